//! What stands in for the rest of a VM where the device is tested: its hypervisor
//! ([`vmm`]), its guest ([`guest`]), and the broker at the other end of the socket ([`broker`]).
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, dead_code)]

pub mod broker;
pub mod guest;
pub mod sys;
pub mod vmm;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_pci_device::abi::{self, CONFIG_LEN, DeviceConfig};
use vhost_pci_device::{Device, Options};

use self::broker::{Broker, Features};
use self::guest::Guest;
use self::vmm::FakeVmm;

pub const PAGE: u64 = 4096;
/// Half of the window: where its read-only aperture starts.
pub const HALF: u64 = 8 << 20;
pub const VRINGS: u16 = 2;

/// How long something may take that has to happen.
const PATIENCE: Duration = Duration::from_secs(10);

pub fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < end, "{what}: never");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn config_bytes() -> [u8; CONFIG_LEN] {
    config_bytes_of(2 * HALF)
}

/// The configuration of a device with a window of this length.
pub fn config_bytes_of(window_len: u64) -> [u8; CONFIG_LEN] {
    let config = DeviceConfig {
        magic: abi::CONFIG_MAGIC.into(),
        version: abi::ABI_VERSION.into(),
        max_vrings: VRINGS.into(),
        window_len: window_len.into(),
        link_offset: abi::LINK_OFFSET.into(),
        link_len: abi::LINK_LEN.into(),
        control_offset: abi::CONTROL_OFFSET.into(),
        control_len: abi::CONTROL_LEN.into(),
        data_offset: abi::DATA_OFFSET.into(),
        max_mappings: abi::MAX_MAPPINGS.into(),
        reserved: 0.into(),
    };
    zerocopy::transmute!(config)
}

/// A memory file of this length, each page of which begins with its number (from 1).
pub fn file(len: u64) -> OwnedFd {
    let file = memfd_create(c"test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, len).unwrap();
    for page in 0..len / PAGE {
        rustix::io::pwrite(&file, &(page + 1).to_le_bytes(), page * PAGE).unwrap();
    }
    file
}

/// A device with everything around it.
pub struct Bench {
    pub broker: Broker,
    pub vmm: Arc<FakeVmm>,
    pub guest: Guest,
}

impl Bench {
    pub fn new() -> Self {
        Self::with(Features::default())
    }

    pub fn with(features: Features) -> Self {
        let broker = Broker::new(features);
        let vmm = FakeVmm::new();
        let device = Device::new(broker.connector(), vmm.clone(), Options { requester_id: 0x18 }).unwrap();
        let device = Arc::new(device);
        vmm.attach(&device);
        let guest = Guest::new(device, vmm.clone());
        Self { broker, vmm, guest }
    }

    /// With a driver that has started the device, of which the broker knows.
    pub fn started() -> Self {
        let bench = Self::new();
        bench.start();
        bench
    }

    /// Starts the device and waits until the broker was told.
    pub fn start(&self) {
        self.guest.start();
        self.broker.wait_until_started(VRINGS + 1);
    }
}

/// Descriptors of this process.
pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Where the read-write aperture starts.
pub fn broker_link_len() -> u64 {
    abi::LINK_LEN
}
