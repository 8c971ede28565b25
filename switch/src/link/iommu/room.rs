//! What of the known ranges is chosen to be shown, and what goes to make room for it.

use std::collections::BTreeMap;

use iommu::{
    Access, Iova, IovaMap, LARGE_PAGE_SIZE, LayoutError, MappedRange, PAGE_SIZE, Span, WindowLayout,
};

use crate::config::OneWay;
use crate::link::descriptor::MemoryFile;
use crate::link::fault::Fault;
use crate::link::owner::OwnerSession;
use crate::link::state::Link;

/// What room a command may have that wants ranges shown, in one pass along all commands.
///
/// One command at a time makes room, and until it is answered: two that exclude each other
/// would take turns for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::link) enum Room {
    /// What others have, if need be.
    Made,
    /// What nobody has.
    Free,
    /// None.
    Taken,
}

impl Room {
    /// A command waits for what was made room for, or needs none: those behind it do not take
    /// it away again.
    pub(super) fn is_for_nobody_else(&mut self) {
        if *self == Self::Made {
            *self = Self::Free;
        }
    }
}

impl Link {
    /// A peer's device starts: what an earlier VMM was asked to map is not shown to one that
    /// would allow more or less with it.
    pub(in crate::link) fn hide_unenforced(&mut self) {
        let policy = (self.config.one_way, self.is_strict());
        let otherwise = |range: &&MappedRange<MemoryFile>| {
            let allowed = self.shown.allowed(range.iova().start()).unwrap_or(range.access());
            allowed_as(allowed, policy.0, policy.1) != Some(range.access())
        };
        let gone: Vec<_> = self.shown.map().iter().filter(otherwise).map(MappedRange::iova).collect();
        self.hide(&gone);
    }

    /// Takes out what is shown for less than this access, so that it is shown anew now that
    /// more is known to be allowed.
    pub(super) fn hide_lesser(&mut self, span: Span<Iova>, access: Access) {
        let shown = self.shown.map().overlapping(span).map(MappedRange::iova);
        let lesser = |span: &Span<Iova>| {
            !self.shown.allowed(span.start()).is_some_and(|allowed| allowed.allows(access))
        };
        let lesser: Vec<_> = shown.filter(lesser).collect();
        self.hide(&lesser);
    }

    /// Shows the known ranges that somebody asked for, those under all of `keep`, and makes
    /// room for them, though not under `keep`.
    ///
    /// # Errors
    /// When there is no room. Ranges that nobody has asked for lately may be gone.
    pub(super) fn show_for(
        &mut self,
        ranges: &[MappedRange<MemoryFile>],
        keep: &[Span<Iova>],
    ) -> Result<(), Fault> {
        if keep.iter().all(|span| self.shown.covers(*span)) {
            return Ok(());
        }
        let shown = |range: &&MappedRange<MemoryFile>| !self.shown.covers(range.iova());
        let new: Vec<Span<Iova>> = ranges.iter().filter(shown).map(MappedRange::iova).collect();
        let (policy, strict) = (self.config.one_way, self.is_strict());
        if ranges.iter().any(|range| allowed_as(range.access(), policy, strict).is_some())
            && joined(ranges).iter().any(|range| mapped_as(range, policy, strict).is_none())
        {
            let reason =
                "the owner's IOMMU maps parts of huge pages (hugetlbfs), which cannot be shown alone";
            return Err(Fault::Iommu(reason.into()));
        }
        // What can never fit costs nobody its place.
        WindowLayout::plan(&self.geometry, &joined(ranges), &WindowLayout::new())?;
        let mut plan =
            Err(LayoutError::TooMany { count: self.shown.map().len(), max: self.config.max_mappings });
        loop {
            if self.add(ranges) {
                plan = self.try_plan();
            }
            match plan {
                Ok(()) => return Ok(()),
                Err(_) if self.shown.join() => {}
                Err(_) if self.shown.evict(keep) => self.demand_counters.evictions += 1,
                Err(error) => {
                    for span in new {
                        self.shown.remove(span);
                    }
                    self.plan();
                    return Err(Fault::Window(error));
                }
            }
        }
    }

    /// Shows these known ranges where nothing has to go for them; says whether it could.
    pub(super) fn show_if_free(&mut self, ranges: &[MappedRange<MemoryFile>]) -> bool {
        let fresh =
            |range: &&MappedRange<MemoryFile>| self.shown.map().overlapping(range.iova()).next().is_none();
        let new: Vec<Span<Iova>> = ranges.iter().filter(fresh).map(MappedRange::iova).collect();
        if self.add(ranges) && self.try_plan().is_ok() {
            return true;
        }
        for span in new {
            self.shown.remove(span);
        }
        self.plan();
        false
    }

    /// Adds those of the ranges that are not shown, neighbours as one. Says whether there
    /// was room for all.
    pub(super) fn add(&mut self, ranges: &[MappedRange<MemoryFile>]) -> bool {
        let fresh =
            |range: &&MappedRange<MemoryFile>| self.shown.map().overlapping(range.iova()).next().is_none();
        let new = joined(ranges.iter().filter(fresh));
        let policy = (self.config.one_way, self.is_strict());
        new.iter().all(|range| {
            let access = mapped_as(range, policy.0, policy.1);
            let mapped = access
                .and_then(|access| MappedRange::new(range.iova(), access, range.backing().clone()).ok());
            mapped.is_some_and(|mapped| self.shown.add(mapped, range.access()).unwrap_or(false))
        })
    }

    /// Takes every shown range with a byte in one of these out of the window.
    pub(super) fn hide(&mut self, gone: &[Span<Iova>]) {
        for span in gone {
            if self.shown.remove(*span) {
                // What stays keeps its place: nothing is to be worked out anew.
                self.unsettled |= self.layout.remove_overlapping(*span);
            }
        }
        if !self.demand.lasting.is_empty() || !self.demand.probes.is_empty() {
            // They come from one map and do not overlap: there may be very many.
            let gone: BTreeMap<Iova, Span<Iova>> = gone.iter().map(|span| (span.start(), *span)).collect();
            let stays = |iova: &Iova| {
                let before = gone.range(..=*iova).next_back();
                !before.is_some_and(|(_, span)| span.contains(*iova))
            };
            self.demand.lasting.retain(stays);
            self.demand.probes.retain(|(page, _)| stays(page));
        }
        // Of an owner without an IOMMU the layout follows from its memory table.
        let has_iommu = self.owner.as_ref().is_some_and(OwnerSession::has_iommu);
        debug_assert!(!has_iommu || self.layout.len() == self.shown.map().len());
    }

    /// Works the layout out anew after something was taken out.
    pub(in crate::link) fn plan(&mut self) {
        while self.try_plan().is_err() {
            // Ranges that were added since the last plan are too many; or there is less room, and vrings, which
            // are asked for all the time, come back and make theirs.
            if !self.shown.drop_newest() {
                return;
            }
        }
    }

    pub(super) fn try_plan(&mut self) -> Result<(), LayoutError> {
        let layout = WindowLayout::plan(&self.geometry, self.shown.map(), &self.layout)?;
        self.unsettled |= layout != self.layout;
        self.layout = layout;
        Ok(())
    }

    pub(super) fn is_strict(&self) -> bool {
        self.peer.as_ref().is_some_and(|peer| peer.is_strict())
    }
}

/// Known ranges with neighbours as one. None overlaps another, as they came from one map.
fn joined<'r>(ranges: impl IntoIterator<Item = &'r MappedRange<MemoryFile>>) -> IovaMap<MemoryFile> {
    let mut map = IovaMap::new();
    for range in ranges {
        let _ = map.insert(range.clone());
    }
    map.merged()
}

/// With which access the peer's VMM is asked to map what the owner allows `allowed` with;
/// `None`: not at all, since that VMM would allow more.
pub(super) fn allowed_as(allowed: Access, policy: OneWay, strict: bool) -> Option<Access> {
    match (allowed, policy) {
        (Access::ReadWrite, _) => Some(Access::ReadWrite),
        (Access::Read, _) if strict => Some(Access::Read),
        (_, OneWay::Widen) => Some(Access::ReadWrite),
        // No MMU has pages that can be written and not read.
        (_, OneWay::Refuse) => None,
    }
}

/// As [`allowed_as`], of a range. A piece of a huge page cannot be mapped at all, or only
/// with the rest of the page.
pub(super) fn mapped_as(range: &MappedRange<MemoryFile>, policy: OneWay, strict: bool) -> Option<Access> {
    let (page, offset) = (range.backing().handle.page_size(), range.backing().offset);
    let whole = range.iova().is_aligned(page) && offset.is_multiple_of(page) && page <= LARGE_PAGE_SIZE;
    allowed_as(range.access(), policy, strict).filter(|_| whole || page == PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use iommu::Backing;

    use super::*;

    #[test]
    fn a_piece_of_a_huge_page_is_not_mapped_and_a_whole_one_is() {
        let file = OwnedFd::from(File::open("/dev/null").unwrap());
        let huge = MemoryFile::new(file, 0, 0).with_page_size(LARGE_PAGE_SIZE);
        let range = |iova, len, offset| {
            let backing = Backing { handle: huge.clone(), offset };
            MappedRange::new(Span::new(Iova::new(iova), len).unwrap(), Access::ReadWrite, backing).unwrap()
        };
        let mapped = |range: &MappedRange<MemoryFile>| mapped_as(range, OneWay::Widen, true).is_some();
        let page = LARGE_PAGE_SIZE;
        assert!(mapped(&range(0, page, 0)) && mapped(&range(4 * page, 2 * page, page)));
        assert!(!mapped(&range(0, PAGE_SIZE, 0)));
        assert!(!mapped(&range(PAGE_SIZE, page, 0)));
        assert!(!mapped(&range(0, page, PAGE_SIZE)));
        // Small pages joined to a whole one will do.
        let small: Vec<_> = (0..512).map(|n| range(n * PAGE_SIZE, PAGE_SIZE, n * PAGE_SIZE)).collect();
        assert!(joined(&small).iter().all(mapped) && !joined(&small[1..]).iter().all(mapped));
    }
}
