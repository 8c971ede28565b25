//! How many notifications a pair costs that waits by interrupts: counted, on one thread, so
//! that each count is exact.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use guest_driver_model::net::{OwnerConfig, PacketBurst, receive_vring, transmit_vring};
use net_support::{Joined, frame, join};

const BURST: usize = 32;
/// Bursts each way; more than once round the rings' indices.
const BURSTS: usize = 4096;

fn ports(event_idx: bool) -> Joined {
    let mut joined = join(OwnerConfig { event_idx, ..OwnerConfig::default() });
    for vring in [receive_vring(0), transmit_vring(0)] {
        joined.peer.set_kicks(vring, false).unwrap();
        joined.owner.set_calls(vring, false).unwrap();
    }
    joined
}

/// Frames that never end.
fn frames(of: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::repeat_n(of, BURST)
}

/// Both sides always have something to do: nobody sleeps, and nobody is notified.
#[test]
fn a_busy_pair_sends_no_notifications() {
    for event_idx in [false, true] {
        let Joined { mut owner, mut peer, .. } = ports(event_idx);
        let frame = frame(1, 60);
        let mut burst = PacketBurst::default();
        let mut notifications = 0;
        // A burst ahead of each other.
        owner.tx_burst(0, frames(&frame)).unwrap();
        peer.tx_burst(0, frames(&frame)).unwrap();
        for _ in 0..BURSTS {
            assert_eq!(owner.tx_burst(0, frames(&frame)), Ok(BURST));
            notifications += usize::from(owner.needs_kick(transmit_vring(0)));
            burst.clear();
            assert_eq!(peer.rx_burst(0, &mut burst, BURST), Ok(BURST));
            notifications += usize::from(peer.needs_call(transmit_vring(0)));
            assert_eq!(peer.tx_burst(0, frames(&frame)), Ok(BURST));
            notifications += usize::from(peer.needs_call(receive_vring(0)));
            burst.clear();
            assert_eq!(owner.rx_burst(0, &mut burst, BURST), Ok(BURST));
            notifications += usize::from(owner.needs_kick(receive_vring(0)));
        }
        assert_eq!(notifications, 0, "event_idx {event_idx}, of {} packets", 2 * BURST * BURSTS);
    }
}

/// The peer falls asleep each time that it has taken all, and wakes up only when so many more
/// bursts have come: by the flag it is kicked for each of them, by the event index once.
#[test]
fn a_sleeper_is_notified_once_however_slowly_it_wakes_up() {
    const LATE: usize = 4;
    for (event_idx, kicks_a_sleep) in [(false, LATE), (true, 1)] {
        let Joined { mut owner, mut peer, .. } = ports(event_idx);
        let frame = frame(1, 60);
        let mut burst = PacketBurst::default();
        let (mut kicks, mut sleeps, mut late) = (0, 0, 0);
        let mut asleep = false;
        for _ in 0..BURSTS {
            assert_eq!(owner.tx_burst(0, frames(&frame)), Ok(BURST));
            let kicked = owner.needs_kick(transmit_vring(0));
            assert!(asleep || !kicked, "nobody asked for it");
            kicks += usize::from(kicked);
            late += 1;
            if asleep && late < LATE {
                continue;
            }
            assert!(!asleep || kicks > 0, "a sleeper was not woken");
            late = 0;
            peer.set_kicks(transmit_vring(0), false).unwrap();
            burst.clear();
            while peer.rx_burst(0, &mut burst, BURST).unwrap() > 0 {}
            assert!(!peer.needs_call(transmit_vring(0)));
            assert_eq!(peer.set_kicks(transmit_vring(0), true), Ok(false), "nothing is there");
            asleep = true;
            sleeps += 1;
        }
        // The first burst met nobody asleep; the last sleep was not ended.
        assert!(sleeps > BURSTS / LATE - 2);
        let expected = kicks_a_sleep * (sleeps - 1);
        assert!((expected..=expected + LATE).contains(&kicks), "event_idx {event_idx}: {kicks} in {sleeps}");
    }
}

/// The worst case: one packet at a time, and each finds the other side asleep.
#[test]
fn a_lone_packet_costs_one_notification_each_way() {
    for event_idx in [false, true] {
        let Joined { mut owner, mut peer, .. } = ports(event_idx);
        let frame = frame(1, 60);
        let mut burst = PacketBurst::default();
        for _ in 0..1000 {
            assert_eq!(peer.set_kicks(transmit_vring(0), true), Ok(false));
            assert_eq!(owner.set_calls(receive_vring(0), true), Ok(false));
            owner.tx_burst(0, [frame.as_slice()]).unwrap();
            assert!(owner.needs_kick(transmit_vring(0)));
            peer.set_kicks(transmit_vring(0), false).unwrap();
            burst.clear();
            assert_eq!(peer.rx_burst(0, &mut burst, BURST), Ok(1));
            // What was transmitted is no news: nobody waits for the buffer.
            assert!(!peer.needs_call(transmit_vring(0)));
            peer.tx_burst(0, burst.frames()).unwrap();
            assert!(peer.needs_call(receive_vring(0)));
            owner.set_calls(receive_vring(0), false).unwrap();
            burst.clear();
            assert_eq!(owner.rx_burst(0, &mut burst, BURST), Ok(1));
            assert!(!owner.needs_kick(receive_vring(0)));
        }
    }
}

/// The owner sends faster than the peer takes, so that it waits for room again and again. The
/// peer calls when most of the ring is done, not for each of its own bursts.
#[test]
fn a_sender_that_waits_for_room_is_called_once_for_many_bursts() {
    const PACKETS: usize = 100_000;
    for event_idx in [false, true] {
        let Joined { mut owner, mut peer, .. } = ports(event_idx);
        let frame = frame(1, 60);
        let mut burst = PacketBurst::default();
        let (mut sent, mut received, mut calls, mut bursts) = (0, 0, 0, 0);
        let mut asleep = false;
        while received < PACKETS {
            if !asleep {
                match owner.tx_burst(0, frames(&frame)).unwrap() {
                    0 => asleep = !owner.set_calls_for_room(0).unwrap(),
                    done => sent += done,
                }
                continue;
            }
            burst.clear();
            received += peer.rx_burst(0, &mut burst, BURST).unwrap();
            bursts += 1;
            assert!(received <= sent && !burst.is_empty(), "the owner oversleeps");
            if peer.needs_call(transmit_vring(0)) {
                calls += 1;
                owner.set_calls(transmit_vring(0), false).unwrap();
                asleep = false;
            }
        }
        // Of 256 in the ring, 192.
        let expected = if event_idx { bursts / 6 } else { bursts };
        assert!((expected - 1..=expected + 1).contains(&calls), "event_idx {event_idx}: {calls} of {bursts}");
    }
}
