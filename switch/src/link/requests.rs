//! Requests of the two front-ends: the session that each concerns takes it, and what follows for the
//! link is done. Who is answered when, `pending` says.

use std::time::Instant;

use iommu::WindowLayout;
use vhost_pci_device::abi;

use super::fault::Fault;
use super::iommu::listen::Refusal;
use super::message::{Effect, Reply, Request, Side};
use super::peer::PeerChange;
use super::pending::concerned;
use super::state::Link;

impl Link {
    pub(super) fn owner_request(&mut self, request: Request, now: Instant, effects: &mut Vec<Effect>) {
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

    pub(super) fn peer_request(&mut self, request: Request, now: Instant, effects: &mut Vec<Effect>) {
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
                        self.served.end();
                        self.wiring.device_stopped();
                        self.window.stop(effects);
                    }
                }
                effects.push(Effect::Reply(Side::Peer, reply));
            }
        }
    }
}
