//! One of the owner's vrings: the messages that set it up, and the states that it
//! goes through.
//!
//! ```text
//!            num, addr, base                 KICK                GET_VRING_BASE
//!  Stopped --------------------> Stopped ----------> Started ----------------> Stopped
//! ```
//! ENABLE is separate (vhost-user: Ring states): a started vring is served while it
//! is enabled. A started vring cannot be set up anew.

use iommu::{FrontendVa, Iova, MemoryTable, Span};
use vhost_pci_device::abi;

use super::descriptor::{Eventfd, MemoryFile};
use super::fault::Fault;

/// The largest size of a split virtqueue (virtio 1.3, 2.7).
const MAX_SIZE: u32 = 32768;

/// What the addresses of SET_VRING_ADDR are.
#[derive(Clone, Copy, Debug)]
pub enum AddressSpace<'m> {
    /// Front-end virtual, as the memory table has them.
    FrontEnd(&'m MemoryTable<MemoryFile>),
    /// The owner's device's own: its driver accepted VIRTIO_F_ACCESS_PLATFORM.
    Iova,
}

/// Where a front-end put a vring, in its [`AddressSpace`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringAddr {
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
}

/// A vring whose size and addresses were checked against the memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringConfig {
    /// Entries, a power of two.
    pub size: u16,
    /// Descriptor table.
    pub desc: Iova,
    /// Available ring.
    pub avail: Iova,
    /// Used ring.
    pub used: Iova,
    /// The available index that the front-end started it at.
    pub base: u16,
}

/// Whether a vring runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VringState {
    /// Being set up, or stopped.
    #[default]
    Stopped,
    /// Started by its kick.
    Started(VringConfig),
}

/// One vring of the owner.
#[derive(Debug, Default)]
pub struct Vring {
    state: VringState,
    size: Option<u16>,
    addr: Option<VringAddr>,
    base: u16,
    /// Whether the front-end wants it served.
    pub enabled: bool,
    /// Signalled by the owner's VMM when buffers are available.
    pub kick: Option<Eventfd>,
    /// Signalled for the owner's VMM when buffers are used.
    pub call: Option<Eventfd>,
    /// Signalled for the owner's VMM when the vring is broken.
    pub err: Option<Eventfd>,
}

impl VringConfig {
    /// Descriptor table, available ring and used ring, each with the event field behind it
    /// (virtio 1.3, 2.7).
    pub fn parts(&self) -> impl Iterator<Item = Span<Iova>> {
        let entries = u64::from(self.size);
        let parts = [(self.desc, 16 * entries), (self.avail, 6 + 2 * entries), (self.used, 6 + 8 * entries)];
        // None wraps: that was checked when the vring was started.
        parts.into_iter().filter_map(|(start, len)| Span::new(start, len).ok())
    }
}

impl Vring {
    /// The set-up while the vring is started.
    pub fn started(&self) -> Option<&VringConfig> {
        match &self.state {
            VringState::Stopped => None,
            VringState::Started(config) => Some(config),
        }
    }

    /// Whether the peer is to serve it.
    pub fn is_live(&self) -> bool {
        self.enabled && self.started().is_some()
    }

    /// The index of the last SET_VRING_BASE, or where the vring was stopped.
    pub fn base(&self) -> u16 {
        self.base
    }

    /// SET_VRING_NUM.
    pub fn set_size(&mut self, index: u32, num: u32) -> Result<(), Fault> {
        self.must_be_stopped(index, "its size")?;
        match u16::try_from(num) {
            Ok(size) if num.is_power_of_two() && num <= MAX_SIZE => {
                self.size = Some(size);
                Ok(())
            }
            _ => Err(Fault::Vring {
                index,
                reason: format!(
                    "its size is {num}; a split virtqueue has a power of two, at most {MAX_SIZE}"
                ),
            }),
        }
    }

    /// SET_VRING_ADDR.
    pub fn set_addr(&mut self, index: u32, addr: VringAddr) -> Result<(), Fault> {
        self.must_be_stopped(index, "its addresses")?;
        self.addr = Some(addr);
        Ok(())
    }

    /// SET_VRING_BASE.
    pub fn set_base(&mut self, index: u32, base: u32) -> Result<(), Fault> {
        self.must_be_stopped(index, "its base")?;
        self.base = u16::try_from(base).map_err(|_| Fault::Vring {
            index,
            reason: format!("its base is {base:#x}; a split virtqueue's index has 16 bits"),
        })?;
        Ok(())
    }

    /// SET_VRING_KICK: starts the vring.
    pub fn start(&mut self, index: u32, kick: Option<Eventfd>, space: AddressSpace<'_>) -> Result<(), Fault> {
        if self.started().is_none() {
            self.state = VringState::Started(self.checked(index, space)?);
        }
        self.kick = kick;
        Ok(())
    }

    /// Checks the addresses of a started vring against a memory table that changed.
    pub fn recheck(&self, index: u32, space: AddressSpace<'_>) -> Result<(), Fault> {
        match self.started() {
            Some(config) if self.checked(index, space)? != *config => {
                Err(Fault::Vring { index, reason: "it is started, and the new memory table moves it".into() })
            }
            _ => Ok(()),
        }
    }

    /// GET_VRING_BASE: stops the vring. Gives what it was started with.
    pub fn stop(&mut self) -> Option<VringConfig> {
        self.kick = None;
        match std::mem::take(&mut self.state) {
            VringState::Stopped => None,
            VringState::Started(config) => Some(config),
        }
    }

    /// The entry of the link page (`docs/vhost-pci-device.md`, 7.4). `reachable`: its
    /// memory is in the window.
    pub fn entry(&self, reachable: bool) -> abi::Vring {
        let Some(config) = self.started() else {
            return abi::Vring::default();
        };
        abi::Vring {
            flags: if self.enabled && reachable { abi::VRING_F_ENABLED } else { 0 }.into(),
            size: u32::from(config.size).into(),
            desc: config.desc.raw().into(),
            avail: config.avail.raw().into(),
            used: config.used.raw().into(),
            base: u32::from(config.base).into(),
            ..abi::Vring::default()
        }
    }

    fn must_be_stopped(&self, index: u32, what: &str) -> Result<(), Fault> {
        if self.started().is_some() {
            return Err(Fault::OutOfOrder(format!(
                "vring {index} is started; {what} can be set after GET_VRING_BASE only"
            )));
        }
        Ok(())
    }

    fn checked(&self, index: u32, space: AddressSpace<'_>) -> Result<VringConfig, Fault> {
        let fault = |reason: String| Fault::Vring { index, reason };
        let (Some(size), Some(addr)) = (self.size, self.addr) else {
            return Err(Fault::OutOfOrder(format!(
                "vring {index} was kicked before SET_VRING_NUM and SET_VRING_ADDR"
            )));
        };
        let entries = u64::from(size);
        // virtio 1.3, 2.7: the three parts, with the event field behind each ring.
        let part = |name: &str, address: u64, align: u64, len: u64| {
            if !address.is_multiple_of(align) {
                return Err(fault(format!("its {name} at {address:#x} is not aligned to {align} bytes")));
            }
            let iova = match space {
                AddressSpace::FrontEnd(memory) => memory
                    .by_frontend(FrontendVa::new(address), len)
                    .map(|place| Iova::new(place.guest.raw()))
                    .map_err(|error| error.to_string()),
                AddressSpace::Iova => Span::new(Iova::new(address), len)
                    .map(|_| Iova::new(address))
                    .map_err(|error| error.to_string()),
            };
            iova.map_err(|error| fault(format!("its {name}: {error}")))
        };
        Ok(VringConfig {
            size,
            desc: part("descriptor table", addr.desc, 16, 16 * entries)?,
            avail: part("available ring", addr.avail, 2, 6 + 2 * entries)?,
            used: part("used ring", addr.used, 4, 6 + 8 * entries)?,
            base: self.base,
        })
    }
}
