//! The window: what was taken away cannot be reached, what may only be read cannot be written,
//! and neither ends the VM.
//!
//! The owner is a model with an IOMMU, in this process, since its part is memory. Each page has
//! two words. The first says whether the guest may load it; the guest counts what it loads
//! against that. The second is stored to by the guest, all the time, wherever the page is.

use std::collections::VecDeque;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use guest_driver_model::net::{OwnerConfig, OwnerLayout};
use guest_driver_model::owner::{
    Addressing, IommuDriver, IommuLink, IommuProtocol, OwnerIommu, OwnerMemory, OwnerVmm, PacketMappings,
};
use iommu::{Access, PAGE_SIZE};

use crate::broker::{BrokerProcess, owner_socket};
use crate::child::Child;
use crate::pair::{start_peer, wait_until_up};
use crate::user::SECRET;

const LINK: &str = "window";
const MEMORY: u64 = 4 << 20;
const GUEST_START: u64 = 1 << 32;
const FIRST_IOVA: u64 = 1 << 36;
/// Pages that take turns, and how many of them the peer has at a time.
const PAGES: u64 = 24;
const GRANTED: usize = 3;
/// The top 16 bits of a first word that the guest may load, and of the host's second words.
const OPEN: u64 = 0x09e4 << 48;
const HOST: u64 = 0x4057 << 48;

/// The owner.
struct Owner {
    memory: OwnerMemory,
    driver: IommuDriver,
    /// Where the pages are in its memory.
    pages: u64,
    _vmm: OwnerVmm,
}

/// A page that the peer has, or had.
#[derive(Clone, Copy, Debug)]
struct Page {
    number: u64,
    access: Access,
    /// The round in which it was granted.
    round: u64,
}

/// Checks it.
///
/// # Errors
/// What does not hold.
pub fn run(rounds: u64) -> anyhow::Result<String> {
    let folder = tempfile::tempdir()?;
    let broker = BrokerProcess::start(folder.path(), &[(LINK, "window = \"4M\"")])?;
    let mut peer = start_peer(folder.path(), LINK, &[])?;
    let owner = Owner::start(folder.path())?;
    wait_until_up(&broker, LINK, None)?;
    peer.tell("use")?;
    let (mut granted, mut stores) = (VecDeque::new(), 0_u64);
    for round in 0..rounds {
        let page = owner.grant(&mut peer, round).with_context(|| format!("round {round}: granting"))?;
        granted.push_back(page);
        if granted.len() > GRANTED {
            let page = granted.pop_front().context("a page")?;
            stores += owner.revoke(page).with_context(|| format!("round {round}: revoking {page:?}"))?;
        }
    }
    for page in granted {
        stores += owner.revoke(page).with_context(|| format!("at the end: revoking {page:?}"))?;
    }
    // Two more passes of the guest over everything, in which nothing must change.
    peer.tell(&format!("window seen {}", vhost_pci_device::abi::DATA_OFFSET))?;
    for number in 0..PAGES.min(rounds) {
        owner.untouched(number)?;
    }
    let leaks = peer.tell("window leaks")?;
    ensure!(leaks == "0", "the guest has loaded {leaks} words of pages that were taken from it");
    peer.tell("stop").context("the guest's processor")?;
    Ok(format!(
        "ok: window: {rounds} grants and revokes, half of them read-only: no store reached a read-only or \
         revoked page, no load saw a revoked one, KVM_RUN did not fail; {stores} pages were written while \
         they could be"
    ))
}

impl Owner {
    fn start(folder: &Path) -> anyhow::Result<Self> {
        let memory = OwnerMemory::new(MEMORY, GUEST_START)?;
        let iommu = OwnerIommu::new(&memory)?;
        let push = IommuLink { iommu: iommu.clone(), protocol: IommuProtocol::Push };
        let mut vmm = OwnerVmm::connect_with(&owner_socket(folder, LINK), 2, Some(push))?;
        let layout = OwnerLayout::new(OwnerConfig::default(), 0, MEMORY)?;
        let driver = IommuDriver::attach(iommu)?;
        let addressing = PacketMappings::new(driver.clone(), &memory, &layout)?;
        let places: Vec<_> = layout.vrings().iter().map(|vring| vring.places).collect();
        let ring_base = |vring| addressing.ring_base(&memory, vring);
        vmm.start_at(layout.config().features(), &memory, &places, ring_base, |_| 0)?;
        let pages = layout.end().next_multiple_of(PAGE_SIZE);
        ensure!(pages + PAGES * PAGE_SIZE <= memory.len(), "the owner's memory is too small");
        Ok(Self { memory, driver, pages, _vmm: vmm })
    }

    /// Where a page is in the memory, and in the IOMMU: every other page, so that none has a
    /// neighbour.
    fn place(&self, number: u64) -> (u64, u64) {
        (self.pages + number * PAGE_SIZE, FIRST_IOVA + 2 * number * PAGE_SIZE)
    }

    /// Grants a page, and sees that the guest can load it, and store to it if it may.
    fn grant(&self, peer: &mut Child, round: u64) -> anyhow::Result<Page> {
        let number = round % PAGES;
        let (at, iova) = self.place(number);
        if round >= PAGES {
            self.untouched(number)?;
        }
        let (access, name) =
            if number.is_multiple_of(2) { (Access::ReadWrite, "rw") } else { (Access::Read, "r") };
        self.memory.shared().store_u64(at, OPEN | round)?;
        self.memory.shared().store_u64(at + 8, HOST | round)?;
        self.driver.map_at(iova, GUEST_START + at, PAGE_SIZE, access)?;
        let offset = peer.tell(&format!("window map {iova} {name}"))?;
        let seen: u64 = peer.tell(&format!("window seen {offset}"))?.parse()?;
        ensure!(
            seen == OPEN | round,
            "the guest sees {seen:#x} at offset {offset}, in place of round {round}"
        );
        let stored = self.memory.shared().load_u64(at + 8)? != HOST | round;
        ensure!(stored == (access == Access::ReadWrite), "{access:?}: stored to: {stored}");
        Ok(Page { number, access, round })
    }

    /// Takes a page back. Gives 1 if the guest has stored to it.
    fn revoke(&self, page: Page) -> anyhow::Result<u64> {
        let (at, iova) = self.place(page.number);
        self.driver.unmap(iova, PAGE_SIZE)?;
        // From here on nothing of the guest's must arrive, and nothing must be seen.
        let stored = self.memory.shared().load_u64(at + 8)? != HOST | page.round;
        self.memory.shared().store_u64(at, SECRET << 48 | page.round)?;
        self.memory.shared().store_u64(at + 8, HOST | page.number)?;
        ensure!(stored == (page.access == Access::ReadWrite), "stored to: {stored}");
        thread::sleep(Duration::from_micros(20));
        self.untouched(page.number)?;
        Ok(stored.into())
    }

    /// That a page which was taken back is as it was then.
    fn untouched(&self, number: u64) -> anyhow::Result<()> {
        let word = self.memory.shared().load_u64(self.place(number).0 + 8)?;
        ensure!(word == HOST | number, "page {number} was stored to after it was taken back: {word:#x}");
        Ok(())
    }
}
