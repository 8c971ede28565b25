//! A guest: configuration space, registers through the VMM's traps, loads and stores to the
//! window's slots; and a driver that starts the device (virtio 1.3, 3.1.1) where the capabilities
//! say that its structures are, as `guest-driver-model` reads them.

use std::io::{self, IoSlice, IoSliceMut};
use std::sync::{Arc, OnceLock};

use guest_driver_model::transport::virtio_pci::{Capabilities, ConfigSpace, Place};
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use vhost_pci_device::Device;
use vm_memory::GuestAddress;

use super::vmm::FakeVmm;
use super::{HALF, VRINGS};

pub const REGISTERS_AT: u64 = 0xe000_0000;
pub const WINDOW_AT: u64 = 0x10_0000_0000;
/// Data of the MSI of a vector.
pub const DATA: u32 = 0x4020;
/// The vector of configuration changes; queue `q` has vector `q`.
pub const CONFIG_VECTOR: u16 = VRINGS + 1;

pub struct Guest {
    pub device: Arc<Device>,
    vmm: Arc<FakeVmm>,
    capabilities: OnceLock<Capabilities>,
}

impl ConfigSpace for Guest {
    fn read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        self.device.config_read(offset, bytes);
        Ok(())
    }
    fn write(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        self.device.config_write(offset, bytes);
        Ok(())
    }
}

impl Guest {
    pub fn new(device: Arc<Device>, vmm: Arc<FakeVmm>) -> Self {
        Self { device, vmm, capabilities: OnceLock::new() }
    }

    pub fn config32(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.device.config_read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn set_config32(&self, offset: u16, value: u32) {
        self.device.config_write(offset, &value.to_le_bytes());
    }

    /// Lengths of the BARs as a guest finds them: by writing all ones.
    pub fn size_bars(&self) -> [u64; 6] {
        let mut lens = [0; 6];
        for bar in [0, 2] {
            let offset = 0x10 + 4 * bar as u16;
            let before = [self.config32(offset), self.config32(offset + 4)];
            for half in [0, 4] {
                self.set_config32(offset + half, u32::MAX);
            }
            let mask = u64::from(self.config32(offset + 4)) << 32 | u64::from(self.config32(offset) & !0xf);
            lens[bar] = (!mask).wrapping_add(1);
            for (half, value) in [0, 4].into_iter().zip(before) {
                self.set_config32(offset + half, value);
            }
        }
        lens
    }

    /// As they are found before the function is enabled.
    pub fn capabilities(&self) -> Capabilities {
        *self.capabilities.get_or_init(|| Capabilities::read(self, &self.size_bars()).unwrap())
    }

    /// Firmware's work: BARs, memory decoding, bus mastering.
    pub fn enable(&self) {
        self.capabilities();
        self.device.assign_bar(0, GuestAddress(REGISTERS_AT));
        self.device.assign_bar(2, GuestAddress(WINDOW_AT));
        self.device.config_write(4, &0x0406_u16.to_le_bytes());
    }

    /// Where the MSI-X capability is.
    pub fn msix(&self) -> u16 {
        self.capability(0x11)
    }

    pub fn capability(&self, id: u8) -> u16 {
        let mut at = (self.config32(0x34) & 0xff) as u16;
        while at != 0 {
            let header = self.config32(at);
            if header as u8 == id {
                return at;
            }
            at = (header >> 8 & 0xff) as u16;
        }
        panic!("no capability {id:#x}")
    }

    /// Programs all vectors and switches MSI-X on.
    pub fn enable_msix(&self) {
        for vector in 0..=CONFIG_VECTOR {
            let entry = self.vector_entry(vector);
            self.store(entry, &0xfee0_1000_u32.to_le_bytes());
            self.store(entry + 4, &0_u32.to_le_bytes());
            self.store(entry + 8, &(DATA + u32::from(vector)).to_le_bytes());
            self.set_masked(vector, false);
        }
        self.device.config_write(self.msix() + 2, &0x8000_u16.to_le_bytes());
    }

    fn vector_entry(&self, vector: u16) -> u64 {
        let table = self.config32(self.msix() + 4) & !7;
        REGISTERS_AT + u64::from(table) + 16 * u64::from(vector)
    }

    pub fn set_masked(&self, vector: u16, masked: bool) {
        self.store(self.vector_entry(vector) + 12, &u32::from(masked).to_le_bytes());
    }

    pub fn set_all_masked(&self, masked: bool) {
        let flags: u16 = if masked { 0xc000 } else { 0x8000 };
        self.device.config_write(self.msix() + 2, &flags.to_le_bytes());
    }

    pub fn pending(&self) -> u64 {
        let at = self.config32(self.msix() + 8) & !7;
        let mut bytes = [0; 8];
        self.load(REGISTERS_AT + u64::from(at), &mut bytes);
        u64::from_le_bytes(bytes)
    }

    pub fn store(&self, address: u64, data: &[u8]) {
        self.vmm.store(address, data);
    }

    pub fn load(&self, address: u64, data: &mut [u8]) {
        self.vmm.load(address, data);
    }

    fn at(&self, place: Place, offset: u64) -> u64 {
        assert_eq!(place.bar, 0);
        REGISTERS_AT + place.offset + offset
    }

    pub fn set_common(&self, offset: u64, value: u32, width: usize) {
        let common = self.capabilities().structures.common;
        self.store(self.at(common, offset), &value.to_le_bytes()[..width]);
    }

    pub fn common(&self, offset: u64, width: usize) -> u32 {
        let common = self.capabilities().structures.common;
        let mut bytes = [0; 4];
        self.load(self.at(common, offset), &mut bytes[..width]);
        u32::from_le_bytes(bytes)
    }

    pub fn set_status(&self, status: u8) {
        self.set_common(20, status.into(), 1);
    }

    pub fn status(&self) -> u8 {
        self.common(20, 1) as u8
    }

    /// The steps of 3.1.1, with a vector for each queue.
    pub fn start(&self) {
        self.enable();
        self.enable_msix();
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(1);
        self.set_status(3);
        self.set_common(0, 1, 4);
        assert_eq!(self.common(4, 4) & 1, 1, "VIRTIO_F_VERSION_1");
        self.set_common(8, 1, 4);
        self.set_common(12, 1, 4);
        self.set_status(11);
        assert_eq!(self.status(), 11);
        self.set_common(16, CONFIG_VECTOR.into(), 2);
        assert_eq!(self.common(18, 2), u32::from(VRINGS) + 1);
        for queue in 0..=VRINGS {
            self.set_common(22, queue.into(), 2);
            self.set_common(24, 8, 2);
            self.set_common(26, queue.into(), 2);
            assert_eq!(self.common(26, 2), u32::from(queue));
            for address in [32, 40, 48] {
                self.set_common(address, 0x10_0000 + u32::from(queue) * 0x1000, 4);
            }
            self.set_common(28, 1, 2);
        }
        self.set_status(15);
        assert_eq!(self.status(), 15);
    }

    /// Function-level reset by the PCI Express capability.
    pub fn flr(&self) {
        let control = self.capability(0x10) + 8;
        self.device.config_write(control, &0x8000_u16.to_le_bytes());
    }

    pub fn notify_address(&self, queue: u16) -> u64 {
        let structures = self.capabilities().structures;
        self.at(structures.notify, u64::from(queue) * u64::from(structures.notify_off_multiplier))
    }

    pub fn notify(&self, queue: u16) {
        self.store(self.notify_address(queue), &queue.to_le_bytes());
    }

    /// Where the slot with this offset of the window is in this process.
    fn host(&self, offset: u64) -> Option<usize> {
        let address = WINDOW_AT + offset;
        let slots = self.vmm.slots();
        let slot =
            slots.iter().find(|slot| (slot.address.0..slot.address.0 + slot.len).contains(&address))?;
        Some((slot.host_address + (address - slot.address.0)) as usize)
    }

    /// Loads as a vCPU does; an error is a hole.
    pub fn window_load(&self, offset: u64) -> nix::Result<u64> {
        let mut bytes = [0; 8];
        let remote = [RemoteIoVec { base: self.host(offset).unwrap(), len: 8 }];
        process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut bytes)], &remote)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Stores as a vCPU does; an error is a page that cannot be written.
    pub fn window_store(&self, offset: u64, value: u64) -> nix::Result<()> {
        let remote = [RemoteIoVec { base: self.host(offset).unwrap(), len: 8 }];
        process_vm_writev(Pid::this(), &[IoSlice::new(&value.to_le_bytes())], &remote).map(|_| ())
    }

    pub fn assert_no_hole(&self) {
        for offset in (0..2 * HALF).step_by(4096) {
            assert!(self.window_load(offset).is_ok(), "a hole at {offset:#x}");
        }
    }
}
