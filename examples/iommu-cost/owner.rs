//! The owner of a link: its VMM as a model in this process, which pushes each change of
//! the IOMMU, and its guest's driver of that IOMMU.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::ensure;
use guest_driver_model::net::{OwnerConfig, OwnerLayout};
use guest_driver_model::owner::{
    Addressing, IommuDriver, IommuLink, IommuProtocol, OwnerIommu, OwnerMemory, OwnerVmm, PacketMappings,
};
use iommu::{Access, PAGE_SIZE};

use crate::peer::Peer;

const MEMORY: u64 = 16 << 20;
const GUEST_START: u64 = 1 << 32;
/// Where pages are mapped: every other one, so that none has a neighbour.
const FIRST_IOVA: u64 = 1 << 36;
/// Pages that take turns.
const PAGES: u64 = 256;
/// For how long a page that was taken away is watched.
const WATCH: Duration = Duration::from_micros(20);

/// An owner with its peer.
pub struct Link {
    memory: OwnerMemory,
    driver: IommuDriver,
    /// The peer.
    pub peer: Peer,
    pages_start: u64,
    next: u64,
    _vmm: OwnerVmm,
}

/// A page that the owner has mapped for its device.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    /// Where.
    pub iova: u64,
    /// Where it is in the owner's memory.
    memory_offset: u64,
}

impl Link {
    /// Brings a link up, with `shown` pages of the owner's in the window that nothing is done
    /// with.
    ///
    /// # Errors
    /// The step that failed.
    pub fn start(folder: &Path, link: &str, shown: u64) -> anyhow::Result<Self> {
        let mut peer = Peer::start(folder, link)?;
        let memory = OwnerMemory::new(MEMORY, GUEST_START)?;
        let iommu = OwnerIommu::new(&memory)?;
        let push = IommuLink { iommu: iommu.clone(), protocol: IommuProtocol::Push };
        let mut vmm = OwnerVmm::connect_with(&folder.join(format!("{link}-owner.sock")), 2, Some(push))?;
        let layout = OwnerLayout::new(OwnerConfig::default(), 0, MEMORY)?;
        let driver = IommuDriver::attach(iommu)?;
        let addressing = PacketMappings::new(driver.clone(), &memory, &layout)?;
        let places: Vec<_> = layout.vrings().iter().map(|vring| vring.places).collect();
        let ring_base = |vring| addressing.ring_base(&memory, vring);
        vmm.start_at(layout.config().features(), &memory, &places, ring_base, |_| 0)?;
        peer.wait_until_up()?;
        let pages_start = layout.end().next_multiple_of(PAGE_SIZE);
        let mut owner = Self { memory, driver, peer, pages_start, next: 0, _vmm: vmm };
        for number in 0..shown {
            let page = owner.page(PAGES + number);
            owner.driver.map_at(page.iova, GUEST_START + page.memory_offset, PAGE_SIZE, Access::ReadWrite)?;
            owner.peer.map(page.iova)?;
        }
        Ok(owner)
    }

    fn page(&self, number: u64) -> Page {
        Page {
            iova: FIRST_IOVA + 2 * number * PAGE_SIZE,
            memory_offset: self.pages_start + number * PAGE_SIZE,
        }
    }

    /// Maps a page in the owner's IOMMU. Gives the time until the broker knows.
    ///
    /// # Errors
    /// If the broker does not follow.
    pub fn push(&mut self) -> anyhow::Result<(Duration, Page)> {
        let page = self.page(self.next % PAGES);
        self.next += 1;
        self.memory.shared().store_u64(page.memory_offset, 0)?;
        let start = Instant::now();
        self.driver.map_at(page.iova, GUEST_START + page.memory_offset, PAGE_SIZE, Access::ReadWrite)?;
        Ok((start.elapsed(), page))
    }

    /// Unmaps it again. Gives the time until the peer has lost it.
    ///
    /// # Errors
    /// If the broker does not follow.
    pub fn unmap(&mut self, page: Page) -> anyhow::Result<Duration> {
        let start = Instant::now();
        self.driver.unmap(page.iova, PAGE_SIZE)?;
        Ok(start.elapsed())
    }

    /// As [`Self::unmap`], of a page that the peer uses: that is checked, and that it does not
    /// when this returns.
    ///
    /// # Errors
    /// As there, and if the peer changed the page after that.
    pub fn revoke(&mut self, page: Page) -> anyhow::Result<Duration> {
        let value = |memory: &OwnerMemory| memory.shared().load_u64(page.memory_offset);
        ensure!(value(&self.memory)? != 0, "the peer does not use the page at {:#x}", page.iova);
        let took = self.unmap(page)?;
        let (last, start) = (value(&self.memory)?, Instant::now());
        while start.elapsed() < WATCH {
            ensure!(value(&self.memory)? == last, "the peer wrote to a page that was taken from it");
        }
        Ok(took)
    }
}
