//! The device as far as there is one.

use std::os::fd::BorrowedFd;

use guest_driver_model::control::{Exchange, Job, Outcome};
use guest_driver_model::shm::SharedMemory;
use guest_driver_model::transport::{Transport, TransportError};
use vhost_pci_device::abi::DeviceConfig;

use crate::{CONTROL, CONTROL_LEN};

/// Bytes, and where they go.
pub type Stores = Vec<(u64, Vec<u8>)>;
/// Stores that are still to be made.
pub type Meanwhile = Option<(SharedMemory, Stores)>;

/// Makes them, once.
pub fn store(meanwhile: &mut Meanwhile) {
    if let Some((memory, stores)) = meanwhile.take() {
        stores.iter().for_each(|(at, bytes)| memory.write(*at, bytes).expect("inside"));
    }
}

/// A device that answers by the fuzzer's choice, and has room for a little.
#[derive(Clone, Default)]
pub struct Fuzzed {
    choice: u8,
    next: u64,
    /// What it stores while the driver waits for it, once.
    pub meanwhile: Meanwhile,
}

impl Fuzzed {
    pub fn new(choice: u8) -> Self {
        Self { choice, next: 0, meanwhile: None }
    }
}

impl Exchange for Fuzzed {
    fn clear(&mut self) {
        self.next = CONTROL + (8 << 10);
    }

    fn reserve(&mut self, len: u32) -> Option<u64> {
        let at = self.next + 64;
        let end = at + u64::from(len).next_multiple_of(64);
        (self.next >= CONTROL && end <= CONTROL + CONTROL_LEN).then(|| {
            self.next = end;
            at
        })
    }

    fn carry_out(&mut self, jobs: &mut [Job]) {
        store(&mut self.meanwhile);
        for job in jobs {
            job.outcome = match self.choice & 3 {
                0 | 1 => Outcome::Done,
                2 if self.choice & 4 != 0 => Outcome::Denied,
                2 => Outcome::Later,
                _ => Outcome::Copy,
            };
            self.choice = self.choice.rotate_right(1);
        }
    }
}

/// A device that is only memory.
pub struct Fake {
    pub config: DeviceConfig,
    pub window: SharedMemory,
}

impl Transport for Fake {
    fn name(&self) -> &str {
        "fuzz"
    }

    fn config(&self) -> &DeviceConfig {
        &self.config
    }

    fn window(&self) -> &SharedMemory {
        &self.window
    }

    fn doorbell(&self, _: u16) {}

    fn interrupt_fd(&self, _: u16) -> Option<BorrowedFd<'_>> {
        None
    }

    fn check(&self) -> Result<(), TransportError> {
        Ok(())
    }
}
