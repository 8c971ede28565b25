//! Which way each notification goes, end by end: by the peer's VMM, if it takes the owner's
//! eventfds; by a doorbell function, if the peer's VM has one and its driver uses it; else by
//! the relay.

use std::time::Instant;

use super::fault::Fault;
use super::message::{Effect, Side, Wire};
use super::state::Link;
use super::wiring::{Answered, End, Ends, WireId};
use crate::config::WiringPolicy;

impl Wire {
    /// Which end it is about.
    pub fn end(&self) -> End {
        End { vring: self.vring, from: self.from }
    }
}

/// The owner's eventfd of each end.
fn ends(wires: &[Wire]) -> Ends {
    let eventfd = |wire: &Wire| match wire.from {
        Side::Owner => wire.source.clone(),
        Side::Peer => wire.target.clone(),
    };
    wires.iter().map(|wire| (wire.end(), eventfd(wire))).collect()
}

/// How the notifications of an end go, for `status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// There are none.
    None,
    /// From one VMM's eventfd to the other's kernel, no thread in between.
    Direct,
    /// The same, by the doorbell function.
    Doorbell,
    /// One of the two is being asked to; signals wait in the eventfd meanwhile, or are relayed.
    Changing,
    /// The kicks wait until the peer's driver has said what it uses.
    Waiting,
    /// By the broker's relay, for a reason that the operator may want to know.
    Relayed(Option<&'static str>),
}

impl Link {
    /// Whether the peer's VMM has no eventfd of the owner's but those of live vrings.
    pub(super) fn is_wired_as_wanted(&self) -> bool {
        self.wiring.is_confined_to(&ends(&self.wanted_wires()))
    }

    /// Works out the way of each end, and turns the differences into effects.
    pub(super) fn settle_notifications(&mut self, up: bool, now: Instant, effects: &mut Vec<Effect>) {
        let wires = if up { self.wanted_wires() } else { Vec::new() };
        let ends = ends(&wires);

        let by_vmm = if self.vmm_wires() { self.of_enabled_queues(&ends) } else { Ends::new() };
        self.wiring.reconcile(&by_vmm, now, effects);

        let armed = self.armed_vectors();
        let (wants_doorbell, vrings) = (armed > 0 && !self.vmm_wires(), self.config.max_vrings());
        let by_doorbell = if wants_doorbell { ends } else { Ends::new() };
        let page_changed = self
            .doorbell_function
            .as_mut()
            .is_some_and(|doorbell| doorbell.reconcile(&by_doorbell, armed, vrings, now, effects));
        if page_changed {
            effects.extend(self.control_call().map(Effect::NotifyPeer));
        }

        let relayed: Vec<Wire> = wires.into_iter().filter(|wire| self.is_relayed(wire)).collect();
        if relayed != self.wires {
            effects.push(Effect::Wire(relayed.clone()));
            self.wires = relayed;
        }
    }

    /// Whether the peer's VMM takes the owner's eventfds.
    fn vmm_wires(&self) -> bool {
        let able = self.peer.as_ref().is_some_and(|peer| peer.has_wiring() && peer.is_started());
        able && self.config.wiring == WiringPolicy::Direct
    }

    fn of_enabled_queues(&self, ends: &Ends) -> Ends {
        let queue = |end: &End| self.peer.as_ref()?.queue_of_vring(end.vring);
        let enabled = ends.iter().filter(|(end, _)| queue(end).is_some_and(|queue| queue.is_enabled()));
        enabled.map(|(end, eventfd)| (*end, eventfd.clone())).collect()
    }

    /// Vectors of the doorbell function that the peer's driver waits for.
    fn armed_vectors(&self) -> u32 {
        let driver = self.peer.as_ref().and_then(|peer| peer.driver);
        match self.config.wiring {
            WiringPolicy::Direct => driver.map_or(0, |driver| driver.vectors),
            WiringPolicy::Relay => 0,
        }
    }

    fn is_relayed(&self, wire: &Wire) -> bool {
        let end = wire.end();
        let carried = self.wiring.carries(end)
            || self.doorbell_function.as_ref().is_some_and(|doorbell| doorbell.carries(end));
        match wire.from {
            // What the peer's VMM or driver sends by itself is passed on in any case.
            Side::Peer => true,
            Side::Owner => !carried && !self.awaits_driver(),
        }
    }

    /// Whether kicks wait until the peer's driver has said whether it uses the doorbell
    /// function, which takes kicks away from all who wait for them.
    fn awaits_driver(&self) -> bool {
        let unknown = self.peer.as_ref().is_some_and(|peer| peer.driver.is_none());
        let usable = self.doorbell_function.as_ref().is_some_and(|doorbell| !doorbell.is_refused());
        unknown && usable && self.config.wiring == WiringPolicy::Direct
    }

    /// The VMM with the doorbell function broke the rules.
    pub(super) fn refuse_doorbell(&mut self, fault: &Fault, effects: &mut Vec<Effect>) {
        if let Some(doorbell) = &mut self.doorbell_function {
            doorbell.refuse();
            self.count(fault, "doorbell", effects);
        }
    }

    /// The doorbell function is another: the driver has not said that it uses this one.
    pub(super) fn forget_vectors(&mut self) {
        if let Some(driver) = self.peer.as_mut().and_then(|peer| peer.driver.as_mut()) {
            driver.vectors = 0;
        }
    }

    /// The peer's VMM answered what it was asked about its wiring.
    pub(super) fn wired(&mut self, id: WireId, result: Result<(), String>, effects: &mut Vec<Effect>) {
        match self.wiring.answered(id, result) {
            Ok(Answered::Done) => {}
            Ok(Answered::SignalAgain(end)) => {
                let wire = self.wanted_wires().into_iter().find(|wire| wire.end() == end);
                effects.extend(wire.map(|wire| Effect::Signal(wire.target)));
            }
            Err(fault) => self.peer_failed(&fault, effects),
        }
    }

    /// How the notifications of an end go.
    pub(super) fn way(&self, end: End) -> Way {
        let doorbell = self.doorbell_function.as_ref();
        if self.wiring.is_direct(end) {
            return Way::Direct;
        }
        if doorbell.is_some_and(|doorbell| doorbell.is_direct(end)) {
            return Way::Doorbell;
        }
        if self.wiring.carries(end) || doorbell.is_some_and(|doorbell| doorbell.carries(end)) {
            return Way::Changing;
        }
        let is_live = self.is_up() && self.wanted_wires().iter().any(|wire| wire.end() == end);
        if is_live && end.from == Side::Owner && self.awaits_driver() {
            return Way::Waiting;
        }
        if !self.wires.iter().any(|wire| wire.end() == end) {
            return Way::None;
        }
        Way::Relayed(match (self.config.wiring, doorbell) {
            (WiringPolicy::Relay, _) => Some("the link's wiring is \"relay\""),
            _ if self.wiring.is_refused(end) => Some("the peer's VMM refused the eventfd"),
            (_, None) if self.config.doorbell_socket.is_some() && !self.vmm_wires() => {
                Some("no doorbell function is connected")
            }
            (_, Some(doorbell)) if doorbell.is_refused() => {
                Some("the doorbell function's VMM broke the rules; plug it anew")
            }
            (_, Some(_)) if self.armed_vectors() == 0 => {
                Some("the peer's driver does not use the doorbell function")
            }
            (_, Some(_)) if end.from == Side::Owner => {
                Some("the doorbell function has no vector left; plug it anew")
            }
            (_, Some(_)) => Some("the doorbell function has no number left; plug it anew"),
            (_, None) => None,
        })
    }
}
