//! Commands of a peer's driver, put into the control area that its VMM was asked to map: half right, with
//! the fuzzer's numbers in them.

use std::mem::offset_of;
use std::os::fd::{AsFd, OwnedFd};

use guest_driver_model::shm::SharedMemory;
use vhost_pci_device::abi::{
    CONTROL_AVAIL, CONTROL_BUFFERS, CONTROL_DESC, CONTROL_LEN, CONTROL_OFFSET, CONTROL_RING_SIZE,
    CTRL_ATTACH, ControlRequest, LINK_OFFSET, LinkHeader, PAGE_SIZE,
};
use zerocopy::IntoBytes;

use crate::input::Input;

/// Where buffers for copies are: behind those of the commands.
const COPIES: u64 = CONTROL_BUFFERS + 256 * CONTROL_RING_SIZE as u64;
const NEXT: u64 = 1;
const WRITE: u64 = 2;

/// The control ring from the driver's side.
#[derive(Debug)]
pub struct Commands {
    area: SharedMemory,
    next: u16,
}

impl Commands {
    /// Over a control area that was sent.
    pub fn over(file: &OwnedFd) -> Option<Self> {
        let len = (CONTROL_OFFSET + CONTROL_LEN) as usize;
        let area = SharedMemory::map(file.as_fd(), 0, len).ok()?;
        Some(Self { area, next: 0 })
    }

    /// Makes a command available: a request, what is behind it, a response, what is behind that.
    pub fn put(&mut self, input: &mut Input<'_>) {
        let slot = u64::from(self.next % (CONTROL_RING_SIZE / 4));
        let choice = input.byte();
        let len = match choice >> 4 & 7 {
            few @ 0..6 => [0, 8, 64, PAGE_SIZE, 64 << 10, 1 << 20][usize::from(few)],
            6 => u64::from(input.word()),
            _ => input.field(0),
        };
        let value = match input.byte() {
            // No driver is listened to that does not know the link.
            0..0xe0 if choice & 7 == CTRL_ATTACH as u8 => self.generation(),
            page @ 0..0xc0 => u64::from(page % 24) * PAGE_SIZE + u64::from(choice >> 3 & 1) * 0x123,
            0xc0..0xe0 => u64::from(input.byte()),
            _ => input.field(0),
        };
        let request = ControlRequest {
            command: u16::from(choice & 7).into(),
            vring: u16::from(input.byte() & 3).into(),
            flags: u32::from(input.byte() & 7).into(),
            kind: u32::from(input.byte() % 11).into(),
            reserved: 0.into(),
            value: value.into(),
            len: len.into(),
        };
        let buffer = CONTROL_BUFFERS + 256 * slot;
        let room = len.min(64 << 10);
        // The data's direction is the command's, or the other one.
        let data = if choice & 0x80 == 0 { u64::from(choice & 7 == 5) * WRITE } else { WRITE };
        let data = [COPIES + slot % 2 * (64 << 10), room, data];
        let (request_part, response) = ([buffer, 32, 0], [buffer + 64, 8, WRITE]);
        let parts = match data {
            [_, 0, _] => vec![request_part, response],
            [.., 0] => vec![request_part, data, response],
            _ => vec![request_part, response, data],
        };
        self.write(buffer, request.as_bytes());
        let last = parts.len() as u64 - 1;
        for (at, [offset, len, flags]) in (0..).zip(parts) {
            let descriptor = 4 * slot + at;
            let flags = flags | if at < last { NEXT } else { 0 };
            let words = [CONTROL_OFFSET + offset, len | flags << 32 | (descriptor + 1) << 48];
            self.write(CONTROL_DESC + 16 * descriptor, words.as_bytes());
        }
        let place = u64::from(self.next % CONTROL_RING_SIZE);
        self.write(CONTROL_AVAIL + 4 + 2 * place, &(4 * slot as u16).to_le_bytes());
        self.next = self.next.wrapping_add(1);
        self.write(CONTROL_AVAIL + 2, &self.next.to_le_bytes());
    }

    fn generation(&self) -> u64 {
        let mut bytes = [0; 8];
        let at = LINK_OFFSET + offset_of!(LinkHeader, generation) as u64;
        self.area.read(at, &mut bytes).expect("inside");
        u64::from_le_bytes(bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.area.write(CONTROL_OFFSET + offset, bytes).expect("inside");
    }
}
