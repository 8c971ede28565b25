//! The control ring against a driver that writes anything: descriptor chains that loop,
//! leave the area or are endless, and indices of all kinds. Nothing panics, no more than
//! a ring full is open, and no byte outside the area's own buffers is reached.
#![allow(clippy::unwrap_used, clippy::panic)]

use proptest::collection::vec;
use proptest::prelude::*;
use vhost_pci_device::abi;
use vhost_pci_switch::link::message::CommandId;
use vhost_pci_switch::runtime::areas::{AreaFile, ControlArea};
use vhost_pci_switch::runtime::control_ring::{Command, ControlRing};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const SIZE: u16 = abi::CONTROL_RING_SIZE;

#[derive(Clone, Debug)]
enum Step {
    /// A descriptor: index, address, length, flags, next.
    Descriptor(u16, u64, u32, u16, u16),
    /// A whole command in these two descriptors, with so much behind request and response.
    Command(u16, u32, u32),
    /// An entry of the available ring.
    Available(u16, u16),
    /// The available index moves on by so many, or jumps.
    Index(u16),
    /// Bytes anywhere in the area.
    Scribble(u64, u64),
    Take,
    Answer(usize, u64),
    Read(usize, u64, usize),
    Write(usize, u64, usize),
}

fn at(offset: u64) -> GuestAddress {
    GuestAddress(abi::CONTROL_OFFSET + offset)
}

fn address() -> impl Strategy<Value = u64> {
    let end = abi::CONTROL_OFFSET + abi::CONTROL_LEN;
    prop_oneof![
        6 => (0..abi::CONTROL_LEN).prop_map(|offset| abi::CONTROL_OFFSET + offset),
        1 => prop::sample::select(vec![0, abi::CONTROL_OFFSET - 1, end - 1, end - 8, end, end + 1, u64::MAX, u64::MAX - 7]),
        1 => any::<u64>(),
    ]
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0u32..100,
        1 => prop::sample::select(vec![31u32, 32, 33, 8, 7, 0x1000, abi::MAX_COPY, u32::MAX, 1 << 31]),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let index = || 0..SIZE + 2;
    // NEXT, WRITE, INDIRECT and what is no flag.
    let flags = prop::sample::select(vec![0u16, 1, 2, 3, 4, 5, 7, 0xffff]);
    prop_oneof![
        6 => (index(), address(), len(), flags, index()).prop_map(|(i, a, l, f, n)| Step::Descriptor(i, a, l, f, n)),
        6 => (0..SIZE / 2, len(), len()).prop_map(|(slot, request, response)| Step::Command(slot, request, response)),
        3 => (0..SIZE, index()).prop_map(|(slot, head)| Step::Available(slot, head)),
        3 => prop_oneof![4 => 0u16..4, 1 => any::<u16>()].prop_map(Step::Index),
        1 => (0..abi::CONTROL_LEN - 8, any::<u64>()).prop_map(|(at, value)| Step::Scribble(at, value)),
        6 => Just(Step::Take),
        3 => (any::<usize>(), prop_oneof![0u64..100, any::<u64>()]).prop_map(|(which, written)| Step::Answer(which, written)),
        2 => (any::<usize>(), prop_oneof![0u64..100, any::<u64>()], 0usize..5000).prop_map(|(w, f, l)| Step::Read(w, f, l)),
        2 => (any::<usize>(), prop_oneof![0u64..100, any::<u64>()], 0usize..5000).prop_map(|(w, f, l)| Step::Write(w, f, l)),
    ]
}

fn descriptor(memory: &GuestMemoryMmap, index: u16, address: u64, len: u32, flags: u16, next: u16) {
    let entry = abi::CONTROL_DESC + 16 * u64::from(index % SIZE);
    memory.write_obj(address, at(entry)).unwrap();
    memory.write_obj(len, at(entry + 8)).unwrap();
    memory.write_obj(flags, at(entry + 12)).unwrap();
    memory.write_obj(next, at(entry + 14)).unwrap();
}

fn available(memory: &GuestMemoryMmap, head: u16) {
    let index: u16 = memory.read_obj(at(abi::CONTROL_AVAIL + 2)).unwrap();
    memory.write_obj(head, at(abi::CONTROL_AVAIL + 4 + 2 * u64::from(index % SIZE))).unwrap();
    memory.write_obj(index.wrapping_add(1), at(abi::CONTROL_AVAIL + 2)).unwrap();
}

struct Driver {
    area: ControlArea,
    ring: ControlRing,
    open: Vec<Command>,
    broken: bool,
}

impl Driver {
    fn take(&mut self) {
        match self.ring.take(self.area.memory()) {
            Ok(commands) => {
                assert!(!self.broken || commands.is_empty(), "a broken ring gives commands");
                self.open.extend(commands);
            }
            Err(_) => {
                assert!(!self.broken, "a ring breaks once");
                self.broken = true;
                self.open.clear();
            }
        }
        assert!(self.open.len() <= usize::from(SIZE), "{} open", self.open.len());
        let mut ids: Vec<CommandId> = self.open.iter().map(|command| command.id).collect();
        ids.dedup();
        assert_eq!(ids.len(), self.open.len());
    }

    fn step(&mut self, step: Step) {
        let which = |which: usize, open: &[Command]| (!open.is_empty()).then(|| which % open.len());
        match step {
            Step::Descriptor(index, address, len, flags, next) => {
                descriptor(self.area.memory(), index, address, len, flags, next);
            }
            Step::Command(slot, request, response) => {
                let buffers = abi::CONTROL_OFFSET + abi::CONTROL_BUFFERS + 4096 * u64::from(slot);
                let memory = self.area.memory();
                descriptor(memory, 2 * slot, buffers, 32u32.saturating_add(request), 1, 2 * slot + 1);
                descriptor(memory, 2 * slot + 1, buffers + 2048, 8u32.saturating_add(response), 2, 0);
                available(memory, 2 * slot);
            }
            Step::Available(slot, head) => {
                let entry = abi::CONTROL_AVAIL + 4 + 2 * u64::from(slot);
                self.area.memory().write_obj(head, at(entry)).unwrap();
            }
            Step::Index(by) => {
                let index = at(abi::CONTROL_AVAIL + 2);
                let now: u16 = self.area.memory().read_obj(index).unwrap();
                self.area.memory().write_obj(now.wrapping_add(by), index).unwrap();
            }
            Step::Scribble(offset, value) => self.area.memory().write_obj(value, at(offset)).unwrap(),
            Step::Take => self.take(),
            Step::Answer(index, written) => {
                if let Some(index) = which(index, &self.open) {
                    let command = self.open.swap_remove(index);
                    let written = written.min(command.writable);
                    self.ring.answer(self.area.memory(), command.id, 1, 0, written);
                    // Twice is once.
                    self.ring.answer(self.area.memory(), command.id, 1, 0, written);
                    assert!(!self.ring.read(self.area.memory(), command.id, 0, &mut [0]));
                }
            }
            Step::Read(index, from, len) => {
                if let Some(index) = which(index, &self.open) {
                    let command = &self.open[index];
                    let done = self.ring.read(self.area.memory(), command.id, from, &mut vec![0; len]);
                    let inside = from.checked_add(len as u64).is_some_and(|end| end <= command.readable);
                    assert!(inside || !done, "{len} bytes from {from} of {}", command.readable);
                }
            }
            Step::Write(index, from, len) => {
                if let Some(index) = which(index, &self.open) {
                    let command = &self.open[index];
                    let done = self.ring.write(self.area.memory(), command.id, from, &vec![7; len]);
                    let inside = from.checked_add(len as u64).is_some_and(|end| end <= command.writable);
                    assert!(inside || !done, "{len} bytes from {from} of {}", command.writable);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_driver_writes_the_ring_stays_bounded_and_within_its_buffers(steps in vec(step(), 1..80)) {
        let area = ControlArea::new(&AreaFile::new().unwrap());
        let mut driver = Driver { area, ring: ControlRing::new().unwrap(), open: Vec::new(), broken: false };
        for step in steps {
            driver.step(step);
        }
        driver.take();
    }
}

#[test]
fn a_chain_that_loops_ends() {
    for next in 0..4 {
        let area = ControlArea::new(&AreaFile::new().unwrap());
        let mut ring = ControlRing::new().unwrap();
        for index in 0..4 {
            let buffers = abi::CONTROL_OFFSET + abi::CONTROL_BUFFERS;
            descriptor(area.memory(), index, buffers, 64, 1, if index == 3 { next } else { index + 1 });
        }
        available(area.memory(), 0);
        // No response: a loop of readable descriptors is no command.
        assert!(ring.take(area.memory()).is_err());
        assert!(ring.take(area.memory()).unwrap().is_empty());
    }
}

#[test]
fn a_head_made_available_again_and_again_has_a_ring_full_of_commands_and_each_one_answer() {
    let area = ControlArea::new(&AreaFile::new().unwrap());
    let mut ring = ControlRing::new().unwrap();
    let buffers = abi::CONTROL_OFFSET + abi::CONTROL_BUFFERS;
    descriptor(area.memory(), 0, buffers, 32, 1, 1);
    descriptor(area.memory(), 1, buffers + 64, 8, 2, 0);
    let mut open = Vec::new();
    for _ in 0..5 {
        for _ in 0..SIZE / 2 {
            available(area.memory(), 0);
        }
        open.extend(ring.take(area.memory()).unwrap_or_default());
        assert!(open.len() <= usize::from(SIZE));
    }
    let count = open.len();
    for command in open {
        ring.answer(area.memory(), command.id, 0, 0, 0);
    }
    let used: u16 = area.memory().read_obj(at(abi::CONTROL_USED + 2)).unwrap();
    assert_eq!(usize::from(used), count);
}

#[test]
fn lengths_that_add_up_past_32_bits_are_counted_whole_and_never_reached() {
    let area = ControlArea::new(&AreaFile::new().unwrap());
    let mut ring = ControlRing::new().unwrap();
    let buffers = abi::CONTROL_OFFSET + abi::CONTROL_BUFFERS;
    descriptor(area.memory(), 0, buffers, 32, 1, 1);
    for index in 1..10 {
        descriptor(area.memory(), index, buffers + 64, u32::MAX, 3, index + 1);
    }
    descriptor(area.memory(), 10, buffers + 64, u32::MAX, 2, 0);
    available(area.memory(), 0);
    let Ok(commands) = ring.take(area.memory()) else { return };
    for command in commands {
        assert!(!ring.write(area.memory(), command.id, 10 * u64::from(u32::MAX), &[0; 64]));
        assert!(!ring.write(area.memory(), command.id, u64::MAX - 7, &[0; 8]));
        ring.answer(area.memory(), command.id, 0, 0, 0);
    }
}
