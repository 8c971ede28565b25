//! The broker's end of the control ring, over an area that the peer's driver writes as it likes between
//! calls and, by another thread, during them. Commands are bounded in number, each is answered at most
//! once, and nothing but the control area is written.
#![no_main]

use std::cell::RefCell;
use std::os::fd::AsFd;

use guest_driver_model::shm::SharedMemory;
use libfuzzer_sys::fuzz_target;
use vhost_pci_device::abi;
use vhost_pci_fuzz::input::Input;
use vhost_pci_fuzz::scribbler::{scribble, words};
use vhost_pci_switch::link::message::CommandId;
use vhost_pci_switch::runtime::areas::{AreaFile, ControlArea};
use vhost_pci_switch::runtime::control_ring::ControlRing;

const STEPS: usize = 300;
const BUFFERS: u64 = abi::CONTROL_OFFSET + abi::CONTROL_BUFFERS;

struct Area {
    control: ControlArea,
    /// The same memory, as the guest has it.
    guest: SharedMemory,
}

thread_local! {
    static AREA: RefCell<Area> = RefCell::new({
        let areas = AreaFile::new().expect("memory");
        let len = abi::CONTROL_OFFSET + abi::CONTROL_LEN;
        let guest = SharedMemory::map(areas.source().as_fd(), 0, len as usize).expect("memory");
        Area { control: ControlArea::new(&areas), guest }
    });
}

fuzz_target!(|bytes: &[u8]| {
    AREA.with_borrow_mut(|area| {
        // What an input touches: the ring, and the first buffers.
        area.guest.zero(abi::CONTROL_OFFSET, 32 << 10).expect("inside");
        play(area, &mut Input::new(bytes));
        let mut link = vec![0; abi::LINK_LEN as usize];
        area.guest.read(abi::LINK_OFFSET, &mut link).expect("inside");
        assert!(link.iter().all(|byte| *byte == 0), "the link area was written");
    });
});

fn play(area: &Area, input: &mut Input<'_>) {
    let (memory, guest) = (area.control.memory(), &area.guest);
    let mut ring = ControlRing::new().expect("the geometry is constant");
    let mut open: Vec<CommandId> = Vec::new();
    let mut next = 0_u16;
    let mut is_broken = false;
    for _ in 0..STEPS {
        if input.is_empty() {
            return;
        }
        let mut scribbling = None;
        let mut choice = input.byte();
        if choice >= 0xf0 {
            let area_words = words(input, 16 << 10).into_iter();
            let area_words = area_words.map(|(at, word)| (abi::CONTROL_OFFSET + at, word)).collect();
            scribbling = Some(scribble(guest, area_words));
            choice = 6;
        }
        match choice % 12 {
            // A descriptor.
            0 | 1 => {
                let index = u64::from(input.byte() % 64);
                let at = abi::CONTROL_OFFSET + abi::CONTROL_DESC + 16 * index;
                let kind = input.byte();
                let address = match kind >> 6 {
                    0 | 1 => BUFFERS + 64 * u64::from(input.byte()),
                    2 => input.field(abi::CONTROL_OFFSET),
                    _ => input.field(0),
                };
                let len =
                    [32, 8, 40, 64, 4096, 16, u32::from(input.byte()), u32::MAX][usize::from(kind >> 3 & 7)];
                let words = [
                    (address, 0),
                    (u64::from(len) | u64::from(kind & 7) << 32 | u64::from(input.byte() % 65) << 48, 8),
                ];
                words.iter().for_each(|(word, offset)| guest.store_u64(at + offset, *word).expect("inside"));
            }
            // A command of two descriptors, all right but for its fields.
            2..=4 => {
                let index = u64::from(input.byte() % 32) * 2;
                let at = abi::CONTROL_OFFSET + abi::CONTROL_DESC + 16 * index;
                let buffer = BUFFERS + 256 * index;
                let (readable, writable) = (u64::from(input.byte()), u64::from(input.byte()));
                guest.store_u64(at, buffer).expect("inside");
                guest.store_u64(at + 8, (32 + readable) | 1 << 32 | (index + 1) << 48).expect("inside");
                guest.store_u64(at + 16, buffer + 512).expect("inside");
                guest.store_u64(at + 24, (8 + writable) | 2 << 32).expect("inside");
                let slot = u64::from(next % abi::CONTROL_RING_SIZE);
                guest
                    .store_u16(abi::CONTROL_OFFSET + abi::CONTROL_AVAIL + 4 + 2 * slot, index as u16)
                    .expect("inside");
                next = next.wrapping_add(1);
                guest.store_u16(abi::CONTROL_OFFSET + abi::CONTROL_AVAIL + 2, next).expect("inside");
            }
            // Anything in the ring.
            5 => {
                let at = abi::CONTROL_OFFSET + u64::from(input.word() % 2048) * 2;
                guest.store_u16(at, input.word()).expect("inside");
            }
            6 | 7 => match ring.take(memory) {
                Ok(commands) => {
                    assert!(!is_broken || commands.is_empty(), "a broken ring gives commands");
                    for command in commands {
                        assert!(!open.contains(&command.id));
                        open.push(command.id);
                    }
                    assert!(open.len() <= abi::CONTROL_RING_SIZE.into());
                }
                Err(_) => {
                    assert!(!is_broken, "broken twice");
                    is_broken = true;
                    open.clear();
                }
            },
            8 | 9 => {
                if !open.is_empty() {
                    let id = open.swap_remove(usize::from(input.byte()) % open.len());
                    ring.answer(memory, id, u32::from(input.byte()), 0, u64::from(input.word()));
                    assert!(!ring.read(memory, id, 0, &mut [0]), "it is answered and open");
                }
            }
            10 => {
                let id = open.get(usize::from(input.byte() % 64)).copied().unwrap_or(CommandId(input.quad()));
                let from = input.field(0);
                let mut bytes = [0; 300];
                let len = usize::from(input.word()) % bytes.len();
                match input.coin() {
                    true => ring.read(memory, id, from, &mut bytes[..len]),
                    false => ring.write(memory, id, from, &bytes[..len]),
                };
            }
            _ => {
                let _ = ring.take_notification(memory);
            }
        }
        drop(scribbling);
    }
}
