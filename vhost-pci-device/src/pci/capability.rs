//! The capability list: MSI-X, the virtio structures (virtio 1.3, 4.1.4), and PCI Express for
//! its function-level reset.

use super::bar::{
    COMMON_OFFSET, DEVICE_OFFSET, ISR_OFFSET, MSIX_PBA_OFFSET, MSIX_TABLE_OFFSET, NOTIFY_OFF_MULTIPLIER,
    NOTIFY_OFFSET, REGISTERS_BAR, WINDOW_BAR,
};
use super::config::ConfigSpace;
use crate::abi::{CONFIG_LEN, SHMID_WINDOW};
use crate::virtio::common_config;

/// Where the list starts.
pub const FIRST: u8 = 0x40;

/// `PCI_CAP_ID_MSIX`.
const ID_MSIX: u8 = 0x11;
/// `PCI_CAP_ID_VNDR`.
const ID_VENDOR: u8 = 0x09;
/// `PCI_CAP_ID_EXP`.
const ID_EXPRESS: u8 = 0x10;

/// `VIRTIO_PCI_CAP_COMMON_CFG`.
const COMMON_CFG: u8 = 1;
/// `VIRTIO_PCI_CAP_NOTIFY_CFG`.
const NOTIFY_CFG: u8 = 2;
/// `VIRTIO_PCI_CAP_ISR_CFG`.
const ISR_CFG: u8 = 3;
/// `VIRTIO_PCI_CAP_DEVICE_CFG`.
const DEVICE_CFG: u8 = 4;
/// `VIRTIO_PCI_CAP_PCI_CFG`.
const PCI_CFG: u8 = 5;
/// `VIRTIO_PCI_CAP_SHARED_MEMORY_CFG`.
const SHARED_MEMORY_CFG: u8 = 8;

/// Bits of `PCI_MSIX_FLAGS` that can be written: enable, and mask of the function.
const MSIX_FLAGS_WRITABLE: u16 = 0xc000;

/// PCI Express capability version 2, root complex integrated endpoint: no link, so it ends
/// after the slot and root registers' second set, 44 bytes.
const EXPRESS_LEN: usize = 44;
const EXPRESS_FLAGS: u16 = 0x0092;
/// `PCI_EXP_DEVCAP_FLR` and `PCI_EXP_DEVCAP_RBER`.
const EXPRESS_DEVICE_CAPABILITIES: u32 = 1 << 28 | 1 << 15;
/// `PCI_EXP_DEVCTL_BCR_FLR`: resets the function; reads as zero.
pub const INITIATE_FLR: u16 = 1 << 15;
/// Device Control after a reset: relaxed ordering, no snoop, 512 bytes a read.
const EXPRESS_DEVICE_CONTROL: u16 = 0x2810;

/// Where the registers are that do something when they are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// MSI-X message control.
    pub msix_flags: u16,
    /// Device Control of the PCI Express capability.
    pub device_control: u16,
    /// The access window into BARs, `struct virtio_pci_cfg_cap` (4.1.4.9).
    pub pci_cfg: PciCfg,
}

/// Where the fields of `struct virtio_pci_cfg_cap` are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PciCfg {
    /// `cap.bar`.
    pub bar: u16,
    /// `cap.offset`.
    pub offset: u16,
    /// `cap.length`.
    pub length: u16,
    /// `pci_cfg_data`.
    pub data: u16,
}

/// Appends capabilities.
struct List<'a> {
    space: &'a mut ConfigSpace,
    /// Where the pointer to the next one goes.
    link: u16,
    next: u16,
}

impl List<'_> {
    /// Appends one whose first two bytes are its id and the pointer, which is filled in.
    /// Returns where it is.
    fn push(&mut self, bytes: &[u8]) -> u16 {
        let at = self.next;
        self.space.set(self.link, &[at as u8]);
        self.space.set(at, bytes);
        self.space.set(at + 1, &[0]);
        self.link = at + 1;
        self.next = at + bytes.len().next_multiple_of(4) as u16;
        at
    }

    /// Appends `struct virtio_pci_cap` with `extra` words behind it.
    fn virtio(&mut self, kind: u8, bar: u8, id: u8, place: (u64, u64), extra: &[u32]) -> u16 {
        let mut bytes = vec![ID_VENDOR, 0, 16 + 4 * extra.len() as u8, kind, bar, id, 0, 0];
        for word in [place.0 as u32, place.1 as u32].iter().chain(extra) {
            bytes.extend(word.to_le_bytes());
        }
        self.push(&bytes)
    }
}

/// Gives configuration space the list of a function with so many queues and vectors, and a
/// window of `window_len` bytes.
pub fn install(space: &mut ConfigSpace, queues: u16, vectors: u16, window_len: u64) -> Places {
    let mut list = List { space, link: 0x34, next: FIRST.into() };

    let flags = vectors.saturating_sub(1);
    let mut msix = vec![ID_MSIX, 0];
    msix.extend(flags.to_le_bytes());
    for offset in [MSIX_TABLE_OFFSET, MSIX_PBA_OFFSET] {
        msix.extend((offset as u32 | u32::from(REGISTERS_BAR)).to_le_bytes());
    }
    let msix_flags = list.push(&msix) + 2;

    let notify_len = u64::from(queues) * u64::from(NOTIFY_OFF_MULTIPLIER);
    list.virtio(COMMON_CFG, REGISTERS_BAR, 0, (COMMON_OFFSET, common_config::LEN as u64), &[]);
    list.virtio(NOTIFY_CFG, REGISTERS_BAR, 0, (NOTIFY_OFFSET, notify_len), &[NOTIFY_OFF_MULTIPLIER]);
    list.virtio(ISR_CFG, REGISTERS_BAR, 0, (ISR_OFFSET, 1), &[]);
    list.virtio(DEVICE_CFG, REGISTERS_BAR, 0, (DEVICE_OFFSET, CONFIG_LEN as u64), &[]);
    let high = [0, (window_len >> 32) as u32];
    list.virtio(SHARED_MEMORY_CFG, WINDOW_BAR, SHMID_WINDOW, (0, window_len), &high);
    let at = list.virtio(PCI_CFG, 0, 0, (0, 0), &[0]);
    let pci_cfg = PciCfg { bar: at + 4, offset: at + 8, length: at + 12, data: at + 16 };

    let mut express = [0; EXPRESS_LEN];
    express[0] = ID_EXPRESS;
    express[2..4].copy_from_slice(&EXPRESS_FLAGS.to_le_bytes());
    express[4..8].copy_from_slice(&EXPRESS_DEVICE_CAPABILITIES.to_le_bytes());
    express[8..10].copy_from_slice(&EXPRESS_DEVICE_CONTROL.to_le_bytes());
    let device_control = list.push(&express) + 8;

    space.allow(msix_flags, &MSIX_FLAGS_WRITABLE.to_le_bytes());
    space.allow(pci_cfg.bar, &[0xff]);
    space.allow(pci_cfg.offset, &[0xff; 4]);
    space.allow(pci_cfg.length, &[0xff; 4]);
    space.allow(pci_cfg.data, &[0xff; 4]);
    space.allow(device_control, &[0xff; 2]);
    Places { msix_flags, device_control, pci_cfg }
}
