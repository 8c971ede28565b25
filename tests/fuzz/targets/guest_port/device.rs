//! The device as far as there is one, and packets to be transmitted.

use std::os::fd::BorrowedFd;

use guest_driver_model::control::{Exchange, Job, Outcome};
use guest_driver_model::net::{NetHeader, Packet};
use guest_driver_model::shm::SharedMemory;
use guest_driver_model::transport::{Transport, TransportError};
use vhost_pci_device::abi::DeviceConfig;
use vhost_pci_fuzz::input::Input;

use crate::{CONTROL, CONTROL_LEN};

/// A packet to be transmitted.
pub struct Spec {
    pub header: NetHeader,
    pub frame: Vec<u8>,
}

impl Spec {
    pub fn packet(&self) -> Packet<'_> {
        Packet { header: self.header, frame: &self.frame }
    }
}

pub fn packets(input: &mut Input<'_>) -> Vec<Spec> {
    let mut specs = Vec::new();
    for _ in 0..=input.below(5) {
        let choice = input.byte();
        let len =
            [60, 64, 1500, 3000, 9000, 66_000, 0, 14][usize::from(choice & 7)] + usize::from(input.byte());
        let mut header = NetHeader::default();
        if choice & 8 != 0 {
            header = NetHeader {
                flags: input.byte() & 7,
                gso_type: input.pick(&[0, 1, 3, 4, 5, 0x81, 0x84]),
                hdr_len: u16::from(input.byte()),
                gso_size: input.word(),
                csum_start: u16::from(input.byte()),
                csum_offset: u16::from(input.byte()),
                num_buffers: input.word(),
            };
        }
        let mut frame = vec![0; len];
        let start = input.bytes(64);
        let known = start.len().min(len);
        frame[..known].copy_from_slice(&start[..known]);
        specs.push(Spec { header, frame });
    }
    specs
}

/// A device that answers by the fuzzer's choice, and has room for a little.
#[derive(Clone, Default)]
pub struct Fuzzed {
    choice: u8,
    next: u64,
}

impl Fuzzed {
    pub fn new(choice: u8) -> Self {
        Self { choice, next: 0 }
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
