//! The virtio structure capabilities (virtio 1.3, 4.1.4): parsed once, into places
//! that are known to lie inside their BARs.

use std::io;

use vhost_pci_device::abi::SHMID_WINDOW;

use super::config_space::{self, ConfigSpace, read8, read16, read32};

/// `PCI_CAP_ID_VNDR`.
const CAP_ID_VENDOR: u8 = 0x09;
/// Where the first capability can start, and how long its header is.
const CAPABILITIES_START: u8 = 0x40;
/// More capabilities than fit into 192 bytes, 4 each: the list has a loop.
const MOST_CAPABILITIES: usize = 48;

/// `VIRTIO_PCI_CAP_COMMON_CFG`.
const COMMON_CFG: u8 = 1;
/// `VIRTIO_PCI_CAP_NOTIFY_CFG`.
const NOTIFY_CFG: u8 = 2;
/// `VIRTIO_PCI_CAP_DEVICE_CFG`.
const DEVICE_CFG: u8 = 4;
/// `VIRTIO_PCI_CAP_SHARED_MEMORY_CFG`.
const SHARED_MEMORY_CFG: u8 = 8;

/// Length of `struct virtio_pci_cap`.
const CAP_LEN: u8 = 16;
/// Length of `struct virtio_pci_notify_cap`.
const NOTIFY_CAP_LEN: u8 = 20;
/// Length of `struct virtio_pci_cap64`.
const CAP64_LEN: u8 = 24;

/// The least that `struct virtio_pci_common_cfg` may be: up to `queue_device`.
const COMMON_LEN: u64 = 56;
/// The config space that a vhost-pci device has.
const CONFIG_LEN: u64 = vhost_pci_device::abi::CONFIG_LEN as u64;

/// A range of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the BAR.
    pub bar: u8,
    /// Offset into it, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub len: u64,
}

/// Where the structures are that every virtio function has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Structures {
    /// Common configuration.
    pub common: Place,
    /// Notification area.
    pub notify: Place,
    /// Bytes between the notify addresses of neighbouring `queue_notify_off`.
    pub notify_off_multiplier: u32,
    /// Device-specific configuration.
    pub device: Place,
}

/// Where the structures of a vhost-pci function are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Those of every function.
    pub structures: Structures,
    /// The window: the shared-memory region with id [`SHMID_WINDOW`].
    pub window: Place,
}

/// Why a function's capabilities are not those of a vhost-pci device.
#[derive(Debug, thiserror::Error)]
pub enum CapabilityError {
    /// Configuration space cannot be read.
    #[error("cannot read its configuration space at {offset:#x}: {source} (run as root)")]
    Read {
        /// Where.
        offset: u16,
        /// The system's answer.
        source: io::Error,
    },
    /// There is no capability list.
    #[error("it has no PCI capabilities, so it is no modern virtio device")]
    None,
    /// The list does not end.
    #[error("its PCI capability list does not end")]
    Loop,
    /// A capability that a vhost-pci device has is not there.
    #[error("it has no {what} capability{advice}")]
    Missing {
        /// The structure's name.
        what: &'static str,
        /// What to look at, or nothing.
        advice: &'static str,
    },
    /// A structure is not inside its BAR, or too short for what it holds.
    #[error("its {what} is said to be {place:?}, which does not fit a BAR of {bar_len:#x} bytes")]
    Place {
        /// The structure's name.
        what: &'static str,
        /// What the capability says.
        place: Place,
        /// Length of that BAR.
        bar_len: u64,
    },
}

impl Structures {
    /// Reads the capability list of a function with at least `device_len` bytes of
    /// device-specific configuration. `bars` are the lengths of the six BARs.
    ///
    /// Of each kind the first that can be used counts; unknown kinds and reserved
    /// BAR numbers are skipped (4.1.4).
    ///
    /// # Errors
    /// If the list or one of the structures is missing or impossible.
    pub fn read<C: ConfigSpace + ?Sized>(
        space: &C,
        bars: &[u64; 6],
        device_len: u64,
    ) -> Result<Self, CapabilityError> {
        Found::read(space)?.structures(bars, device_len)
    }
}

impl Capabilities {
    /// As [`Structures::read`], of a vhost-pci function.
    ///
    /// # Errors
    /// As [`Structures::read`].
    pub fn read<C: ConfigSpace + ?Sized>(space: &C, bars: &[u64; 6]) -> Result<Self, CapabilityError> {
        let found = Found::read(space)?;
        let structures = found.structures(bars, CONFIG_LEN)?;
        let window = found.window.ok_or(CapabilityError::Missing {
            what: "shared-memory",
            advice: ": the back-end announced no window. Is it a vhost-pci-switch, and does the VMM speak \
                     SHMEM_MAP (QEMU 11.1 or later)?",
        })?;
        check("window", window, bars, vhost_pci_device::abi::PAGE_SIZE)?;
        Ok(Self { structures, window })
    }
}

/// Whether a structure lies inside its BAR and has at least `least` bytes.
fn check(what: &'static str, place: Place, bars: &[u64; 6], least: u64) -> Result<(), CapabilityError> {
    let bar_len = bars.get(usize::from(place.bar)).copied().unwrap_or(0);
    let inside = place.offset.checked_add(place.len).is_some_and(|end| end <= bar_len);
    // 4.1.4: the structures are 4-byte aligned (the notify area may be 2).
    if inside && place.len >= least && place.offset.is_multiple_of(2) {
        Ok(())
    } else {
        Err(CapabilityError::Place { what, place, bar_len })
    }
}

/// The first usable structure of each kind.
#[derive(Default)]
struct Found {
    common: Option<Place>,
    notify: Option<(Place, u32)>,
    device: Option<Place>,
    window: Option<Place>,
}

impl Found {
    fn read<C: ConfigSpace + ?Sized>(space: &C) -> Result<Self, CapabilityError> {
        let space = Reader(|offset, bytes: &mut [u8]| space.read(offset, bytes));
        let mut found = Self::default();
        for at in space.list()? {
            space.structure(at, &mut found)?;
        }
        Ok(found)
    }

    fn structures(&self, bars: &[u64; 6], device_len: u64) -> Result<Structures, CapabilityError> {
        let missing = |what, advice| CapabilityError::Missing { what, advice };
        let (notify, notify_off_multiplier) = self.notify.ok_or(missing("notify", ""))?;
        let structures = Structures {
            common: self.common.ok_or(missing("common configuration", ""))?,
            notify,
            notify_off_multiplier,
            device: self
                .device
                .ok_or(missing("device configuration", ": is config_size=64 given to QEMU?"))?,
        };
        check("common configuration", structures.common, bars, COMMON_LEN)?;
        check("notify area", structures.notify, bars, 2)?;
        check("device configuration", structures.device, bars, device_len)?;
        Ok(structures)
    }
}

/// Configuration space as a reading function.
struct Reader<F>(F);

impl<F: Fn(u16, &mut [u8]) -> io::Result<()>> ConfigSpace for Reader<F> {
    fn read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        (self.0)(offset, bytes)
    }

    fn write(&self, _: u16, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl<F: Fn(u16, &mut [u8]) -> io::Result<()>> Reader<F> {
    /// Where the capabilities are; each offset is one of configuration space.
    fn list(&self) -> Result<Vec<u8>, CapabilityError> {
        let failed = |offset| move |source| CapabilityError::Read { offset, source };
        let status = read16(self, config_space::STATUS).map_err(failed(config_space::STATUS))?;
        if status & config_space::STATUS_CAP_LIST == 0 {
            return Err(CapabilityError::None);
        }
        let mut offsets = Vec::new();
        let mut pointer = config_space::CAPABILITY_LIST;
        loop {
            // The two low bits are reserved: masked, as PCI 3.0, 6.7 wants it.
            let at = read8(self, pointer).map_err(failed(pointer))? & !3;
            if at < CAPABILITIES_START {
                return Ok(offsets);
            }
            if offsets.len() == MOST_CAPABILITIES {
                return Err(CapabilityError::Loop);
            }
            offsets.push(at);
            pointer = u16::from(at) + 1;
        }
    }

    /// Notes the structure that the capability at `at` describes, if any.
    fn structure(&self, at: u8, found: &mut Found) -> Result<(), CapabilityError> {
        let at = u16::from(at);
        let byte = |into: u16| {
            let offset = at + into;
            read8(self, offset).map_err(|source| CapabilityError::Read { offset, source })
        };
        let double = |into: u16| {
            let offset = at + into;
            read32(self, offset).map_err(|source| CapabilityError::Read { offset, source })
        };
        if byte(0)? != CAP_ID_VENDOR {
            return Ok(());
        }
        let (len, kind) = (byte(2)?, byte(3)?);
        // A capability that is too short for its kind, or runs out of configuration
        // space, is none of that kind.
        if len < CAP_LEN || at + u16::from(len) > 256 {
            return Ok(());
        }
        let bar = byte(4)?;
        if bar > 5 {
            return Ok(());
        }
        let place = Place { bar, offset: double(8)?.into(), len: double(12)?.into() };
        match kind {
            COMMON_CFG => found.common = found.common.or(Some(place)),
            DEVICE_CFG => found.device = found.device.or(Some(place)),
            NOTIFY_CFG if len >= NOTIFY_CAP_LEN && found.notify.is_none() => {
                found.notify = Some((place, double(16)?));
            }
            SHARED_MEMORY_CFG if len >= CAP64_LEN && byte(5)? == SHMID_WINDOW && found.window.is_none() => {
                let offset = place.offset | u64::from(double(16)?) << 32;
                let len = place.len | u64::from(double(20)?) << 32;
                found.window = Some(Place { bar, offset, len });
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Configuration space with capabilities; built by hand, byte by byte.
    pub(crate) struct Image(pub Vec<u8>);

    impl ConfigSpace for Image {
        fn read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
            let from = usize::from(offset);
            let source = self.0.get(from..from + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            bytes.copy_from_slice(source);
            Ok(())
        }

        fn write(&self, _: u16, _: &[u8]) -> io::Result<()> {
            Ok(())
        }
    }

    fn capability(kind: u8, bar: u8, id: u8, offset: u32, len: u32, extra: &[u32]) -> Vec<u8> {
        let mut bytes = vec![CAP_ID_VENDOR, 0, 16 + 4 * extra.len() as u8, kind, bar, id, 0, 0];
        for word in [offset, len].iter().chain(extra) {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn image(capabilities: &[Vec<u8>]) -> Image {
        let mut bytes = vec![0; 256];
        bytes[usize::from(config_space::STATUS)] = config_space::STATUS_CAP_LIST as u8;
        let mut pointer = usize::from(config_space::CAPABILITY_LIST);
        let mut at = 0x40;
        for capability in capabilities {
            bytes[pointer] = at as u8;
            bytes[at..at + capability.len()].copy_from_slice(capability);
            pointer = at + 1;
            at += capability.len();
        }
        Image(bytes)
    }

    const BARS: [u64; 6] = [0, 0x1000, 4 << 30, 0, 0x4000, 0];

    fn good() -> Vec<Vec<u8>> {
        vec![
            vec![0x11, 0, 1, 0, 1, 0, 0, 0, 1, 8, 0, 0],
            capability(5, 0, 0, 0, 0, &[0]),
            capability(COMMON_CFG, 4, 0, 0, 0x1000, &[]),
            capability(DEVICE_CFG, 4, 0, 0x2000, 0x1000, &[]),
            capability(NOTIFY_CFG, 4, 0, 0x3000, 0x1000, &[4]),
            capability(SHARED_MEMORY_CFG, 2, 0, 0, 0, &[0, 1]),
        ]
    }

    #[test]
    fn the_capabilities_of_a_vhost_pci_function_are_found() {
        let found = Capabilities::read(&image(&good()), &BARS).unwrap();
        assert_eq!(found.structures.common, Place { bar: 4, offset: 0, len: 0x1000 });
        assert_eq!(found.structures.notify_off_multiplier, 4);
        assert_eq!(found.window, Place { bar: 2, offset: 0, len: 4 << 30 });
    }

    #[test]
    fn a_network_card_needs_no_window_and_less_configuration() {
        let mut list = good();
        list.truncate(5);
        list[3] = capability(DEVICE_CFG, 4, 0, 0x2000, 12, &[]);
        assert_eq!(Structures::read(&image(&list), &BARS, 12).unwrap().device.len, 12);
        assert!(matches!(
            Structures::read(&image(&list), &BARS, 13),
            Err(CapabilityError::Place { what: "device configuration", .. })
        ));
    }

    #[test]
    fn the_first_usable_capability_counts() {
        let mut list = good();
        list.insert(1, capability(COMMON_CFG, 7, 0, 0, 0x1000, &[]));
        list.push(capability(COMMON_CFG, 4, 0, 0x1000, 0x1000, &[]));
        list[5] = capability(NOTIFY_CFG, 4, 0, 0x3000, 0x1000, &[4]);
        assert_eq!(Capabilities::read(&image(&list), &BARS).unwrap().structures.common.offset, 0);
    }

    #[test]
    fn a_missing_or_short_capability_is_named() {
        for (index, name) in [(2, "common"), (3, "device"), (4, "notify"), (5, "shared-memory")] {
            let mut list = good();
            list.remove(index);
            let error = Capabilities::read(&image(&list), &BARS).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
            let mut list = good();
            list[index][2] = 15;
            assert!(matches!(Capabilities::read(&image(&list), &BARS), Err(CapabilityError::Missing { .. })));
        }
        let mut other = good();
        other[5] = capability(SHARED_MEMORY_CFG, 2, 1, 0, 0, &[0, 1]);
        assert!(matches!(Capabilities::read(&image(&other), &BARS), Err(CapabilityError::Missing { .. })));
    }

    #[test]
    fn a_structure_outside_its_bar_is_refused() {
        let cases = [
            (2, capability(COMMON_CFG, 4, 0, 0x3fff, 0x1000, &[])),
            (2, capability(COMMON_CFG, 0, 0, 0, 0x1000, &[])),
            (2, capability(COMMON_CFG, 4, 0, 0, 8, &[])),
            (3, capability(DEVICE_CFG, 4, 0, 0x2000, 60, &[])),
            (4, capability(NOTIFY_CFG, 4, 0, u32::MAX, u32::MAX, &[4])),
            (5, capability(SHARED_MEMORY_CFG, 2, 0, 0x1000, 0, &[0, 1])),
            (5, capability(SHARED_MEMORY_CFG, 2, 0, u32::MAX, u32::MAX, &[u32::MAX, u32::MAX])),
        ];
        for (index, capability) in cases {
            let mut list = good();
            list[index] = capability;
            let result = Capabilities::read(&image(&list), &BARS);
            assert!(matches!(result, Err(CapabilityError::Place { .. })), "{result:?}");
        }
    }

    #[test]
    fn a_list_that_loops_ends_and_one_that_is_absent_is_said() {
        let mut looping = image(&good());
        looping.0[0x41] = 0x40;
        assert!(matches!(Capabilities::read(&looping, &BARS), Err(CapabilityError::Loop)));
        let mut none = image(&good());
        none.0[usize::from(config_space::STATUS)] = 0;
        assert!(matches!(Capabilities::read(&none, &BARS), Err(CapabilityError::None)));
        // A capability at the very end of configuration space.
        let mut last = image(&[]);
        last.0[usize::from(config_space::CAPABILITY_LIST)] = 0xfc;
        last.0[0xfc] = CAP_ID_VENDOR;
        last.0[0xfe] = 24;
        assert!(matches!(Capabilities::read(&last, &BARS), Err(CapabilityError::Missing { .. })));
        let short = Image(vec![0; 5]);
        assert!(matches!(Capabilities::read(&short, &BARS), Err(CapabilityError::Read { .. })));
    }
}
