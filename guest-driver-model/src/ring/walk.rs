//! The walk along one descriptor chain, and how each buffer on the way is found: in the
//! mapping table, beyond it, or not at all.
//!
//! Owns: what has been seen of the chain. Fetches nothing itself: it is given descriptors
//! that are private already.

use vhost_pci_device::abi::{FaultKind, MAX_COPY, MAX_MAP, PAGE_SIZE};

use super::chain::{ChainBurst, Descriptor, Direction, Place, Segment};
use super::device::MAX_CHAIN;
use super::miss::{Finding, Misses, OnMiss};
use crate::translate::{Access, Part, Translation};

/// The most segments of one chain: a buffer that runs through several mappings has
/// several.
pub const MAX_SEGMENTS: usize = 2 * MAX_CHAIN as usize;

/// A kind of fault with what was seen, before it is known which ring it is about.
pub(super) type Broken = (FaultKind, u64);

/// Why a chain was not popped.
pub(super) enum Stop {
    /// It breaks the rules.
    Broken(Broken),
    /// Something of it is not in the mapping table; what is missing was noted.
    Missing,
}

impl From<Broken> for Stop {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}

/// How a ring finds buffers.
#[derive(Debug)]
pub(super) struct Lookup {
    pub(super) translation: Translation,
    pub(super) on_miss: OnMiss,
    pub(super) misses: Misses,
}

impl Lookup {
    /// In this table, which shows all that there is.
    pub(super) fn new(translation: Translation) -> Self {
        Self { translation, on_miss: OnMiss::Fault, misses: Misses::default() }
    }

    /// An indirect table has a gap: both are given as address and length. Where the table
    /// has been put instead, or why it cannot be read.
    pub(super) fn missing_table(
        &mut self,
        at: u16,
        (addr, len): (u64, u32),
        (gap, gap_len): (u64, u32),
        why: FaultKind,
    ) -> Result<u64, Stop> {
        let denied = Stop::Broken((why, addr));
        if addr.checked_add(u64::from(len) - 1).is_none() {
            return Err(denied);
        }
        let asked = match self.on_miss {
            OnMiss::Fault => return Err(denied),
            OnMiss::Copy => Some(Finding::Copy),
            OnMiss::Map => self.misses.finding_of_page(gap, Access::READ),
        };
        match asked {
            Some(Finding::Denied) => return Err(denied),
            Some(Finding::Copy) => match self.misses.finding_of_table(at, addr, len) {
                Some(Finding::Denied) => return Err(denied),
                Some(Finding::Fetched(offset)) => return Ok(offset),
                _ => self.misses.note_table(at, addr, len),
            },
            _ => self.misses.note_map(gap, gap_len, Access::READ),
        }
        Err(Stop::Missing)
    }

    /// The `len` bytes at `iova` are not in the mapping table. How many of them are dealt
    /// with: they are the segment pushed, or were noted as missing.
    fn missing(
        &mut self,
        (iova, len): (u64, u32),
        writable: bool,
        burst: &mut ChainBurst,
        walk: &mut Walk,
    ) -> Option<u32> {
        let access = access_of(writable);
        let found = match self.on_miss {
            OnMiss::Fault => return None,
            OnMiss::Copy => {
                let run = len.min(MAX_COPY);
                burst.push_outside(iova, run, writable);
                return Some(run);
            }
            OnMiss::Map => self.misses.finding_of_page(iova, access),
        };
        match found {
            Some(Finding::Denied) => None,
            Some(Finding::Copy) => {
                // As far as that was said.
                let most = len.min(MAX_COPY);
                let mut run = ((PAGE_SIZE - iova % PAGE_SIZE) as u32).min(most);
                while run < most
                    && self.misses.finding_of_page(iova + u64::from(run), access) == Some(Finding::Copy)
                {
                    run = (run + PAGE_SIZE as u32).min(most);
                }
                burst.push_outside(iova, run, writable);
                Some(run)
            }
            _ => {
                walk.missing = true;
                self.misses.note_map(iova, len, access);
                Some(len.min((MAX_MAP - iova % PAGE_SIZE) as u32))
            }
        }
    }
}

fn access_of(writable: bool) -> Access {
    if writable { Access::WRITE } else { Access::READ }
}

/// What nearly all chains of a network card are like: one descriptor, whose buffer is in the
/// mapping of the one before.
pub(super) struct Usual {
    pub(super) flags: u16,
    access: Access,
}

impl Usual {
    #[inline]
    pub(super) fn of(direction: Direction) -> Self {
        match direction {
            Direction::DeviceReads | Direction::Both => Self { flags: 0, access: Access::READ },
            Direction::DeviceWrites => Self { flags: Descriptor::WRITE, access: Access::WRITE },
        }
    }

    /// The segment that the buffer of such a descriptor is, if its mapping was hit last.
    #[inline]
    pub(super) fn segment(&self, iova: u64, len: u32, translation: &Translation) -> Option<Segment> {
        let offset = translation.last_hit(iova, len, self.access)?;
        Some(Segment { iova, place: Place::Window(offset), len, writable: self.flags != 0 })
    }
}

/// What has been seen of one chain.
pub(super) struct Walk {
    /// The chain's index in the available ring.
    pub(super) at: u16,
    direction: Direction,
    writable_seen: bool,
    len: u64,
    /// Where its segments start in the burst.
    mark: usize,
    /// Something of it is missing.
    missing: bool,
}

impl Walk {
    /// Along the chain at an index of the available ring, whose segments will start at `mark`.
    #[inline]
    pub(super) fn new(at: u16, direction: Direction, mark: usize) -> Self {
        Self { at, direction, writable_seen: false, len: 0, mark, missing: false }
    }

    /// One descriptor more, which is not one of an indirect table.
    #[inline]
    pub(super) fn take(
        &mut self,
        descriptor: &Descriptor,
        lookup: &mut Lookup,
        burst: &mut ChainBurst,
    ) -> Result<(), Stop> {
        let writable = descriptor.is_writable();
        let fits = match self.direction {
            Direction::DeviceReads => !writable,
            Direction::DeviceWrites => writable,
            // 2.7.4.2: readable parts come first.
            Direction::Both => writable || !self.writable_seen,
        };
        if !fits {
            return Err(Stop::Broken((FaultKind::Direction, descriptor.addr)));
        }
        self.writable_seen |= writable;
        self.len += u64::from(descriptor.len);
        let Descriptor { addr: iova, len, .. } = *descriptor;
        match lookup.translation.translate(iova, len, access_of(writable)) {
            Ok(offset) => {
                burst.push_segment(Segment { iova, place: Place::Window(offset), len, writable });
                Ok(())
            }
            Err(why) => self.take_parts(descriptor, why, lookup, burst),
        }
    }

    /// A buffer that is not in one mapping.
    #[cold]
    fn take_parts(
        &mut self,
        descriptor: &Descriptor,
        why: FaultKind,
        lookup: &mut Lookup,
        burst: &mut ChainBurst,
    ) -> Result<(), Stop> {
        let Descriptor { addr, len, .. } = *descriptor;
        let writable = descriptor.is_writable();
        let wraps = addr.checked_add(u64::from(len).saturating_sub(1)).is_none();
        if why == FaultKind::Length || wraps {
            return Err(Stop::Broken((why, addr)));
        }
        let mut done = 0_u32;
        while done < len {
            if burst.mark() - self.mark >= MAX_SEGMENTS {
                return Err(Stop::Broken((FaultKind::ChainTooLong, MAX_SEGMENTS as u64)));
            }
            if self.missing && lookup.misses.is_full() {
                return Err(Stop::Missing);
            }
            let (iova, left) = (addr + u64::from(done), len - done);
            done += match lookup.translation.part(iova, left, access_of(writable)) {
                Part::Mapped { offset, len } => {
                    burst.push_segment(Segment { iova, place: Place::Window(offset), len, writable });
                    len
                }
                Part::Missing { len, why } => {
                    lookup.missing((iova, len), writable, burst, self).ok_or(Stop::Broken((why, addr)))?
                }
            };
        }
        Ok(())
    }

    /// The chain is at its end.
    #[inline]
    pub(super) fn finish(&self, head: u16, burst: &mut ChainBurst) -> Result<(), Stop> {
        if self.missing {
            return Err(Stop::Missing);
        }
        burst.finish(head, self.mark, self.len);
        Ok(())
    }
}
