//! The steps by which an owner's IOMMU decides what the peer sees: its front-end's
//! messages are taken, the peer's commands are served from what is known, and what is
//! missing is asked for, one miss at a time.

use std::time::{Duration, Instant};

use iommu::{
    Access, FrontendVa, Iova, IovaMap, LARGE_PAGE_SIZE, LayoutError, MappedRange, PAGE_SIZE, Span,
    WindowLayout,
};
use vhost_pci_device::abi;

use super::demand::{Asked, Task, Want, want};
use super::iotlb::PushedChange;
use crate::config::OneWay;
use crate::link::descriptor::MemoryFile;
use crate::link::fault::Fault;
use crate::link::link_page;
use crate::link::message::{CommandId, Effect, IotlbMessage, MissId, PushEntry};
use crate::link::owner::OwnerSession;
use crate::link::state::{Link, Pending};

/// Copies from or to a range, without an unmap between them, after which it is taken
/// for one that lasts, and worth a place in the window.
const LASTING: u32 = 8;
/// How long ranges that last are collected, so that neighbours are mapped as one.
const COLLECT: Duration = Duration::from_millis(100);
/// Answers to a miss without an update, in a row, that are put up with.
const MAX_UNTOLD: u32 = 8;
/// Pages that are asked about in the background, at most.
const MAX_PROBES: usize = 4096;

impl Link {
    /// Takes an IOTLB message of the owner's front-end.
    ///
    /// # Errors
    /// Whether the message is declined, or ends the session.
    pub(in crate::link) fn take_iotlb(&mut self, message: IotlbMessage) -> Result<(), Refusal> {
        let owner = self.owner.as_mut().ok_or(Refusal::End(Fault::Unsupported("IOTLB_MSG")))?;
        if !owner.has_iommu() {
            return Err(Refusal::End(Fault::Unsupported("IOTLB_MSG")));
        }
        let fault = |reason: String| Refusal::Decline(Fault::Iommu(reason));
        if owner.pushes() {
            return Err(fault("IOTLB_MSG of a front-end that pushes".into()));
        }
        let span = Span::new(Iova::new(message.iova), message.size);
        let gone = match message.kind {
            IotlbMessage::UPDATE => {
                self.demand_counters.updates += 1;
                let shown = &self.shown;
                let range = mapped_range(owner, message.iova, message.size, message.frontend, message.perm)
                    .map_err(fault)?;
                let proven = proven(&range, self.demand.asked.as_mut());
                match proven {
                    Some(proven) => owner.iotlb.learn(proven, range.access(), |span| shown.covers(span)),
                    None => forget_changed(owner, &range),
                }
            }
            IotlbMessage::INVALIDATE => {
                self.demand_counters.invalidations += 1;
                // A front-end may say "everything" by a length that wraps: what is meant is
                // clear, and to forget too much is never wrong.
                let span = span.or_else(|_| Span::new(Iova::new(message.iova), u64::MAX - message.iova));
                let span = span.map_err(|error| fault(format!("INVALIDATE: {error}")))?;
                owner.iotlb.forget(span)
            }
            kind => return Err(fault(format!("message type {kind} is not one of a front-end"))),
        };
        self.hide(&gone);
        Ok(())
    }

    /// Takes a message of pushed changes; all of it or nothing.
    pub(in crate::link) fn take_push(&mut self, reset: bool, entries: &[PushEntry]) -> Result<(), Refusal> {
        let owner = self.owner.as_mut().ok_or(Refusal::End(Fault::Unsupported("IOMMU_PUSH")))?;
        if !owner.has_iommu() || !owner.pushes() {
            return Err(Refusal::End(Fault::Unsupported("IOMMU_PUSH")));
        }
        self.demand_counters.pushes += 1;
        let fault = |position: usize, reason: String| {
            Refusal::Decline(Fault::Iommu(format!("pushed entry {position}: {reason}")))
        };
        let mut changes = Vec::with_capacity(entries.len() + 1);
        if reset {
            changes.push(PushedChange::Reset);
        }
        for (position, entry) in entries.iter().enumerate() {
            changes.push(match entry.perm {
                0 => Span::new(Iova::new(entry.iova), entry.size)
                    .map(PushedChange::Unmap)
                    .map_err(|error| fault(position, error.to_string()))?,
                perm => mapped_range(owner, entry.iova, entry.size, entry.frontend, perm)
                    .map(PushedChange::Map)
                    .map_err(|reason| fault(position, reason))?,
            });
        }
        let first = usize::from(reset);
        let gone = owner
            .iotlb
            .push(changes)
            .map_err(|(position, error)| fault(position.saturating_sub(first), error.to_string()))?;
        // A vring whose memory was not mapped may have it now.
        self.demand.refused_vrings.clear();
        self.hide(&gone);
        Ok(())
    }

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

    /// The owner's memory table changed: what is behind no region any more is gone.
    pub(in crate::link) fn hide_unbacked(&mut self) {
        if let Some(owner) = self.owner.as_mut().filter(|owner| owner.has_iommu()) {
            let gone = std::mem::take(&mut owner.unbacked);
            self.hide(&gone);
        }
    }

    /// The owner's VMM answered a miss.
    pub(in crate::link) fn miss_done(
        &mut self,
        id: MissId,
        told: bool,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        let Some(asked) = self.demand.asked.take_if(|asked| asked.id == id) else {
            return;
        };
        if asked.stale {
            return;
        }
        let Some(owner) = self.owner.as_mut() else { return };
        match asked.outcome {
            // Known; or unmapped since, and asked for again if that is still wanted.
            Some(true) if told => return,
            // An update that answered something else was taken for the answer.
            Some(true) => {
                let gone = asked.span().map_or_else(Vec::new, |page| owner.iotlb.forget(page));
                self.hide(&gone);
            }
            Some(false) => effects.push(Effect::AccessFail(asked.page, asked.access)),
            // Its update is on another socket, and may come after this: asked again if it is
            // still wanted then, but not for ever.
            None if told && self.demand.untold < MAX_UNTOLD => {
                self.demand.untold += 1;
                return;
            }
            None => {}
        }
        self.demand.untold = 0;
        self.demand.denials.note(now);
        let (Some(page), Some(owner)) = (asked.span(), self.owner.as_ref()) else { return };
        let owner_vrings = owner.vrings().iter().zip(0_u32..);
        let vrings: Vec<u32> = owner_vrings
            .filter(|(vring, _)| {
                vring.started().is_some_and(|config| config.parts().any(|part| part.overlaps(page)))
            })
            .map(|(_, index)| index)
            .collect();
        for index in vrings {
            if self.demand.refused_vrings.insert(index) {
                self.unsettled = true;
                let reason = format!(
                    "the owner's IOMMU does not let its device {} the vring's page at {}",
                    if asked.access == Access::Read { "read" } else { "write" },
                    asked.page
                );
                self.count(&Fault::Vring { index, reason }, "owner", effects);
            }
        }
        self.demand.probes.retain(|probe| *probe != (asked.page, asked.access));
        let denied = |want: &Want| want.span.overlaps(page) && want.access.bits() & asked.access.bits() != 0;
        let (denied, rest) = std::mem::take(&mut self.demand.wants).into_iter().partition(denied);
        self.demand.wants = rest;
        let denied: std::collections::VecDeque<Want> = denied;
        for want in denied {
            self.deny(want.command, effects);
        }
    }

    /// Takes MAP, FETCH or STORE.
    pub(in crate::link) fn take_want(
        &mut self,
        command: CommandId,
        request: &abi::ControlRequest,
        readable: u64,
        writable: u64,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        let mut answer = |status| effects.push(Effect::Answer(command, status, false));
        let Some(want) = want(command, request, readable, writable, now + self.timeout) else {
            return answer(abi::CTRL_INVALID);
        };
        self.demand_counters.maps += u64::from(want.task == Task::Map);
        if !self.owner.as_ref().is_some_and(|owner| owner.has_iommu() && owner.is_running()) {
            return answer(abi::CTRL_FAILED);
        }
        self.demand.wants.push_back(want);
    }

    /// Serves what can be served and asks for what is missing.
    pub(in crate::link) fn serve_demand(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let Some(owner) = self.owner.as_ref().filter(|owner| owner.has_iommu()) else {
            return;
        };
        if !owner.is_running() {
            self.stop_demand(effects);
            return;
        }
        let mut missing = self.serve_vrings(effects);
        self.may_evict = self.pending.as_ref().is_none_or(Pending::is_of_some);
        for want in std::mem::take(&mut self.demand.wants) {
            if now >= want.deadline {
                effects.push(Effect::Answer(want.command, abi::CTRL_FAILED, false));
                continue;
            }
            match self.serve_want(&want, now, effects) {
                Served::Done => {}
                Served::Waits => self.demand.wants.push_back(want),
                Served::Missing(page, access) => {
                    missing.get_or_insert((page, access));
                    self.demand.wants.push_back(want);
                }
            }
        }
        self.show_lasting(now);
        if self.demand.asked.is_none()
            && let Some((page, access)) = missing.or_else(|| self.next_probe(now))
        {
            let asked = self.demand.ask(page, access);
            self.demand_counters.misses += 1;
            effects.push(Effect::Miss(asked.id, page, access));
        }
    }

    /// Answers MAP commands whose ranges the peer has now, when the link page says so.
    pub(in crate::link) fn answer_mapped(&mut self, effects: &mut Vec<Effect>) {
        if self.demand.wants.is_empty() {
            return;
        }
        let there = &self.published.mappings;
        self.demand.wants.retain(|want| {
            let done = want.task == Task::Map && link_page::allows(there, want.span, want.access);
            if done {
                effects.push(Effect::Answer(want.command, abi::CTRL_OK, true));
            }
            !done
        });
    }

    /// The owner's device stopped or its VMM left: commands are over, and nothing is shown.
    pub(in crate::link) fn stop_demand(&mut self, effects: &mut Vec<Effect>) {
        for want in self.demand.forget_owner() {
            effects.push(Effect::Answer(want.command, abi::CTRL_FAILED, false));
        }
        self.shown.clear();
        self.plan();
    }

    /// Shows the memory of the vrings that run. Gives what is not known of it.
    fn serve_vrings(&mut self, effects: &mut Vec<Effect>) -> Option<(Iova, Access)> {
        let owner = self.owner.as_ref()?;
        let refused = &self.demand.refused_vrings;
        let live = owner.vrings().iter().zip(0_u32..);
        let live = live.filter(|(vring, index)| vring.is_live() && !refused.contains(index));
        let live: Vec<(u32, Vec<Span<Iova>>)> =
            live.filter_map(|(vring, index)| Some((index, vring.started()?.parts().collect()))).collect();
        let mut missing = None;
        for (index, parts) in live {
            if parts.iter().all(|part| self.shown.covers_for(*part, Access::ReadWrite)) {
                parts.iter().for_each(|part| self.shown.touch(*part, true));
                continue;
            }
            let owner = self.owner.as_ref()?;
            let known: Result<Vec<_>, _> =
                parts.iter().map(|part| owner.iotlb.covering(*part, Access::ReadWrite)).collect();
            let mut ranges: Vec<_> = match known {
                Ok(ranges) => ranges.into_iter().flatten().cloned().collect(),
                Err(_) if owner.pushes() => continue,
                Err(page) => {
                    missing.get_or_insert(page);
                    continue;
                }
            };
            ranges.sort_by_key(|range| range.iova().start());
            ranges.dedup();
            for part in &parts {
                self.hide_lesser(*part, Access::ReadWrite);
            }
            if let Err(fault) = self.show_for(&ranges, &parts) {
                self.demand.refused_vrings.insert(index);
                self.unsettled = true;
                self.count(&fault, "owner", effects);
                continue;
            }
            for part in parts {
                self.shown.touch(part, true);
            }
        }
        missing
    }

    fn serve_want(&mut self, want: &Want, now: Instant, effects: &mut Vec<Effect>) -> Served {
        let Some(owner) = self.owner.as_mut() else { return Served::Waits };
        let pieces = match owner.iotlb.pieces(want.span, want.access) {
            Ok(pieces) => pieces,
            Err(_) if owner.pushes() => {
                self.deny(want.command, effects);
                return Served::Done;
            }
            Err(_) if !self.demand.denials.allow(now) => {
                self.demand_counters.limited += 1;
                effects.push(Effect::Answer(want.command, abi::CTRL_BUSY, false));
                return Served::Done;
            }
            Err((page, access)) => return Served::Missing(page, access),
        };
        let counters = &mut self.demand_counters;
        match want.task {
            Task::Map => return self.serve_map(want, effects),
            Task::Fetch => {
                counters.fetches += 1;
                counters.bytes_fetched += want.span.len();
            }
            Task::Store => {
                counters.stores += 1;
                counters.bytes_stored += want.span.len();
            }
        }
        effects.push(Effect::Copy(want.command, want.task, pieces));
        let lasting = owner.iotlb.note_copy(want.span, LASTING);
        for (start, access) in lasting {
            match allowed_as(access, self.config.one_way, self.is_strict()) {
                Some(_) => self.take_lasting(start, now),
                None if self.demand.probes.len() < MAX_PROBES && !self.pushes() => {
                    let other = if access == Access::Read { Access::Write } else { Access::Read };
                    self.demand.probes.push_back((start, other));
                }
                None => {}
            }
        }
        Served::Done
    }

    fn serve_map(&mut self, want: &Want, effects: &mut Vec<Effect>) -> Served {
        let Some(owner) = self.owner.as_ref() else { return Served::Waits };
        let Ok(ranges) = owner.iotlb.covering(want.span, want.access) else { return Served::Waits };
        let ranges: Vec<_> = ranges.into_iter().cloned().collect();
        let policy = (self.config.one_way, self.is_strict());
        let mut done = |status| {
            effects.push(Effect::Answer(want.command, status, false));
            Served::Done
        };
        if ranges.iter().any(|range| mapped_as(range, policy.0, policy.1).is_none()) {
            return done(abi::CTRL_COPY);
        }
        // One command at a time makes room: two that exclude each other would take turns.
        if !self.shown.covers_for(want.span, want.access) {
            if !std::mem::take(&mut self.may_evict) {
                return Served::Waits;
            }
            self.hide_lesser(want.span, want.access);
            if self.show_for(&ranges, &[want.span]).is_err() {
                return done(abi::CTRL_NO_ROOM);
            }
        }
        self.shown.touch(want.span, false);
        Served::Waits
    }

    /// Takes out what is shown for less than this access, so that it is shown anew now that
    /// more is known to be allowed.
    fn hide_lesser(&mut self, span: Span<Iova>, access: Access) {
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
    fn show_for(&mut self, ranges: &[MappedRange<MemoryFile>], keep: &[Span<Iova>]) -> Result<(), Fault> {
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
        let len = self.geometry.data().len();
        if new.iter().any(|span| span.len() > len) || self.shown.most_room() == 0 {
            let count = self.shown.map().len() + new.len();
            return Err(Fault::Window(LayoutError::TooMany { count, max: self.config.max_mappings }));
        }
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

    /// Adds those of the ranges that are not shown, neighbours as one. Says whether there
    /// was room for all.
    fn add(&mut self, ranges: &[MappedRange<MemoryFile>]) -> bool {
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
    fn hide(&mut self, gone: &[Span<Iova>]) {
        let mut changed = false;
        for span in gone {
            changed |= self.shown.remove(*span);
            self.demand.lasting.retain(|start| !span.contains(*start));
            self.demand.probes.retain(|(page, _)| !span.contains(*page));
        }
        if changed {
            self.plan();
        }
    }

    fn take_lasting(&mut self, start: Iova, now: Instant) {
        self.demand.lasting.insert(start);
        self.demand.show_at.get_or_insert(now + COLLECT);
    }

    /// The next page of a lasting range whose other direction is not known: a question
    /// that may be in vain.
    fn next_probe(&mut self, now: Instant) -> Option<(Iova, Access)> {
        let probe = self.demand.probes.front().copied()?;
        self.demand.denials.allow(now).then_some(probe)
    }

    /// Moves answered probes on, and shows the ranges that last when their time has come.
    fn show_lasting(&mut self, now: Instant) {
        let Some(owner) = self.owner.as_ref() else { return };
        let mut found = Vec::new();
        self.demand.probes.retain(|(page, access)| {
            let known = owner.iotlb.range_at(*page);
            match known {
                Some(range) if range.access().allows(*access) => {
                    found.push(range.iova().start());
                    false
                }
                Some(_) => true,
                None => false,
            }
        });
        for start in found {
            self.take_lasting(start, now);
        }
        // All that is being asked about comes together.
        if !self.demand.probes.is_empty() || self.demand.show_at.is_none_or(|at| now < at) {
            return;
        }
        self.demand.show_at = None;
        let starts = std::mem::take(&mut self.demand.lasting);
        let Some(owner) = self.owner.as_ref() else { return };
        let ranges: Vec<_> =
            starts.iter().filter_map(|start| owner.iotlb.range_at(*start).cloned()).collect();
        // No room is no fault: what is not shown goes on being copied. Nothing is evicted
        // for it either, since no command of the driver's is being carried out.
        if !self.add(&ranges) || self.try_plan().is_err() {
            self.plan();
        }
    }

    fn deny(&mut self, command: CommandId, effects: &mut Vec<Effect>) {
        self.demand_counters.denied += 1;
        effects.push(Effect::Answer(command, abi::CTRL_DENIED, false));
    }

    fn is_strict(&self) -> bool {
        self.peer.as_ref().is_some_and(|peer| peer.is_strict())
    }

    fn pushes(&self) -> bool {
        self.owner.as_ref().is_some_and(OwnerSession::pushes)
    }

    /// Works the layout out anew after something was taken out.
    fn plan(&mut self) {
        while self.try_plan().is_err() {
            // Only ranges that were added since the last plan can be too many.
            if !self.shown.drop_newest() {
                return;
            }
        }
    }

    fn try_plan(&mut self) -> Result<(), LayoutError> {
        let layout = WindowLayout::plan(&self.geometry, self.shown.map(), &self.layout)?;
        self.unsettled |= layout != self.layout;
        self.layout = layout;
        Ok(())
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

/// How serving a command ended.
enum Served {
    /// It was answered, or will be when its copy is made.
    Done,
    /// It waits for the window.
    Waits,
    /// It waits for this page, for this access.
    Missing(Iova, Access),
}

/// Why a message of the owner's front-end is not taken.
#[derive(Debug)]
pub(in crate::link) enum Refusal {
    /// It is answered with an error; the session goes on.
    Decline(Fault),
    /// The session ends.
    End(Fault),
}

/// With which access the peer's VMM is asked to map what the owner allows `allowed` with;
/// `None`: not at all, since that VMM would allow more.
fn allowed_as(allowed: Access, policy: OneWay, strict: bool) -> Option<Access> {
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
fn mapped_as(range: &MappedRange<MemoryFile>, policy: OneWay, strict: bool) -> Option<Access> {
    let (page, offset) = (range.backing().handle.page_size(), range.backing().offset);
    let whole = range.iova().is_aligned(page) && offset.is_multiple_of(page) && page <= LARGE_PAGE_SIZE;
    allowed_as(range.access(), policy, strict).filter(|_| whole || page == PAGE_SIZE)
}

/// A range as a front-end tells it.
fn mapped_range(
    owner: &OwnerSession,
    iova: u64,
    size: u64,
    frontend: u64,
    perm: u8,
) -> Result<MappedRange<MemoryFile>, String> {
    let span = Span::new(Iova::new(iova), size).map_err(|error| error.to_string())?;
    let access =
        Access::from_bits(perm.into()).ok_or_else(|| format!("{span}: no access has number {perm}"))?;
    let place = owner.memory().by_frontend(FrontendVa::new(frontend), size);
    let place = place.map_err(|error| format!("{span}: front-end address: {error}"))?;
    MappedRange::new(span, access, place.backing).map_err(|error| error.to_string())
}

/// What an update proves: no more than what was asked for.
fn proven(range: &MappedRange<MemoryFile>, asked: Option<&mut Asked>) -> Option<MappedRange<MemoryFile>> {
    let asked = asked.filter(|asked| !asked.stale && range.iova().contains(asked.page))?;
    let access = Access::from_bits(range.access().bits() & asked.access.bits());
    asked.outcome = Some(access.is_some());
    MappedRange::new(range.iova(), access?, range.backing().clone()).ok()
}

/// An update that nobody asked for proves nothing, but what it contradicts is not so.
fn forget_changed(owner: &mut OwnerSession, range: &MappedRange<MemoryFile>) -> Vec<Span<Iova>> {
    let pieces = owner.iotlb.pieces_known(range.iova());
    let backing = range.backing();
    let same = pieces
        .iter()
        .all(|(into, piece)| piece.file == backing.handle && piece.offset == backing.offset + into);
    let allowed = owner.iotlb.accesses(range.iova()).all(|access| range.access().allows(access));
    if same && allowed { Vec::new() } else { owner.iotlb.forget(range.iova()) }
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
