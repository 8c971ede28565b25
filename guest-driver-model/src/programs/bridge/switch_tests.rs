#![allow(clippy::panic, clippy::unwrap_used)]
use std::collections::VecDeque;

use super::*;
use crate::programs::bridge::counters::Dropped;

const LIMITS: Limits = Limits { ageing: Duration::from_secs(300), stations: 100 };
const ALL: Mac = [0xff; 6];

fn station(number: u8) -> Mac {
    [0x02, 0, 0, 0, 0, number]
}

fn head(to: Mac, from: Mac) -> [u8; HEAD] {
    let mut head = [8, 0].repeat(7);
    head[..6].copy_from_slice(&to);
    head[6..12].copy_from_slice(&from);
    *head.first_chunk().unwrap()
}

/// A switch of ports that are all up.
fn switch(ports: PortId, flood_limit: u32) -> Switch {
    let mut switch = Switch::new(LIMITS, flood_limit, ports.into());
    (0..ports).for_each(|port| switch.set_live(port, true));
    switch
}

fn dropped(switch: &Switch, port: PortId) -> Dropped {
    switch.port(port).0.dropped
}

#[test]
fn frames_go_to_all_until_their_station_is_heard_and_then_to_its_port() {
    let mut switch = switch(3, 1000);
    let (one, two) = (station(1), station(2));
    assert_eq!(switch.decide(0, &head(two, one), 60), Verdict::Flood);
    assert_eq!(switch.others(0), 0b110);
    assert_eq!(switch.decide(2, &head(one, two), 60), Verdict::To(0));
    assert_eq!(switch.decide(0, &head(two, one), 60), Verdict::To(2));
    assert_eq!(
        switch.decide(0, &head(two, one), 60),
        Verdict::To(2),
        "the same once more, by what is remembered"
    );
    for group in [ALL, [0x01, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1]] {
        assert_eq!(switch.decide(0, &head(group, one), 60), Verdict::Flood);
    }
    // Both are behind the same port: they have heard each other.
    assert_eq!(switch.decide(0, &head(one, station(3)), 60), Verdict::Drop);
    let (counters, up, stations) = switch.port(0);
    assert_eq!((counters.rx_packets, counters.rx_bytes, counters.flooded, counters.filtered), (7, 420, 4, 1));
    assert_eq!((counters.learned, counters.moved, counters.dropped.sum(), up, stations), (2, 0, 0, true, 2));
}

/// What is remembered of the frame before is not what the table said then, but what it says now.
#[test]
fn a_station_that_moves_in_the_midst_of_a_burst_is_followed() {
    let mut switch = switch(3, 1000);
    switch.decide(2, &head(ALL, station(2)), 60);
    switch.begin(Instant::now());
    assert_eq!(switch.decide(0, &head(station(2), station(1)), 60), Verdict::To(2));
    // It is here.
    assert_eq!(switch.decide(0, &head(ALL, station(2)), 60), Verdict::Flood);
    assert_eq!(switch.decide(0, &head(station(2), station(1)), 60), Verdict::Drop);
    assert_eq!(switch.port(0).0.filtered, 1);
}

#[test]
fn what_is_no_frame_of_a_station_is_not_learned_and_goes_nowhere() {
    let mut switch = switch(2, 1000);
    let good = head(ALL, station(1));
    assert_eq!(switch.decide(0, &good, HEAD - 1), Verdict::Drop);
    for source in [ALL, [0x01, 0, 0, 0, 0, 1], [0; 6]] {
        assert_eq!(switch.decide(0, &head(ALL, source), 60), Verdict::Drop);
        assert_eq!(
            switch.decide(1, &head(source, station(9)), 60),
            Verdict::Flood,
            "to nobody who was learned"
        );
    }
    assert_eq!(dropped(&switch, 0), Dropped { bad: 4, ..Dropped::default() });
    for last in 0..16 {
        assert_eq!(switch.decide(0, &head([0x01, 0x80, 0xc2, 0, 0, last], station(1)), 60), Verdict::Drop);
    }
    assert_eq!(dropped(&switch, 0).reserved, 16);
    assert_eq!(switch.port(0).2, 0, "nothing was learned");
}

#[test]
fn a_link_that_goes_takes_its_stations_with_it() {
    let mut switch = switch(3, 1000);
    switch.decide(1, &head(ALL, station(2)), 60);
    assert_eq!(switch.decide(0, &head(station(2), station(1)), 60), Verdict::To(1));
    switch.set_live(1, false);
    switch.begin(Instant::now());
    assert_eq!(switch.decide(0, &head(station(2), station(1)), 60), Verdict::Flood);
    assert_eq!(switch.others(0), 0b100);
    switch.set_live(2, false);
    assert_eq!(switch.decide(0, &head(ALL, station(1)), 60), Verdict::Drop);
    assert_eq!(dropped(&switch, 0).no_link, 1);
    switch.set_live(1, true);
    assert_eq!(switch.decide(0, &head(station(2), station(1)), 60), Verdict::Flood);
}

#[test]
fn a_port_that_floods_is_cut_off_and_told_of_once_and_its_other_frames_go_on() {
    let mut switch = switch(3, 10);
    switch.decide(1, &head(ALL, station(2)), 60);
    let flooded =
        (0..1000).filter(|_| switch.decide(0, &head(ALL, station(1)), 60) == Verdict::Flood).count();
    assert_eq!(flooded, 10);
    assert_eq!(dropped(&switch, 0).storm, 990);
    assert_eq!(switch.events().collect::<Vec<_>>(), [Event::Storm(0)]);
    assert_eq!(switch.decide(0, &head(station(2), station(1)), 60), Verdict::To(1));
    assert_eq!(
        switch.decide(2, &head(ALL, station(3)), 60),
        Verdict::Flood,
        "another port has its own limit"
    );
    switch.begin(Instant::now() + Duration::from_secs(2));
    assert_eq!(switch.decide(0, &head(ALL, station(1)), 60), Verdict::Flood);
}

/// A broadcast of a station behind port 0, with a cable between ports 1 and 2: what goes out by one of them
/// comes back by the other. Returns how many copies another port has got when nothing goes round any more.
fn go_round(switch: &mut Switch, first: &[PortId]) -> u32 {
    let mut circulating: VecDeque<_> = first.iter().copied().collect();
    let (mut copies, mut steps) = (0, 0);
    while let Some(from) = circulating.pop_front() {
        if switch.decide(from, &head(ALL, station(1)), 60) == Verdict::Flood {
            let others = switch.others(from);
            copies += u32::from(others & 0b1000 != 0);
            circulating
                .extend([(1, 2), (2, 1)].iter().filter(|(out, _)| others >> out & 1 == 1).map(|(_, at)| *at));
        }
        steps += 1;
        assert!(steps < 10_000, "it goes round for ever");
    }
    copies
}

#[test]
fn a_frame_that_goes_round_is_stopped_and_its_station_stays_reachable() {
    let mut switch = switch(4, 1_000_000);
    let copies = go_round(&mut switch, &[0]);
    assert!(copies <= 6, "{copies}");
    let events: Vec<_> = switch.events().collect();
    let [Event::Flaps { station: flaps, at: 0, other: 1 | 2 }] = events[..] else { panic!("{events:?}") };
    assert_eq!(flaps, station(1));
    assert_eq!(switch.decide(3, &head(station(1), station(4)), 60), Verdict::To(0));
    assert_eq!(switch.decide(0, &head(station(4), station(1)), 60), Verdict::To(3));
    // The next broadcast comes back as well, and ends there.
    assert_eq!(switch.decide(0, &head(ALL, station(1)), 60), Verdict::Flood);
    for from in [1, 2] {
        assert_eq!(switch.decide(from, &head(ALL, station(1)), 60), Verdict::Drop);
    }
    assert!(dropped(&switch, 1).looped + dropped(&switch, 2).looped >= 2);
    assert_eq!(dropped(&switch, 1).storm + dropped(&switch, 2).storm, 0);
}

/// In one direction only it looks as if it had moved, and had much to say.
#[test]
fn a_frame_that_goes_round_one_way_is_stopped_as_well() {
    let mut switch = switch(4, 1_000_000);
    switch.decide(0, &head(ALL, station(1)), 60);
    let copies = go_round(&mut switch, &[1]);
    assert!(copies <= 17, "{copies}");
    assert_eq!(switch.events().collect::<Vec<_>>(), [Event::Flaps { station: station(1), at: 0, other: 1 }]);
    assert_eq!((dropped(&switch, 1).looped, switch.port(0).2), (1, 1));
}

/// What nothing can be told of ends at the limit.
#[test]
fn a_frame_of_a_station_that_cannot_be_learned_goes_round_until_the_limit() {
    let mut switch = Switch::new(Limits { stations: 1, ..LIMITS }, 500, 4);
    (0..4).for_each(|port| switch.set_live(port, true));
    switch.decide(1, &head(ALL, station(9)), 60);
    assert_eq!(go_round(&mut switch, &[1]), 499);
    assert_eq!(switch.events().collect::<Vec<_>>(), [Event::Full(1), Event::Storm(1)]);
}

#[test]
fn who_makes_up_addresses_is_told_of_once_and_keeps_nobody_from_being_known() {
    let limits = Limits { stations: 16, ..LIMITS };
    let mut switch = Switch::new(limits, 1_000_000, 2);
    [0, 1].into_iter().for_each(|port| switch.set_live(port, true));
    switch.decide(1, &head(ALL, station(1)), 60);
    for number in 0..10_000_u16 {
        let [high, low] = number.to_be_bytes();
        switch.decide(0, &head(ALL, [0x06, 0, 0, 0, high, low]), 60);
    }
    let (counters, _, stations) = switch.port(0);
    assert_eq!((counters.learned, counters.not_learned, stations), (16, 9984, 16));
    assert_eq!(switch.events().collect::<Vec<_>>(), [Event::Full(0)]);
    assert_eq!(switch.decide(0, &head(station(1), [0x06, 0, 0, 0, 0, 1]), 60), Verdict::To(1));
}
