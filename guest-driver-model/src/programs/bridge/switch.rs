//! Where each frame goes (IEEE 802.1Q, 8.6): to the port behind which its station is, or to all others.
//!
//! Owns: the forwarding table, what a port may have flooded, and the counters. Sees addresses only, does no
//! I/O and reads no clock.

use std::time::{Duration, Instant};

use super::counters::PortCounters;
use super::frame::{self, HEAD, Mac};
use super::storm::{Gate, Storm};
use super::table::{Learned, Limits, PortId, Table};

/// The most ports: a bit each.
pub const MAX_PORTS: usize = 64;
/// A port whose share of the table is used up is told of so often.
const TELL: Duration = Duration::from_secs(60);
/// Events that wait to be told.
const EVENTS: usize = 16;

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// To this port.
    To(PortId),
    /// To all others.
    Flood,
    /// Nowhere. It is counted.
    Drop,
}

/// What is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// More was to be flooded than may be.
    Storm(PortId),
    /// A station moves to and fro, and is held at a port.
    Flaps {
        /// Its address.
        station: Mac,
        /// Where it is held.
        at: PortId,
        /// Where it was seen besides.
        other: PortId,
    },
    /// A port's share of the table is used up.
    Full(PortId),
}

#[derive(Debug, Default)]
struct Port {
    counters: PortCounters,
    storm: Storm,
    told_full: Option<Instant>,
}

/// The last frame whose way was found, of this burst.
#[derive(Clone, Copy, Debug)]
struct Last {
    addresses: [u8; 12],
    to: PortId,
    changes: u64,
}

/// All but the packets.
#[derive(Debug)]
pub struct Switch {
    table: Table,
    flood_limit: u32,
    ports: Vec<Port>,
    /// Ports whose link is up, a bit each.
    live: u64,
    last: Option<Last>,
    now: Instant,
    events: Vec<Event>,
}

impl Switch {
    /// A switch of so many ports, none of which is up.
    pub fn new(limits: Limits, flood_limit: u32, ports: usize) -> Self {
        let ports: Vec<_> = std::iter::repeat_with(Port::default).take(ports.min(MAX_PORTS)).collect();
        Self {
            table: Table::new(limits, ports.len()),
            flood_limit,
            ports,
            live: 0,
            last: None,
            now: Instant::now(),
            events: Vec::with_capacity(EVENTS),
        }
    }

    /// The link of a port is up, or down: then its stations are forgotten.
    pub fn set_live(&mut self, port: PortId, is_live: bool) {
        let bit = bit(port);
        if self.live & bit != 0 && !is_live {
            self.table.forget(port);
        }
        self.live = if is_live { self.live | bit } else { self.live & !bit };
    }

    /// The ports to which a frame from this one is flooded, a bit each.
    pub fn others(&self, from: PortId) -> u64 {
        self.live & !bit(from)
    }

    /// A burst begins, from one port.
    pub fn begin(&mut self, now: Instant) {
        self.now = now;
        self.last = None;
    }

    /// Where a frame of `len` bytes goes that came from a port, and begins like this.
    #[inline]
    pub fn decide(&mut self, from: PortId, head: &[u8; HEAD], len: usize) -> Verdict {
        let Some(port) = self.ports.get_mut(usize::from(from)) else { return Verdict::Drop };
        port.counters.rx_packets += 1;
        port.counters.rx_bytes += len as u64;
        if let Some(last) = self.last
            && head.first_chunk() == Some(&last.addresses)
            && last.changes == self.table.changes()
            && len >= HEAD
        {
            return Verdict::To(last.to);
        }
        self.find(from, head, len)
    }

    #[inline(never)]
    fn find(&mut self, from: PortId, head: &[u8; HEAD], len: usize) -> Verdict {
        let (Some(port), Some(addresses)) = (self.ports.get_mut(usize::from(from)), head.first_chunk::<12>())
        else {
            return Verdict::Drop;
        };
        let &[d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5] = addresses;
        let (destination, station) = ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]);
        let counters = &mut port.counters;
        if len < HEAD || !frame::is_station(&station) {
            counters.dropped.bad += 1;
            return Verdict::Drop;
        }
        if frame::is_reserved(&destination) {
            counters.dropped.reserved += 1;
            return Verdict::Drop;
        }
        let now = self.now;
        let learned = self.table.learn(station, from, now);
        let mut is_elsewhere = false;
        match learned {
            Learned::Known => {}
            Learned::New => counters.learned += 1,
            Learned::Moved(_) => {
                counters.learned += 1;
                counters.moved += 1;
            }
            Learned::Flaps { at, other } => {
                is_elsewhere = at != from;
                tell(&mut self.events, Event::Flaps { station, at, other });
            }
            Learned::Held(_) => is_elsewhere = true,
            Learned::Full => {
                counters.not_learned += 1;
                if port.told_full.is_none_or(|told| now.saturating_duration_since(told) >= TELL) {
                    port.told_full = Some(now);
                    tell(&mut self.events, Event::Full(from));
                }
            }
        }
        let known = if frame::is_group(&destination) { None } else { self.table.port_of(&destination, now) };
        match known {
            Some(to) if to == from => {
                counters.filtered += 1;
                return Verdict::Drop;
            }
            Some(to) if self.live & bit(to) == 0 => {
                counters.dropped.no_link += 1;
                return Verdict::Drop;
            }
            Some(to) => {
                if matches!(learned, Learned::Known | Learned::New | Learned::Moved(_)) {
                    self.last = Some(Last { addresses: *addresses, to, changes: self.table.changes() });
                }
                return Verdict::To(to);
            }
            None => {}
        }
        if !is_elsewhere && let Some((at, other)) = self.table.floods(&station, now) {
            is_elsewhere = true;
            tell(&mut self.events, Event::Flaps { station, at, other });
        }
        if is_elsewhere {
            counters.dropped.looped += 1;
            return Verdict::Drop;
        }
        if self.live & !bit(from) == 0 {
            counters.dropped.no_link += 1;
            return Verdict::Drop;
        }
        match port.storm.pass(self.flood_limit, now) {
            Gate::Open => {
                counters.flooded += 1;
                return Verdict::Flood;
            }
            Gate::Closes => tell(&mut self.events, Event::Storm(from)),
            Gate::Closed => {}
        }
        counters.dropped.storm += 1;
        Verdict::Drop
    }

    /// What a port has counted, to count on.
    pub fn counters(&mut self, port: PortId) -> Option<&mut PortCounters> {
        self.ports.get_mut(usize::from(port)).map(|port| &mut port.counters)
    }

    /// What a port has counted, whether its link is up, and stations behind it.
    pub fn port(&self, port: PortId) -> (PortCounters, bool, usize) {
        let counters = self.ports.get(usize::from(port)).map(|port| port.counters).unwrap_or_default();
        (counters, self.live & bit(port) != 0, self.table.stations(port))
    }

    /// Packets that came by all ports.
    pub fn received(&self) -> u64 {
        self.ports.iter().map(|port| port.counters.rx_packets).sum()
    }

    /// Once in a while: forgets the stations that have been silent for too long.
    pub fn sweep(&mut self, now: Instant) {
        self.table.sweep(now);
    }

    /// What is to be told since this was last asked.
    pub fn events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }
}

/// The bit of a port; none of what is no port.
fn bit(port: PortId) -> u64 {
    1_u64.checked_shl(port.into()).unwrap_or(0)
}

fn tell(events: &mut Vec<Event>, event: Event) {
    if events.len() < EVENTS {
        events.push(event);
    }
}

#[cfg(test)]
#[path = "switch_tests.rs"]
mod tests;
