//! The link: joins the owner's session, the peer's session and the window.
//!
//! Each event is applied in three steps: the side that it concerns takes it; what
//! the peer should see is worked out anew (`settle`); and the difference
//! becomes effects. An owner's request that takes memory away is answered when the
//! peer has lost it, and not before.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use iommu::{Iova, Span, WindowGeometry, WindowLayout};
use vhost_pci_device::abi;

use super::descriptor::{Eventfd, MemoryFile};
use super::doorbell::Doorbell;
use super::fault::Fault;
use super::iommu::demand::{Demand, DemandCounters};
use super::iommu::listen::Refusal;
use super::iommu::room::Room;
use super::iommu::shown::Shown;
use super::message::{
    CommandId, Effect, Event, Flood, Generations, LinkContents, Log, Reply, Request, Side, Wire,
};
use super::migration::{DRIVER_PATIENCE, geometry};
use super::owner::OwnerSession;
use super::peer::{AttachedDriver, PeerChange, PeerSession};
use super::release::{Release, loses};
use super::window::Window;
use super::wiring::Wiring;
use crate::config::LinkConfig;

/// Connections of a side that are all logged; of later ones only powers of two.
const LOGGED_CONNECTIONS: u64 = 32;

/// An owner's request whose answer waits for a revocation.
#[derive(Debug)]
pub(super) struct Pending {
    reply: Reply,
    concerns: Concern,
    /// Until when a peer may hold it up whose device is stopped.
    peer_deadline: Instant,
    /// Until when the owner waits.
    deadline: Instant,
}

impl Pending {
    /// Whether it waits for some addresses only, and not for all of the window.
    pub(super) fn is_of_some(&self) -> bool {
        matches!(self.concerns, Concern::Addresses(_) | Concern::Eventfds)
    }

    /// Until when the peer's driver may hold it up.
    pub(super) fn driver_deadline(&self) -> Option<Instant> {
        match self.concerns {
            Concern::Marking { until, .. } => Some(until),
            Concern::Everything | Concern::Addresses(_) | Concern::Eventfds => None,
        }
    }

    /// What it is answered with.
    pub(super) fn into_reply(self) -> Reply {
        self.reply
    }
}

/// What of the owner's the peer must have lost before an owner's request is answered.
#[derive(Debug)]
enum Concern {
    /// All that is not the owner's to show any more: memory and eventfds.
    Everything,
    /// Memory at these addresses.
    Addresses(Vec<Span<Iova>>),
    /// Eventfds that were replaced.
    Eventfds,
    /// All that may be written unmarked: the generation of the link page at which it was, and until when
    /// a driver is waited for.
    Marking { before: u64, until: Instant },
}

/// Until when a link that ends waits for its peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unplug {
    /// As [`Pending::peer_deadline`].
    peer_deadline: Instant,
    deadline: Instant,
}

/// Counts that the link itself keeps.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) owner_connections: u64,
    pub(super) takeovers: u64,
    pub(super) peer_connections: u64,
    pub(super) owner_messages: u64,
    pub(super) peer_messages: u64,
    pub(super) control_commands: u64,
    pub(super) faults: BTreeMap<&'static str, u64>,
}

/// One link of the broker.
#[derive(Debug)]
pub struct Link {
    pub(super) config: LinkConfig,
    pub(super) timeout: Duration,
    pub(super) geometry: WindowGeometry,
    pub(super) owner: Option<OwnerSession>,
    /// Another VMM of the owner's side, which does not have the link.
    pub(super) waiting: Option<OwnerSession>,
    /// All of the owner's has to leave the peer's window before anything is shown again.
    pub(super) withdraws: bool,
    pub(super) peer: Option<PeerSession>,
    pub(super) window: Window,
    /// What a device of the peer's VM has to let go of before it leaves the window.
    pub(super) release: Release,
    /// What of the owner's memory the peer should have.
    pub(super) layout: WindowLayout<MemoryFile>,
    /// Of an owner with an IOMMU: what is open between the sides, and what is chosen to be
    /// shown.
    pub(super) demand: Demand,
    pub(super) demand_counters: DemandCounters,
    pub(super) shown: Shown,
    pub(super) pending: Option<Pending>,
    /// The link ends.
    pub(super) unplug: Option<Unplug>,
    pub(super) failure: Option<String>,
    pub(super) published: LinkContents,
    /// The room that commands may have before the link settles.
    pub(super) room: Room,
    /// Something happened that what the peer should see may follow from.
    pub(super) unsettled: bool,
    pub(super) generations: Generations,
    /// What the relay has to pass on.
    pub(super) wires: Vec<Wire>,
    /// What the peer's VMM has of the owner's eventfds.
    pub(super) wiring: Wiring,
    /// The doorbell function of the peer's VM, while it is connected.
    pub(super) doorbell_function: Option<Doorbell>,
    /// The control ring's.
    doorbell: Option<Eventfd>,
    pub(super) counters: Counters,
}

impl Link {
    /// A link that nobody is connected to. The peer's VMM has `timeout` to confirm a
    /// change of its window. `generation` is the first of the link page: larger than
    /// any that an earlier broker can have shown, and even.
    pub fn new(config: LinkConfig, timeout: Duration, generation: u64) -> Result<Self, Fault> {
        let geometry = geometry(config.window_len, 0)?;
        let shown = Shown::new(config.max_mappings);
        Ok(Self {
            config,
            timeout,
            geometry,
            owner: None,
            waiting: None,
            withdraws: false,
            peer: None,
            window: Window::new(timeout),
            release: Release::new(timeout),
            layout: WindowLayout::new(),
            demand: Demand::default(),
            demand_counters: DemandCounters::default(),
            shown,
            pending: None,
            unplug: None,
            failure: None,
            published: LinkContents::default(),
            room: Room::Taken,
            unsettled: false,
            generations: Generations { link: generation, table: generation },
            wires: Vec::new(),
            wiring: Wiring::new(timeout),
            doorbell_function: None,
            doorbell: None,
            counters: Counters::default(),
        })
    }

    /// All that a new link area is to say.
    pub fn publication(&self) -> Effect {
        Effect::Publish(self.published.clone(), self.generations)
    }

    /// Applies one event and gives what the runtime has to do, in this order.
    pub fn apply(&mut self, event: Event, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        // Commands, and words on the owner's IOMMU, change nothing by themselves.
        self.unsettled |= !matches!(
            event,
            Event::Command(..)
                | Event::MissDone(..)
                | Event::TooOften(..)
                | Event::Request(Side::Owner, Request::Iotlb(_) | Request::IommuPush { .. })
        );
        match event {
            Event::Connected(Side::Owner) => {
                self.counters.owner_connections += 1;
                self.note_connection(Side::Owner.name(), self.counters.owner_connections, &mut effects);
                self.owner = Some(OwnerSession::new(&self.config));
            }
            Event::Connected(Side::Peer) => {
                self.counters.peer_connections += 1;
                self.note_connection(Side::Peer.name(), self.counters.peer_connections, &mut effects);
                self.peer = Some(PeerSession::new(&self.config));
            }
            Event::TooOften(side, flood) => {
                let rates = self.config.rates;
                let limit = match flood {
                    Flood::Messages => rates.messages,
                    Flood::Notifications => rates.notifications,
                    Flood::Connections => rates.connections,
                };
                self.count(&Fault::TooOften { flood, limit }, side.name(), &mut effects);
            }
            Event::Waiting(event) => self.waiting_event(event, &mut effects),
            Event::TurnedAway(side) => self.count(&Fault::Occupied, side.name(), &mut effects),
            Event::NotPermitted { door, pid, uid } => {
                self.count(&Fault::NotPermitted { pid, uid }, door, &mut effects);
            }
            Event::Request(Side::Owner, request) => self.owner_request(request, now, &mut effects),
            Event::Request(Side::Peer, request) => self.peer_request(request, now, &mut effects),
            Event::Disconnected(side, fault) => {
                if let Some(fault) = fault {
                    self.count(&fault, side.name(), &mut effects);
                }
                self.leave(side, &mut effects);
            }
            Event::WindowDone(op, result) => {
                if let Err(fault) = self.window.confirm(op, result, now, &mut effects) {
                    self.peer_failed(&fault, &mut effects);
                }
            }
            Event::WitnessGone => self.window.witness_gone(now, &mut effects),
            Event::WireDone(id, result) => self.wired(id, result, &mut effects),
            Event::DoorbellConnected => {
                self.doorbell_function = Some(Doorbell::new(self.timeout, now));
                self.forget_vectors();
                effects.push(Effect::WatchDoorbell);
            }
            Event::DoorbellTurnedAway => self.count(&Fault::Occupied, "doorbell", &mut effects),
            Event::DoorbellRead => {
                self.doorbell_function.iter_mut().for_each(Doorbell::read);
            }
            Event::DoorbellSpoke => self.refuse_doorbell(&Fault::DoorbellSpoke, &mut effects),
            Event::DoorbellGone => {
                self.doorbell_function = None;
                self.forget_vectors();
                // What its page said counts no more.
                effects.extend(self.control_call().map(Effect::NotifyPeer));
            }
            Event::MissDone(id, told) => self.miss_done(id, told, now, &mut effects),
            Event::Command(command, request, readable, writable) => {
                self.command(command, &request, (readable, writable), now, &mut effects);
            }
            Event::ControlRingBroken(reason) => self.count(&Fault::ControlRing(reason), "peer", &mut effects),
            Event::Unplug => self.unplug(now, &mut effects),
            Event::Tick => self.tick(now, &mut effects),
        }
        self.change_owner(&mut effects);
        self.settle(now, &mut effects);
        effects
    }

    /// When an [`Event::Tick`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        let silent_peer = self.silent_peer();
        let wait = |peer_deadline: Instant, deadline| match silent_peer {
            true => peer_deadline.min(deadline),
            false => deadline,
        };
        let of_driver =
            |pending: &Pending| pending.driver_deadline().filter(|_| !self.withdraws && !silent_peer);
        let pending = self.pending.as_ref();
        let pending = pending.map(|pending| {
            of_driver(pending).unwrap_or_else(|| wait(pending.peer_deadline, pending.deadline))
        });
        let unplug = self.unplug.map(|unplug| wait(unplug.peer_deadline, unplug.deadline));
        let doorbell = self.doorbell_function.as_ref().and_then(Doorbell::deadline);
        let (demand, wiring) = (self.demand.deadline(), self.wiring.deadline());
        let others = [pending, unplug, demand, wiring, doorbell, self.release.deadline()];
        self.window.deadline().into_iter().chain(others.into_iter().flatten()).min()
    }

    /// Whether a VMM is connected that may hold mappings and takes no changes.
    fn silent_peer(&self) -> bool {
        self.peer.is_some() && self.window.is_residue()
    }

    /// Takes one command of the peer's driver.
    fn command(
        &mut self,
        command: CommandId,
        request: &abi::ControlRequest,
        (readable, writable): (u64, u64),
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        self.counters.control_commands += 1;
        let generation = self.generations.link;
        let Some(peer) = self.peer.as_mut() else {
            return effects.push(Effect::Answer(command, abi::CTRL_INVALID, false));
        };
        let status = match request.command.value() {
            abi::CTRL_ATTACH if request.value.value() != generation => abi::CTRL_STALE,
            abi::CTRL_ATTACH => {
                let has = |flag| request.flags.value() & flag != 0;
                // An MSI-X table has 2048 entries at most.
                let vectors = request.len.value().min(2048) as u32;
                peer.driver = Some(AttachedDriver {
                    generation,
                    interrupt: has(abi::ATTACH_F_INTERRUPT),
                    vectors: if has(abi::ATTACH_F_DOORBELL) { vectors } else { 0 },
                    quiesces: has(abi::ATTACH_F_QUIESCE),
                });
                if !has(abi::ATTACH_F_QUIESCE) {
                    self.release.forget();
                }
                self.unsettled = true;
                abi::CTRL_OK
            }
            abi::CTRL_DETACH => {
                peer.driver = None;
                self.release.forget();
                self.unsettled = true;
                abi::CTRL_OK
            }
            abi::CTRL_RELEASE => {
                let table = request.value.value();
                let quiesces = peer.driver.is_some_and(|driver| driver.quiesces);
                match quiesces && table <= self.generations.table {
                    false => abi::CTRL_INVALID,
                    true if self.release.give(table) => {
                        self.unsettled = true;
                        abi::CTRL_OK
                    }
                    true => abi::CTRL_STALE,
                }
            }
            abi::CTRL_FAULT => self.ring_fault(request, effects),
            // A command of a driver that serves an earlier link must not reach into this one.
            abi::CTRL_MAP | abi::CTRL_FETCH | abi::CTRL_STORE
                if peer.driver.is_none_or(|driver| driver.generation != generation) =>
            {
                abi::CTRL_STALE
            }
            abi::CTRL_MAP | abi::CTRL_FETCH | abi::CTRL_STORE => {
                return self.take_want(command, request, readable, writable, now, effects);
            }
            _ => abi::CTRL_UNKNOWN,
        };
        effects.push(Effect::Answer(command, status, false));
    }

    /// Bytes of the window that have the owner's read-write memory: all, unless the peer's VMM
    /// has a second aperture of that length for what is read-only.
    pub fn window_len(&self) -> u64 {
        self.config.window_len
    }

    /// Whether it matters when the VMM with the doorbell function has read what it was sent.
    pub fn awaits_doorbell(&self) -> bool {
        self.doorbell_function.as_ref().is_some_and(|doorbell| doorbell.deadline().is_some())
    }

    /// Whether the peer's driver has started its device.
    pub fn is_shown(&self) -> bool {
        self.peer.as_ref().is_some_and(PeerSession::is_started)
    }

    /// Whether the peer's driver may use the owner's vrings.
    pub fn is_up(&self) -> bool {
        self.published.status & abi::LINK_S_UP != 0
    }

    /// The eventfd by which the peer's driver is interrupted for the control ring
    /// and for changes of the link area.
    pub fn control_call(&self) -> Option<Eventfd> {
        let peer = self.peer.as_ref().filter(|peer| peer.is_started())?;
        peer.control_queue()?.call.clone()
    }

    fn ring_fault(&mut self, request: &abi::ControlRequest, effects: &mut Vec<Effect>) -> u32 {
        let vring = request.vring.value();
        let kind = abi::FaultKind::from_number(request.kind.value());
        let (Some(kind), true) = (kind, vring < self.config.max_vrings()) else {
            return abi::CTRL_INVALID;
        };
        let fault = Fault::Ring { vring, kind, value: request.value.value() };
        self.count(&fault, "owner", effects);
        let err = self.owner.as_ref().and_then(|owner| owner.vrings()[usize::from(vring)].err.clone());
        effects.extend(err.map(Effect::Signal));
        abi::CTRL_OK
    }

    fn owner_request(&mut self, request: Request, now: Instant, effects: &mut Vec<Effect>) {
        let Some(owner) = self.owner.as_mut() else {
            return;
        };
        self.counters.owner_messages += 1;
        let replaces = matches!(request, Request::SetVringKick { .. } | Request::SetVringCall { .. });
        let takes_away = matches!(
            request,
            Request::GetVringBase { .. }
                | Request::SetVringEnable { enable: false, .. }
                | Request::SetMemTable(_)
                | Request::RemMemReg { .. }
                | Request::ResetOwner
                | Request::Iotlb(_)
                | Request::IommuPush { .. }
        );
        let changes_memory =
            matches!(request, Request::SetMemTable(_) | Request::AddMemReg(_) | Request::RemMemReg { .. });
        let concerns = concerned(&request, self.generations.link, now);
        let logs = matches!(request, Request::SetFeatures(_) | Request::SetLogBase { .. });
        let starts = matches!(request, Request::SetVringKick { .. } | Request::SetVringEnable { .. });
        let taken = match request {
            Request::SetBackendChannel(stream) => owner.take_channel().map_err(Refusal::End).map(|()| {
                // What the old channel was asked nobody answers any more.
                self.demand.asked = None;
                effects.push(Effect::OpenChannel(Side::Owner, stream));
                Reply::Done
            }),
            Request::Iotlb(message) => self.take_iotlb(message).map(|()| Reply::Done),
            Request::IommuPush { reset, entries } => self.take_push(reset, &entries).map(|()| Reply::Done),
            Request::SetFeatures(acked) => self.begins_or_ends_log(acked).and_then(|()| {
                let owner = self.owner.as_mut().ok_or(Refusal::End(Fault::Unsupported("SET_FEATURES")))?;
                owner.apply(request).map_err(Refusal::of)
            }),
            request @ Request::SetLogBase { .. } => self.take_log(request, effects),
            request => owner.apply(request).map_err(Refusal::of),
        };
        if logs {
            self.take_geometry();
            self.end_withdrawal();
        }
        if changes_memory {
            self.hide_unbacked();
        }
        if starts {
            self.demand.refused_vrings.clear();
        }
        match taken.and_then(|reply| self.plan_identity().map(|()| reply).map_err(Refusal::End)) {
            Err(Refusal::End(fault)) => self.refuse(Side::Owner, &fault, effects),
            Err(Refusal::Decline(fault)) => {
                self.count(&fault, Side::Owner.name(), effects);
                effects.push(Effect::Reply(Side::Owner, Reply::Declined));
            }
            Ok(reply) if logs && self.withdraws => self.reply_when_confined(reply, concerns, now, effects),
            Ok(reply) if takes_away || replaces => {
                if takes_away
                    && self.owner.as_ref().is_some_and(|owner| owner.has_iommu() && !owner.is_running())
                {
                    self.stop_demand(effects);
                }
                self.reply_when_confined(reply, concerns, now, effects);
            }
            Ok(reply) => effects.push(Effect::Reply(Side::Owner, reply)),
        }
    }

    /// The layout of an owner without an IOMMU follows from its memory table.
    pub(super) fn plan_identity(&mut self) -> Result<(), Fault> {
        if let Some(owner) = self.owner.as_ref().filter(|owner| !owner.has_iommu()) {
            self.shown.clear();
            self.layout = WindowLayout::plan(&self.geometry, &owner.identity(), &self.layout)?;
        }
        Ok(())
    }

    /// Answers the owner when the peer holds no more than it should of what the request
    /// concerns: what is taken out for another reason must not hold the owner up.
    fn reply_when_confined(
        &mut self,
        reply: Reply,
        concerns: Concern,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        if self.is_confined(&concerns) {
            effects.push(Effect::Reply(Side::Owner, reply));
            return;
        }
        self.pending = Some(Pending {
            reply,
            concerns,
            // The peer's VMM has its time; then the kernel's word that its mappings are
            // gone has as much again.
            peer_deadline: now + self.timeout,
            deadline: now + 2 * self.timeout,
        });
    }

    /// Whether the peer holds no more of the owner's than it should.
    fn is_confined(&self, concerns: &Concern) -> bool {
        let (nothing, log) = (WindowLayout::new(), self.wanted_log());
        let layout = if self.withdraws { &nothing } else { &self.layout };
        let has_lost = |of| self.window.is_confined_to(layout, log.as_ref(), of);
        match concerns {
            Concern::Everything => has_lost(None) && self.is_wired_as_wanted(),
            Concern::Addresses(addresses) => has_lost(Some(addresses)),
            Concern::Eventfds => self.is_wired_as_wanted(),
            Concern::Marking { before, .. } => has_lost(None) && self.driver_follows(*before),
        }
    }

    fn peer_request(&mut self, request: Request, now: Instant, effects: &mut Vec<Effect>) {
        let Some(peer) = self.peer.as_mut() else {
            return;
        };
        self.counters.peer_messages += 1;
        let strict = peer.is_strict();
        // Before it says this, it takes back what was wired.
        let stops = match request {
            Request::GetVringBase { index }
            | Request::SetVringKick { index, .. }
            | Request::SetVringEnable { index, enable: false } => Some(index),
            _ => None,
        };
        let renews_control_call =
            matches!(request, Request::SetVringCall { index, .. } if index == u32::from(abi::QUEUE_CONTROL));
        let taken = match request {
            Request::SetBackendChannel(stream) => peer.take_channel(stream).map(|stream| {
                effects.push(Effect::OpenChannel(Side::Peer, stream));
                (Reply::Done, PeerChange::None)
            }),
            request => peer.apply(request),
        };
        match taken {
            Err(fault) => self.refuse(Side::Peer, &fault, effects),
            Ok((reply, change)) => {
                if let Some(queue) = stops {
                    self.wiring.queue_stopped(queue);
                }
                // What was signalled last may have reached one that is not looked at any more.
                if renews_control_call {
                    effects.extend(self.control_call().map(Effect::NotifyPeer));
                }
                match change {
                    PeerChange::None => {}
                    PeerChange::Started => {
                        self.demand.forget_peer();
                        self.wiring.device_started();
                        self.hide_unenforced();
                        effects.push(Effect::ResetControlRing);
                        self.window.open(strict, now, effects);
                    }
                    PeerChange::Stopped => {
                        self.demand.forget_peer();
                        self.release.forget();
                        self.wiring.device_stopped();
                        self.window.stop(effects);
                    }
                }
                effects.push(Effect::Reply(Side::Peer, reply));
            }
        }
    }

    fn tick(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        if let Err(fault) = self.window.tick(now, effects).and_then(|()| self.wiring.tick(now)) {
            self.peer_failed(&fault, effects);
        }
        if self.release.tick(now) {
            self.count(&Fault::Unreleased(self.release.patience().as_millis()), "peer", effects);
        }
        if let Some(Err(fault)) = self.doorbell_function.as_ref().map(|doorbell| doorbell.tick(now)) {
            self.refuse_doorbell(&fault, effects);
        }
        self.answer_without_driver(now, effects);
        let deadlines = self.pending.iter().map(|pending| pending.peer_deadline);
        let mut deadlines = deadlines.chain(self.unplug.map(|unplug| unplug.peer_deadline));
        let overdue = deadlines.any(|deadline| now >= deadline);
        if overdue && self.silent_peer() {
            self.peer_failed(&Fault::Unconfirmed(self.timeout.as_millis()), effects);
        }
        if self.pending.as_ref().is_some_and(|pending| now >= pending.deadline) {
            // Never a false answer: the owner's VMM learns that it has none.
            let message =
                "the peer's VMM may still hold the owner's memory; the owner is disconnected unanswered";
            effects.push(Effect::Log(Log::Fault(message.into())));
            self.failure = Some(message.into());
            effects.push(Effect::Disconnect(Side::Owner));
            self.leave(Side::Owner, effects);
        }
        if self.unplug.take_if(|unplug| now >= unplug.deadline).is_some() {
            effects.push(Effect::Unplugged(false));
        }
    }

    /// The link is to end: nothing of the owner's is shown from now on.
    fn unplug(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let has_iommu = self.owner.as_ref().is_some_and(OwnerSession::has_iommu);
        if let Some(owner) = &mut self.owner {
            owner.unplug();
        }
        if let Some(waiting) = &mut self.waiting {
            waiting.unplug();
        }
        if has_iommu {
            self.stop_demand(effects);
        }
        self.layout = WindowLayout::new();
        self.unplug = Some(Unplug { peer_deadline: now + self.timeout, deadline: now + 2 * self.timeout });
    }

    /// The peer's VMM cannot be relied on: it loses its link.
    pub(super) fn peer_failed(&mut self, fault: &Fault, effects: &mut Vec<Effect>) {
        self.count(fault, "peer", effects);
        self.failure = Some(fault.to_string());
        effects.push(Effect::Disconnect(Side::Peer));
        self.leave(Side::Peer, effects);
    }

    pub(super) fn refuse(&mut self, side: Side, fault: &Fault, effects: &mut Vec<Effect>) {
        self.count(fault, side.name(), effects);
        effects.push(Effect::Reply(side, Reply::Refused(fault.to_string())));
        effects.push(Effect::Disconnect(side));
        self.leave(side, effects);
    }

    fn leave(&mut self, side: Side, effects: &mut Vec<Effect>) {
        match side {
            Side::Owner => {
                self.owner = None;
                self.pending = None;
                self.stop_demand(effects);
                self.demand.asked = None;
                self.layout = WindowLayout::new();
                self.take_geometry();
            }
            Side::Peer if self.peer.take().is_some() => {
                self.demand.forget_peer();
                self.release.forget();
                self.wiring.disconnected();
                self.window.disconnect(effects);
            }
            Side::Peer => {}
        }
    }

    /// Works out what the peer should see and how notifications should go, and
    /// turns the differences into effects.
    fn settle(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        self.serve_demand(now, effects);
        if !std::mem::take(&mut self.unsettled) {
            self.answer_mapped(effects);
            return;
        }
        self.end_withdrawal();
        self.unsettled = false;
        let mappings = self.mappings();
        let up = !self.withdraws && self.is_usable(&mappings);
        if up && self.failure.take().is_some() {
            effects.push(Effect::Log(Log::Info("the link works again".into())));
        }

        self.settle_notifications(up, now, effects);
        let doorbell = self.peer.as_ref().filter(|peer| peer.is_started());
        let doorbell = doorbell.and_then(|peer| peer.control_queue()?.kick.clone());
        if doorbell != self.doorbell {
            effects.push(Effect::ControlDoorbell(doorbell.clone()));
            self.doorbell = doorbell;
        }

        // What is taken away leaves the link page before it leaves the window.
        let contents = self.contents(up, mappings);
        if contents != self.published {
            let Generations { link, table } = self.generations;
            let quiesces =
                self.peer.as_ref().and_then(|peer| peer.driver).is_some_and(|driver| driver.quiesces);
            let lent =
                quiesces && (self.release.is_owed() || loses(&self.published.mappings, &contents.mappings));
            if lent {
                self.release.ask(table + 2, now);
            }
            if contents.is_but_for_mappings(&self.published) {
                self.generations = Generations { link, table: table + 2 };
                effects.push(Effect::PublishTable(contents.mappings.clone(), self.generations.table));
                effects.extend(self.control_call().filter(|_| lent).map(Effect::NotifyPeer));
            } else {
                self.generations = Generations { link: link + 2, table: table + 2 };
                effects.push(Effect::Publish(contents.clone(), self.generations));
                effects.extend(self.control_call().map(Effect::NotifyPeer));
                for want in self.demand.wants.drain(..) {
                    effects.push(Effect::Answer(want.command, abi::CTRL_STALE, false));
                }
            }
            self.published = contents;
        }
        self.answer_mapped(effects);
        // And a device of the peer's VM lets go of it before.
        if !self.release.is_owed() {
            let (nothing, log) = (WindowLayout::new(), self.wanted_log());
            let layout = if self.withdraws { &nothing } else { &self.layout };
            self.window.reconcile(layout, log.as_ref(), now, effects);
        }

        let answered = self.pending.as_ref().is_some_and(|pending| self.is_confined(&pending.concerns));
        if let Some(pending) = self.pending.take_if(|_| answered) {
            effects.push(Effect::Reply(Side::Owner, pending.reply));
            // Commands may have waited for that.
            self.settle(now, effects);
        }
        if self.unplug.is_some() && self.is_confined(&Concern::Everything) {
            self.unplug = None;
            effects.push(Effect::Unplugged(true));
        }
    }

    /// Logs a connection, unless there were so many that somebody connects in a loop.
    pub(super) fn note_connection(&self, who: &str, count: u64, effects: &mut Vec<Effect>) {
        if count <= LOGGED_CONNECTIONS || count.is_power_of_two() {
            effects.push(Effect::Log(Log::Info(format!("{who} connected (number {count})"))));
        }
    }

    /// Counts a fault of a side, and logs it when its count is a power of two: a
    /// side that errs without end does not fill the log.
    pub(super) fn count(&mut self, fault: &Fault, side: &str, effects: &mut Vec<Effect>) {
        let count = self.counters.faults.entry(fault.kind()).or_default();
        *count += 1;
        if count.is_power_of_two() {
            let times = if *count > 1 { format!(" (so far {count} of this kind)") } else { String::new() };
            effects.push(Effect::Log(Log::Fault(format!("{side}: {fault}{times}"))));
        }
    }
}

/// What a request of the owner's front-end concerns that takes something away.
fn concerned(request: &Request, generation: u64, now: Instant) -> Concern {
    let span = |iova, size| Span::new(Iova::new(iova), size).ok();
    match request {
        Request::Iotlb(message) => match span(message.iova, message.size) {
            Some(span) => Concern::Addresses(vec![span]),
            None => Concern::Everything,
        },
        Request::IommuPush { reset: false, entries } => {
            Concern::Addresses(entries.iter().filter_map(|entry| span(entry.iova, entry.size)).collect())
        }
        Request::SetVringKick { .. } | Request::SetVringCall { .. } => Concern::Eventfds,
        Request::SetFeatures(_) | Request::SetLogBase { .. } => {
            Concern::Marking { before: generation, until: now + DRIVER_PATIENCE }
        }
        _ => Concern::Everything,
    }
}
