//! The owner's session: what its front-end has told so far, and what of its
//! memory the peer is to see.

use iommu::{FrontendVa, Gpa, IovaMap, MemoryTable, NewRegion};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

use super::descriptor::MemoryFile;
use super::fault::Fault;
use super::features;
use super::message::{RegionRequest, Reply, Request, VringBase};
use super::vring::{Vring, VringAddr};
use crate::config::LinkConfig;

/// Memory regions that an owner may have: what QEMU has slots for in a virtual
/// machine without memory hot-plug, many times over.
pub const MAX_REGIONS: usize = 64;

/// Protocol features offered to an owner's front-end.
pub fn protocol_features() -> Protocol {
    Protocol::MQ | Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS
}

/// What the owner's front-end has told so far.
#[derive(Debug)]
pub struct OwnerSession {
    offered: u64,
    features: u64,
    protocol: u64,
    queue_pairs: u16,
    memory: MemoryTable<MemoryFile>,
    vrings: Vec<Vring>,
    /// After a vring was stopped nothing is shown until one is started again.
    halted: bool,
}

impl OwnerSession {
    /// A session in which nothing was said yet.
    pub fn new(config: &LinkConfig) -> Self {
        Self {
            offered: features::offered_to_owner(config.profile),
            features: 0,
            protocol: 0,
            queue_pairs: config.queue_pairs,
            memory: MemoryTable::new(MAX_REGIONS),
            vrings: (0..config.max_vrings()).map(|_| Vring::default()).collect(),
            halted: true,
        }
    }

    /// The virtio features that the owner's driver accepted.
    pub fn features(&self) -> u64 {
        self.features & !features::PROTOCOL_FEATURES
    }

    /// The vhost-user protocol features that the front-end accepted.
    pub fn protocol(&self) -> u64 {
        self.protocol
    }

    /// The owner's vrings.
    pub fn vrings(&self) -> &[Vring] {
        &self.vrings
    }

    /// The owner's memory as its device may reach it: all of it, where the owner
    /// has no virtual IOMMU; empty while no vring runs.
    pub fn visible(&self) -> IovaMap<MemoryFile> {
        if self.halted || !self.vrings.iter().any(Vring::is_live) {
            return IovaMap::new();
        }
        // A buffer may run from one region into the next where both touch.
        IovaMap::identity(&self.memory).merged()
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
            }
            Request::GetFeatures => return Ok(Reply::Number(self.offered)),
            Request::SetFeatures(acked) => {
                features::check(acked, self.offered)?;
                self.features = acked;
                if acked & features::PROTOCOL_FEATURES == 0 {
                    // vhost-user, Ring states: without the feature rings start enabled.
                    self.vrings.iter_mut().for_each(|vring| vring.enabled = true);
                }
            }
            Request::GetProtocolFeatures => return Ok(Reply::Number(protocol_features().bits())),
            Request::SetProtocolFeatures(acked) => {
                features::check(acked, protocol_features().bits())?;
                self.protocol = acked;
            }
            Request::GetQueueNum => return Ok(Reply::Number(u64::from(self.queue_pairs))),
            Request::GetMaxMemSlots => return Ok(Reply::Number(MAX_REGIONS as u64)),
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
            Request::SetVringNum { index, num } => self.vring(index)?.set_size(index, num)?,
            Request::SetVringAddr { index, desc, avail, used } => {
                self.vring(index)?.set_addr(index, VringAddr { desc, avail, used })?;
            }
            Request::SetVringBase { index, base } => self.vring(index)?.set_base(index, base)?,
            Request::GetVringBase { index } => return self.stop_vring(index),
            Request::SetVringKick { index, fd } => {
                self.vring(index)?;
                self.vrings[index as usize].start(index, fd, &self.memory)?;
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
            Request::GetConfig { .. } | Request::SetConfig => return Err(Fault::Unsupported("CONFIG")),
            Request::GetShmemConfig => return Err(Fault::Unsupported("SHMEM")),
            Request::SetBackendChannel(_) => return Err(Fault::Unsupported("BACKEND_REQ")),
            Request::Iotlb => return Err(Fault::Unsupported("IOTLB_MSG")),
        }
        Ok(Reply::Done)
    }

    fn take_memory(&mut self, table: MemoryTable<MemoryFile>) -> Result<(), Fault> {
        for (index, vring) in (0..).zip(&self.vrings) {
            vring.recheck(index, &table)?;
        }
        self.memory = table;
        Ok(())
    }

    fn stop_vring(&mut self, index: u32) -> Result<Reply, Fault> {
        let vring = self.vring(index)?;
        let fallback = vring.base();
        let stopped = vring.stop();
        self.halted = true;
        // The used ring's index is its second 16-bit field (virtio 1.3, 2.7.8).
        let used_index = stopped.and_then(|config| {
            let place = self.memory.by_guest(Gpa::new(config.used.raw()), 4).ok()?;
            Some((place.backing.handle, place.backing.offset + 2))
        });
        Ok(Reply::VringBase(VringBase { index, used_index, fallback }))
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring, Fault> {
        let count = self.vrings.len();
        self.vrings.get_mut(index as usize).ok_or_else(|| Fault::Vring {
            index,
            reason: format!("this link has {count} vrings (queue_pairs in its configuration)"),
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
