//! What the tests of rings and ports share: a memfd that is the owner's memory and
//! the peer's window at once, a writer of link pages, and a ring that is written by
//! hand.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

pub mod device;
pub mod side;

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use guest_driver_model::link::{Access, LinkPage, LinkSnapshot, Mapping, VringInfo};
use guest_driver_model::net::{OwnerConfig, OwnerLayout, OwnerPort, PacketBurst, PeerPort};
use guest_driver_model::ring::{DeviceRing, Fault, RingConfig, RingFeatures, RingPlaces};
use guest_driver_model::shm::SharedMemory;
use guest_driver_model::translate::Translation;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_pci_device::abi::{self, DeviceConfig};

pub const IOVA: u64 = 0x40_0000_0000;

/// A file in memory.
pub fn memfd(len: u64) -> OwnedFd {
    let fd = memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&fd, len as i64).unwrap();
    fd
}

pub fn shared(len: u64) -> SharedMemory {
    SharedMemory::private(len as usize).unwrap()
}

/// One file, mapped twice: as the owner's memory, and as a window in which it appears
/// at `DATA_OFFSET`. Miri has no files in memory: there it is mapped once.
pub struct TwoViews {
    pub owner: SharedMemory,
    pub window: SharedMemory,
    /// To map it once more.
    file: Option<OwnedFd>,
}

impl TwoViews {
    pub fn new(owner_len: u64) -> Self {
        let len = abi::DATA_OFFSET + owner_len;
        if cfg!(miri) {
            let window = shared(len);
            return Self { owner: window.part(abi::DATA_OFFSET, owner_len).unwrap(), window, file: None };
        }
        let fd = memfd(len);
        Self {
            owner: SharedMemory::map(fd.as_fd(), abi::DATA_OFFSET, owner_len as usize).unwrap(),
            window: SharedMemory::map(fd.as_fd(), 0, len as usize).unwrap(),
            file: Some(fd),
        }
    }

    /// The window, mapped once more.
    pub fn another_window(&self) -> SharedMemory {
        let file = self.file.as_ref().unwrap();
        SharedMemory::map(file.as_fd(), 0, self.window.len() as usize).unwrap()
    }

    /// How often the process has it mapped.
    pub fn mappings(&self) -> usize {
        let inode = nix::sys::stat::fstat(self.file.as_ref().unwrap()).unwrap().st_ino.to_string();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.split_whitespace().nth(4) == Some(&inode)).count()
    }

    pub fn mapping(&self) -> Mapping {
        Mapping {
            iova: IOVA,
            len: self.owner.len(),
            window_offset: abi::DATA_OFFSET,
            access: Access::READ_WRITE,
        }
    }
}

/// What a device would write into the link area.
#[derive(Clone)]
pub struct LinkWriter {
    pub magic: u32,
    pub version: u16,
    pub header_len: u16,
    pub generation: u64,
    pub table_generation: u64,
    pub status: u32,
    pub owner_device: u32,
    pub features: u64,
    pub mappings: Vec<Mapping>,
    pub vrings: Vec<VringInfo>,
    pub mapping_table: u32,
    pub vring_table: u32,
    /// Window offset and length of the dirty log, and the number of each mapping's first page.
    pub log: (u64, u64, u32),
    pub mapping_count: Option<u32>,
    pub vring_count: Option<u32>,
    pub config: Vec<u8>,
    pub config_at: u32,
    pub config_len: Option<u32>,
}

impl LinkWriter {
    pub fn new(features: u64, mappings: Vec<Mapping>, vrings: Vec<VringInfo>) -> Self {
        Self {
            magic: abi::LINK_MAGIC,
            version: abi::ABI_VERSION,
            header_len: size_of::<abi::LinkHeader>() as u16,
            generation: 2,
            table_generation: 2,
            status: abi::LINK_S_OWNER | abi::LINK_S_UP,
            owner_device: 1,
            features,
            mappings,
            vrings,
            mapping_table: abi::MAPPING_TABLE,
            vring_table: abi::VRING_TABLE,
            log: (0, 0, 0),
            mapping_count: None,
            vring_count: None,
            config: Vec::new(),
            config_at: abi::OWNER_CONFIG,
            config_len: None,
        }
    }

    pub fn write(&self, window: &SharedMemory) {
        let link = window.part(abi::LINK_OFFSET, abi::LINK_LEN).unwrap();
        link.store_u16(4, self.version).unwrap();
        link.store_u16(6, self.header_len).unwrap();
        link.store_u32(16, self.status).unwrap();
        link.store_u32(20, self.owner_device).unwrap();
        link.store_u64(72, self.log.0).unwrap();
        link.store_u64(80, self.log.1).unwrap();
        link.store_u64(24, self.features).unwrap();
        link.store_u32(32, self.mapping_count.unwrap_or(self.mappings.len() as u32)).unwrap();
        link.store_u32(36, self.mapping_table).unwrap();
        link.store_u32(40, self.vring_count.unwrap_or(self.vrings.len() as u32)).unwrap();
        link.store_u32(44, self.vring_table).unwrap();
        link.store_u32(64, self.config_len.unwrap_or(self.config.len() as u32)).unwrap();
        link.store_u32(68, self.config_at).unwrap();
        link.write(u64::from(abi::OWNER_CONFIG), &self.config).unwrap();
        for (at, mapping) in self.mappings.iter().enumerate() {
            let at = u64::from(abi::MAPPING_TABLE) + 32 * at as u64;
            link.store_u64(at, mapping.iova).unwrap();
            link.store_u64(at + 8, mapping.len).unwrap();
            link.store_u64(at + 16, mapping.window_offset).unwrap();
            link.store_u32(at + 24, mapping.access.bits()).unwrap();
            link.store_u32(at + 28, self.log.2).unwrap();
        }
        for (at, vring) in self.vrings.iter().enumerate() {
            let at = u64::from(abi::VRING_TABLE) + 64 * at as u64;
            link.store_u32(at, u32::from(vring.enabled)).unwrap();
            link.store_u32(at + 4, vring.size).unwrap();
            link.store_u64(at + 8, vring.desc).unwrap();
            link.store_u64(at + 16, vring.avail).unwrap();
            link.store_u64(at + 24, vring.used).unwrap();
            link.store_u32(at + 32, vring.base).unwrap();
        }
        link.store_u64_release(48, self.table_generation).unwrap();
        link.store_u64_release(8, self.generation).unwrap();
        link.store_u32_release(0, self.magic).unwrap();
    }
}

/// The config space of a device with this window.
pub fn device_config(window: &SharedMemory) -> DeviceConfig {
    DeviceConfig {
        magic: abi::CONFIG_MAGIC.into(),
        version: abi::ABI_VERSION.into(),
        max_vrings: 8.into(),
        window_len: window.len().into(),
        link_offset: abi::LINK_OFFSET.into(),
        link_len: abi::LINK_LEN.into(),
        control_offset: abi::CONTROL_OFFSET.into(),
        control_len: abi::CONTROL_LEN.into(),
        data_offset: abi::DATA_OFFSET.into(),
        max_mappings: abi::MAX_MAPPINGS.into(),
        ..DeviceConfig::default()
    }
}

pub fn link_page(window: &SharedMemory) -> LinkPage {
    LinkPage::new(window, &device_config(window)).unwrap()
}

/// An owner's port and a peer's port on one memory.
pub struct Joined {
    pub views: TwoViews,
    pub layout: OwnerLayout,
    pub owner: OwnerPort,
    pub peer: PeerPort,
    pub snapshot: LinkSnapshot,
}

pub fn join(config: OwnerConfig) -> Joined {
    let len = OwnerLayout::new(config, 0, u64::MAX >> 8).unwrap().end();
    let views = TwoViews::new(len);
    let layout = OwnerLayout::new(config, 0, len).unwrap();
    let owner = OwnerPort::new(&views.owner, &layout, IOVA).unwrap();
    LinkWriter::new(config.features(), vec![views.mapping()], layout.infos(IOVA)).write(&views.window);
    let page = link_page(&views.window);
    let snapshot = page.snapshot().unwrap();
    let peer = PeerPort::new(&views.window, &page, &snapshot).unwrap();
    Joined { views, layout, owner, peer, snapshot }
}

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A ring that a hostile owner fills by hand, at the start of its memory.
pub struct HandRing {
    pub views: TwoViews,
    pub places: RingPlaces,
    pub mappings: Vec<Mapping>,
    pub features: RingFeatures,
}

impl HandRing {
    /// The ring takes the first 64 KiB; buffers may be anywhere behind it.
    pub fn new(size: u16) -> Self {
        let views = TwoViews::new(2 << 20);
        let (places, end) = RingPlaces::at(0, size);
        assert!(end <= 64 << 10);
        let mappings = vec![views.mapping()];
        Self {
            views,
            places,
            mappings,
            features: RingFeatures { indirect: true, event_idx: true, ..RingFeatures::default() },
        }
    }

    pub fn device(&self) -> Result<DeviceRing, Fault> {
        let config = RingConfig::try_from(&self.places.info(IOVA)).unwrap();
        DeviceRing::new(3, &config, &self.views.window, Translation::new(&self.mappings), self.features)
    }

    /// Writes a descriptor at an offset of the owner's memory.
    pub fn descriptor_at(&self, offset: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let memory = &self.views.owner;
        memory.store_u64(offset, addr).unwrap();
        memory.store_u32(offset + 8, len).unwrap();
        memory.store_u16(offset + 12, flags).unwrap();
        memory.store_u16(offset + 14, next).unwrap();
    }

    /// Writes a descriptor of the ring's table. `addr` counts from `IOVA`.
    pub fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(self.places.desc + 16 * u64::from(index), IOVA + addr, len, flags, next);
    }

    pub fn avail_slot(&self, slot: u16, head: u16) {
        let slot = u64::from(slot % self.places.size);
        self.views.owner.store_u16(self.places.avail + 4 + 2 * slot, head).unwrap();
    }

    pub fn avail_index(&self, index: u16) {
        self.views.owner.store_u16_release(self.places.avail + 2, index).unwrap();
    }

    /// Makes one chain available, at slot 0.
    pub fn offer(&self, head: u16) {
        self.avail_slot(0, head);
        self.avail_index(1);
    }

    pub fn used_index(&self) -> u16 {
        self.views.owner.load_u16_acquire(self.places.used + 2).unwrap()
    }

    pub fn used_element(&self, slot: u16) -> (u32, u32) {
        let at = self.places.used + 4 + 8 * u64::from(slot % self.places.size);
        (self.views.owner.load_u32(at).unwrap(), self.views.owner.load_u32(at + 4).unwrap())
    }
}

/// Raised when dropped, by a panic too: ends the threads that a failed test would
/// otherwise wait for.
#[derive(Default)]
pub struct Done(AtomicBool);

impl Done {
    pub fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Raises it at the end of the scope.
    pub fn at_end(&self) -> impl Drop + '_ {
        struct AtEnd<'a>(&'a AtomicBool);
        impl Drop for AtEnd<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        AtEnd(&self.0)
    }
}

/// Frames whose bytes tell a lost, doubled or torn one.
pub fn frame(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Passes all frames through, in bursts, and compares what comes out.
pub fn pass(
    frames: &[Vec<u8>],
    bursts: &[(usize, usize)],
    mut send: impl FnMut(&[&[u8]]) -> usize,
    mut receive: impl FnMut(&mut PacketBurst, usize) -> usize,
) {
    let mut expected = VecDeque::new();
    let mut burst = PacketBurst::default();
    let (mut sent, mut idle) = (0, 0);
    for &(out, back) in bursts.iter().cycle() {
        let next: Vec<_> = frames[sent..].iter().take(out).map(Vec::as_slice).collect();
        let taken = send(&next);
        expected.extend(&frames[sent..sent + taken]);
        sent += taken;
        burst.clear();
        let received = receive(&mut burst, back);
        assert_eq!(received, burst.len());
        for packet in burst.iter() {
            assert_eq!(Some(packet.frame), expected.pop_front().map(Vec::as_slice));
            assert_eq!((packet.header.flags, packet.header.gso_type), (0, 0));
        }
        if sent == frames.len() && expected.is_empty() {
            return;
        }
        idle = if taken + received == 0 { idle + 1 } else { 0 };
        assert!(idle < 100, "no packet moves any more");
    }
}
