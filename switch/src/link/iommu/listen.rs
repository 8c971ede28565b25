//! What the owner's front-end says of its guest's IOMMU: IOTLB messages, pushes, answers
//! to misses.

use std::time::Instant;

use iommu::{Access, FrontendVa, Iova, MappedRange, Span};

use super::demand::{Asked, Want};
use super::iotlb::PushedChange;
use crate::link::descriptor::MemoryFile;
use crate::link::fault::Fault;
use crate::link::message::{Effect, IotlbMessage, MissId, PushEntry};
use crate::link::owner::OwnerSession;
use crate::link::state::Link;

/// Answers to a miss without an update, in a row, that are put up with.
const MAX_UNTOLD: u32 = 8;

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
        self.demand_counters.pushes += 1;
        let gone = push(owner, reset, entries)?;
        // A vring whose memory was not mapped may have it now.
        self.demand.refused_vrings.clear();
        self.hide(&gone);
        Ok(())
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
            Some(true) if told => {
                self.demand.untold = 0;
                return;
            }
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
}

/// Takes pushed changes into what is known of an owner's IOMMU. Gives what is not mapped any more.
///
/// # Errors
/// Whether the message is declined, or ends the session.
pub(in crate::link) fn push(
    owner: &mut OwnerSession,
    reset: bool,
    entries: &[PushEntry],
) -> Result<Vec<Span<Iova>>, Refusal> {
    if !owner.has_iommu() || !owner.pushes() {
        return Err(Refusal::End(Fault::Unsupported("IOMMU_PUSH")));
    }
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
    let pushed = owner.iotlb.push(changes);
    pushed.map_err(|(position, error)| fault(position.saturating_sub(first), error.to_string()))
}

/// Why a message of the owner's front-end is not taken.
#[derive(Debug)]
pub(in crate::link) enum Refusal {
    /// It is answered with an error; the session goes on.
    Decline(Fault),
    /// The session ends.
    End(Fault),
}

impl Refusal {
    /// What becomes of a message that was at fault in this way.
    pub(in crate::link) fn of(fault: Fault) -> Self {
        match fault {
            Fault::Config(_) => Self::Decline(fault),
            fault => Self::End(fault),
        }
    }
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
    if place.backing.handle.is_foreign() {
        return Err(format!("{span}: this is another VM's memory, which its VMM has in a window"));
    }
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
