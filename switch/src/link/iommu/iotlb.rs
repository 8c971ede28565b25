//! What the owner's front-end has told of its guest's IOMMU, by IOTLB updates or by
//! pushes: ranges of IOVAs with the memory behind them and the access that is
//! *proven*. This file never asks anybody; it is told, and it forgets.
//!
//! An update answers a miss and proves no more than the miss asked for: QEMU checks
//! the direction of the miss, and then says "read and write" whatever the mapping
//! allows. So a range is known to be writable only after a miss for writing.

use std::collections::BTreeMap;

use iommu::{Access, Iova, IovaMap, MapError, MappedRange, MemoryTable, PAGE_SIZE, Span};

use crate::link::descriptor::MemoryFile;

/// Ranges that are remembered from updates; the least recently used is forgotten.
const MAX_UPDATES: usize = 16_384;
/// How many of the least recently used are looked at to find one that is not needed.
const MAX_LOOKED_AT: usize = 64;
/// Ranges that a front-end may push; it is refused more.
pub const MAX_PUSHED: usize = 131_072;

/// A part of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The file.
    pub file: MemoryFile,
    /// Bytes from its start.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// One change of a pushed map (`docs/vhost-user-extensions.md`).
#[derive(Clone, Debug)]
pub enum PushedChange {
    /// Everything is unmapped.
    Reset,
    /// A range is mapped.
    Map(MappedRange<MemoryFile>),
    /// A range is unmapped.
    Unmap(Span<Iova>),
}

/// Why a pushed change cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// It contradicts what was pushed before.
    #[error(transparent)]
    Map(#[from] MapError),
    /// There are too many ranges.
    #[error("{MAX_PUSHED} ranges are mapped, and no more may be")]
    TooMany,
}

#[derive(Clone, Copy, Debug, Default)]
struct Facts {
    used: u64,
    copies: u32,
    probed: bool,
}

/// The owner's IOMMU, as far as it is known.
#[derive(Debug, Default)]
pub struct Iotlb {
    known: IovaMap<MemoryFile>,
    facts: BTreeMap<Iova, Facts>,
    by_use: BTreeMap<u64, Iova>,
    clock: u64,
}

impl Iotlb {
    /// How many ranges are known.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// The known ranges that together cover `span` for this access, whole. Or the
    /// first page of `span` of which that is not known, with the access to ask for.
    ///
    /// # Errors
    /// What is missing.
    pub fn covering(
        &self,
        span: Span<Iova>,
        access: Access,
    ) -> Result<Vec<&MappedRange<MemoryFile>>, (Iova, Access)> {
        let mut ranges = Vec::new();
        let mut at = span.start();
        loop {
            let page = Iova::new(at.raw() - at.raw() % PAGE_SIZE);
            let allowed = self.known.range_at(at).map(|range| range.access().bits());
            // A miss proves one direction at a time; reading is asked for first.
            match Access::from_bits(access.bits() & !allowed.unwrap_or(0)) {
                Some(Access::Write) => return Err((page, Access::Write)),
                Some(_) => return Err((page, Access::Read)),
                None => {}
            }
            let Some(range) = self.known.range_at(at) else { return Err((page, access)) };
            ranges.push(range);
            let last = range.iova().last();
            if last >= span.last() {
                return Ok(ranges);
            }
            at = Iova::new(last.raw() + 1);
        }
    }

    /// Where the bytes of `span` are, in order.
    ///
    /// # Errors
    /// As [`Self::covering`].
    pub fn pieces(&self, span: Span<Iova>, access: Access) -> Result<Vec<Piece>, (Iova, Access)> {
        let ranges = self.covering(span, access)?;
        let parts = ranges.into_iter().filter_map(|range| {
            let part = range.iova().intersection(span)?;
            let into = part.start().raw() - range.iova().start().raw();
            let backing = range.backing();
            Some(Piece { file: backing.handle.clone(), offset: backing.offset + into, len: part.len() })
        });
        Ok(parts.collect())
    }

    /// What is known to be allowed with the ranges that have a byte in `span`.
    pub fn accesses(&self, span: Span<Iova>) -> impl Iterator<Item = Access> {
        self.known.overlapping(span).map(MappedRange::access)
    }

    /// What is known of `span`, in any part: bytes into the span, and where they are.
    pub fn pieces_known(&self, span: Span<Iova>) -> Vec<(u64, Piece)> {
        let parts = self.known.overlapping(span).filter_map(|range| {
            let part = range.iova().intersection(span)?;
            let into = part.start().raw() - range.iova().start().raw();
            let backing = range.backing();
            let piece =
                Piece { file: backing.handle.clone(), offset: backing.offset + into, len: part.len() };
            Some((part.start().raw() - span.start().raw(), piece))
        });
        parts.collect()
    }

    /// Learns a range by an update that said `told` of it, of which `range` has what is
    /// proven. Gives what is not known any more because of it. When there are too many, one
    /// is forgotten, rather one that `keep` does not say is needed.
    pub fn learn(
        &mut self,
        range: MappedRange<MemoryFile>,
        told: Access,
        keep: impl Fn(Span<Iova>) -> bool,
    ) -> Vec<Span<Iova>> {
        let mut range = range;
        let mut facts = Facts::default();
        let before = self.known.range_at(range.iova().start());
        if let Some(before) = before.filter(|before| before.iova() == range.iova())
            && before.backing() == range.backing()
            && told.allows(before.access())
        {
            let both = Access::from_bits(before.access().bits() | range.access().bits());
            facts = self.facts.get(&range.iova().start()).copied().unwrap_or_default();
            self.forget(range.iova());
            let again =
                MappedRange::new(range.iova(), both.unwrap_or(range.access()), range.backing().clone());
            range = again.unwrap_or(range);
            self.insert(range, facts);
            return Vec::new();
        }
        let mut gone = self.forget(range.iova());
        if self.known.len() >= MAX_UPDATES {
            let oldest = self.by_use.values().filter_map(|start| self.known.range_at(*start));
            let mut oldest = oldest.map(MappedRange::iova).peekable();
            let first = oldest.peek().copied();
            let oldest = oldest.take(MAX_LOOKED_AT).find(|span| !keep(*span)).or(first);
            gone.extend(oldest.into_iter().flat_map(|span| self.forget(span)));
        }
        self.insert(range, facts);
        gone
    }

    /// Makes the changes of one push, all or none. Gives what is not mapped any more.
    ///
    /// # Errors
    /// The first change that cannot be made, by its position.
    pub fn push(&mut self, changes: Vec<PushedChange>) -> Result<Vec<Span<Iova>>, (usize, PushError)> {
        let mut gone = Vec::new();
        let mut undo = Vec::new();
        for (position, change) in changes.into_iter().enumerate() {
            let made = match change {
                PushedChange::Reset => {
                    undo.extend(std::mem::take(&mut self.known).iter().cloned().map(Undo::Insert));
                    Ok(())
                }
                PushedChange::Unmap(span) => {
                    self.known.remove(span).map_err(PushError::from).map(|removed| {
                        undo.extend(removed.into_iter().map(Undo::Insert));
                    })
                }
                PushedChange::Map(_) if self.known.len() >= MAX_PUSHED => Err(PushError::TooMany),
                PushedChange::Map(range) => {
                    let span = range.iova();
                    self.known.insert(range).map_err(PushError::from).map(|()| undo.push(Undo::Remove(span)))
                }
            };
            if let Err(error) = made {
                for step in undo.into_iter().rev() {
                    match step {
                        Undo::Insert(range) => drop(self.known.insert(range)),
                        Undo::Remove(span) => drop(self.known.remove(span)),
                    }
                }
                return Err((position, error));
            }
        }
        for step in &undo {
            if let Undo::Insert(range) = step {
                gone.push(range.iova());
                self.drop_facts(range.iova().start());
            }
        }
        Ok(gone)
    }

    /// Forgets every range that has a byte in `span`, wholly: what is lost too much, a
    /// miss brings back. Gives what was forgotten.
    pub fn forget(&mut self, span: Span<Iova>) -> Vec<Span<Iova>> {
        let gone: Vec<_> = self.known.remove_overlapping(span).iter().map(MappedRange::iova).collect();
        for span in &gone {
            self.drop_facts(span.start());
        }
        gone
    }

    /// Forgets what is not the owner's memory any more. Gives what was forgotten.
    pub fn forget_unbacked(&mut self, memory: &MemoryTable<MemoryFile>) -> Vec<Span<Iova>> {
        let gone: Vec<_> = self.known.remove_unbacked(memory).iter().map(MappedRange::iova).collect();
        for span in &gone {
            self.drop_facts(span.start());
        }
        gone
    }

    /// Notes that the ranges under `span` were copied from or to. Gives those that
    /// have now been so `often` without having been unmapped, the first time that
    /// this is so.
    pub fn note_copy(&mut self, span: Span<Iova>, often: u32) -> Vec<(Iova, Access)> {
        let starts: Vec<_> =
            self.known.overlapping(span).map(|range| (range.iova().start(), range.access())).collect();
        let mut lasting = Vec::new();
        for (start, access) in starts {
            self.touch(start);
            let facts = self.facts.entry(start).or_default();
            facts.copies = facts.copies.saturating_add(1);
            if facts.copies >= often && !facts.probed {
                facts.probed = true;
                lasting.push((start, access));
            }
        }
        lasting
    }

    /// The known range at an address.
    pub fn range_at(&self, iova: Iova) -> Option<&MappedRange<MemoryFile>> {
        self.known.range_at(iova)
    }

    fn insert(&mut self, range: MappedRange<MemoryFile>, facts: Facts) {
        let start = range.iova().start();
        // What it overlapped was forgotten before.
        if self.known.insert(range).is_ok() {
            self.facts.insert(start, facts);
            self.touch(start);
        }
    }

    fn touch(&mut self, start: Iova) {
        self.clock += 1;
        let facts = self.facts.entry(start).or_default();
        self.by_use.remove(&facts.used);
        facts.used = self.clock;
        self.by_use.insert(self.clock, start);
    }

    fn drop_facts(&mut self, start: Iova) {
        if let Some(facts) = self.facts.remove(&start) {
            self.by_use.remove(&facts.used);
        }
    }
}

/// How to take a change back.
enum Undo {
    Insert(MappedRange<MemoryFile>),
    Remove(Span<Iova>),
}
