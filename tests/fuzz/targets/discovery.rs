//! How a guest finds the device: capabilities, config space and registers of any content. What is found
//! lies in the BARs that there are.
#![no_main]

use std::cell::RefCell;
use std::io;

use guest_driver_model::transport::virtio_pci::{
    Capabilities, ConfigSpace, Place, QueuePages, Registers, Structures, start,
};
use libfuzzer_sys::fuzz_target;
use vhost_pci_device::abi;
use vhost_pci_fuzz::input::Input;

/// Lengths of the BARs.
const BARS: [u64; 6] = [0, 0x1000, 4 << 30, 0, 0x4000, 0];

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let image = image(&mut input);
    let is_inside = |place: Place| {
        let bar = BARS.get(usize::from(place.bar)).copied().unwrap_or(0);
        assert!(place.offset.checked_add(place.len).is_some_and(|end| end <= bar), "{place:?}");
    };
    if let Ok(found) = Capabilities::read(&image, &BARS) {
        is_inside(found.window);
        let structures = found.structures;
        [structures.common, structures.notify, structures.device].into_iter().for_each(is_inside);
    }
    if let Ok(found) = Structures::read(&image, &BARS, u64::from(input.byte()) as _) {
        [found.common, found.notify, found.device].into_iter().for_each(is_inside);
    }
    let vrings = input.byte();
    let pages = QueuePages { pages: (0..u64::from(vrings)).map(|page| page << 12).collect() };
    let common = Device::new(&mut input, false);
    let device = Device::new(&mut input, true);
    if let Ok(started) = start(&common, &device, 4 << 20, &pages, u16::from(input.byte() % 70)) {
        let queues = usize::from(started.config.max_vrings.value()) + 1;
        assert_eq!(started.notify_offsets.len(), queues);
        assert!(started.config.max_vrings.value() <= abi::MAX_VRINGS);
    }
});

/// A configuration space.
struct Image(Vec<u8>);

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

/// One with capabilities that are right, as far as the fuzzer does not want others.
fn image(input: &mut Input<'_>) -> Image {
    let mut bytes = vec![0; 256];
    bytes[0x06] = 1 << 4;
    let known: [(u8, u8, u64, u64, &[u32]); 5] = [
        (1, 4, 0, 0x1000, &[]),
        (4, 4, 0x2000, 0x1000, &[]),
        (2, 4, 0x3000, 0x1000, &[4]),
        (8, 2, 0, 0, &[0, 1]),
        (5, 0, 0, 0, &[0]),
    ];
    let (mut pointer, mut at) = (0x34, 0x40);
    for _ in 0..input.below(9) {
        let choice = input.byte();
        let (mut kind, mut bar, mut offset, mut len, extra) = known[usize::from(choice % 5)];
        if choice & 0xc0 == 0xc0 {
            (kind, bar, offset, len) = (input.byte(), input.byte(), input.field(0), input.field(0x1000));
        }
        let mut capability = vec![0x09, 0, 16 + 4 * extra.len() as u8, kind, bar, 0, 0, 0];
        for word in [offset as u32, len as u32].iter().chain(extra) {
            capability.extend(word.to_le_bytes());
        }
        if at + capability.len() > bytes.len() {
            break;
        }
        bytes[pointer] = at as u8;
        bytes[at..at + capability.len()].copy_from_slice(&capability);
        pointer = at + 1;
        at += capability.len();
    }
    for _ in 0..input.below(4) {
        let at = usize::from(input.byte());
        bytes[at] = input.byte();
    }
    bytes.truncate(256 - usize::from(input.byte() & 3));
    Image(bytes)
}

/// Registers: what is read is right, or the fuzzer's.
struct Device {
    config: [u8; 72],
    wrong: RefCell<Vec<u8>>,
    is_config: bool,
    select: RefCell<u32>,
    status: RefCell<u8>,
    stored: RefCell<[u32; 64]>,
}

impl Device {
    fn new(input: &mut Input<'_>, is_config: bool) -> Self {
        let mut config = [0; 72];
        config[..4].copy_from_slice(b"VPCI");
        config[4..8].copy_from_slice(&[1, 0, input.byte(), 0]);
        let words = [
            4 << 20,
            abi::LINK_OFFSET,
            abi::LINK_LEN,
            abi::CONTROL_OFFSET,
            abi::CONTROL_LEN,
            abi::DATA_OFFSET,
        ];
        for (at, word) in words.iter().enumerate() {
            let word = if input.byte() < 0xf0 { *word } else { input.field(0) };
            config[8 + 8 * at..16 + 8 * at].copy_from_slice(&word.to_le_bytes());
        }
        let mut wrong = input.bytes(64).to_vec();
        wrong.reverse();
        Self {
            config,
            wrong: RefCell::new(wrong),
            is_config,
            select: RefCell::new(0),
            status: RefCell::new(0),
            stored: RefCell::new([0; 64]),
        }
    }

    fn load(&self, at: u64) -> u32 {
        if self.is_config {
            let at = (at as usize).min(68);
            return u32::from_le_bytes([0, 1, 2, 3].map(|byte| self.config[at + byte]));
        }
        let right = match at {
            // Features: VERSION_1 and ACCESS_PLATFORM.
            4 if *self.select.borrow() == 1 => 3,
            4 => 0x3000_0000,
            // Queues; then the size of one.
            18 => 65,
            24 => 128,
            20 => u32::from(*self.status.borrow()),
            at => self.stored.borrow()[at as usize % 64],
        };
        match self.wrong.borrow_mut().pop() {
            // A status that never becomes 0 is waited for: not here.
            Some(wrong) if wrong & 0x80 != 0 && at != 20 => u32::from(wrong & 0x7f),
            _ => right,
        }
    }

    fn store(&self, at: u64, value: u32) {
        match at {
            0 => *self.select.borrow_mut() = value,
            20 => *self.status.borrow_mut() = value as u8,
            _ => self.stored.borrow_mut()[at as usize % 64] = value,
        }
    }
}

impl Registers for Device {
    fn read8(&self, at: u64) -> u8 {
        self.load(at) as u8
    }

    fn read16(&self, at: u64) -> u16 {
        self.load(at) as u16
    }

    fn read32(&self, at: u64) -> u32 {
        self.load(at)
    }

    fn write8(&self, at: u64, value: u8) {
        self.store(at, value.into());
    }

    fn write16(&self, at: u64, value: u16) {
        self.store(at, value.into());
    }

    fn write32(&self, at: u64, value: u32) {
        self.store(at, value);
    }
}
