//! The peer's commands are served from what is known of the owner's IOMMU, and what is
//! missing is asked for, one miss at a time.

use std::time::{Duration, Instant};

use iommu::{Access, Iova, Span};
use vhost_pci_device::abi;

use super::demand::{Task, Want, want};
use super::room::{Room, allowed_as, mapped_as};
use crate::link::link_page;
use crate::link::message::{CommandId, Effect, Marks};
use crate::link::owner::OwnerSession;
use crate::link::pending::Pending;
use crate::link::state::Link;

/// Copies from or to a range, without an unmap between them, after which it is taken
/// for one that lasts, and worth a place in the window.
const LASTING: u32 = 8;
/// How long ranges that last are collected, so that neighbours are mapped as one.
const COLLECT: Duration = Duration::from_millis(100);
/// Pages that are asked about in the background, at most.
const MAX_PROBES: usize = 4096;

impl Link {
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
        let may_evict = self.pending.as_ref().is_none_or(Pending::is_of_some);
        self.room = if may_evict { Room::Made } else { Room::Taken };
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
        let log = owner.log().filter(|_| want.task == Task::Store).cloned();
        let marks = log.map(|log| Marks {
            log,
            pages: pieces.iter().filter_map(|piece| owner.pages(piece.clone())).collect(),
        });
        effects.push(Effect::Copy(want.command, want.task, pieces, marks));
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
        if self.shown.covers_for(want.span, want.access) {
            self.room.is_for_nobody_else();
        } else {
            match self.room {
                Room::Taken => return Served::Waits,
                Room::Free => {
                    self.hide_lesser(want.span, want.access);
                    if !self.show_if_free(&ranges) {
                        self.room = Room::Taken;
                        return Served::Waits;
                    }
                }
                Room::Made => {
                    self.hide_lesser(want.span, want.access);
                    if self.show_for(&ranges, &[want.span]).is_err() {
                        // It is over, and keeps nobody waiting.
                        return done(abi::CTRL_NO_ROOM);
                    }
                    self.room.is_for_nobody_else();
                }
            }
        }
        self.shown.touch(want.span, false);
        Served::Waits
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

    pub(super) fn deny(&mut self, command: CommandId, effects: &mut Vec<Effect>) {
        self.demand_counters.denied += 1;
        effects.push(Effect::Answer(command, abi::CTRL_DENIED, false));
    }

    fn pushes(&self) -> bool {
        self.owner.as_ref().is_some_and(OwnerSession::pushes)
    }
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
