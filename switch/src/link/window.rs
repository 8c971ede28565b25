//! The peer's window: what its VMM has mapped, what it should have mapped, and the
//! steps from one to the other.
//!
//! A revocation has happened when two things are known: the VMM answered the
//! unmap, and the kernel says that the witness page, unmapped after it, is mapped
//! nowhere any more. The second holds also for a VMM that answers before it acts,
//! that was reset, or that died. So nothing of the owner's is ever mapped without a
//! witness beside it: none is asked for before the VMM confirmed a witness, and a
//! revocation puts a new witness into the other slot before it takes the old one
//! away. This file never does I/O.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use iommu::{Change, Iova, Placement, Span, WindowLayout, difference};

use super::descriptor::MemoryFile;
use super::fault::Fault;
use super::log::PlacedLog;
use super::message::{Content, Effect, OpId, WindowOp};

/// How long a restarted device is given to drop what it held before it is told to.
const RESET_GRACE: Duration = Duration::from_millis(250);

/// What stands in the window before any of the owner's memory does, in the order
/// in which it is mapped.
const BASE: [Content; 3] = [Content::LinkArea, Content::ControlArea, Content::Witness { slot: 0 }];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HeldState {
    /// The VMM was asked to map it.
    Granting(OpId),
    /// The VMM answered that it is mapped; whether the guest reaches it already is not
    /// known (QEMU answers before it commits).
    Answered(OpId),
    /// It is mapped, for certain.
    Granted,
    /// The VMM was asked to unmap it.
    Revoking(OpId),
    /// The VMM confirmed that it is unmapped; the kernel has not yet.
    Unmapped(OpId),
}

#[derive(Debug)]
struct Held {
    content: Content,
    state: HeldState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No device that could hold anything.
    Closed,
    /// The VMM takes changes.
    Open,
    /// Unmaps are on their way; then the witness has to go, before `deadline`.
    Revoking { deadline: Instant },
    /// The VMM takes no changes, but may hold what it held.
    Residue,
    /// A device started while the VMM may hold what an earlier one held. A reset
    /// drops that by itself: wait until `grace_ends`, then unmap it.
    Reopening { grace_ends: Instant },
    /// Everything is being unmapped, so that the device can start afresh.
    /// `refused`: the VMM did not unmap something. Either it had dropped it by itself,
    /// and the witness as well; or it still has it, and so has to keep its witness.
    Clearing { deadline: Instant, refused: bool },
}

/// Counts of mappings of the owner's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowCounters {
    /// Mappings that the peer's VMM confirmed.
    pub made: u64,
    /// Mappings that are known to be gone again.
    pub revoked: u64,
    /// The most bytes that the peer had, or may have had, at once.
    pub largest: u64,
}

/// One peer's window.
#[derive(Debug)]
pub struct Window {
    timeout: Duration,
    /// The VMM answers a change when it has taken effect: its word on an unmap is enough,
    /// as long as its device runs.
    strict: bool,
    phase: Phase,
    /// The owner's ranges that the VMM was asked to have.
    asked: WindowLayout<MemoryFile>,
    /// The log that it was asked to have.
    asked_log: Option<PlacedLog>,
    held: Vec<Held>,
    next_op: u64,
    unconfirmed: VecDeque<(OpId, Instant)>,
    counters: WindowCounters,
}

impl Window {
    /// A window that nobody has. The peer's VMM has `timeout` for each change.
    pub fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            strict: false,
            phase: Phase::Closed,
            asked: WindowLayout::new(),
            asked_log: None,
            held: Vec::new(),
            next_op: 0,
            unconfirmed: VecDeque::new(),
            counters: WindowCounters::default(),
        }
    }

    /// What was mapped and revoked so far.
    pub fn counters(&self) -> WindowCounters {
        self.counters
    }

    /// The peer's device was started and its VMM takes changes. `strict`: as negotiated
    /// (`docs/vhost-user-extensions.md`, SHMEM_STRICT).
    pub fn open(&mut self, strict: bool, now: Instant, effects: &mut Vec<Effect>) {
        self.strict = strict;
        if self.held.is_empty() {
            self.start(now, effects);
        } else {
            self.phase = Phase::Reopening { grace_ends: now + RESET_GRACE };
        }
    }

    /// The peer's device was stopped: its VMM takes no changes until it is started
    /// again.
    pub fn stop(&mut self, effects: &mut Vec<Effect>) {
        if self.held.is_empty() {
            self.phase = Phase::Closed;
        } else {
            self.phase = Phase::Residue;
            // A change that is still on its way to the VMM may put a page there yet:
            // only when all are answered does a missing witness mean anything.
            if self.unconfirmed.is_empty() {
                effects.push(Effect::WatchWitness);
            }
        }
    }

    /// The peer's VMM left: it confirms nothing more.
    pub fn disconnect(&mut self, effects: &mut Vec<Effect>) {
        self.unconfirmed.clear();
        self.stop(effects);
    }

    /// Asks for the next changes towards `desired` and `log`. There is a log whenever there is memory for which one is
    /// wanted: it comes first and goes last.
    pub fn reconcile(
        &mut self,
        desired: &WindowLayout<MemoryFile>,
        log: Option<&PlacedLog>,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        let Some(slot) = self.witness_slot().filter(|_| self.phase == Phase::Open) else {
            return;
        };
        let mut revoked = false;
        let (changes_log, has_log) = (self.asked_log.as_ref() != log, self.asked_log.is_some());
        if changes_log && !has_log {
            self.change_log(log, now, effects);
        }
        for change in difference(&self.asked, desired) {
            // All unmaps come before all maps.
            if matches!(change, Change::Map(_)) && revoked && !self.strict {
                break;
            }
            self.asked.make(&change);
            match change {
                Change::Unmap(placement) => {
                    revoked = true;
                    self.unmap(Content::Owner(placement), now, effects);
                }
                Change::Map(placement) => self.map(Content::Owner(placement), now, effects),
            }
        }
        if changes_log && has_log {
            revoked = true;
            self.change_log(None, now, effects);
            if self.strict {
                self.change_log(log, now, effects);
            }
        }
        if revoked && !self.strict {
            self.map(Content::Witness { slot: slot ^ 1 }, now, effects);
            self.phase = Phase::Revoking { deadline: now + self.timeout };
        }
    }

    fn change_log(&mut self, log: Option<&PlacedLog>, now: Instant, effects: &mut Vec<Effect>) {
        if let Some(old) = self.asked_log.take() {
            self.unmap(Content::Log(old), now, effects);
        }
        if let Some(log) = log {
            self.asked_log = Some(log.clone());
            self.map(Content::Log(log.clone()), now, effects);
        }
    }

    /// The VMM confirmed change `op`, or refused it.
    ///
    /// # Errors
    /// When it refused a change that it should be able to make: it cannot be relied on.
    pub fn confirm(
        &mut self,
        op: OpId,
        result: Result<(), String>,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Fault> {
        match self.unconfirmed.pop_front() {
            Some((expected, _)) if expected == op => {}
            // The answer to a session that is gone already.
            other => {
                if let Some(other) = other {
                    self.unconfirmed.push_front(other);
                }
                return Ok(());
            }
        }
        // Requests are carried out one after the other: what was answered before is done.
        for held in &mut self.held {
            if matches!(held.state, HeldState::Answered(before) if before < op) {
                held.state = HeldState::Granted;
            }
        }
        // A device that restarted may have dropped by itself what it is now asked
        // to unmap; whether everything is gone the witness tells.
        let clearing =
            matches!(self.phase, Phase::Clearing { .. } | Phase::Residue | Phase::Reopening { .. });
        if let Err(reason) = &result {
            match &mut self.phase {
                Phase::Clearing { refused, .. } => *refused = true,
                _ if clearing => {}
                _ => return Err(Fault::Refused(reason.clone())),
            }
        }
        let asked = [HeldState::Granting(op), HeldState::Revoking(op)];
        if let Some(index) = self.held.iter().position(|held| asked.contains(&held.state)) {
            match (self.held[index].state, result.is_ok()) {
                (HeldState::Revoking(_), true)
                    if self.strict && self.phase == Phase::Open && self.held[index].is_owners() =>
                {
                    self.held.remove(index);
                    self.counters.revoked += 1;
                }
                (HeldState::Revoking(_), true) if self.held[index].content == Content::Fence => {
                    self.held.remove(index);
                }
                (HeldState::Revoking(op), true) => self.held[index].state = HeldState::Unmapped(op),
                // It may have it still: to be asked again.
                (HeldState::Revoking(_), false) => self.held[index].state = HeldState::Granted,
                (_, mapped) => self.granted(index, mapped, now, effects),
            }
        }
        if self.unconfirmed.is_empty() {
            let gone_soon = |held: &Held| held.is_witness() && held.is_leaving();
            match self.phase {
                Phase::Open => self.fence(now, effects),
                Phase::Closed => {}
                // The new witness is there, and all else is gone: now the old one.
                Phase::Revoking { .. } if !self.held.iter().any(gone_soon) => {
                    if let Some(old) = self.held.iter().find(|held| held.is_witness()) {
                        self.unmap(old.content.clone(), now, effects);
                    }
                }
                Phase::Clearing { .. } => self.clear_witnesses(now, effects),
                _ => effects.push(Effect::WatchWitness),
            }
        }
        Ok(())
    }

    /// Has the VMM answer once more, if there is something that it answered last.
    fn fence(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        if !self.held.iter().any(|held| matches!(held.state, HeldState::Answered(_))) {
            return;
        }
        match self.held.iter().any(|held| held.content == Content::Fence) {
            true => self.unmap(Content::Fence, now, effects),
            false => self.map(Content::Fence, now, effects),
        }
    }

    /// Takes the witnesses away when all else is unmapped, and has their end watched.
    fn clear_witnesses(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let there = |held: &&Held| held.is_witness() && !held.is_leaving();
        let witnesses: Vec<Content> =
            self.held.iter().filter(there).map(|held| held.content.clone()).collect();
        if matches!(self.phase, Phase::Clearing { refused: true, .. }) || witnesses.is_empty() {
            effects.push(Effect::WatchWitness);
            return;
        }
        for witness in witnesses {
            self.unmap(witness, now, effects);
        }
    }

    /// The VMM mapped what it was asked to, or did not.
    fn granted(&mut self, index: usize, mapped: bool, now: Instant, effects: &mut Vec<Effect>) {
        if mapped {
            let is_known = self.strict || !self.is_open() || !self.held[index].is_owners();
            self.held[index].state = match self.held[index].state {
                HeldState::Granting(op) if !is_known => HeldState::Answered(op),
                _ => HeldState::Granted,
            };
            self.counters.made += u64::from(self.held[index].is_owners());
        }
        if !matches!(self.phase, Phase::Residue | Phase::Reopening { .. }) {
            return;
        }
        // The device was stopped meanwhile. What came after a reset, which took the
        // witness away, and what has no witness at all, no witness tells about: it is
        // taken back.
        let last = |held: &Held| held.is_witness() && held.state == HeldState::Granted;
        let orphans: Vec<Content> = match (mapped, self.held[index].is_witness()) {
            (true, false) => vec![self.held[index].content.clone()],
            (false, true) if !self.held.iter().any(last) => {
                let there = |held: &&Held| matches!(held.state, HeldState::Granted | HeldState::Answered(_));
                let granted = self.held.iter().filter(there);
                granted.map(|held| held.content.clone()).collect()
            }
            _ => Vec::new(),
        };
        for content in orphans {
            self.unmap(content, now, effects);
        }
    }

    /// The kernel says that the oldest witness is mapped nowhere: what was unmapped
    /// before it is gone, and when no other is left, all is.
    pub fn witness_gone(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        if matches!(self.phase, Phase::Closed | Phase::Open) {
            return;
        }
        let Some(oldest) = self.held.iter().position(Held::is_witness) else {
            return self.all_gone(now, effects);
        };
        let other_stays = |held: &Held| held.is_witness() && !held.is_leaving();
        match self.held[oldest].left_at() {
            Some(its) if self.held.iter().any(other_stays) => {
                // What was asked to go before it went; the rest the VMM still has.
                let before = |held: &mut Held| held.left_at().is_some_and(|op| op <= its);
                let revoked = self.held.extract_if(.., before);
                self.counters.revoked += revoked.filter(Held::is_owners).count() as u64;
            }
            _ => drop(self.held.remove(oldest)),
        }
        if let Phase::Revoking { .. } = self.phase {
            self.phase = Phase::Open;
        } else if self.held.iter().any(Held::is_witness) {
            effects.push(Effect::WatchWitness);
        } else {
            self.all_gone(now, effects);
        }
    }

    fn all_gone(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        self.asked = WindowLayout::new();
        self.asked_log = None;
        self.counters.revoked += self.held.iter().filter(|held| held.is_owners()).count() as u64;
        self.held.clear();
        self.unconfirmed.clear();
        match self.phase {
            Phase::Reopening { .. } | Phase::Clearing { .. } => self.start(now, effects),
            _ => self.phase = Phase::Closed,
        }
    }

    /// Time passed.
    ///
    /// # Errors
    /// When the VMM did not confirm a change in time.
    pub fn tick(&mut self, now: Instant, effects: &mut Vec<Effect>) -> Result<(), Fault> {
        if let Phase::Reopening { grace_ends } = self.phase
            && now >= grace_ends
        {
            self.phase = Phase::Clearing { deadline: now + self.timeout, refused: false };
            // The witnesses go last: they stand for all that went before.
            let others = self.held.iter().filter(|held| !held.is_witness() && !held.is_leaving());
            let others: Vec<Content> = others.map(|held| held.content.clone()).collect();
            for content in others {
                self.unmap(content, now, effects);
            }
            if self.unconfirmed.is_empty() {
                self.clear_witnesses(now, effects);
            }
        }
        let late = self.unconfirmed.front().is_some_and(|(_, deadline)| now >= *deadline);
        let witness_late = match self.phase {
            Phase::Revoking { deadline } | Phase::Clearing { deadline, .. } => now >= deadline,
            _ => false,
        };
        if late || witness_late {
            return Err(Fault::Unconfirmed(self.timeout.as_millis()));
        }
        Ok(())
    }

    /// When [`Self::tick`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        let phase = match self.phase {
            Phase::Revoking { deadline } | Phase::Clearing { deadline, .. } => Some(deadline),
            Phase::Reopening { grace_ends } => Some(grace_ends),
            Phase::Closed | Phase::Open | Phase::Residue => None,
        };
        let operation = self.unconfirmed.front().map(|(_, deadline)| *deadline);
        phase.into_iter().chain(operation).min()
    }

    /// Whether the peer holds no memory of the owner's but `desired`, and no log but this; if `of` is given,
    /// of what has a byte in one of these ranges.
    pub fn is_confined_to(
        &self,
        desired: &WindowLayout<MemoryFile>,
        log: Option<&PlacedLog>,
        of: Option<&[Span<Iova>]>,
    ) -> bool {
        self.held.iter().all(|held| match &held.content {
            Content::Owner(placement) => {
                let iova = placement.range().iova();
                let concerned = of.is_none_or(|of| of.iter().any(|span| span.overlaps(iova)));
                !concerned || (!held.is_leaving() && desired.has(placement))
            }
            Content::Log(held_log) => of.is_some() || (!held.is_leaving() && Some(held_log) == log),
            _ => true,
        })
    }

    /// Whether the peer holds nothing of the owner's, and may be asked to.
    pub fn has_nothing(&self) -> bool {
        matches!(self.phase, Phase::Open | Phase::Closed) && !self.held.iter().any(Held::is_owners)
    }

    /// Whether the peer has this log for certain, or none is wanted and it has none.
    pub fn has_log(&self, log: Option<&PlacedLog>) -> bool {
        let mut logs = self.held.iter().filter(|held| matches!(held.content, Content::Log(_)));
        match (logs.next(), log) {
            (None, None) => true,
            (Some(held), Some(log)) => {
                held.content == Content::Log(log.clone())
                    && held.state == HeldState::Granted
                    && logs.next().is_none()
            }
            _ => false,
        }
    }

    /// Whether the peer has all of `desired`, and nothing of it is in question.
    pub fn shows_exactly(&self, desired: &WindowLayout<MemoryFile>) -> bool {
        self.phase == Phase::Open
            && self.is_ready()
            && self.asked == *desired
            && self.held.iter().filter(|held| held.is_owners()).all(|held| held.state == HeldState::Granted)
    }

    /// The owner's ranges that the VMM has, for certain.
    pub fn granted_ranges(&self) -> impl Iterator<Item = &Placement<MemoryFile>> {
        self.owner_ranges().filter(|(_, granted)| *granted).map(|(placement, _)| placement)
    }

    /// Whether the VMM may be asked for changes, now or when a revocation is done.
    pub fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open | Phase::Revoking { .. })
    }

    /// Whether the peer's device has its link and control areas.
    pub fn is_ready(&self) -> bool {
        BASE.iter().take(2).all(|content| {
            self.held.iter().any(|held| held.content == *content && held.state == HeldState::Granted)
        })
    }

    /// The owner's ranges that the peer's VMM has, or may have.
    pub fn owner_ranges(&self) -> impl Iterator<Item = (&Placement<MemoryFile>, bool)> {
        self.held.iter().filter_map(|held| match &held.content {
            Content::Owner(placement) => Some((placement, held.state == HeldState::Granted)),
            _ => None,
        })
    }

    /// Bytes of the owner's that the peer's VMM has, or may have.
    pub fn owner_bytes(&self) -> u64 {
        self.owner_ranges().map(|(placement, _)| placement.window().len()).sum()
    }

    /// Whether a VMM that takes no changes may hold mappings.
    pub fn is_residue(&self) -> bool {
        self.phase == Phase::Residue
    }

    /// The phase's name for `status`.
    pub fn phase_name(&self) -> &'static str {
        match self.phase {
            Phase::Closed => "closed",
            Phase::Open => "open",
            Phase::Revoking { .. } => "revoking",
            Phase::Residue => "residue",
            Phase::Reopening { .. } | Phase::Clearing { .. } => "reopening",
        }
    }

    fn start(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        self.phase = Phase::Open;
        effects.push(Effect::StopWatching);
        for content in BASE {
            self.map(content, now, effects);
        }
    }

    /// The slot of the witness that the VMM confirmed.
    fn witness_slot(&self) -> Option<u8> {
        self.held.iter().find_map(|held| match held.content {
            Content::Witness { slot } if held.state == HeldState::Granted => Some(slot),
            _ => None,
        })
    }

    fn map(&mut self, content: Content, now: Instant, effects: &mut Vec<Effect>) {
        let op = self.ask(WindowOp::Map(content.clone()), now, effects);
        self.held.push(Held { content, state: HeldState::Granting(op) });
        self.counters.largest = self.counters.largest.max(self.owner_bytes());
    }

    fn unmap(&mut self, content: Content, now: Instant, effects: &mut Vec<Effect>) {
        let op = self.ask(WindowOp::Unmap(content.clone()), now, effects);
        for held in &mut self.held {
            if held.content == content && !held.is_leaving() {
                held.state = HeldState::Revoking(op);
            }
        }
    }

    fn ask(&mut self, change: WindowOp, now: Instant, effects: &mut Vec<Effect>) -> OpId {
        self.next_op += 1;
        let op = OpId(self.next_op);
        self.unconfirmed.push_back((op, now + self.timeout));
        effects.push(Effect::Window(op, change));
        op
    }
}

impl Held {
    fn is_owners(&self) -> bool {
        matches!(self.content, Content::Owner(_) | Content::Log(_))
    }

    /// Whether the VMM was asked to unmap it.
    fn is_leaving(&self) -> bool {
        self.left_at().is_some()
    }

    /// The change by which the VMM was asked to unmap it.
    fn left_at(&self) -> Option<OpId> {
        match self.state {
            HeldState::Revoking(op) | HeldState::Unmapped(op) => Some(op),
            HeldState::Granting(_) | HeldState::Answered(_) | HeldState::Granted => None,
        }
    }

    fn is_witness(&self) -> bool {
        matches!(self.content, Content::Witness { .. })
    }
}
