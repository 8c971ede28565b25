//! The forwarding table: behind which port a station is (IEEE 802.1Q, 8.7 and 8.8, by address alone).
//!
//! Owns: the entries, their age, and each port's share of them. No port's stations push out those of another
//! port, whatever addresses its owner makes up: who has used up its share is learned no more until entries age.
//! Does no I/O, and reads no clock.
//!
//! A station that moves is followed at once. One that moves [to and fro](FLAPS), or of which [many frames](FLOODS)
//! are for all right after it has moved, is not where it is by its own doing: its frames come back by a loop,
//! or somebody else uses its address. It is then put back to the port where it was at first, and held there for
//! [a while](HOLD). If nothing was heard of it there meanwhile, it has moved, and may send what it likes.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::time::{Duration, Instant};

use super::frame::Mac;

/// A port's number.
pub type PortId = u8;

/// So many moves of a station within [`WITHIN`] are too many.
pub const FLAPS: u32 = 5;
/// The time in which moves, and what is sent after them, are counted.
pub const WITHIN: Duration = Duration::from_secs(1);
/// So many of its frames are for all within the same time after it has moved, and no more.
pub const FLOODS: u32 = 16;
/// How long a station is held that moved so often.
pub const HOLD: Duration = Duration::from_secs(5);

/// What a table is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long a station is known that sends nothing.
    pub ageing: Duration,
    /// The most stations of a port.
    pub stations: usize,
}

/// What came of a frame from a station.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learned {
    /// It is where it was.
    Known,
    /// It was not known.
    New,
    /// It was at this port.
    Moved(PortId),
    /// It has moved too often, and is held from now on.
    Flaps {
        /// Where.
        at: PortId,
        /// Where it was seen besides.
        other: PortId,
    },
    /// It is held at this port, which is another one.
    Held(PortId),
    /// The port's share is used up: it is not learned, or stays where it was.
    Full,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    port: PortId,
    seen: Instant,
    /// The moves since this moment, and where it was before them.
    since: Instant,
    moves: u32,
    floods: u32,
    origin: PortId,
    held_until: Option<Instant>,
    /// It was heard where it is since it was held there.
    heard: bool,
    /// It was held, and not heard there: it has moved indeed.
    settled: bool,
}

impl Entry {
    fn new(port: PortId, now: Instant) -> Self {
        Self {
            port,
            seen: now,
            since: now,
            moves: 0,
            floods: 0,
            origin: port,
            held_until: None,
            heard: true,
            settled: false,
        }
    }

    /// It is not to move for a while.
    fn hold(&mut self, now: Instant) {
        (self.moves, self.floods, self.seen) = (0, 0, now);
        (self.held_until, self.heard) = (Some(now + HOLD), false);
    }

    fn is_fresh(&self, ageing: Duration, now: Instant) -> bool {
        now.saturating_duration_since(self.seen) < ageing
    }
}

/// The forwarding table.
#[derive(Debug)]
pub struct Table {
    limits: Limits,
    // Its hash has a secret: the addresses are whatever the owners make up.
    entries: HashMap<Mac, Entry>,
    /// Entries by port.
    shares: Vec<usize>,
    changes: u64,
}

impl Table {
    /// An empty table for so many ports, which has room for all that they may learn.
    pub fn new(limits: Limits, ports: usize) -> Self {
        let entries = HashMap::with_capacity(ports.saturating_mul(limits.stations));
        Self { limits, entries, shares: vec![0; ports], changes: 0 }
    }

    /// A number that is another one after each change of what [`Self::port_of`] says at a moment.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Stations behind a port, old ones that nobody has removed yet included.
    pub fn stations(&self, port: PortId) -> usize {
        self.shares.get(usize::from(port)).copied().unwrap_or(0)
    }

    /// Where a station is, if that is known.
    #[inline]
    pub fn port_of(&self, station: &Mac, now: Instant) -> Option<PortId> {
        let entry = self.entries.get(station)?;
        entry.is_fresh(self.limits.ageing, now).then_some(entry.port)
    }

    /// A frame came from a station, by a port of the table.
    pub fn learn(&mut self, station: Mac, port: PortId, now: Instant) -> Learned {
        let Self { limits, entries, shares, changes } = self;
        let mut slot = match entries.entry(station) {
            Slot::Vacant(slot) => {
                if !take(shares, port, limits.stations) {
                    return Learned::Full;
                }
                slot.insert(Entry::new(port, now));
                *changes += 1;
                return Learned::New;
            }
            Slot::Occupied(slot) => slot,
        };
        let entry = slot.get_mut();
        if !entry.is_fresh(limits.ageing, now) {
            // As if it had never been.
            give(shares, entry.port);
            *changes += 1;
            if !take(shares, port, limits.stations) {
                slot.remove();
                return Learned::Full;
            }
            *entry = Entry::new(port, now);
            return Learned::New;
        }
        if entry.port == port {
            entry.seen = now;
            entry.heard = true;
            return Learned::Known;
        }
        if entry.held_until.is_some_and(|until| now < until) {
            return Learned::Held(entry.port);
        }
        let was_held = entry.held_until.take().is_some();
        if now.saturating_duration_since(entry.since) >= WITHIN || entry.moves == 0 {
            (entry.since, entry.moves, entry.floods, entry.origin) = (now, 0, 0, entry.port);
            entry.settled = was_held && !entry.heard;
        }
        let flaps = entry.moves + 1 >= FLAPS;
        let (from, to) = (entry.port, if flaps { entry.origin } else { port });
        let has_room = go((shares, limits.stations), entry, to, changes);
        if flaps {
            // Where its share is used up it stays where it is now.
            entry.hold(now);
            let at = entry.port;
            return Learned::Flaps { at, other: if at == port { from } else { port } };
        }
        if !has_room {
            return Learned::Full;
        }
        entry.seen = now;
        entry.moves += 1;
        Learned::Moved(from)
    }

    /// A frame of a station, which is known, is for all. Where it is held from now on, and where it was, if it
    /// sends too many such frames after it has moved.
    pub fn floods(&mut self, station: &Mac, now: Instant) -> Option<(PortId, PortId)> {
        let Self { limits, entries, shares, changes } = self;
        let entry = entries.get_mut(station)?;
        let has_moved = entry.moves > 0 && now.saturating_duration_since(entry.since) < WITHIN;
        if !has_moved || entry.settled {
            return None;
        }
        entry.floods += 1;
        let (from, to) = (entry.port, entry.origin);
        if entry.floods <= FLOODS || from == to || !go((shares, limits.stations), entry, to, changes) {
            return None;
        }
        entry.hold(now);
        Some((to, from))
    }

    /// Forgets the stations that have been silent for too long. Returns how many.
    pub fn sweep(&mut self, now: Instant) -> usize {
        let ageing = self.limits.ageing;
        self.retain(|entry| entry.is_fresh(ageing, now))
    }

    /// Forgets the stations behind a port, and of others that they were there. Returns how many stations.
    pub fn forget(&mut self, port: PortId) -> usize {
        for entry in self.entries.values_mut().filter(|entry| entry.origin == port) {
            // Nobody is put back there.
            (entry.origin, entry.moves, entry.floods) = (entry.port, 0, 0);
        }
        self.retain(|entry| entry.port != port)
    }

    fn retain(&mut self, keep: impl Fn(&Entry) -> bool) -> usize {
        let before = self.entries.len();
        let shares = &mut self.shares;
        self.entries.retain(|_, entry| {
            let keeps = keep(entry);
            if !keeps {
                give(shares, entry.port);
            }
            keeps
        });
        let gone = before - self.entries.len();
        self.changes += gone as u64;
        gone
    }
}

/// Has a station at a port, if that has room for it.
fn go((shares, most): (&mut [usize], usize), entry: &mut Entry, to: PortId, changes: &mut u64) -> bool {
    if entry.port == to {
        return true;
    }
    let has_room = take(shares, to, most);
    if has_room {
        give(shares, entry.port);
        entry.port = to;
        *changes += 1;
    }
    has_room
}

/// Takes one of a port's share, if there is one left.
fn take(shares: &mut [usize], port: PortId, most: usize) -> bool {
    match shares.get_mut(usize::from(port)) {
        Some(share) if *share < most => {
            *share += 1;
            true
        }
        _ => false,
    }
}

fn give(shares: &mut [usize], port: PortId) {
    if let Some(share) = shares.get_mut(usize::from(port)) {
        *share = share.saturating_sub(1);
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
