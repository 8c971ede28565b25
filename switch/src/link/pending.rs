//! What waits until the peer has lost something of the owner's: an answer to the owner's front-end, and
//! the end of the link.

use std::time::{Duration, Instant};

use iommu::{Iova, Span, WindowLayout};

use super::message::{Effect, Reply, Request, Side};
use super::migration::DRIVER_PATIENCE;
use super::state::Link;

/// An owner's request whose answer waits for a revocation.
#[derive(Debug)]
pub(super) struct Pending {
    /// What it is answered with.
    pub(super) reply: Reply,
    /// What of the owner's it waits for.
    pub(super) concerns: Concern,
    /// Until when.
    pub(super) until: Deadlines,
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
}

/// What of the owner's the peer must have lost before an owner's request is answered.
#[derive(Debug)]
pub(super) enum Concern {
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

/// What a request of the owner's front-end concerns that takes something away.
pub(super) fn concerned(request: &Request, generation: u64, now: Instant) -> Concern {
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

/// Until when an owner's request, or a link that ends, waits for the peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadlines {
    /// Until when a peer may hold it up whose device is stopped.
    pub(super) peer: Instant,
    /// Until when it waits at all: the peer's VMM has its time; then the kernel's word that its mappings are gone has
    /// as much again.
    pub(super) last: Instant,
}

impl Deadlines {
    /// Those of what begins to wait now.
    pub(super) fn new(now: Instant, timeout: Duration) -> Self {
        Self { peer: now + timeout, last: now + 2 * timeout }
    }

    /// The next; the peer's if the peer is one whose device is stopped.
    pub(super) fn next(self, silent_peer: bool) -> Instant {
        if silent_peer { self.peer } else { self.last }
    }
}

impl Link {
    /// Answers the owner when the peer holds no more than it should of what the request
    /// concerns: what is taken out for another reason must not hold the owner up.
    pub(super) fn reply_when_confined(
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
        self.pending = Some(Pending { reply, concerns, until: Deadlines::new(now, self.timeout) });
    }

    /// Whether the peer holds no more of the owner's than it should.
    pub(super) fn is_confined(&self, concerns: &Concern) -> bool {
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
}
