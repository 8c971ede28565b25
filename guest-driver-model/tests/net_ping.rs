//! An owner's pings, and a peer that gives them back, or does not.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::cell::Cell;
use std::thread;
use std::time::{Duration, Instant};

use guest_driver_model::net::{OwnerConfig, PacketBurst};
use guest_driver_model::owner::Kicks;
use guest_driver_model::programs::ping::{Ping, Pinged};
use guest_driver_model::programs::quantity::Rate;
use guest_driver_model::programs::waiting::Wait;
use net_support::{Joined, join};

#[derive(Default)]
struct Counted(Cell<usize>);

impl Kicks for Counted {
    fn kick(&self, _: u16) {
        self.0.set(self.0.get() + 1);
    }
}

struct Link {
    joined: Joined,
    ping: Ping,
    kicks: Counted,
    burst: PacketBurst,
}

impl Link {
    fn new(rate: Option<f64>) -> Self {
        let rate = rate.and_then(Rate::new);
        let ping = Ping::new(64, rate, Wait::Interrupt).unwrap();
        Self {
            joined: join(OwnerConfig::default()),
            ping,
            kicks: Counted::default(),
            burst: PacketBurst::default(),
        }
    }

    fn round(&mut self) -> Pinged {
        self.ping.round(&mut self.joined.owner, &self.kicks, &mut self.burst, true).unwrap()
    }

    /// The peer takes what there is, and sends it back after a change.
    fn echo(&mut self, change: impl Fn(&mut Vec<u8>)) -> usize {
        let mut burst = PacketBurst::default();
        self.joined.peer.rx_burst(0, &mut burst, 64).unwrap();
        let frames: Vec<Vec<u8>> = burst
            .frames()
            .map(|frame| {
                let mut frame = frame.to_vec();
                change(&mut frame);
                frame
            })
            .collect();
        self.joined.peer.tx_burst(0, frames.iter().map(Vec::as_slice)).unwrap()
    }
}

#[test]
fn one_packet_is_on_its_way_at_a_time_and_each_that_comes_back_is_a_trip() {
    let mut link = Link::new(None);
    let begin = Instant::now();
    let mut trips = 0;
    while trips < 100 || begin.elapsed() < Duration::from_millis(200) {
        let sent = Pinged { sent: 1, sent_bytes: 64, ..Pinged::default() };
        assert_eq!(link.round(), sent);
        assert_eq!(link.round(), Pinged::default());
        assert_eq!(link.echo(|_| ()), 1);
        assert_eq!(link.round(), Pinged { received: 1, received_bytes: 64, ..Pinged::default() });
        trips += 1;
    }
    let found = link.ping.round_trips();
    assert!(
        found.count > 0 && found.count < trips,
        "{} of {trips}: the first 100 ms do not count",
        found.count
    );
    assert_eq!((found.lost, found.corrupted), (0, 0));
    let order = [found.min_ns, found.p50_ns, found.p90_ns, found.p99_ns, found.p99_9_ns, found.p99_99_ns];
    assert!(found.min_ns > 0 && order.is_sorted() && found.p99_99_ns <= found.max_ns, "{found:?}");
    assert_eq!(found.histogram.iter().map(|(_, count)| count).sum::<u64>(), found.count);
    assert!(found.histogram.last().unwrap().0 >= found.max_ns);
    assert!(link.kicks.0.get() > 0, "the peer wants kicks");
}

#[test]
fn an_echo_with_a_wrong_byte_or_length_is_corrupted_and_no_trip() {
    let mut link = Link::new(None);
    thread::sleep(Duration::from_millis(1));
    link.round();
    thread::sleep(Duration::from_millis(110));
    let changes: [fn(&mut Vec<u8>); 3] =
        [|frame| frame[40] ^= 1, |frame| frame.truncate(63), |frame| frame[14] ^= 1];
    link.echo(|_| ());
    link.round();
    for change in changes {
        link.round();
        link.echo(change);
        assert_eq!(link.round().received, 1);
    }
    assert_eq!((link.ping.round_trips().corrupted, link.ping.round_trips().count), (3, 0));
}

#[test]
fn an_echo_that_comes_too_late_is_lost_and_nothing_else() {
    let mut link = Link::new(None);
    link.round();
    thread::sleep(Duration::from_millis(1100));
    link.round();
    assert_eq!(link.ping.round_trips().lost, 1);
    // The next one is sent, and the late one comes first.
    assert_eq!(link.round().sent, 1);
    assert_eq!(link.echo(|_| ()), 2);
    assert_eq!(link.round().received, 1);
    assert_eq!(link.round().received, 1);
    let found = link.ping.round_trips();
    assert_eq!((found.lost, found.corrupted, found.count), (1, 0, 1));
}

#[test]
fn a_rate_is_not_exceeded() {
    let mut link = Link::new(Some(1000.0));
    let begin = Instant::now();
    let mut sent = 0;
    while begin.elapsed() < Duration::from_millis(50) {
        sent += link.round().sent;
        link.echo(|_| ());
    }
    assert!((2..=51).contains(&sent), "{sent}");
}
