#![allow(clippy::unwrap_used)]
use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const AGEING: Duration = Duration::from_secs(300);
const LIMITS: Limits = Limits { ageing: AGEING, stations: 4 };

fn station(number: u8) -> Mac {
    [0x02, 0, 0, 0, 0, number]
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn a_station_is_known_until_it_has_been_silent_for_too_long() {
    let (start, mut table) = (Instant::now(), Table::new(LIMITS, 2));
    assert_eq!(table.port_of(&station(1), start), None);
    assert_eq!(table.learn(station(1), 1, start), Learned::New);
    assert_eq!(table.learn(station(1), 1, start + seconds(200)), Learned::Known);
    assert_eq!(table.port_of(&station(1), start + seconds(499)), Some(1));
    assert_eq!(table.port_of(&station(1), start + seconds(500)), None);
    // It is there, and does not count.
    assert_eq!(table.stations(1), 1);
    assert_eq!(table.learn(station(1), 0, start + seconds(500)), Learned::New);
    assert_eq!((table.stations(0), table.stations(1)), (1, 0));
    assert_eq!(table.sweep(start + seconds(799)), 0);
    assert_eq!(table.sweep(start + seconds(800)), 1);
    assert_eq!(table.stations(0), 0);
}

#[test]
fn a_station_that_moves_is_followed_at_once_and_its_share_goes_with_it() {
    let (start, mut table) = (Instant::now(), Table::new(LIMITS, 3));
    table.learn(station(1), 0, start);
    let before = table.changes();
    assert_eq!(table.learn(station(1), 2, start), Learned::Moved(0));
    assert_ne!(table.changes(), before);
    assert_eq!(table.port_of(&station(1), start), Some(2));
    assert_eq!((table.stations(0), table.stations(2)), (0, 1));
    let before = table.changes();
    assert_eq!(table.learn(station(1), 2, start), Learned::Known);
    assert_eq!(table.changes(), before, "no other answer");
}

/// A station that has moved from a port whose link goes down then has nowhere to be put back to.
#[test]
fn nobody_is_put_back_to_a_port_that_is_down() {
    let start = Instant::now();
    let flood = |table: &mut Table| (0..20).find_map(|_| table.floods(&station(1), start));
    let moved = || {
        let mut table = Table::new(LIMITS, 3);
        table.learn(station(1), 1, start);
        assert_eq!(table.learn(station(1), 2, start), Learned::Moved(1));
        table
    };
    assert_eq!(flood(&mut moved()), Some((1, 2)), "as long as it is up");
    let mut table = moved();
    assert_eq!(table.forget(1), 0);
    assert_eq!((flood(&mut table), table.port_of(&station(1), start)), (None, Some(2)));
    // Nor if it goes on to move.
    let mut table = moved();
    table.forget(1);
    let learned = (0..FLAPS).map(|n| table.learn(station(1), if n % 2 == 0 { 0 } else { 2 }, start));
    assert_eq!(learned.last(), Some(Learned::Flaps { at: 2, other: 0 }));
    assert_eq!((table.stations(0), table.stations(1), table.stations(2)), (0, 0, 1));
}

/// Who makes up addresses pushes out nobody else's, and takes no more room than its share.
#[test]
fn a_port_that_has_used_up_its_share_learns_no_more_until_entries_age() {
    let (start, mut table) = (Instant::now(), Table::new(LIMITS, 2));
    table.learn(station(200), 1, start);
    for number in 0..4 {
        assert_eq!(table.learn(station(number), 0, start + seconds(u64::from(number))), Learned::New);
    }
    for number in 4..100 {
        assert_eq!(table.learn(station(number), 0, start + seconds(10)), Learned::Full, "{number}");
    }
    // Nor can it take one over.
    assert_eq!(table.learn(station(200), 0, start + seconds(10)), Learned::Full);
    assert_eq!(table.port_of(&station(200), start + seconds(10)), Some(1));
    assert_eq!((table.stations(0), table.stations(1), table.entries.len()), (4, 1, 5));
    assert_eq!(table.learn(station(2), 0, start + seconds(10)), Learned::Known);
    table.sweep(start + seconds(301));
    assert_eq!(table.learn(station(50), 0, start + seconds(301)), Learned::New);
}

#[test]
fn a_station_that_moves_to_and_fro_is_put_back_and_held() {
    let (start, mut table) = (Instant::now(), Table::new(LIMITS, 3));
    let later = |milliseconds: u64| start + Duration::from_millis(milliseconds);
    table.learn(station(1), 0, start);
    // Its frames come back by two others.
    assert_eq!(table.learn(station(1), 1, later(10)), Learned::Moved(0));
    assert_eq!(table.learn(station(1), 2, later(20)), Learned::Moved(1));
    assert_eq!(table.learn(station(1), 1, later(30)), Learned::Moved(2));
    assert_eq!(table.learn(station(1), 2, later(40)), Learned::Moved(1));
    assert_eq!(table.learn(station(1), 1, later(50)), Learned::Flaps { at: 0, other: 1 });
    for at in (60..5_000).step_by(100) {
        assert_eq!(table.learn(station(1), 2, later(at)), Learned::Held(0));
        assert_eq!(table.learn(station(1), 0, later(at)), Learned::Known);
        assert_eq!(table.port_of(&station(1), later(at)), Some(0));
    }
    assert_eq!([0, 1, 2].map(|port| table.stations(port)), [1, 0, 0]);
    // Held no longer than that: it may have moved in the end.
    assert_eq!(table.learn(station(1), 2, later(5_050)), Learned::Moved(0));
    assert_eq!(table.port_of(&station(1), later(5_050)), Some(2));
}

#[test]
fn a_station_that_moves_now_and_then_is_not_held() {
    let (start, mut table) = (Instant::now(), Table::new(LIMITS, 2));
    table.learn(station(1), 0, start);
    for step in 1..100 {
        let (port, from) = ((step % 2) as PortId, ((step + 1) % 2) as PortId);
        let now = start + Duration::from_millis(300 * step);
        assert_eq!(table.learn(station(1), port, now), Learned::Moved(from), "{step}");
    }
}

#[test]
fn what_was_behind_a_port_is_forgotten_with_it() {
    let (start, mut table) = (Instant::now(), Table::new(LIMITS, 2));
    for number in 0..4 {
        table.learn(station(number), PortId::from(number % 2), start);
    }
    assert_eq!(table.forget(1), 2);
    let known = (0..4).map(|number| table.port_of(&station(number), start));
    assert_eq!(known.collect::<Vec<_>>(), [Some(0), None, Some(0), None]);
    assert_eq!((table.stations(0), table.stations(1)), (2, 0));
}

#[test]
fn a_station_that_has_moved_may_send_to_all_only_a_little_at_first_unless_it_has_moved_indeed() {
    let (start, mut table) = (Instant::now(), Table::new(LIMITS, 2));
    let later = |milliseconds: u64| start + Duration::from_millis(milliseconds);
    let flood = |table: &mut Table, milliseconds: u64| {
        table.learn(station(1), 1, later(milliseconds));
        table.floods(&station(1), later(milliseconds))
    };
    table.learn(station(1), 0, start);
    assert!((0..100).all(|_| table.floods(&station(1), start).is_none()), "where it has been all along");
    assert!((0..16).all(|at| flood(&mut table, at).is_none()));
    assert_eq!(flood(&mut table, 20), Some((0, 1)));
    assert_eq!(table.learn(station(1), 1, later(4_000)), Learned::Held(0));
    // It was not heard there: so it is not there any more.
    assert!((0..500).all(|at| flood(&mut table, 5_100 + at).is_none()));
    assert_eq!(table.port_of(&station(1), later(6_000)), Some(1));
    // Nor is one held that has moved some time ago.
    assert!((0..500).all(|at| flood(&mut table, 20_000 + at).is_none()));
    // One that is heard is held again and again.
    assert_eq!(table.learn(station(2), 0, start), Learned::New);
    for round in 0..3 {
        let now = later(round * 6_000);
        table.learn(station(2), 0, now);
        assert_eq!(table.learn(station(2), 1, now), Learned::Moved(0), "{round}");
        let held = (0..17).filter_map(|_| table.floods(&station(2), now)).count();
        assert_eq!(held, 1, "{round}");
        assert_eq!(table.learn(station(2), 0, now), Learned::Known);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Flood(u8),
    Learn(u8, PortId),
    Forget(PortId),
    Sweep,
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..12_u8, 0..3_u8).prop_map(|(number, port)| Step::Learn(number, port)),
        1 => (0..3_u8).prop_map(Step::Forget),
        1 => Just(Step::Sweep),
        2 => (0..12_u8).prop_map(Step::Flood),
        // None, some moves, and more than a station's age.
        4 => prop_oneof![Just(1_u64), Just(400), Just(6_000), 100_000..400_000_u64].prop_map(Step::Wait),
    ]
}

proptest! {
    /// What is known is the port that a station was last heard by, if it could be learned there, was not
    /// held elsewhere, and was heard within the time; shares are never exceeded; and the numbers agree.
    #[test]
    fn the_table_knows_what_a_list_of_all_that_was_heard_says(
        steps in proptest::collection::vec(step(), 1..200)
    ) {
        let (mut now, mut table) = (Instant::now(), Table::new(LIMITS, 3));
        let mut model: BTreeMap<u8, (PortId, Instant)> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Wait(milliseconds) => now += Duration::from_millis(milliseconds),
                Step::Sweep => {
                    table.sweep(now);
                    model.retain(|_, (_, seen)| now - *seen < AGEING);
                }
                Step::Forget(port) => {
                    table.forget(port);
                    model.retain(|_, (at, _)| *at != port);
                }
                Step::Flood(number) => for _ in 0..17 {
                    let known = model.get(&number).copied();
                    if let Some((at, other)) = table.floods(&station(number), now) {
                        prop_assert_eq!(known.map(|(port, _)| port), Some(other));
                        model.insert(number, (at, now));
                    }
                }
                Step::Learn(number, port) => {
                    let known = model.get(&number).copied().filter(|(_, seen)| now - *seen < AGEING);
                    let learned = table.learn(station(number), port, now);
                    let share = |at: PortId| model.values().filter(|(port, _)| *port == at).count();
                    match learned {
                        Learned::Known => prop_assert_eq!(known.map(|(at, _)| at), Some(port)),
                        Learned::New => prop_assert!(known.is_none()),
                        Learned::Moved(from) => prop_assert!(known.map(|(at, _)| at) == Some(from) && from != port),
                        Learned::Flaps { at, other } => prop_assert!(known.is_some() && at != other),
                        Learned::Held(at) => prop_assert!(known.map(|(at, _)| at) == Some(at) && at != port),
                        Learned::Full => prop_assert!(known.map(|(at, _)| at) != Some(port) && share(port) >= 4),
                    }
                    match learned {
                        Learned::Known | Learned::New | Learned::Moved(_) => drop(model.insert(number, (port, now))),
                        Learned::Flaps { at, .. } => drop(model.insert(number, (at, now))),
                        Learned::Full if known.is_none() => drop(model.remove(&number)),
                        Learned::Held(_) | Learned::Full => {}
                    }
                }
            }
            for number in 0..12 {
                let known = model.get(&number).filter(|(_, seen)| now - *seen < AGEING).map(|(port, _)| *port);
                prop_assert_eq!(table.port_of(&station(number), now), known);
            }
            for port in 0..3 {
                let share = model.values().filter(|(at, _)| *at == port).count();
                prop_assert_eq!(table.stations(port), share);
                prop_assert!(share <= LIMITS.stations);
            }
        }
    }
}
