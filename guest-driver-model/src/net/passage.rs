//! One vring of the owner whose buffers are passed on to a device of this VM: many are out at once,
//! come back in any order, and are completed in the order of the ring (8.2).
//!
//! Owns: what is out. Never reads or writes a packet; of its header it writes `num_buffers`, where
//! the device leaves that to the driver. Never completes a buffer that the device has not given back.

use std::collections::VecDeque;
use std::time::Duration;

use vhost_pci_device::abi::FaultKind;

use super::header::HEADER_LEN;
use super::receive::packet_len;
use crate::control::{Exchange, Job, Request};
use crate::link::{LinkPage, LinkSnapshot, Mapping};
use crate::reach::{Demand, LiveVring, Reach, Tables, on_miss};
use crate::ring::{Chain, ChainBurst, DeviceRing, Direction, Fault, OnMiss, Place, RingConfig, RingFeatures};
use crate::shm::SharedMemory;
use crate::translate::{Access, Translation};

/// Where `num_buffers` is in the header.
const NUM_BUFFERS: u64 = HEADER_LEN as u64 - 2;

/// What became of a buffer that was to be passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passed {
    /// The device has it.
    On,
    /// The device has no room now: it stays with the owner.
    NoRoom,
    /// The device can never take it: the owner gets it back, and the packet is dropped.
    Dropped,
}

/// What a burst passed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Burst {
    /// Buffers that the device has got.
    pub passed: usize,
    /// Buffers that it cannot take.
    pub dropped: usize,
    /// The first address of a buffer that the window does not show, and will not: the burst ended
    /// before it.
    pub not_shown: Option<u64>,
    /// The device had no room for the next.
    pub no_room: bool,
    /// The mapping table has changed: nothing was passed on.
    pub moved: bool,
}

/// What was completed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completed {
    /// Packets that passed.
    pub packets: u64,
    /// Bytes of their frames.
    pub bytes: u64,
    /// Buffers that the device cannot take.
    pub dropped: u64,
}

/// A buffer that is out, or waits for one before it.
#[derive(Debug)]
struct Out {
    head: u16,
    len: u64,
    state: State,
}

/// What has become of it.
#[derive(Debug)]
enum State {
    /// The device has it.
    Lent {
        /// Window offset of `num_buffers`, if it can be stored.
        num_buffers: Option<u64>,
        /// First address and length of each piece, as the owner names them.
        pieces: Vec<(u64, u32)>,
    },
    /// The device has given it back, with so many bytes written.
    Back(u32),
    /// The device cannot take it.
    Dropped,
}

/// A vring whose buffers are passed on.
#[derive(Debug)]
pub struct Passage {
    window: SharedMemory,
    tables: Tables,
    live: LiveVring<()>,
    demand: Demand,
    direction: Direction,
    /// The device shows what the owner allows both ways only.
    both_ways: bool,
    chains: ChainBurst,
    /// The oldest first.
    out: VecDeque<Out>,
    /// The oldest one's number; the others' follow.
    first: u64,
    /// Lists that are not in use.
    spare: Vec<Vec<(u64, u32)>>,
}

impl Passage {
    /// Of an enabled vring of the snapshot, which was taken of this page of this window.
    ///
    /// # Errors
    /// If its geometry cannot be used.
    pub fn new(
        window: &SharedMemory,
        page: &LinkPage,
        snapshot: &LinkSnapshot,
        vring: u16,
        direction: Direction,
    ) -> Result<Self, Fault> {
        let info = snapshot.vrings.get(usize::from(vring)).copied().unwrap_or_default();
        let (tables, features) = (Tables::new(page, snapshot, None), RingFeatures::of(snapshot.features));
        let config = RingConfig::new(&info, features).map_err(|kind| Fault {
            kind,
            vring,
            value: u64::from(info.size),
        })?;
        // A ring copies tables of descriptors, and never a packet.
        let words = window.uncounted();
        let ring = DeviceRing::new(vring, &config, &words, tables.translation().clone(), features)?;
        // What is only copied cannot be passed on: it is asked for all the same, as a mapping.
        let miss = match on_miss(snapshot) {
            OnMiss::Fault => OnMiss::Fault,
            OnMiss::Map | OnMiss::Copy => OnMiss::Map,
        };
        Ok(Self {
            window: window.clone(),
            live: LiveVring::new(ring.on_miss(miss), &tables, ()),
            tables,
            demand: Demand::default(),
            direction,
            both_ways: snapshot.copy,
            chains: ChainBurst::default(),
            out: VecDeque::new(),
            first: 0,
            spare: Vec::new(),
        })
    }

    /// The owner's vring number.
    pub fn vring(&self) -> u16 {
        self.live.ring.vring()
    }

    /// What was asked of the device.
    pub fn demand(&self) -> Demand {
        Demand { table_reads: self.tables.reads(), ..self.demand }
    }

    /// Buffers that are not completed.
    pub fn out(&self) -> usize {
        self.out.len()
    }

    /// Goes by the mapping table of this generation, for what is passed on next.
    pub fn follow(&mut self, table_generation: u64, translation: &Translation) {
        self.tables.take(table_generation, translation);
        self.live.follow(&self.tables);
    }

    /// How long it will be before the device is asked again for what it did not have, if there is such a
    /// thing.
    pub fn pause(&self) -> Option<Duration> {
        self.live.backoff.left()
    }

    /// Passes on up to `budget` buffers: `pass` gets each with the number by which it is known until it
    /// is back. Nothing is, if the mapping table has not this generation.
    ///
    /// # Errors
    /// If the owner's driver broke the vring.
    pub fn pass(
        &mut self,
        budget: usize,
        table_generation: u64,
        exchange: &mut dyn Exchange,
        pass: &mut dyn FnMut(u64, &Chain<'_>) -> Passed,
    ) -> Result<Burst, Fault> {
        let mut chains = std::mem::take(&mut self.chains);
        chains.clear();
        let result = self.pass_chains(budget, table_generation, exchange, &mut chains, pass);
        self.chains = chains;
        result
    }

    fn pass_chains(
        &mut self,
        budget: usize,
        table_generation: u64,
        exchange: &mut dyn Exchange,
        chains: &mut ChainBurst,
        pass: &mut dyn FnMut(u64, &Chain<'_>) -> Passed,
    ) -> Result<Burst, Fault> {
        if !self.tables.is_at(table_generation) {
            return Ok(Burst { moved: true, ..Burst::default() });
        }
        let mut both_ways = BothWays(exchange);
        let exchange: &mut dyn Exchange = if self.both_ways { &mut both_ways } else { both_ways.0 };
        exchange.follow(table_generation);
        let (tables, demand) = (&mut self.tables, &mut self.demand);
        let mut reach = Reach { window: &self.window, tables, exchange, demand };
        let popped = reach.pop(&mut self.live, 1, budget, self.direction, chains)?;
        let mut burst = Burst::default();
        if self.tables.table_generation() != table_generation {
            self.live.ring.put_back(popped);
            return Ok(Burst { moved: true, ..burst });
        }
        let mut broken = None;
        for chain in chains.iter() {
            if let Some(piece) = chain.segments.iter().find(|piece| piece.place == Place::Owner) {
                burst.not_shown = Some(piece.iova);
                break;
            }
            let whole = match self.direction {
                Direction::DeviceReads => packet_len(&chain).is_some(),
                _ => chain.len > HEADER_LEN as u64,
            };
            if !whole {
                broken = Some(chain.len);
                break;
            }
            let state = match pass(self.first + self.out.len() as u64, &chain) {
                Passed::On => {
                    let mut pieces = self.spare.pop().unwrap_or_default();
                    pieces.clear();
                    pieces.extend(chain.segments.iter().map(|piece| (piece.iova, piece.len)));
                    burst.passed += 1;
                    State::Lent { num_buffers: num_buffers(&chain), pieces }
                }
                Passed::NoRoom => {
                    burst.no_room = true;
                    break;
                }
                // Of these there may be as many as the ring has entries.
                Passed::Dropped => {
                    burst.dropped += 1;
                    State::Dropped
                }
            };
            self.out.push_back(Out { head: chain.head, len: chain.len, state });
        }
        let taken = burst.passed + burst.dropped;
        self.live.ring.put_back(popped - taken);
        match broken {
            // Those before it first.
            Some(len) if taken == 0 => Err(self.live.ring.fail(FaultKind::Length, len)),
            _ => Ok(burst),
        }
    }

    /// The device gives a buffer back, of which it has written so many bytes, header and all. Whether it had
    /// that number. `count_buffers`: it leaves `num_buffers` to the driver. That is stored now, as what the
    /// device does not hold may leave the window before it is completed.
    pub fn back(&mut self, number: u64, written: u32, count_buffers: bool) -> bool {
        let at = number.checked_sub(self.first).and_then(|at| usize::try_from(at).ok());
        let Some(out) = at.and_then(|at| self.out.get_mut(at)) else { return false };
        let State::Lent { num_buffers, pieces } = &mut out.state else { return false };
        if let Some(at) = num_buffers.filter(|_| count_buffers && written > 0) {
            // In the window, and aligned; a header, not a packet.
            let _ = self.window.store_u16(at, 1);
        }
        self.spare.push(std::mem::take(pieces));
        out.state = State::Back(written);
        true
    }

    /// Completes what is back or dropped, as far as what went before it is.
    pub fn complete(&mut self) -> Completed {
        let mut done = Completed::default();
        while let Some(out) = self.out.front() {
            let written = match out.state {
                State::Lent { .. } => break,
                State::Back(written) => {
                    let len = match self.direction {
                        Direction::DeviceReads => out.len,
                        _ => u64::from(written),
                    };
                    done.packets += 1;
                    done.bytes += len.saturating_sub(HEADER_LEN as u64);
                    written
                }
                State::Dropped => {
                    done.dropped += 1;
                    0
                }
            };
            self.live.ring.push_used(out.head, written);
            self.out.pop_front();
            self.first += 1;
        }
        if done != Completed::default() {
            self.live.ring.flush_used();
        }
        done
    }

    /// The device has let go of all buffers: those that are not completed are passed on anew, in their
    /// order. Gives how many.
    pub fn take_back(&mut self) -> usize {
        let count = self.out.len();
        self.live.ring.put_back(count);
        self.first += count as u64;
        self.spare.extend(self.out.drain(..).filter_map(|out| match out.state {
            State::Lent { pieces, .. } => Some(pieces),
            State::Back(_) | State::Dropped => None,
        }));
        count
    }

    /// Whether the device has a buffer of which a part lies in one of these ranges, which are sorted by IOVA and
    /// do not overlap.
    pub fn has_out(&self, ranges: &[Mapping]) -> bool {
        let pieces = self.out.iter().flat_map(|out| match &out.state {
            State::Lent { pieces, .. } => pieces.as_slice(),
            State::Back(_) | State::Dropped => &[],
        });
        pieces.into_iter().any(|piece| touches(ranges, *piece))
    }

    /// Whether the owner wants to be called for what was completed since this was last asked.
    pub fn needs_call(&mut self) -> bool {
        self.live.ring.needs_call()
    }

    /// Asks the owner to kick, or not to. Whether there are buffers to be passed on already.
    ///
    /// # Errors
    /// If the owner's driver broke the vring.
    pub fn set_kicks(&mut self, enabled: bool) -> Result<bool, Fault> {
        self.live.ring.set_kicks(enabled)
    }
}

/// Where `num_buffers` is, if it can be stored as a word.
fn num_buffers(chain: &Chain<'_>) -> Option<u64> {
    let mut skip = NUM_BUFFERS;
    for piece in chain.segments {
        match (u64::from(piece.len).checked_sub(skip), piece.place) {
            (Some(2..), Place::Window(offset)) if (offset + skip).is_multiple_of(2) => {
                return Some(offset + skip);
            }
            (Some(1..), _) => return None,
            _ => skip -= u64::from(piece.len),
        }
    }
    None
}

/// Whether one of these ranges, which are sorted by IOVA and do not overlap, has a part of a piece.
fn touches(ranges: &[Mapping], (iova, len): (u64, u32)) -> bool {
    let last = iova.saturating_add(u64::from(len).saturating_sub(1));
    // Of those that do not start behind the piece the last one ends last.
    let before = ranges.partition_point(|range| range.iova <= last);
    let range = before.checked_sub(1).and_then(|at| ranges.get(at));
    range.is_some_and(|range| range.iova.saturating_add(range.len.saturating_sub(1)) >= iova)
}

/// Asks for both directions of what one is needed of: a VMM that enforces none shows nothing else.
struct BothWays<'a>(&'a mut dyn Exchange);

impl Exchange for BothWays<'_> {
    fn clear(&mut self) {
        self.0.clear();
    }

    fn reserve(&mut self, len: u32) -> Option<u64> {
        self.0.reserve(len)
    }

    fn carry_out(&mut self, jobs: &mut [Job]) {
        for job in &mut *jobs {
            if let Request::Map { access, .. } = &mut job.request {
                *access = Access::READ_WRITE;
            }
        }
        self.0.carry_out(jobs);
    }

    fn follow(&mut self, table_generation: u64) {
        self.0.follow(table_generation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_touched_by_a_range_that_has_its_first_byte_or_its_last() {
        let range = |iova, len| Mapping { iova, len, ..Mapping::default() };
        let ranges = [range(0x1000, 0x1000), range(0x3000, 0x2000), range(u64::MAX - 0xfff, 0x1000)];
        for piece in [
            (0x1000, 1),
            (0x1fff, 1),
            (0xf00, 0x101),
            (0x1fff, 0x1001),
            (0x2fff, 2),
            (0x2000, 0x8000),
            (u64::MAX, 1),
            (u64::MAX - 0x1000, 2),
        ] {
            assert!(touches(&ranges, piece), "{piece:x?}");
        }
        for piece in [(0xf00, 0x100), (0x2000, 0x1000), (0x5000, 0x1000), (0, 1), (u64::MAX - 0x1000, 1)] {
            assert!(!touches(&ranges, piece), "{piece:x?}");
        }
        assert!(!touches(&[], (0, 1)));
    }
}
