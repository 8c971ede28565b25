//! Requests as front-ends make them, and a plain account of what an owner shares
//! by its own: the judge of what a peer may still hold.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use iommu::Placement;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_pci_switch::link::descriptor::{Eventfd, MemoryFile};
use vhost_pci_switch::link::features::{
    ACCESS_PLATFORM, PROTOCOL_FEATURES, PROTOCOL_IOMMU_PUSH, PROTOCOL_SHMEM_STRICT, PROTOCOL_WIRING,
};
use vhost_pci_switch::link::iommu::demand::Task;
use vhost_pci_switch::link::iommu::iotlb::Piece;
use vhost_pci_switch::link::message::{IotlbMessage, PushEntry, RegionRequest, Request};
use vhost_pci_switch::link::{owner, peer};

use crate::iommu_owner::page_table::PageTable;

/// Front-end virtual address of guest address 0.
pub const FRONTEND: u64 = 0x7f00_0000_0000;
/// Length of each file.
pub const FILE_LEN: u64 = 8 << 20;
/// VIRTIO_F_VERSION_1 and the bit of vhost-user.
pub const FEATURES: u64 = 1 << 32 | PROTOCOL_FEATURES;

/// A region, by plain numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub guest: u64,
    pub len: u64,
    /// Which of the files.
    pub file: usize,
    pub offset: u64,
}

impl Region {
    pub const fn new(guest: u64, len: u64, file: usize, offset: u64) -> Self {
        Self { guest, len, file, offset }
    }
}

/// The files that regions are in.
pub struct Files(Vec<MemoryFile>);

impl Files {
    pub fn new() -> Self {
        Self((0..3).map(|_| memory_file()).collect())
    }

    /// Another VM's, which the front-end has in a window.
    pub fn make_foreign(&mut self, file: usize) {
        self.0[file] = self.0[file].clone().foreign();
    }

    pub fn request(&self, region: Region) -> RegionRequest {
        RegionRequest {
            guest: region.guest,
            frontend: FRONTEND + region.guest,
            len: region.len,
            offset: region.offset,
            file: self.0[region.file].clone(),
            file_len: FILE_LEN,
        }
    }

    /// The end of what this region has of the range from `start` on, if it has that.
    fn end_of(&self, region: &Region, placement: &Placement<MemoryFile>, start: u64) -> Option<u64> {
        let (iova, backing) = (placement.range().iova(), placement.range().backing());
        if !(region.guest..region.guest + region.len).contains(&start) {
            return None;
        }
        let place = backing.offset + (start - iova.start().raw());
        let same = backing.handle == self.0[region.file] && place == region.offset + (start - region.guest);
        same.then(|| region.guest + region.len)
    }
}

fn memory_file() -> MemoryFile {
    let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(FILE_LEN).unwrap();
    let metadata = file.metadata().unwrap();
    MemoryFile::new(OwnedFd::from(file), metadata.dev(), metadata.ino())
}

pub fn eventfd() -> Eventfd {
    eventfd_pair().1
}

/// The front-end's end and the broker's end of one eventfd.
pub fn eventfd_pair() -> (EventFd, Eventfd) {
    let mine = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
    let theirs = mine.as_fd().try_clone_to_owned().unwrap();
    (mine, Eventfd::new(theirs))
}

/// What an owner's front-end asks.
#[derive(Clone, Debug)]
pub enum Ask {
    Features(u64),
    MemTable(Vec<Region>),
    AddRegion(Region),
    RemoveRegion(Region),
    /// NUM, ADDR and BASE are three requests; this is one of them.
    Num(u32, u32),
    /// The vring's page: descriptors at its start, rings behind them.
    Addr(u32, u64),
    /// Descriptors, available and used ring at IOVAs.
    AddrIova(u32, [u64; 3]),
    Protocol(u64),
    /// A new back-end channel.
    Channel,
    /// IOTLB update: IOVA, size, guest-physical address, permission.
    Update(u64, u64, u64, u8),
    /// IOTLB invalidation: IOVA, size.
    Invalidate(u64, u64),
    /// Pushed changes: IOVA, size, guest-physical address, permission.
    Push(bool, Vec<(u64, u64, u64, u8)>),
    Kick(u32),
    Call(u32),
    Enable(u32, bool),
    Stop(u32),
    ResetOwner,
}

impl Ask {
    pub fn request(&self, files: &Files) -> Request {
        match self {
            Self::Features(bits) => Request::SetFeatures(*bits),
            Self::MemTable(regions) => {
                Request::SetMemTable(regions.iter().map(|region| files.request(*region)).collect())
            }
            Self::AddRegion(region) => Request::AddMemReg(files.request(*region)),
            Self::RemoveRegion(region) => {
                Request::RemMemReg { guest: region.guest, frontend: FRONTEND + region.guest, len: region.len }
            }
            Self::Num(index, num) => Request::SetVringNum { index: *index, num: *num },
            Self::Addr(index, page) => Request::SetVringAddr {
                index: *index,
                desc: FRONTEND + page,
                avail: FRONTEND + page + 0x400,
                used: FRONTEND + page + 0x600,
            },
            Self::AddrIova(index, [desc, avail, used]) => {
                Request::SetVringAddr { index: *index, desc: *desc, avail: *avail, used: *used }
            }
            Self::Protocol(bits) => Request::SetProtocolFeatures(*bits),
            Self::Channel => Request::SetBackendChannel(UnixStream::pair().unwrap().0),
            Self::Update(iova, size, guest, perm) => Request::Iotlb(IotlbMessage {
                iova: *iova,
                size: *size,
                frontend: FRONTEND.wrapping_add(*guest),
                perm: *perm,
                kind: IotlbMessage::UPDATE,
            }),
            Self::Invalidate(iova, size) => Request::Iotlb(IotlbMessage {
                iova: *iova,
                size: *size,
                frontend: 0,
                perm: 0,
                kind: IotlbMessage::INVALIDATE,
            }),
            Self::Push(reset, entries) => {
                let entry = |(iova, size, guest, perm): &(u64, u64, u64, u8)| PushEntry {
                    iova: *iova,
                    size: *size,
                    frontend: if *perm == 0 { 0 } else { FRONTEND.wrapping_add(*guest) },
                    perm: *perm,
                };
                Request::IommuPush { reset: *reset, entries: entries.iter().map(entry).collect() }
            }
            Self::Kick(index) => Request::SetVringKick { index: *index, fd: Some(eventfd()) },
            Self::Call(index) => Request::SetVringCall { index: *index, fd: Some(eventfd()) },
            Self::Enable(index, enable) => Request::SetVringEnable { index: *index, enable: *enable },
            Self::Stop(index) => Request::GetVringBase { index: *index },
            Self::ResetOwner => Request::ResetOwner,
        }
    }

    /// Whether the owner may reuse memory as soon as this is answered.
    pub fn waits_for_wiring(&self) -> bool {
        matches!(
            self,
            Self::Kick(_) | Self::Call(_) | Self::Enable(_, false) | Self::Stop(_) | Self::ResetOwner
        )
    }

    pub fn revokes(&self) -> bool {
        matches!(
            self,
            Self::MemTable(_)
                | Self::RemoveRegion(_)
                | Self::Enable(_, false)
                | Self::Stop(_)
                | Self::ResetOwner
                | Self::Invalidate(..)
                | Self::Push(..)
        )
    }

    /// Everything that starts an owner's device with vrings 0 and 1 in the first
    /// pages of the first region.
    pub fn bring_up(regions: &[Region]) -> Vec<Self> {
        let mut asks = vec![Self::Features(FEATURES), Self::MemTable(regions.to_vec())];
        let page = regions[0].guest;
        for index in 0..2 {
            asks.push(Self::Num(index, 64));
            asks.push(Self::Addr(index, page + 0x1000 * u64::from(index)));
            asks.push(Self::Call(index));
            asks.push(Self::Kick(index));
            asks.push(Self::Enable(index, true));
        }
        asks
    }
}

/// What the owner shares, from its requests alone.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    regions: Vec<Region>,
    features: u64,
    protocol: u64,
    /// The guest's IOMMU, if it has one; with pushes, as far as it was told.
    pub table: PageTable,
    started: [bool; 2],
    enabled: [bool; 2],
    halted: bool,
}

impl Shared {
    pub fn takes(&mut self, ask: &Ask) {
        match ask {
            Ask::Features(bits) => {
                self.features = *bits;
                if bits & PROTOCOL_FEATURES == 0 {
                    self.enabled = [true; 2];
                }
            }
            Ask::Protocol(bits) => self.protocol = *bits,
            Ask::Push(reset, entries) => {
                self.table.push(*reset, entries, &self.regions);
            }
            Ask::Num(..) | Ask::Addr(..) | Ask::AddrIova(..) | Ask::Call(_) | Ask::Channel => {}
            Ask::Update(..) | Ask::Invalidate(..) => {}
            Ask::MemTable(regions) => self.regions.clone_from(regions),
            Ask::AddRegion(region) => self.regions.push(*region),
            Ask::RemoveRegion(region) => {
                self.regions.retain(|present| (present.guest, present.len) != (region.guest, region.len))
            }
            Ask::Kick(index) => {
                self.started[*index as usize] = true;
                self.halted = false;
            }
            Ask::Enable(index, enable) => {
                self.enabled[*index as usize] = *enable;
                self.halted &= !enable;
            }
            Ask::Stop(index) => {
                self.started[*index as usize] = false;
                self.halted = true;
            }
            Ask::ResetOwner => {
                self.started = [false; 2];
                self.halted = true;
            }
        }
        if self.pushes() && matches!(ask, Ask::Stop(_) | Ask::ResetOwner) && self.started == [false; 2] {
            self.table = PageTable::default();
        }
        if self.pushes() && matches!(ask, Ask::MemTable(_) | Ask::RemoveRegion(_)) {
            self.table.keep_backed(&self.regions);
        }
    }

    /// The front-end has its answer.
    pub fn answered(&mut self, ask: &Ask, declined: bool) {
        if matches!(ask, Ask::Push(..)) {
            assert_eq!(!declined, self.table.accepted, "{ask:?}");
        }
    }

    /// Whether a vring runs.
    pub fn runs(&self) -> bool {
        !self.halted && (0..2).any(|ring| self.started[ring] && self.enabled[ring])
    }

    pub fn is_started(&self, ring: u32) -> bool {
        self.started[ring as usize]
    }

    pub fn has_iommu(&self) -> bool {
        self.features & ACCESS_PLATFORM != 0
    }

    pub fn pushes(&self) -> bool {
        self.protocol & PROTOCOL_IOMMU_PUSH != 0
    }

    /// What a copy may touch: the bytes behind the addresses that it was asked for, if the
    /// guest lets its device do that now.
    pub fn check_copy(&self, task: Task, iova: u64, len: u64, pieces: &[Piece], files: &Files) {
        let bit = if task == Task::Fetch { 1 } else { 2 };
        let mut at = iova;
        for piece in pieces {
            for byte in (0..piece.len).step_by(512).chain([piece.len - 1]) {
                let place = self.table.place(at + byte, bit, &self.regions);
                let (file, offset) =
                    place.unwrap_or_else(|| panic!("{task:?} of {:#x}, which is not allowed", at + byte));
                assert!(piece.file == files.0[file] && piece.offset + byte == offset, "{task:?} elsewhere");
            }
            at += piece.len;
        }
        assert_eq!(at, iova + len, "{task:?} of less or more than was asked for");
    }

    /// Whether a peer may have this range; with an IOMMU, with this access at least.
    pub fn allows(&self, placement: &Placement<MemoryFile>, files: &Files, bits: u8) -> bool {
        let runs = self.runs();
        if self.has_iommu() {
            return runs && self.allows_iova(placement, files, bits);
        }
        // Regions that touch, in memory and in their file, may appear as one range.
        let (mut start, last) =
            (placement.range().iova().start().raw(), placement.range().iova().last().raw());
        while runs && start <= last {
            let ends = self.regions.iter().find_map(|region| files.end_of(region, placement, start));
            let Some(end) = ends else { return false };
            start = end;
        }
        runs
    }

    fn allows_iova(&self, placement: &Placement<MemoryFile>, files: &Files, bits: u8) -> bool {
        let (iova, backing) = (placement.range().iova(), placement.range().backing());
        (0..iova.len()).step_by(4096).all(|into| {
            let place = self.table.place(iova.start().raw() + into, bits, &self.regions);
            place.is_some_and(|(file, offset)| {
                backing.handle == files.0[file] && backing.offset + into == offset
            })
        })
    }

    pub fn regions(&self) -> &[Region] {
        &self.regions
    }
}

/// What a peer's front-end asks before its guest's driver starts the device.
pub fn peer_set_up(queues: u32, strict: bool, wiring: bool) -> Vec<Request> {
    let without = if strict { 0 } else { PROTOCOL_SHMEM_STRICT } | if wiring { 0 } else { PROTOCOL_WIRING };
    let mut requests = vec![
        Request::GetFeatures,
        Request::GetProtocolFeatures,
        Request::SetProtocolFeatures(peer::protocol_features() & !without),
        Request::GetQueueNum,
        Request::SetOwner,
        Request::GetShmemConfig,
        Request::SetBackendChannel(UnixStream::pair().unwrap().0),
        Request::GetConfig { offset: 0, len: 64 },
        Request::SetFeatures(FEATURES),
    ];
    for index in 0..queues {
        requests.push(Request::SetVringCall { index, fd: Some(eventfd()) });
    }
    requests
}

/// What starts the device.
pub fn peer_start(queues: u32) -> Vec<Request> {
    let mut requests = Vec::new();
    for index in 0..queues {
        requests.push(Request::SetVringNum { index, num: 128 });
        requests.push(Request::SetVringBase { index, base: 0 });
        requests.push(Request::SetVringAddr { index, desc: 0, avail: 0, used: 0 });
        requests.push(Request::SetVringKick { index, fd: Some(eventfd()) });
    }
    requests.extend((0..queues).map(|index| Request::SetVringEnable { index, enable: true }));
    requests
}

/// What an owner's front-end is offered.
pub fn owner_protocol_features() -> u64 {
    owner::protocol_features(&crate::bench::config().device, true)
}
