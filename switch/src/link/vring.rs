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
use super::features;

/// The largest size of a virtqueue (virtio 1.3, 2.7 and 2.8.10.1).
const MAX_SIZE: u32 = 32768;

/// The format of an owner's rings: all have the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// virtio 1.3, 2.7.
    #[default]
    Split,
    /// virtio 1.3, 2.8: VIRTIO_F_RING_PACKED was accepted.
    Packed,
}

/// What a front-end calls one of a vring's three areas, its alignment and its length, bytes.
struct Area {
    name: &'static str,
    align: u64,
    len: u64,
}

impl Format {
    /// By the virtio features that a driver accepted.
    pub fn of(features: u64) -> Self {
        if features & features::RING_PACKED == 0 { Self::Split } else { Self::Packed }
    }

    /// The areas of a vring with so many entries, in the order of SET_VRING_ADDR's fields. A
    /// split ring's are those of 2.7, each with the event field behind it; a packed ring has the
    /// descriptors and two event suppression areas (2.8).
    fn areas(self, size: u16) -> [Area; 3] {
        let entries = u64::from(size);
        let area = |name, align, len| Area { name, align, len };
        match self {
            Self::Split => [
                area("descriptor table", 16, 16 * entries),
                area("available ring", 2, 6 + 2 * entries),
                area("used ring", 4, 6 + 8 * entries),
            ],
            Self::Packed => [
                area("descriptor ring", 16, 16 * entries),
                area("driver event suppression area", 4, 4),
                area("device event suppression area", 4, 4),
            ],
        }
    }

    /// Of the three areas, those that the peer's driver writes.
    pub fn is_written(self) -> [bool; 3] {
        match self {
            Self::Split => [false, false, true],
            Self::Packed => [true, false, true],
        }
    }

    /// Where the peer's driver says how far it is: bytes from the start of the third area.
    pub fn place_at(self) -> u64 {
        match self {
            // The used ring's index (2.7.8).
            Self::Split => 2,
            // The field that names a descriptor (`docs/vhost-pci-device.md`, 8.2).
            Self::Packed => 0,
        }
    }

    /// What GET_VRING_BASE answers for what is there, or `None` if it cannot be.
    pub fn base_of(self, place: u16, size: u16) -> Option<u32> {
        match self {
            Self::Split => Some(place.into()),
            Self::Packed => {
                // Turned over, so that a fresh area names the start of the first lap.
                let event = u32::from(place) ^ 1 << 15;
                // The available and the used side are at the same place: what was popped and not
                // completed is popped again.
                (event & 0x7fff < u32::from(size)).then_some(event | event << 16)
            }
        }
    }

    /// Where a vring that was never served goes on, if its front-end did not say.
    pub fn first_base(self) -> u32 {
        match self {
            Self::Split => 0,
            Self::Packed => 0x8000_8000,
        }
    }
}

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
    /// What the three areas are.
    pub format: Format,
    /// Entries; a power of two in a split ring.
    pub size: u16,
    /// Descriptor table, or descriptor ring.
    pub desc: Iova,
    /// Available ring, or driver event suppression area.
    pub avail: Iova,
    /// Used ring, or device event suppression area.
    pub used: Iova,
    /// Where the front-end started it: an available index, or, in a packed ring, what
    /// [`Format::base_of`] has.
    pub base: u32,
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
    base: Option<u32>,
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
    /// The areas that the peer's driver writes.
    pub fn written(&self) -> impl Iterator<Item = Span<Iova>> {
        let written = self.format.is_written();
        self.parts().zip(written).filter(|(_, written)| *written).map(|(part, _)| part)
    }

    /// The three areas.
    pub fn parts(&self) -> impl Iterator<Item = Span<Iova>> {
        let areas = self.format.areas(self.size);
        let parts = [self.desc, self.avail, self.used].into_iter().zip(areas);
        // None wraps: that was checked when the vring was started.
        parts.filter_map(|(start, area)| Span::new(start, area.len).ok())
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

    /// What the last SET_VRING_BASE said.
    pub fn base(&self, format: Format) -> u32 {
        self.base.unwrap_or(format.first_base())
    }

    /// SET_VRING_NUM.
    pub fn set_size(&mut self, index: u32, num: u32, format: Format) -> Result<(), Fault> {
        self.must_be_stopped(index, "its size")?;
        let size = u16::try_from(num).ok().filter(|_| (1..=MAX_SIZE).contains(&num));
        self.size = Some(size.ok_or_else(|| wrong_size(index, num, format))?);
        self.check_size(index, format)
    }

    fn check_size(&self, index: u32, format: Format) -> Result<(), Fault> {
        match self.size {
            Some(size) if format == Format::Split && !size.is_power_of_two() => {
                Err(wrong_size(index, size.into(), format))
            }
            _ => Ok(()),
        }
    }

    /// SET_VRING_ADDR.
    pub fn set_addr(&mut self, index: u32, addr: VringAddr) -> Result<(), Fault> {
        // Said again when logging begins and ends, with its flag.
        if self.addr != Some(addr) {
            self.must_be_stopped(index, "its addresses")?;
        }
        self.addr = Some(addr);
        Ok(())
    }

    /// SET_VRING_BASE. The peer's driver goes on where the ring itself says
    /// (`docs/vhost-pci-device.md`, 8.2); this is what is told of a vring that has no ring.
    pub fn set_base(&mut self, index: u32, base: u32, format: Format) -> Result<(), Fault> {
        self.must_be_stopped(index, "its base")?;
        check_base(index, base, format)?;
        self.base = Some(base);
        Ok(())
    }

    /// SET_VRING_KICK: starts the vring.
    pub fn start(
        &mut self,
        index: u32,
        kick: Option<Eventfd>,
        space: AddressSpace<'_>,
        format: Format,
    ) -> Result<(), Fault> {
        if self.started().is_none() {
            self.state = VringState::Started(self.checked(index, space, format)?);
        }
        self.kick = kick;
        Ok(())
    }

    /// Checks the addresses of a started vring against a memory table that changed.
    pub fn recheck(&self, index: u32, space: AddressSpace<'_>) -> Result<(), Fault> {
        match self.started() {
            Some(config) if self.checked(index, space, config.format)? != *config => {
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
            base: config.base.into(),
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

    fn checked(&self, index: u32, space: AddressSpace<'_>, format: Format) -> Result<VringConfig, Fault> {
        let fault = |reason: String| Fault::Vring { index, reason };
        let (Some(size), Some(addr)) = (self.size, self.addr) else {
            return Err(Fault::OutOfOrder(format!(
                "vring {index} was kicked before SET_VRING_NUM and SET_VRING_ADDR"
            )));
        };
        // Said before the features were, perhaps.
        self.check_size(index, format)?;
        let base = self.base(format);
        check_base(index, base, format)?;
        let place = |address: u64, Area { name, align, len }: Area| {
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
        let [desc, avail, used] = format.areas(size);
        Ok(VringConfig {
            format,
            size,
            desc: place(addr.desc, desc)?,
            avail: place(addr.avail, avail)?,
            used: place(addr.used, used)?,
            base,
        })
    }
}

fn wrong_size(index: u32, num: u32, format: Format) -> Fault {
    let rule = match format {
        Format::Split => "a split virtqueue has a power of two",
        Format::Packed => "a packed virtqueue has at least 1",
    };
    Fault::Vring { index, reason: format!("its size is {num}; {rule}, at most {MAX_SIZE}") }
}

/// A packed ring's base has two slots with their wrap counters, and any 32 bits are that.
fn check_base(index: u32, base: u32, format: Format) -> Result<(), Fault> {
    match format {
        Format::Split if base > u32::from(u16::MAX) => Err(Fault::Vring {
            index,
            reason: format!("its base is {base:#x}; a split virtqueue's index has 16 bits"),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_rings_base_is_where_its_area_says_if_that_is_in_the_ring() {
        let base = |place, size| Format::Packed.base_of(place, size);
        assert_eq!(base(0, 256), Some(Format::Packed.first_base()));
        assert_eq!(base(255, 256), Some(0x80ff_80ff));
        assert_eq!(base(0x8003, 256), Some(0x0003_0003));
        assert_eq!([base(256, 256), base(0xffff, 256), base(1, 1)], [None; 3]);
        assert_eq!(base(0x7fff, 32_768), Some(0xffff_ffff));
        assert_eq!(Format::Split.base_of(0xffff, 1), Some(0xffff));
    }
}
