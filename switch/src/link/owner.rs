//! The owner's session: what its front-end has told so far, and what of its
//! memory the peer is to see.

use iommu::{
    Access, Backing, FrontendVa, Gpa, Iova, IovaMap, MappedRange, MemoryTable, NewRegion, Region, Span,
};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost_pci_device::abi;

use super::descriptor::MemoryFile;
use super::fault::Fault;
use super::features;
use super::iommu::iotlb::{Iotlb, Piece};
use super::log::{DirtyLog, Pages};
use super::message::{Marks, RegionRequest, Reply, Request, VringBase};
use super::vring::{AddressSpace, Format, Vring, VringAddr, VringConfig};
use crate::config::LinkConfig;
use crate::kind::Device;

/// Protocol features offered to the front-end of an owner with this device.
pub fn protocol_features(device: &Device, migration: bool) -> u64 {
    let mut standard =
        Protocol::MQ | Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS | Protocol::BACKEND_REQ;
    standard.set(Protocol::CONFIG, !device.config.is_empty());
    standard.set(Protocol::LOG_SHMFD, migration);
    standard.bits() | features::PROTOCOL_IOMMU_PUSH
}

/// What the front-end gave to mark written pages in.
#[derive(Debug, Default)]
enum Log {
    /// Nothing yet.
    #[default]
    None,
    /// A log.
    Given(DirtyLog),
    /// One that cannot be used.
    Refused,
}

/// What the owner's front-end has told so far.
#[derive(Debug)]
pub struct OwnerSession {
    offered: u64,
    features: u64,
    protocol: u64,
    offered_protocol: u64,
    device: Device,
    memory: MemoryTable<MemoryFile>,
    vrings: Vec<Vring>,
    /// What is known of the guest's IOMMU, if it has one.
    pub iotlb: Iotlb,
    /// What was known of memory that has left the table since this was last taken.
    pub unbacked: Vec<Span<Iova>>,
    has_channel: bool,
    takes_unsealed: bool,
    log: Log,
    /// After a vring was stopped nothing is shown until one is started again.
    halted: bool,
    /// The link ends: nothing is shown any more.
    unplugged: bool,
}

impl OwnerSession {
    /// A session in which nothing was said yet.
    pub fn new(config: &LinkConfig) -> Self {
        Self {
            offered: features::offered_to_owner(&config.device)
                | if config.migration { features::LOG_ALL } else { 0 },
            offered_protocol: protocol_features(&config.device, config.migration),
            features: 0,
            protocol: 0,
            device: config.device.clone(),
            memory: MemoryTable::new(config.memory_regions),
            vrings: (0..config.max_vrings()).map(|_| Vring::default()).collect(),
            iotlb: Iotlb::default(),
            unbacked: Vec::new(),
            has_channel: false,
            takes_unsealed: config.unsealed_memory,
            log: Log::None,
            halted: true,
            unplugged: false,
        }
    }

    /// Whether the owner's device is behind an IOMMU.
    pub fn has_iommu(&self) -> bool {
        self.features & features::ACCESS_PLATFORM != 0
    }

    /// The format of the owner's rings.
    fn format(&self) -> Format {
        Format::of(self.features)
    }

    /// Whether the front-end tells each change of the IOMMU by itself: what it did not
    /// tell is not mapped.
    pub fn pushes(&self) -> bool {
        self.protocol & features::PROTOCOL_IOMMU_PUSH != 0
    }

    /// The owner's memory.
    pub fn memory(&self) -> &MemoryTable<MemoryFile> {
        &self.memory
    }

    /// Whether the peer may see anything: a vring runs.
    pub fn is_running(&self) -> bool {
        // A front-end that starts a device in the middle of a migration tells the log last.
        !self.unplugged && !self.halted && self.has_live_vring() && (!self.logs() || self.log().is_some())
    }

    /// Shows nothing from now on, whatever the front-end says.
    pub fn unplug(&mut self) {
        self.unplugged = true;
    }

    /// Whether a vring was started and is enabled.
    pub fn has_live_vring(&self) -> bool {
        self.vrings.iter().any(Vring::is_live)
    }

    /// Whether the front-end wants to know what is written.
    pub fn logs(&self) -> bool {
        self.features & features::LOG_ALL != 0
    }

    /// Where that is to be marked.
    pub fn log(&self) -> Option<&DirtyLog> {
        match &self.log {
            Log::Given(log) if self.logs() => Some(log),
            _ => None,
        }
    }

    /// Takes a log for what is written from the next SET_FEATURES on that says so, or, if there is one in use,
    /// from now on.
    pub fn set_log(&mut self, log: DirtyLog) {
        self.log = Log::Given(log);
    }

    /// The log that came cannot be used.
    pub fn refuse_log(&mut self) {
        self.log = Log::Refused;
    }

    /// Whether SET_FEATURES with these bits would begin to log with a log that was refused, and the
    /// front-end hears of it if it is declined.
    pub fn must_decline(&self, acked: u64) -> bool {
        let begins = acked & !self.features & features::LOG_ALL != 0;
        begins && matches!(self.log, Log::Refused) && self.protocol & Protocol::REPLY_ACK.bits() != 0
    }

    /// Where the owner's guest has the memory of a range, if it has it in one piece.
    pub fn guest_of_range(&self, range: &MappedRange<MemoryFile>) -> Option<Gpa> {
        match self.has_iommu() {
            true => self.memory.guest_of(range.backing(), range.iova().len()),
            false => Some(Gpa::new(range.iova().start().raw())),
        }
    }

    /// The virtio features that the owner's driver accepted.
    pub fn features(&self) -> u64 {
        self.features & !features::PROTOCOL_FEATURES & !features::LOG_ALL
    }

    /// The vhost-user protocol features that the front-end accepted.
    pub fn protocol(&self) -> u64 {
        self.protocol
    }

    /// The owner's vrings.
    pub fn vrings(&self) -> &[Vring] {
        &self.vrings
    }

    /// The owner's memory as the device of an owner without an IOMMU may reach it: all
    /// of it that is its own; empty while no vring runs.
    pub fn identity(&self) -> IovaMap<MemoryFile> {
        if !self.is_running() {
            return IovaMap::new();
        }
        // A buffer may run from one region into the next where both touch.
        IovaMap::identity(&self.memory.without(MemoryFile::is_foreign)).merged()
    }

    /// Takes one request. On a fault nothing has changed.
    ///
    /// # Errors
    /// The fault of a request that cannot be taken.
    pub fn apply(&mut self, request: Request) -> Result<Reply, Fault> {
        match request {
            Request::SetOwner => {}
            Request::ResetOwner => {
                for vring in &mut self.vrings {
                    vring.stop();
                }
                self.halted = true;
                self.iotlb = Iotlb::default();
            }
            Request::GetFeatures => return Ok(Reply::Number(self.offered)),
            Request::SetFeatures(acked) => {
                features::check(acked, self.offered)?;
                if (acked ^ self.features) & features::ACCESS_PLATFORM != 0 {
                    self.must_be_stopped("VIRTIO_F_ACCESS_PLATFORM")?;
                    self.iotlb = Iotlb::default();
                }
                if (acked ^ self.features) & features::RING_PACKED != 0 {
                    self.must_be_stopped("VIRTIO_F_RING_PACKED")?;
                }
                if acked & features::LOG_ALL != 0 && matches!(self.log, Log::Refused) {
                    return Err(Fault::Log("VHOST_F_LOG_ALL without one that can be used".into()));
                }
                self.features = acked;
                if acked & features::PROTOCOL_FEATURES == 0 {
                    // vhost-user, Ring states: without the feature rings start enabled.
                    self.vrings.iter_mut().for_each(|vring| vring.enabled = true);
                }
            }
            Request::GetProtocolFeatures => return Ok(Reply::Number(self.offered_protocol)),
            Request::SetProtocolFeatures(acked) => {
                features::check(acked, self.offered_protocol)?;
                features::check_needs(acked, features::PROTOCOL_IOMMU_PUSH, Protocol::REPLY_ACK)?;
                if (acked ^ self.protocol) & features::PROTOCOL_IOMMU_PUSH != 0 {
                    self.must_be_stopped("IOMMU_PUSH")?;
                    self.iotlb = Iotlb::default();
                }
                self.protocol = acked;
            }
            Request::GetQueueNum => return Ok(Reply::Number(u64::from(self.device.queues))),
            Request::GetMaxMemSlots => return Ok(Reply::Number(self.memory.max_regions() as u64)),
            Request::SetMemTable(regions) => {
                let table = self.memory.replace(regions.into_iter().map(new_region).collect())?;
                self.take_memory(table)?;
            }
            Request::AddMemReg(region) => {
                let mut table = self.memory.clone();
                table.add(new_region(region))?;
                self.take_memory(table)?;
            }
            Request::RemMemReg { guest, frontend, len } => {
                let mut table = self.memory.clone();
                table.remove(Gpa::new(guest), FrontendVa::new(frontend), len)?;
                self.take_memory(table)?;
            }
            Request::SetVringNum { index, num } => {
                let format = self.format();
                self.vring(index)?.set_size(index, num, format)?;
            }
            Request::SetVringAddr { index, desc, avail, used } => {
                self.vring(index)?.set_addr(index, VringAddr { desc, avail, used })?;
            }
            Request::SetVringBase { index, base } => {
                let format = self.format();
                self.vring(index)?.set_base(index, base, format)?;
            }
            Request::GetVringBase { index } => return self.stop_vring(index),
            Request::SetVringKick { index, fd } => {
                self.vring(index)?;
                self.can_translate()?;
                let own = self.memory.without(MemoryFile::is_foreign);
                let space = match self.has_iommu() {
                    true => AddressSpace::Iova,
                    false => AddressSpace::FrontEnd(&own),
                };
                let format = self.format();
                self.vrings[index as usize].start(index, fd, space, format)?;
                self.halted = false;
            }
            Request::SetVringCall { index, fd } => self.vring(index)?.call = fd,
            Request::SetVringErr { index, fd } => self.vring(index)?.err = fd,
            Request::SetVringEnable { index, enable } => {
                self.vring(index)?.enabled = enable;
                if enable {
                    self.halted = false;
                }
            }
            Request::GetConfig { .. } | Request::SetConfig if self.device.config.is_empty() => {
                return Err(Fault::Unsupported("CONFIG"));
            }
            Request::GetConfig { offset, len } => return self.config_bytes(offset, len).map(Reply::Config),
            // None is offered that the driver could write.
            Request::SetConfig => return Err(Fault::Config("it is read-only".into())),
            Request::GetShmemConfig => return Err(Fault::Unsupported("SHMEM")),
            Request::SetLogBase { .. } => return Err(Fault::Unsupported("LOG_SHMFD")),
            // Taken by the link before it comes here.
            Request::SetBackendChannel(_) => return Err(Fault::Unsupported("BACKEND_REQ")),
            Request::Iotlb(_) | Request::IommuPush { .. } => return Err(Fault::Unsupported("IOTLB_MSG")),
        }
        Ok(Reply::Done)
    }

    fn take_memory(&mut self, table: MemoryTable<MemoryFile>) -> Result<(), Fault> {
        let can_shrink = |region: &Region<MemoryFile>| region.backing().handle.can_shrink();
        if !self.takes_unsealed && table.regions().iter().any(can_shrink) {
            return Err(Fault::Unsealed);
        }
        if !self.has_iommu() {
            let own = table.without(MemoryFile::is_foreign);
            for (index, vring) in (0..).zip(&self.vrings) {
                vring.recheck(index, AddressSpace::FrontEnd(&own))?;
            }
        }
        if let Some(log) = self.log() {
            log.check_covers(&table)?;
        }
        // A region that is described otherwise has left, and another has come.
        self.unbacked.extend(self.iotlb.forget_unbacked(&table.common(&self.memory)));
        self.memory = table;
        Ok(())
    }

    fn stop_vring(&mut self, index: u32) -> Result<Reply, Fault> {
        let format = self.format();
        let started = self.vring(index)?.started().copied();
        let marks = started.and_then(|config| self.marks(&config));
        let vring = self.vring(index)?;
        let fallback = vring.base(format);
        let stopped = vring.stop();
        self.halted = true;
        let (size, format) = stopped.map_or((0, format), |config| (config.size, config.format));
        let place = stopped.and_then(|config| self.place(&config));
        // While its device is stopped QEMU does not tell what is unmapped, and a front-end
        // that pushes tells all of it at the next start.
        if self.vrings.iter().all(|vring| vring.started().is_none()) {
            self.iotlb = Iotlb::default();
        }
        Ok(Reply::VringBase(VringBase { index, place, format, size, fallback, marks }))
    }

    /// What of a vring's own memory is to be marked when it has stopped: the peer's driver marks after it
    /// has written, and may have lost the log in between.
    fn marks(&self, config: &VringConfig) -> Option<Marks> {
        let log = self.log()?.clone();
        let guest = |span: Span<Iova>| match self.has_iommu() {
            true => {
                let pieces = self.iotlb.pieces(span, Access::Write).unwrap_or_default();
                pieces.into_iter().filter_map(|piece| self.pages(piece)).collect()
            }
            false => vec![Pages::of(Gpa::new(span.start().raw()), span.len())],
        };
        Some(Marks { log, pages: config.written().flat_map(guest).collect() })
    }

    /// The pages of the guest's that a piece of its memory's files is.
    pub fn pages(&self, piece: Piece) -> Option<Pages> {
        let backing = Backing { handle: piece.file, offset: piece.offset };
        Some(Pages::of(self.memory.guest_of(&backing, piece.len)?, piece.len))
    }

    /// Where a vring says how far the peer's driver is.
    fn place(&self, config: &VringConfig) -> Option<(MemoryFile, u64)> {
        let at = config.format.place_at();
        if self.has_iommu() {
            let span = Span::new(config.used, 4).ok()?;
            let piece = self.iotlb.pieces(span, Access::Write).ok()?.into_iter().next()?;
            return Some((piece.file, piece.offset + at));
        }
        let place = self.memory.by_guest(Gpa::new(config.used.raw()), 4).ok()?;
        Some((place.backing.handle, place.backing.offset + at))
    }

    /// Takes the stream for requests to the front-end.
    ///
    /// # Errors
    /// When the channel was not negotiated.
    pub fn take_channel(&mut self) -> Result<(), Fault> {
        if self.protocol & Protocol::BACKEND_REQ.bits() == 0 {
            return Err(Fault::Unsupported("BACKEND_REQ"));
        }
        self.has_channel = true;
        Ok(())
    }

    /// An owner with an IOMMU has to have a way to tell its translations.
    fn can_translate(&self) -> Result<(), Fault> {
        let asks = self.has_channel && self.protocol & Protocol::REPLY_ACK.bits() != 0;
        if self.has_iommu() && !asks && !self.pushes() {
            return Err(Fault::OutOfOrder(
                "the owner's driver accepted VIRTIO_F_ACCESS_PLATFORM, but its front-end cannot be asked for \
                 translations: it did not negotiate REPLY_ACK and BACKEND_REQ and give a back-end channel"
                    .into(),
            ));
        }
        Ok(())
    }

    /// What gives addresses their meaning cannot change under a started vring.
    fn must_be_stopped(&self, what: &str) -> Result<(), Fault> {
        match self.vrings.iter().any(|vring| vring.started().is_some()) {
            true => Err(Fault::OutOfOrder(format!("{what} changes while a vring is started"))),
            false => Ok(()),
        }
    }

    /// Bytes of the device's configuration space; zero past its end.
    fn config_bytes(&self, offset: u32, len: u32) -> Result<Vec<u8>, Fault> {
        if u64::from(offset) + u64::from(len) > u64::from(abi::MAX_OWNER_CONFIG) {
            return Err(Fault::Config(format!(
                "{len} bytes from {offset} on are asked for; it has at most {}",
                abi::MAX_OWNER_CONFIG
            )));
        }
        let known = self.device.config.iter().copied().chain(std::iter::repeat(0));
        Ok(known.skip(offset as usize).take(len as usize).collect())
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring, Fault> {
        let count = self.vrings.len();
        let key = self.device.vrings_key();
        self.vrings.get_mut(index as usize).ok_or_else(|| Fault::Vring {
            index,
            reason: format!("this link has {count} vrings ({key} in its configuration)"),
        })
    }
}

fn new_region(region: RegionRequest) -> NewRegion<MemoryFile> {
    NewRegion {
        guest: Gpa::new(region.guest),
        frontend: FrontendVa::new(region.frontend),
        len: region.len,
        handle: region.file,
        offset: region.offset,
        file_len: region.file_len,
    }
}
