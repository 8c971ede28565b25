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
use vhost_pci_switch::link::features::{PROTOCOL_FEATURES, PROTOCOL_SHMEM_STRICT};
use vhost_pci_switch::link::message::{RegionRequest, Request};
use vhost_pci_switch::link::{owner, peer};

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
            Self::Kick(index) => Request::SetVringKick { index: *index, fd: Some(eventfd()) },
            Self::Call(index) => Request::SetVringCall { index: *index, fd: Some(eventfd()) },
            Self::Enable(index, enable) => Request::SetVringEnable { index: *index, enable: *enable },
            Self::Stop(index) => Request::GetVringBase { index: *index },
            Self::ResetOwner => Request::ResetOwner,
        }
    }

    /// Whether the owner may reuse memory as soon as this is answered.
    pub fn revokes(&self) -> bool {
        matches!(
            self,
            Self::MemTable(_)
                | Self::RemoveRegion(_)
                | Self::Enable(_, false)
                | Self::Stop(_)
                | Self::ResetOwner
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
    started: [bool; 2],
    enabled: [bool; 2],
    halted: bool,
}

impl Shared {
    pub fn takes(&mut self, ask: &Ask) {
        match ask {
            Ask::Features(bits) if bits & PROTOCOL_FEATURES == 0 => self.enabled = [true; 2],
            Ask::Features(_) | Ask::Num(..) | Ask::Addr(..) | Ask::Call(_) => {}
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
    }

    /// Whether a peer may have this range.
    pub fn allows(&self, placement: &Placement<MemoryFile>, files: &Files) -> bool {
        let runs = !self.halted && (0..2).any(|ring| self.started[ring] && self.enabled[ring]);
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

    pub fn regions(&self) -> &[Region] {
        &self.regions
    }
}

/// What a peer's front-end asks before its guest's driver starts the device.
pub fn peer_set_up(queues: u32) -> Vec<Request> {
    let mut requests = vec![
        Request::GetFeatures,
        Request::GetProtocolFeatures,
        Request::SetProtocolFeatures(peer::protocol_features() & !PROTOCOL_SHMEM_STRICT),
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
    owner::protocol_features()
}
