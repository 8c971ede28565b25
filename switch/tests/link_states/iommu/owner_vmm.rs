//! An owner whose VMM answers misses as QEMU 11.1 does: it checks the direction that the
//! miss asks for, and then says "read and write". And an owner whose VMM pushes.

use iommu::Access;
use vhost_pci_switch::config::LinkConfig;
use vhost_pci_switch::link::features::{ACCESS_PLATFORM, PROTOCOL_IOMMU_PUSH};
use vhost_pci_switch::link::message::Request;
use vhost_pci_switch::link::{Event, Side};

use super::page_table::PAGE;
use crate::bench::{Bench, REGIONS, config};
use crate::front_end::{Ask, FEATURES, owner_protocol_features};

/// Where the vrings are: one page each.
pub const RINGS: u64 = 0xffff_e000;
/// Where the tests map buffers.
pub const BUFFERS: u64 = 0x10_0000_0000;
/// What is behind them.
pub const BEHIND: u64 = 0x10_0000;
/// Permissions.
pub const RO: u8 = 1;
pub const WO: u8 = 2;
pub const RW: u8 = 3;

/// A vring whose three parts begin in this page.
pub fn ring_in(page: u64) -> [u64; 3] {
    [page, page + 0x400, page + 0x600]
}

/// Whether a front-end pushes, or is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Asked,
    Pushes,
}

impl Bench {
    /// Both sides up, the owner with an IOMMU in which its vrings are mapped.
    pub fn iommu() -> Self {
        Self::iommu_with(config(), Kind::Asked, false)
    }

    pub fn iommu_with(config: LinkConfig, kind: Kind, strict: bool) -> Self {
        let mut bench = Self::with(config);
        bench.strict = strict;
        bench.iommu_owner(kind);
        bench.iommu_rings(kind);
        bench.peer_up();
        bench.settle();
        assert!(bench.is_up(), "{:#?}", bench.report());
        bench.forget();
        bench
    }

    /// An owner up to its memory table.
    pub fn iommu_owner(&mut self, kind: Kind) {
        self.connect(Side::Owner);
        let without = if kind == Kind::Pushes { 0 } else { PROTOCOL_IOMMU_PUSH };
        self.owner(Ask::Protocol(owner_protocol_features() & !without));
        self.owner(Ask::Channel);
        self.owner(Ask::Features(FEATURES | ACCESS_PLATFORM));
        self.owner(Ask::MemTable(REGIONS.to_vec()));
    }

    /// Maps the vrings' pages and starts them.
    pub fn iommu_rings(&mut self, kind: Kind) {
        for index in 0..2 {
            let page = RINGS + PAGE * u64::from(index);
            match kind {
                Kind::Asked => self.shared.table.map(page, PAGE, PAGE * u64::from(index), RW),
                Kind::Pushes => self.owner(Ask::Push(false, vec![(page, PAGE, PAGE * u64::from(index), RW)])),
            }
            self.start_ring(index, ring_in(page));
        }
    }

    pub fn start_ring(&mut self, index: u32, parts: [u64; 3]) {
        for ask in [
            Ask::Num(index, 64),
            Ask::AddrIova(index, parts),
            Ask::Call(index),
            Ask::Kick(index),
            Ask::Enable(index, true),
        ] {
            self.owner(ask);
        }
    }

    /// The guest maps so many pages of buffers.
    pub fn guest_maps(&mut self, pages: std::ops::Range<u64>, perm: u8) {
        for page in pages {
            let (iova, guest) = (BUFFERS + page * PAGE, BEHIND + page * PAGE);
            match self.shared.pushes() {
                false => self.shared.table.map(iova, PAGE, guest, perm),
                true => self.owner(Ask::Push(false, vec![(iova, PAGE, guest, perm)])),
            }
        }
    }

    /// The guest unmaps: its front-end tells, and the guest waits for the answer.
    pub fn guest_unmaps(&mut self, iova: u64, len: u64) {
        match self.shared.pushes() {
            false => {
                self.shared.table.unmap(iova, len);
                self.owner(Ask::Invalidate(iova, len));
            }
            true => self.owner(Ask::Push(false, vec![(iova, len, 0, 0)])),
        }
    }

    /// The owner's VMM takes the open miss. False if there is none, or the VMM waits for
    /// an answer itself.
    pub fn answer_miss(&mut self) -> bool {
        let Some((id, page, access)) = self.miss.filter(|_| self.question.is_none()) else {
            return false;
        };
        let found = self.shared.table.at(page.raw());
        let found = found.filter(|(.., perm)| u32::from(*perm) & access.bits() == access.bits());
        if let Some((iova, len, guest, _)) = found {
            self.owner(Ask::Update(iova, len, guest, RW));
            while self.question.is_some() {
                assert!(self.step(crate::vmm::Manner::Honest) || self.vmm_catches_up(), "an update waits");
            }
        }
        self.miss = None;
        self.apply(Event::MissDone(id, found.is_some()));
        true
    }

    /// As [`Self::answer_miss`], by a VMM that is not answered while the peer holds
    /// something up: then the miss stays open.
    pub fn try_answer_miss(&mut self) -> bool {
        let Some((id, page, access)) = self.miss.filter(|_| self.question.is_none()) else {
            return false;
        };
        let found = self.shared.table.at(page.raw());
        let found = found.filter(|(.., perm)| u32::from(*perm) & access.bits() == access.bits());
        if let Some((iova, len, guest, _)) = found {
            self.owner(Ask::Update(iova, len, guest, RW));
            if self.question.is_some() || !self.is_connected(Side::Owner) {
                return false;
            }
        }
        self.miss = None;
        self.apply(Event::MissDone(id, found.is_some()));
        true
    }

    fn vmm_catches_up(&mut self) -> bool {
        self.vmm.catch_up();
        self.look();
        self.question.is_none()
    }

    /// Everybody does what there is to do.
    pub fn settle(&mut self) {
        loop {
            self.work();
            if !self.answer_miss() {
                return;
            }
        }
    }

    /// The pages that misses ask about while everything is done, with the access.
    pub fn misses_asked(&mut self) -> Vec<(u64, Access)> {
        let mut asked = Vec::new();
        loop {
            self.work();
            asked.extend(self.miss.map(|(_, page, access)| (page.raw(), access)));
            if !self.answer_miss() {
                return asked;
            }
        }
    }

    /// IOVAs and lengths that the link page shows.
    pub fn shown(&self) -> Vec<(u64, u64)> {
        let mappings = self.published.0.mappings.iter();
        mappings.map(|entry| (entry.iova.value(), entry.len.value())).collect()
    }

    /// Whether the link page shows this address.
    pub fn shows(&self, iova: u64) -> bool {
        self.shown().iter().any(|(start, len)| (*start..start + len).contains(&iova))
    }

    /// What any peer's VMM holds of the address.
    pub fn held(&self, iova: u64) -> bool {
        self.vmm.owner_ranges().any(|placement| placement.range().iova().contains(iommu::Iova::new(iova)))
    }

    pub fn owner_stops(&mut self) {
        for index in 0..2 {
            self.owner(Ask::Stop(index));
            self.settle();
            assert!(self.question.is_none());
        }
    }

    /// A message that is not in [`Ask`].
    pub fn iotlb(&mut self, message: vhost_pci_switch::link::message::IotlbMessage) {
        self.owner_raw(Request::Iotlb(message));
    }
}
