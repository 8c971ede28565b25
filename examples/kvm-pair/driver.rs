//! Firmware and driver of the peer's device, as far as its registers go: what a guest would do
//! through exits, done by the VMM's process through the same two doors, configuration cycles
//! and accesses to BARs.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use guest_driver_model::transport::virtio_pci::config_space::{self, ConfigSpace};
use guest_driver_model::transport::virtio_pci::{Capabilities, Place};
use vhost_pci_device::Device;

use crate::bus::Bus;
use crate::layout::{FIRST_VECTOR, MSI_ADDRESS, QUEUES, REGISTERS, WINDOW};
use crate::vcpu::Mmio;

/// First register of the BARs.
const BARS: u16 = 0x10;
/// A BAR of 64 bits; a prefetchable one.
const BAR_64: u32 = 1 << 2;
const BAR_PREFETCHABLE: u32 = 1 << 3;
/// Capabilities: PCI Express, with function-level reset in its device control; MSI-X.
const CAP_EXPRESS: u8 = 0x10;
const EXPRESS_CONTROL: u16 = 8;
const CONTROL_RESET: u16 = 1 << 15;
const CAP_MSIX: u8 = 0x11;
const MSIX_ENABLE: u16 = 1 << 15;

// struct virtio_pci_common_cfg (virtio 1.3, 4.1.4.3).
const DEVICE_FEATURE_SELECT: u64 = 0;
const DEVICE_FEATURE: u64 = 4;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const NUM_QUEUES: u64 = 18;
const DEVICE_STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_MSIX_VECTOR: u64 = 26;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_NOTIFY_OFF: u64 = 30;
const QUEUE_ADDRESSES: [u64; 3] = [32, 40, 48];

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
/// VIRTIO_F_VERSION_1, in the second half of the features.
const VERSION_1: u32 = 1;

/// Entries of each queue, which carries nothing; bytes of each.
const QUEUE_ENTRIES: u16 = 8;
const QUEUE_LEN: u64 = 256;
/// How long a reset may take.
const RESET_TIME: Duration = Duration::from_secs(10);

/// The function, its BARs placed.
pub struct Function {
    device: Arc<Device>,
    bus: Arc<Bus>,
    capabilities: Capabilities,
    /// Where its MSI-X table and pending bits are.
    table: u64,
    pending: u64,
    /// By BAR.
    addresses: [u64; 6],
}

/// Configuration cycles.
struct Cycles<'a>(&'a Device);

impl ConfigSpace for Cycles<'_> {
    fn read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        self.0.config_read(offset, bytes);
        Ok(())
    }

    fn write(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        self.0.config_write(offset, bytes);
        Ok(())
    }
}

impl Cycles<'_> {
    fn word(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.0.config_read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn half(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.0.config_read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn set(&self, offset: u16, value: u32) {
        self.0.config_write(offset, &value.to_le_bytes());
    }

    /// Length of a BAR of 64 bits and what kind it is; `None` if there is none.
    fn bar(&self, register: u16) -> Option<(u64, u32)> {
        let kind = self.word(register);
        if kind & BAR_64 == 0 {
            return None;
        }
        self.set(register, u32::MAX);
        self.set(register + 4, u32::MAX);
        let mask = u64::from(self.word(register + 4)) << 32 | u64::from(self.word(register) & !0xf);
        Some((mask.wrapping_neg(), kind))
    }

    fn capability(&self, wanted: u8) -> Option<u16> {
        let mut at = self.half(config_space::CAPABILITY_LIST) & 0xfc;
        for _ in 0..64 {
            match self.half(at).to_le_bytes() {
                _ if at == 0 => break,
                [id, _] if id == wanted => return Some(at),
                [_, next] => at = u16::from(next & 0xfc),
            }
        }
        None
    }
}

impl Function {
    /// Places the BARs, and finds what is in them: the firmware's part.
    ///
    /// # Errors
    /// If it is no vhost-pci function.
    pub fn place(device: &Arc<Device>, bus: &Arc<Bus>) -> anyhow::Result<Self> {
        let cycles = Cycles(device);
        let (mut lens, mut addresses) = ([0; 6], [0; 6]);
        for bar in [0_u8, 2, 4] {
            let register = BARS + u16::from(bar) * 4;
            if let Some((len, kind)) = cycles.bar(register) {
                let address = if kind & BAR_PREFETCHABLE == 0 { REGISTERS } else { WINDOW };
                cycles.set(register, address as u32);
                cycles.set(register + 4, (address >> 32) as u32);
                (lens[usize::from(bar)], addresses[usize::from(bar)]) = (len, address);
            }
        }
        config_space::enable(&cycles)?;
        let capabilities = Capabilities::read(&cycles, &lens)?;
        let msix = cycles.capability(CAP_MSIX).context("the function has no MSI-X")?;
        let place = |register: u16| {
            let word = cycles.word(register);
            addresses.get(word as usize & 7).map(|start| start + u64::from(word & !7)).context("a BAR")
        };
        let (table, pending) = (place(msix + 4)?, place(msix + 8)?);
        Ok(Self { device: Arc::clone(device), bus: Arc::clone(bus), capabilities, table, pending, addresses })
    }

    /// Length of the window, bytes.
    pub fn window_len(&self) -> u64 {
        self.capabilities.window.len
    }

    /// Where the device-specific configuration is.
    pub fn config(&self) -> u64 {
        self.at(self.capabilities.structures.device)
    }

    /// Starts the device (virtio 1.3, 3.1.1), each queue with the interrupt vector of its
    /// number.
    ///
    /// # Errors
    /// The step that the device does not take.
    pub fn start(&self) -> anyhow::Result<()> {
        let common = self.at(self.capabilities.structures.common);
        self.reset()?;
        self.store8(common + DEVICE_STATUS, ACKNOWLEDGE);
        self.store8(common + DEVICE_STATUS, ACKNOWLEDGE | DRIVER);
        self.store32(common + DEVICE_FEATURE_SELECT, 1);
        let offered = self.load32(common + DEVICE_FEATURE);
        ensure!(offered & VERSION_1 != 0, "the device offers {offered:#x} from bit 32 on");
        for (half, features) in [(0, 0), (1, VERSION_1)] {
            self.store32(common + DRIVER_FEATURE_SELECT, half);
            self.store32(common + DRIVER_FEATURE, features);
        }
        self.store8(common + DEVICE_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        ensure!(self.status() & FEATURES_OK != 0, "the device refuses its features");
        let queues = self.load16(common + NUM_QUEUES);
        self.enable_interrupts(queues)?;
        for queue in 0..queues {
            self.store16(common + QUEUE_SELECT, queue);
            self.store16(common + QUEUE_SIZE, QUEUE_ENTRIES);
            self.store16(common + QUEUE_MSIX_VECTOR, queue);
            ensure!(self.load16(common + QUEUE_MSIX_VECTOR) == queue, "no vector for queue {queue}");
            let start = QUEUES + u64::from(queue) * QUEUE_LEN;
            for (register, address) in QUEUE_ADDRESSES.into_iter().zip([start, start + 128, start + 160]) {
                self.store32(common + register, address as u32);
                self.store32(common + register + 4, (address >> 32) as u32);
            }
            self.store16(common + QUEUE_ENABLE, 1);
        }
        self.store8(common + DEVICE_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        Ok(())
    }

    /// Resets the device, as its driver does when it is unbound.
    ///
    /// # Errors
    /// If the reset does not end.
    pub fn reset(&self) -> anyhow::Result<()> {
        self.store8(self.at(self.capabilities.structures.common) + DEVICE_STATUS, 0);
        let start = Instant::now();
        while self.status() != 0 {
            ensure!(start.elapsed() < RESET_TIME, "the device does not come out of reset");
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    /// Resets the function. Its BARs have to be placed anew.
    ///
    /// # Errors
    /// If it cannot.
    pub fn reset_function(&self) -> anyhow::Result<()> {
        let cycles = Cycles(&self.device);
        let express = cycles.capability(CAP_EXPRESS).context("the function is not PCI Express")?;
        let control = cycles.half(express + EXPRESS_CONTROL) | CONTROL_RESET;
        self.device.config_write(express + EXPRESS_CONTROL, &control.to_le_bytes());
        if cycles.half(config_space::COMMAND) & config_space::COMMAND_MEMORY != 0 {
            bail!("the function is as it was before its reset");
        }
        Ok(())
    }

    /// Where a queue is notified.
    pub fn doorbell(&self, queue: u16) -> u64 {
        let common = self.at(self.capabilities.structures.common);
        self.store16(common + QUEUE_SELECT, queue);
        let offset = u64::from(self.load16(common + QUEUE_NOTIFY_OFF));
        let structures = self.capabilities.structures;
        self.at(structures.notify) + offset * u64::from(structures.notify_off_multiplier)
    }

    /// What notifies a queue.
    pub fn notifier(&self, queue: u16) -> impl Fn() + Send + Sync + 'static {
        let (bus, address) = (Arc::clone(&self.bus), self.doorbell(queue));
        move || bus.store(address, &queue.to_le_bytes())
    }

    /// Masks a vector, or unmasks it.
    pub fn mask(&self, vector: u16, masked: bool) {
        self.store32(self.table + u64::from(vector) * 16 + 12, masked.into());
    }

    /// Whether the vector's pending bit is set.
    pub fn is_pending(&self, vector: u16) -> bool {
        self.load32(self.pending + u64::from(vector / 32) * 4) & 1 << (vector % 32) != 0
    }

    /// A load of the driver's.
    pub fn load32(&self, address: u64) -> u32 {
        let mut bytes = [0; 4];
        self.bus.load(address, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// A store of the driver's.
    pub fn store16(&self, address: u64, value: u16) {
        self.bus.store(address, &value.to_le_bytes());
    }

    fn enable_interrupts(&self, vectors: u16) -> anyhow::Result<()> {
        let cycles = Cycles(&self.device);
        let msix = cycles.capability(CAP_MSIX).context("the function has no MSI-X")?;
        let control = cycles.half(msix + 2);
        ensure!((control & 0x7ff) + 1 >= vectors, "{vectors} vectors are wanted");
        for vector in 0..vectors {
            let data = u32::from(FIRST_VECTOR) + u32::from(vector);
            let entry = [MSI_ADDRESS as u32, (MSI_ADDRESS >> 32) as u32, data, 0];
            for (at, word) in (self.table + u64::from(vector) * 16..).step_by(4).zip(entry) {
                self.store32(at, word);
            }
        }
        self.device.config_write(msix + 2, &(control | MSIX_ENABLE).to_le_bytes());
        Ok(())
    }

    fn at(&self, place: Place) -> u64 {
        self.addresses.get(usize::from(place.bar)).map_or(0, |start| start + place.offset)
    }

    fn status(&self) -> u8 {
        let mut byte = [0];
        self.bus.load(self.at(self.capabilities.structures.common) + DEVICE_STATUS, &mut byte);
        byte[0]
    }

    fn load16(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.bus.load(address, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn store8(&self, address: u64, value: u8) {
        self.bus.store(address, &[value]);
    }

    fn store32(&self, address: u64, value: u32) {
        self.bus.store(address, &value.to_le_bytes());
    }
}
