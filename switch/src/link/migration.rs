//! Live migration of the owner: when the peer's driver begins to mark what it writes, and which of two
//! VMMs of the owner's side has the link.
//!
//! The VMM that migrates its VM gives a dirty log and says that it wants it written
//! (VHOST_F_LOG_ALL). It is answered when nothing is written unmarked any more: all of its memory was
//! taken out of the peer's window, as in any revocation, and shown again with the log, at a new
//! generation, and a driver that was attached has attached to that one. A driver that was in the
//! middle of something cannot come back to it later than that.
//!
//! The VMM to which the VM migrates connects before that one leaves, and waits. It has the link when it
//! has started a vring and the other one has none that runs.

use std::time::{Duration, Instant};

use iommu::{Span, WindowGeometry, WindowLayout, WindowOffset};
use vhost_pci_device::abi;

use super::fault::Fault;
use super::features;
use super::iommu::listen::{Refusal, push};
use super::log::{DirtyLog, PlacedLog, high_len};
use super::message::{Effect, Log, Reply, Request, WaitingEvent};
use super::owner::OwnerSession;
use super::state::Link;

/// How long the owner's VMM waits for the peer's driver to attach, when it has nothing of the owner's that it
/// had before: one that takes longer is gone, or its VM stands still.
pub(super) const DRIVER_PATIENCE: Duration = Duration::from_millis(500);

/// Whom events and faults name when it is the second of the owner's VMMs.
const WAITING: &str = "owner that waits";

impl Link {
    /// The log that the peer's window should have now.
    pub(super) fn wanted_log(&self) -> Option<PlacedLog> {
        let owner = self.owner.as_ref().filter(|owner| owner.is_running() && !self.withdraws)?;
        PlacedLog::new(owner.log()?.clone(), self.config.window_len)
    }

    /// Takes SET_LOG_BASE. A log that cannot be used is answered all the same, as this message has no other
    /// answer; the request to use it is declined later.
    pub(super) fn take_log(&mut self, request: Request, effects: &mut Vec<Effect>) -> Result<Reply, Refusal> {
        let unsupported = || Refusal::End(Fault::Unsupported("LOG_SHMFD"));
        let Request::SetLogBase { file, file_len, offset, len } = request else { return Err(unsupported()) };
        let owner = self.owner.as_mut().ok_or_else(unsupported)?;
        let log = DirtyLog::new(file, file_len, offset, len);
        let fits = |log: DirtyLog| {
            log.check_covers(owner.memory())?;
            let geometry = geometry(self.config.window_len, high_len(&log))?;
            if !owner.has_iommu() {
                WindowLayout::plan(&geometry, &owner.identity(), &WindowLayout::new())
                    .map_err(|error| Fault::Log(format!("the window has no room for it: {error}")))?;
            }
            Ok(log)
        };
        match log.and_then(fits) {
            Ok(log) => {
                owner.set_log(log);
                self.withdraws |= owner.logs();
            }
            // It is in the middle of a migration, and cannot be told otherwise.
            Err(fault) if owner.logs() => return Err(Refusal::End(fault)),
            Err(fault) => {
                owner.refuse_log();
                self.count(&fault, "owner", effects);
            }
        }
        Ok(Reply::Done)
    }

    /// SET_FEATURES is about to say whether what is written is to be marked. Whether it has to be
    /// declined.
    pub(super) fn begins_or_ends_log(&mut self, acked: u64) -> Result<(), Refusal> {
        let Some(owner) = self.owner.as_ref() else { return Ok(()) };
        if owner.must_decline(acked) {
            let reason = "VHOST_F_LOG_ALL with the log that was refused before".into();
            return Err(Refusal::Decline(Fault::Log(reason)));
        }
        self.withdraws |= (acked & features::LOG_ALL != 0) != owner.logs();
        Ok(())
    }

    /// Whether the peer's driver is where it marks what it writes, or there is none.
    pub(super) fn driver_follows(&self, before: u64) -> bool {
        let driver = self.peer.as_ref().and_then(|peer| peer.driver);
        // Who ends it need not know when.
        let is_to_come_up = self.owner.as_ref().is_some_and(|owner| owner.logs() && owner.is_running())
            && self.peer.as_ref().is_some_and(super::peer::PeerSession::is_started);
        !self.withdraws && (!is_to_come_up || driver.is_none_or(|driver| driver.generation > before))
    }

    /// Takes what comes of the owner's VMM that waits.
    pub(super) fn waiting_event(&mut self, event: WaitingEvent, effects: &mut Vec<Effect>) {
        match event {
            WaitingEvent::Connected => {
                self.counters.owner_connections += 1;
                self.note_connection(WAITING, self.counters.owner_connections, effects);
                self.waiting = Some(OwnerSession::new(&self.config));
            }
            WaitingEvent::Disconnected(fault) => {
                if let Some(fault) = fault {
                    self.count(&fault, WAITING, effects);
                }
                self.waiting = None;
            }
            WaitingEvent::Request(request) => {
                self.counters.owner_messages += 1;
                match self.waiting_request(request, effects) {
                    Ok(reply) => effects.push(Effect::ReplyWaiting(reply)),
                    Err(Refusal::Decline(fault)) => {
                        self.count(&fault, WAITING, effects);
                        effects.push(Effect::ReplyWaiting(Reply::Declined));
                    }
                    Err(Refusal::End(fault)) => {
                        self.count(&fault, WAITING, effects);
                        effects.push(Effect::ReplyWaiting(Reply::Refused(fault.to_string())));
                        effects.push(Effect::DisconnectWaiting);
                        self.waiting = None;
                    }
                }
            }
        }
    }

    /// What it says is noted, and has no effect on the peer: so nothing of it waits for anybody.
    fn waiting_request(&mut self, request: Request, effects: &mut Vec<Effect>) -> Result<Reply, Refusal> {
        let owner = self.waiting.as_mut().ok_or(Refusal::End(Fault::OutOfOrder("nobody waits".into())))?;
        match request {
            Request::SetBackendChannel(stream) => {
                owner.take_channel().map_err(Refusal::End)?;
                effects.push(Effect::OpenWaitingChannel(stream));
                Ok(Reply::Done)
            }
            // What was not asked for proves nothing, and what is not known need not be forgotten.
            Request::Iotlb(_) if owner.has_iommu() && !owner.pushes() => Ok(Reply::Done),
            Request::IommuPush { reset, entries } => push(owner, reset, &entries).map(|_| Reply::Done),
            Request::SetLogBase { file, file_len, offset, len } => {
                let log = DirtyLog::new(file, file_len, offset, len);
                match log.and_then(|log| log.check_covers(owner.memory()).map(|()| log)) {
                    Ok(log) if high_len(&log) == 0 => owner.set_log(log),
                    // Where the peer's window would have it is not worked out for one that waits.
                    Ok(_) => owner.refuse_log(),
                    Err(fault) => {
                        owner.refuse_log();
                        self.count(&fault, WAITING, effects);
                    }
                }
                Ok(Reply::Done)
            }
            request => owner.apply(request).map_err(Refusal::of),
        }
    }

    /// Gives the link to the VMM that waits, if it is time.
    pub(super) fn change_owner(&mut self, effects: &mut Vec<Effect>) {
        let Some(waiting) = &self.waiting else { return };
        let is_time = match &self.owner {
            None => true,
            // What was taken away from the peer for the one is answered before the other comes.
            Some(owner) => self.pending.is_none() && !owner.has_live_vring() && waiting.has_live_vring(),
        };
        if !is_time || self.unplug.is_some() {
            return;
        }
        self.stop_demand(effects);
        self.demand.asked = None;
        self.demand.refused_vrings.clear();
        self.layout = WindowLayout::new();
        std::mem::swap(&mut self.owner, &mut self.waiting);
        self.withdraws = true;
        self.unsettled = true;
        self.take_geometry();
        if self.waiting.is_some() {
            self.counters.takeovers += 1;
            let line =
                "the owner's VMM that waited has started its device and has the link; the other one waits";
            effects.push(Effect::Log(Log::Info(line.into())));
        }
        effects.push(Effect::SwapOwners);
        if let Err(fault) = self.plan_identity() {
            self.refuse(super::Side::Owner, &fault, effects);
        }
    }

    /// The part of the window that the owner's memory may have. Of an owner with an IOMMU all that is shown gets
    /// another place when this changes, which is when nothing of it is to be in the window; without one
    /// the layout is worked out anew with each request.
    pub(super) fn take_geometry(&mut self) {
        let log = self.owner.as_ref().and_then(OwnerSession::log);
        let Ok(geometry) = geometry(self.config.window_len, log.map_or(0, high_len)) else { return };
        if std::mem::replace(&mut self.geometry, geometry) != geometry
            && self.owner.as_ref().is_some_and(OwnerSession::has_iommu)
        {
            self.layout = WindowLayout::new();
            self.plan();
        }
    }

    /// What was asked to be withdrawn has gone: what is wanted may come.
    pub(super) fn end_withdrawal(&mut self) {
        if self.withdraws && self.window.has_nothing() {
            self.withdraws = false;
            self.unsettled = true;
        }
    }

    /// The time by which the owner's VMM is answered though no driver attached to the new generation: it has lost what it
    /// had before.
    pub(super) fn answer_without_driver(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let is_over = |at: Option<Instant>| at.is_some_and(|at| now >= at);
        let over = self.pending.take_if(|pending| !self.withdraws && is_over(pending.driver_deadline()));
        if let Some(pending) = over {
            let line =
                "the peer's driver has not taken the link up again in time, now that the owner is migrated";
            effects.push(Effect::Log(Log::Info(line.into())));
            effects.push(Effect::Reply(super::Side::Owner, pending.reply));
        }
    }
}

/// What of a window can have the owner's memory, if the last `high` bytes have something else.
pub(super) fn geometry(window_len: u64, high: u64) -> Result<WindowGeometry, Fault> {
    let impossible = |error: String| {
        Fault::Log(format!("the window of {window_len:#x} bytes has no room for it: {error}"))
    };
    let len = window_len.saturating_sub(abi::DATA_OFFSET).saturating_sub(high);
    let data =
        Span::new(WindowOffset::new(abi::DATA_OFFSET), len).map_err(|error| impossible(error.to_string()))?;
    WindowGeometry::new(data, abi::MAX_MAPPINGS as usize).map_err(|error| impossible(error.to_string()))
}
