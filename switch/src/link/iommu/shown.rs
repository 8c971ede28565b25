//! Which of the owner's mapped ranges the window is to show: a bounded choice. Ranges
//! of vrings are pinned; of the others the least recently asked for goes first.

use std::collections::{BTreeMap, BTreeSet};

use iommu::{Access, Iova, IovaMap, MapError, MappedRange, Span};

use crate::link::descriptor::MemoryFile;

#[derive(Clone, Copy, Debug)]
struct Facts {
    used: u64,
    pinned: bool,
    /// What the owner allows; the map has what the peer's VMM is asked for.
    allowed: Access,
}

/// The ranges to show.
#[derive(Debug)]
pub struct Shown {
    map: IovaMap<MemoryFile>,
    facts: BTreeMap<Iova, Facts>,
    clock: u64,
    max: usize,
}

impl Shown {
    /// Nothing, and at most `max` ranges later.
    pub fn new(max: usize) -> Self {
        Self { map: IovaMap::new(), facts: BTreeMap::new(), clock: 0, max }
    }

    /// The ranges, with the access that the peer's VMM is asked for.
    pub fn map(&self) -> &IovaMap<MemoryFile> {
        &self.map
    }

    /// What the owner allows with the range that starts here.
    pub fn allowed(&self, start: Iova) -> Option<Access> {
        self.facts.get(&start).map(|facts| facts.allowed)
    }

    /// Whether all of `span` is in shown ranges.
    pub fn covers(&self, span: Span<Iova>) -> bool {
        let mut at = span.start();
        while let Some(range) = self.map.range_at(at) {
            if range.iova().last() >= span.last() {
                return true;
            }
            at = Iova::new(range.iova().last().raw() + 1);
        }
        false
    }

    /// Whether all of `span` is in shown ranges that the owner allows this access with.
    pub fn covers_for(&self, span: Span<Iova>, access: Access) -> bool {
        let allows = |facts: &Facts| facts.allowed.allows(access);
        let mut parts = self.map.overlapping(span);
        self.covers(span) && parts.all(|part| self.facts.get(&part.iova().start()).is_some_and(allows))
    }

    /// Adds a range that the owner allows `allowed` with. Says whether there was room.
    ///
    /// # Errors
    /// When a part of it is shown already.
    pub fn add(&mut self, range: MappedRange<MemoryFile>, allowed: Access) -> Result<bool, MapError> {
        if self.map.len() >= self.max {
            return Ok(false);
        }
        let start = range.iova().start();
        self.map.insert(range)?;
        self.clock += 1;
        self.facts.insert(start, Facts { used: self.clock, pinned: false, allowed });
        Ok(true)
    }

    /// Notes that the ranges under `span` were asked for; `pin`: they stay until they
    /// are unmapped.
    pub fn touch(&mut self, span: Span<Iova>, pin: bool) {
        let starts: Vec<_> = self.map.overlapping(span).map(|range| range.iova().start()).collect();
        for start in starts {
            self.clock += 1;
            if let Some(facts) = self.facts.get_mut(&start) {
                facts.used = self.clock;
                facts.pinned |= pin;
            }
        }
    }

    /// Takes out every range with a byte in `span`; says whether there was one.
    pub fn remove(&mut self, span: Span<Iova>) -> bool {
        let gone = self.map.remove_overlapping(span);
        for range in &gone {
            self.facts.remove(&range.iova().start());
        }
        !gone.is_empty()
    }

    /// Takes out the range that was asked for longest ago, except pinned ones and
    /// those under `keep`. Says whether there was one.
    pub fn evict(&mut self, keep: &[Span<Iova>]) -> bool {
        let kept = keep.iter().flat_map(|span| self.map.overlapping(*span));
        let kept: BTreeSet<_> = kept.map(|range| range.iova().start()).collect();
        let candidates = self.facts.iter().filter(|(start, facts)| !facts.pinned && !kept.contains(start));
        let oldest = candidates.min_by_key(|(_, facts)| facts.used).map(|(start, _)| *start);
        let span = oldest.and_then(|start| self.map.range_at(start)).map(MappedRange::iova);
        span.is_some_and(|span| self.remove(span))
    }

    /// Joins ranges that are neighbours, except pinned ones, if that makes much room. Says
    /// whether it did. (Joining takes a range out of the window and brings it back.)
    pub fn join(&mut self) -> bool {
        let mut loose = IovaMap::new();
        for range in self.map.iter() {
            let allowed = self.facts.get(&range.iova().start()).filter(|facts| !facts.pinned);
            // By what the owner allows: that is what the link page says of the whole.
            let again = allowed.and_then(|facts| {
                MappedRange::new(range.iova(), facts.allowed, range.backing().clone()).ok()
            });
            if let Some(again) = again {
                // They came from one map: none overlaps another.
                let _ = loose.insert(again);
            }
        }
        let joined = loose.merged();
        // Of none there is none to join.
        if loose.is_empty() || 4 * joined.len() > 3 * loose.len() {
            return false;
        }
        for range in joined.iter() {
            let before = self.map.overlapping(range.iova()).next();
            let asked = before.map_or(range.access(), MappedRange::access);
            let used =
                self.map.overlapping(range.iova()).filter_map(|part| self.facts.get(&part.iova().start()));
            let used = used.map(|facts| facts.used).max().unwrap_or(self.clock);
            let Ok(whole) = MappedRange::new(range.iova(), asked, range.backing().clone()) else { continue };
            self.remove(range.iova());
            if self.map.insert(whole).is_ok() {
                let facts = Facts { used, pinned: false, allowed: range.access() };
                self.facts.insert(range.iova().start(), facts);
            }
        }
        true
    }

    /// Takes out the range that was asked for last, pinned or not. Says whether there was
    /// one.
    pub fn drop_newest(&mut self) -> bool {
        let newest = self.facts.iter().max_by_key(|(_, facts)| facts.used).map(|(start, _)| *start);
        let span = newest.and_then(|start| self.map.range_at(start)).map(MappedRange::iova);
        span.is_some_and(|span| self.remove(span))
    }

    /// Takes out everything.
    pub fn clear(&mut self) {
        self.map = IovaMap::new();
        self.facts.clear();
    }
}
