//! The link: joins the owner's session, the peer's session and the window.
//!
//! Each event is applied in three steps: the side that it concerns takes it; what
//! the peer should see is worked out anew (`settle`); and the difference
//! becomes effects. An owner's request that takes memory away is answered when the
//! peer has lost it, and not before.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use iommu::{WindowGeometry, WindowLayout};
use vhost_pci_device::abi;

use super::descriptor::{Eventfd, MemoryFile};
use super::doorbell::Doorbell;
use super::fault::Fault;
use super::iommu::demand::{Demand, DemandCounters};
use super::iommu::room::Room;
use super::iommu::shown::Shown;
use super::message::{Effect, Event, Flood, Generations, LinkContents, Log, Reply, Request, Side, Wire};
use super::migration::geometry;
use super::owner::OwnerSession;
use super::peer::PeerSession;
use super::pending::{Concern, Deadlines, Pending};
use super::release::{Release, loses};
use super::served::Served;
use super::window::Window;
use super::wiring::Wiring;
use crate::config::LinkConfig;

/// Connections of a side that are all logged; of later ones only powers of two.
const LOGGED_CONNECTIONS: u64 = 32;

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
    /// The burst that the peer's driver is in the middle of when its link ends.
    pub(super) served: Served,
    /// What of the owner's memory the peer should have.
    pub(super) layout: WindowLayout<MemoryFile>,
    /// Of an owner with an IOMMU: what is open between the sides, and what is chosen to be
    /// shown.
    pub(super) demand: Demand,
    pub(super) demand_counters: DemandCounters,
    pub(super) shown: Shown,
    pub(super) pending: Option<Pending>,
    /// The link ends, and waits so long for its peer.
    pub(super) unplug: Option<Deadlines>,
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
            served: Served::new(timeout),
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
                | Event::Unmarked(..)
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
            Event::Unserved => self.served.end(),
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
            Event::Unmarked(reason) => self.count(&Fault::Log(reason), "owner", &mut effects),
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
        let of_driver =
            |pending: &Pending| pending.driver_deadline().filter(|_| !self.withdraws && !silent_peer);
        let pending = self.pending.as_ref();
        let pending =
            pending.map(|pending| of_driver(pending).unwrap_or_else(|| pending.until.next(silent_peer)));
        let unplug = self.unplug.map(|unplug| unplug.next(silent_peer));
        let doorbell = self.doorbell_function.as_ref().and_then(Doorbell::deadline);
        let (demand, wiring) = (self.demand.deadline(), self.wiring.deadline());
        let others =
            [pending, unplug, demand, wiring, doorbell, self.release.deadline(), self.served.deadline()];
        self.window.deadline().into_iter().chain(others.into_iter().flatten()).min()
    }

    /// Whether a VMM is connected that may hold mappings and takes no changes.
    fn silent_peer(&self) -> bool {
        self.peer.is_some() && self.window.is_residue()
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

    /// Whether it matters if the peer's driver serves an earlier generation of the link still.
    pub fn awaits_served(&self) -> bool {
        self.served.is_waited_for()
    }

    fn peer_says_served(&self) -> bool {
        self.peer.as_ref().and_then(|peer| peer.driver).is_some_and(|driver| driver.says_served)
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

    fn tick(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        if let Err(fault) = self.window.tick(now, effects).and_then(|()| self.wiring.tick(now)) {
            self.peer_failed(&fault, effects);
        }
        self.served.tick(now);
        if self.release.tick(now) {
            self.count(&Fault::Unreleased(self.release.patience().as_millis()), "peer", effects);
        }
        if let Some(Err(fault)) = self.doorbell_function.as_ref().map(|doorbell| doorbell.tick(now)) {
            self.refuse_doorbell(&fault, effects);
        }
        self.answer_without_driver(now, effects);
        let mut waits = self.pending.iter().map(|pending| pending.until).chain(self.unplug);
        let overdue = waits.any(|until| now >= until.peer);
        if overdue && self.silent_peer() {
            self.peer_failed(&Fault::Unconfirmed(self.timeout.as_millis()), effects);
        }
        if self.pending.as_ref().is_some_and(|pending| now >= pending.until.last) {
            // Never a false answer: the owner's VMM learns that it has none.
            let message =
                "the peer's VMM may still hold the owner's memory; the owner is disconnected unanswered";
            effects.push(Effect::Log(Log::Fault(message.into())));
            self.failure = Some(message.into());
            effects.push(Effect::Disconnect(Side::Owner));
            self.leave(Side::Owner, effects);
        }
        if self.unplug.take_if(|unplug| now >= unplug.last).is_some() {
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
        self.unplug = Some(Deadlines::new(now, self.timeout));
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
                self.served.end();
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
                if self.served.is_waited_for() || self.is_up() && self.peer_says_served() {
                    self.served.wait(now);
                    effects.push(Effect::WatchServed(self.generations.link));
                }
                effects.extend(self.control_call().map(Effect::NotifyPeer));
                for want in self.demand.wants.drain(..) {
                    effects.push(Effect::Answer(want.command, abi::CTRL_STALE, false));
                }
            }
            self.published = contents;
        }
        self.answer_mapped(effects);
        // And a device of the peer's VM lets go of it before, and so does a driver in the middle of a burst.
        if !self.release.is_owed() && !self.served.is_waited_for() {
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
