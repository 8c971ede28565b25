//! `owner --mode ping`: how long one packet takes to the peer and back, as a histogram. One packet
//! is on its way at a time; the next is sent when it has come back.
//!
//! What is measured goes from before the packet is written into its buffer until its echo has been
//! copied out of its own, and contains one reading of the clock.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::ProgramError;
use super::quantity::Rate;
use super::waiting::Wait;
use crate::net::owner::BufferMapping;
use crate::net::{OwnerPort, PacketBurst, receive_vring, transmit_vring};
use crate::owner::Kicks;
use crate::ring::DriverFault;

/// Looks of a polling program for the echo before it sees to other things.
const LOOKS: u32 = 256;
/// Trips of packets sent so early are not recorded: caches fill, and processors speed up.
const WARM_UP: Duration = Duration::from_millis(100);
/// An echo that has not come after this time is lost.
const LOST: Duration = Duration::from_secs(1);
/// The longest trip that is told apart from longer ones, nanoseconds, and to how many digits.
const LONGEST: u64 = 10_000_000_000;
const DIGITS: u8 = 3;
/// Of the printed histogram: the first bucket ends here, nanoseconds; each other so much later.
const FIRST_BUCKET: u64 = 64;
const NEXT_BUCKET: f64 = 1.25;
/// Readings of the clock that its cost is the mean of.
const READINGS: u32 = 10_000;
/// Where the number of a packet is: behind its Ethernet header.
const NUMBER: std::ops::Range<usize> = 14..22;
/// Addresses that are nobody's, and IEEE 802's local experimental ethertype 1.
const ETHERNET: [u8; 14] = [2, 0x56, 0x50, 0, 0, 0x0b, 2, 0x56, 0x50, 0, 0, 0x0a, 0x88, 0xb5];

/// What pings have found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundTrips {
    /// Trips that are in the histogram.
    pub count: u64,
    /// Echoes that were not what was sent.
    pub corrupted: u64,
    /// Echoes that did not come within a second.
    pub lost: u64,
    /// Mean cost of one reading of the clock, which each trip contains, nanoseconds.
    pub clock_ns: f64,
    /// The fastest trip, nanoseconds.
    pub min_ns: u64,
    /// The median.
    pub p50_ns: u64,
    /// 90 of 100 are no longer than this.
    pub p90_ns: u64,
    /// 99 of 100.
    pub p99_ns: u64,
    /// 999 of 1,000.
    pub p99_9_ns: u64,
    /// 9,999 of 10,000.
    pub p99_99_ns: u64,
    /// The slowest.
    pub max_ns: u64,
    /// Trips that took at most so many nanoseconds, and more than the bucket before.
    pub histogram: Vec<(u64, u64)>,
}

impl RoundTrips {
    /// For people.
    pub fn text(&self) -> String {
        let Self { count, corrupted, lost, clock_ns, min_ns, p50_ns, p90_ns, p99_ns, .. } = self;
        let Self { p99_9_ns, p99_99_ns, max_ns, .. } = self;
        format!(
            "round trips: {count}, lost {lost}, corrupted {corrupted}; ns: min {min_ns}, median {p50_ns}, \
             90 % {p90_ns}, 99 % {p99_ns}, 99.9 % {p99_9_ns}, 99.99 % {p99_99_ns}, max {max_ns} (of which the \
             clock {clock_ns:.0})"
        )
    }
}

/// The pings of an owner, over its first queue pair.
pub struct Ping {
    frame: Vec<u8>,
    /// When the packet that is on its way was sent.
    sent: Option<Instant>,
    /// When the first packet was sent.
    begin: Option<Instant>,
    /// The packet that is on its way is recorded.
    warm: bool,
    looks: u32,
    /// Between the beginnings of two trips, if it is given.
    interval: Option<Duration>,
    due: Option<Instant>,
    number: u64,
    trips: Histogram<u64>,
    corrupted: u64,
    lost: u64,
}

/// What one round of pings has moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pinged {
    /// Packets sent.
    pub sent: usize,
    /// Their bytes.
    pub sent_bytes: usize,
    /// Packets received.
    pub received: usize,
    /// Their bytes.
    pub received_bytes: usize,
}

impl Ping {
    /// Packets of so many bytes, so many a second at most.
    ///
    /// # Errors
    /// None that is known: the histogram takes its bounds.
    pub fn new(size: usize, rate: Option<Rate>, wait: Wait) -> Result<Self, ProgramError> {
        let trips = Histogram::new_with_bounds(1, LONGEST, DIGITS).map_err(|error| ProgramError::System {
            what: "the histogram",
            source: std::io::Error::other(error),
        })?;
        let mut frame = ETHERNET.to_vec();
        frame.extend((frame.len()..size.max(NUMBER.end)).map(|at| at as u8));
        Ok(Self {
            frame,
            sent: None,
            begin: None,
            warm: false,
            // Who sleeps until notified has to come to that.
            looks: if wait == Wait::Poll { LOOKS } else { 1 },
            interval: rate.map(Rate::interval),
            due: None,
            number: 0,
            trips,
            corrupted: 0,
            lost: 0,
        })
    }

    /// Sends a packet if none is on its way and `send` says so, and looks for its echo. The port
    /// asks for no other packets than these.
    ///
    /// # Errors
    /// If the device breaks a ring: then nothing is on its way any more.
    pub fn round<M: BufferMapping>(
        &mut self,
        port: &mut OwnerPort<M>,
        kicks: &impl Kicks,
        received: &mut PacketBurst,
        send: bool,
    ) -> Result<Pinged, DriverFault> {
        let result = self.try_round(port, kicks, received, send);
        if result.is_err() {
            self.sent = None;
        }
        result
    }

    fn try_round<M: BufferMapping>(
        &mut self,
        port: &mut OwnerPort<M>,
        kicks: &impl Kicks,
        received: &mut PacketBurst,
        send: bool,
    ) -> Result<Pinged, DriverFault> {
        let mut pinged = Pinged::default();
        if self.sent.is_none() && send && self.is_due() {
            self.number += 1;
            if let Some(place) = self.frame.get_mut(NUMBER) {
                place.copy_from_slice(&self.number.to_le_bytes());
            }
            let now = Instant::now();
            let begin = *self.begin.get_or_insert(now);
            self.warm = now.duration_since(begin) >= WARM_UP;
            pinged.sent = port.tx_burst(0, [self.frame.as_slice()])?;
            pinged.sent_bytes = pinged.sent * self.frame.len();
            if pinged.sent > 0 && port.needs_kick(transmit_vring(0)) {
                kicks.kick(transmit_vring(0));
            }
            self.sent = (pinged.sent > 0).then_some(now);
        }
        let Some(sent) = self.sent else { return Ok(pinged) };
        for _ in 0..self.looks {
            received.clear();
            if port.rx_burst(0, received, 1)? > 0 {
                let trip = sent.elapsed();
                if port.needs_kick(receive_vring(0)) {
                    kicks.kick(receive_vring(0));
                }
                self.came_back(trip, received, &mut pinged);
                return Ok(pinged);
            }
            std::hint::spin_loop();
        }
        if sent.elapsed() >= LOST {
            self.lost += 1;
            self.sent = None;
        }
        Ok(pinged)
    }

    fn came_back(&mut self, trip: Duration, received: &PacketBurst, pinged: &mut Pinged) {
        for frame in received.frames() {
            pinged.received += 1;
            pinged.received_bytes += frame.len();
            if frame == self.frame {
                self.sent = None;
                if self.warm {
                    // What is longer than `LONGEST` counts as that.
                    self.trips.saturating_record(u64::try_from(trip.as_nanos()).unwrap_or(u64::MAX));
                }
            } else if !self.is_late(frame) {
                self.sent = None;
                self.corrupted += 1;
            }
        }
    }

    /// Whether it is the echo of a packet that was given up, and not of the one on its way.
    fn is_late(&self, frame: &[u8]) -> bool {
        let number = frame.get(NUMBER).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        self.lost > 0 && number.is_some_and(|number| number < self.number)
    }

    fn is_due(&mut self) -> bool {
        let Some(interval) = self.interval else { return true };
        let now = Instant::now();
        let due = self.due.is_none_or(|due| now >= due);
        if due {
            // A trip that took longer than the interval delays the next one; none is made up for.
            self.due = Some(now + interval);
        }
        due
    }

    /// What was found until now.
    pub fn round_trips(&self) -> RoundTrips {
        let at = |percent: f64| self.trips.value_at_percentile(percent);
        let buckets = self.trips.iter_log(FIRST_BUCKET, NEXT_BUCKET);
        let buckets = buckets.map(|bucket| (bucket.value_iterated_to(), bucket.count_since_last_iteration()));
        RoundTrips {
            count: self.trips.len(),
            corrupted: self.corrupted,
            lost: self.lost,
            clock_ns: clock(),
            min_ns: self.trips.min(),
            p50_ns: at(50.0),
            p90_ns: at(90.0),
            p99_ns: at(99.0),
            p99_9_ns: at(99.9),
            p99_99_ns: at(99.99),
            max_ns: self.trips.max(),
            histogram: buckets.filter(|(_, count)| *count > 0).collect(),
        }
    }
}

/// Mean cost of one reading of the clock, nanoseconds.
fn clock() -> f64 {
    let begin = Instant::now();
    for _ in 0..READINGS {
        std::hint::black_box(Instant::now());
    }
    begin.elapsed().as_nanos() as f64 / f64::from(READINGS)
}
