//! What follows from a link's state for the peer: what the link page says, and which
//! notifications go where. Nothing here changes anything.

use iommu::{Access, Placement};
use vhost_pci_device::abi;

use super::descriptor::{Eventfd, MemoryFile};
use super::link_page;
use super::message::{LinkContents, Side, Wire, shown_at};
use super::state::Link;
use super::vring::Vring;
use crate::config::OneWay;

impl Link {
    pub(super) fn contents(&self, up: bool, mappings: Vec<abi::Mapping>) -> LinkContents {
        let Some(owner) = &self.owner else {
            return LinkContents::default();
        };
        let mut contents = LinkContents {
            status: abi::LINK_S_OWNER,
            owner_device: self.config.device.kind.virtio_id,
            config: self.config.device.config.clone(),
            ..LinkContents::default()
        };
        if up {
            contents.status |= abi::LINK_S_UP;
            contents.features = owner.features();
            let vrings = owner.vrings().iter();
            contents.vrings = vrings.map(|vring| vring.entry(is_reachable(vring, &mappings))).collect();
            if owner.has_iommu() {
                contents.status |= abi::LINK_S_IOMMU;
                if self.config.one_way == OneWay::Refuse {
                    contents.status |= abi::LINK_S_COPY;
                }
            }
            if let Some(placed) = self.wanted_log() {
                contents.status |= abi::LINK_S_LOG;
                contents.log = (placed.window.start().raw(), placed.log.len());
            }
            contents.mappings = mappings;
        }
        contents
    }

    /// The ranges that the peer should have and has, for certain, as the link page names
    /// them.
    pub(super) fn mappings(&self) -> Vec<abi::Mapping> {
        let granted = self.window.granted_ranges().filter(|placement| self.layout.has(placement));
        let mut mappings: Vec<_> = granted.map(|placement| self.mapping_entry(placement)).collect();
        mappings.sort_by_key(|entry| entry.iova.value());
        mappings
    }

    /// Whether the peer's driver may use the vrings: of an owner without an IOMMU when all
    /// of its memory is in the window, else when its vrings are.
    pub(super) fn is_usable(&self, mappings: &[abi::Mapping]) -> bool {
        match &self.owner {
            Some(owner) if owner.has_iommu() => {
                // Vrings that the owner's IOMMU keeps from its device are not waited for. One that
                // pushes has told all there is.
                let refused = &self.demand.refused_vrings;
                let live = (0..).zip(owner.vrings()).filter(|(_, vring)| vring.is_live());
                let (there, awaited): (Vec<_>, Vec<_>) =
                    live.partition(|(_, vring)| is_reachable(vring, mappings));
                let awaited = awaited.iter().any(|(index, _)| !refused.contains(index) && !owner.pushes());
                let has_log = self.window.has_log(self.wanted_log().as_ref());
                has_log && self.window.is_open() && self.window.is_ready() && !there.is_empty() && !awaited
            }
            _ => {
                let has_log = self.window.has_log(self.wanted_log().as_ref());
                !self.layout.is_empty() && has_log && self.window.shows_exactly(&self.layout)
            }
        }
    }

    /// The entry of the link page (`docs/vhost-pci-device.md`, 7.3).
    pub(super) fn mapping_entry(&self, placement: &Placement<MemoryFile>) -> abi::Mapping {
        let range = placement.range();
        // The peer's VMM may be asked for more than the owner allows.
        let allowed = self.shown.allowed(range.iova().start()).unwrap_or(range.access());
        let owner = self.owner.as_ref();
        let page = owner.filter(|owner| owner.logs()).map(|owner| {
            let guest = owner.guest_of_range(range)?;
            u32::try_from(guest.raw() / abi::PAGE_SIZE).ok()
        });
        let (bits, log_page) = match page {
            None => (allowed.bits(), 0),
            Some(Some(page)) => (allowed.bits(), page),
            // It is in one piece of its file, and in several of the guest's: what is written there is stored by
            // command, and marked by who stores it.
            Some(None) => (allowed.bits() & abi::ACCESS_READ, 0),
        };
        abi::Mapping {
            iova: range.iova().start().raw().into(),
            len: range.iova().len().into(),
            window_offset: shown_at(placement, self.config.window_len).raw().into(),
            access: bits.into(),
            log_page: log_page.into(),
        }
    }

    pub(super) fn wanted_wires(&self) -> Vec<Wire> {
        let (Some(owner), Some(peer)) = (&self.owner, &self.peer) else {
            return Vec::new();
        };
        let mut wires = Vec::new();
        for (vring, state) in (0..).zip(owner.vrings()).filter(|(_, state)| state.is_live()) {
            let Some(queue) = peer.queue_of_vring(vring) else {
                continue;
            };
            let mut wire = |from, source: &Option<Eventfd>, target: &Option<Eventfd>| {
                if let (Some(source), Some(target)) = (source, target) {
                    wires.push(Wire { vring, from, source: source.clone(), target: target.clone() });
                }
            };
            wire(Side::Owner, &state.kick, &queue.call);
            wire(Side::Peer, &queue.kick, &state.call);
        }
        wires
    }
}

/// Whether a vring runs and its memory is in the window.
fn is_reachable(vring: &Vring, mappings: &[abi::Mapping]) -> bool {
    let reachable = |part| link_page::allows(mappings, part, Access::ReadWrite);
    vring.is_live() && vring.started().is_some_and(|config| config.parts().all(reachable))
}
