//! Initialisation over a device made of a register file.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::collections::HashMap;

use super::*;
use crate::transport::tests::config_bytes;

/// What the fake device does wrong.
#[derive(Clone, Copy, Default, PartialEq)]
enum Defect {
    #[default]
    None,
    NeverResets,
    Legacy,
    RefusesFeatures,
    FewQueues,
    QueueMissing,
    NoVectors,
}

#[derive(Default)]
struct State {
    registers: HashMap<u64, u32>,
    queues: HashMap<(u16, u64), u32>,
    statuses: Vec<u8>,
}

/// Common configuration of a device with three queues; or its config space.
#[derive(Default)]
struct Fake {
    defect: Defect,
    config: Option<[u8; CONFIG_LEN]>,
    state: RefCell<State>,
}

impl Fake {
    fn new(defect: Defect) -> Self {
        Self { defect, ..Self::default() }
    }

    fn config() -> Self {
        Self { config: Some(config_bytes(WINDOW, 2)), ..Self::default() }
    }

    fn load(&self, at: u64) -> u32 {
        if let Some(bytes) = self.config {
            let at = at as usize;
            return u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        }
        let state = self.state.borrow();
        let register = |at| state.registers.get(&at).copied().unwrap_or(0);
        let queue = register(QUEUE_SELECT) as u16;
        match at {
            DEVICE_FEATURE if register(DEVICE_FEATURE_SELECT) == 1 => match self.defect {
                Defect::Legacy => 0,
                _ => 0b11 | 1 << 8,
            },
            DEVICE_FEATURE => 0x3000_0000,
            NUM_QUEUES if self.defect == Defect::FewQueues => 2,
            NUM_QUEUES => 3,
            QUEUE_NOTIFY_OFF => u32::from(queue) * 10,
            QUEUE_SIZE if self.defect == Defect::QueueMissing && queue == 1 => 0,
            QUEUE_SIZE => state.queues.get(&(queue, at)).copied().unwrap_or(64),
            QUEUE_MSIX_VECTOR if self.defect == Defect::NoVectors => u32::from(NO_VECTOR),
            at if at >= QUEUE_SIZE => state.queues.get(&(queue, at)).copied().unwrap_or(0),
            at => register(at),
        }
    }

    fn store(&self, at: u64, value: u32) {
        let mut state = self.state.borrow_mut();
        let queue = state.registers.get(&QUEUE_SELECT).copied().unwrap_or(0) as u16;
        match at {
            DEVICE_STATUS => {
                state.statuses.push(value as u8);
                let refused = u32::from(FEATURES_OK);
                let value = match self.defect {
                    Defect::NeverResets => 0x40,
                    Defect::RefusesFeatures => value & !refused,
                    _ => value,
                };
                state.registers.insert(at, value);
            }
            at if at >= QUEUE_SIZE => {
                state.queues.insert((queue, at), value);
            }
            at => {
                state.registers.insert(at, value);
            }
        }
    }
}

impl Registers for Fake {
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

/// Length of the window.
const WINDOW: u64 = 4 << 20;

fn rings() -> QueuePages {
    QueuePages { pages: vec![0x1_0000_1000] }
}

#[test]
fn a_device_is_started_in_the_order_of_the_specification() {
    let device = Fake::new(Defect::None);
    let started = start(&device, &Fake::config(), WINDOW, &rings(), 3).unwrap();
    assert_eq!(started.config.max_vrings.value(), 2);
    assert_eq!(started.notify_offsets, [0, 10, 20]);
    let state = device.state.borrow();
    assert_eq!(state.statuses, [0, 1, 3, 11, 15]);
    // Of what is offered only VERSION_1 and ACCESS_PLATFORM (bits 32, 33) is accepted;
    // the last half written is the upper one.
    assert_eq!(state.registers[&DRIVER_FEATURE], 0b11);
    for queue in 0..3_u16 {
        let at = |register| state.queues[&(queue, register)];
        assert_eq!(at(QUEUE_ENABLE), 1);
        assert_eq!(at(QUEUE_SIZE), 8);
        assert_eq!(at(QUEUE_MSIX_VECTOR), u32::from(queue));
        assert_eq!(at(QUEUE_DESC), 0x1000 + u32::from(queue) * 256);
        assert_eq!(at(QUEUE_DEVICE + 4), 1);
        assert!(at(QUEUE_DEVICE).is_multiple_of(4) && at(QUEUE_DRIVER).is_multiple_of(2));
    }
}

#[test]
fn queues_share_the_last_vector_or_poll() {
    assert_eq!([0, 1, 2].map(|queue| vector_of_queue(queue, 1)), [Some(0); 3]);
    assert_eq!([0, 1, 2].map(|queue| vector_of_queue(queue, 2)), [Some(0), Some(1), Some(1)]);
    assert_eq!(vector_of_queue(0, 0), None);
    let device = Fake::new(Defect::NoVectors);
    assert!(start(&device, &Fake::config(), WINDOW, &rings(), 0).is_ok());
}

#[test]
fn of_a_device_with_one_vector_each_queue_interrupts() {
    for (vectors, expected) in [(1, [0, 0]), (2, [0, 1]), (0, [NO_VECTOR; 2])] {
        let device = Fake::new(Defect::None);
        let queues = [(64, [0x1000, 0x2000, 0x3000]), (64, [0x4000, 0x5000, 0x6000])];
        assert_eq!(queues_up(&device, queues, vectors), Ok(vec![0, 10]));
        let state = device.state.borrow();
        let at = |queue, register| state.queues[&(queue, register)];
        assert_eq!([0, 1].map(|queue| at(queue, QUEUE_MSIX_VECTOR)), expected.map(u32::from));
        assert_eq!([0, 1].map(|queue| at(queue, QUEUE_DRIVER)), [0x2000, 0x5000]);
        assert_eq!([0, 1].map(|queue| at(queue, QUEUE_SIZE)), [64; 2]);
    }
}

#[test]
fn a_defect_is_an_error_of_its_step() {
    let error =
        |defect, vectors| start(&Fake::new(defect), &Fake::config(), WINDOW, &rings(), vectors).unwrap_err();
    assert_eq!(error(Defect::Legacy, 0), InitError::Missing { offered: 0x3000_0000, missing: 1 << 32 });
    assert_eq!(error(Defect::RefusesFeatures, 0), InitError::Features { features: 3 << 32 });
    assert_eq!(error(Defect::FewQueues, 0), InitError::Queues { present: 2, vrings: 2 });
    assert_eq!(error(Defect::QueueMissing, 0), InitError::QueueSize { queue: 1, most: 0, least: 1 });
    assert_eq!(error(Defect::NoVectors, 3), InitError::Vector { queue: 0, vector: 0 });
    assert_eq!(error(Defect::NeverResets, 0), InitError::Reset { status: 0x40 });
    let none =
        start(&Fake::new(Defect::None), &Fake::config(), WINDOW, &QueuePages::default(), 0).unwrap_err();
    assert_eq!(none, InitError::Rings { queues: 3 });
}

#[test]
fn ring_areas_fit_and_do_not_overlap() {
    let places = QueuePages { pages: vec![0, 4096, 8192, 12288, 16384] };
    assert_eq!(QueuePages::pages_for(65), 5);
    let mut next = 0;
    for queue in 0..65 {
        let [desc, driver, device] = places.of(queue).unwrap();
        let entries = u64::from(RING_ENTRIES);
        assert!(desc >= next && driver >= desc + 16 * entries && device >= driver + 6 + 2 * entries);
        next = device + 6 + 8 * entries;
        assert_eq!(desc / 4096, (next - 1) / 4096, "a queue lies in one page");
    }
}

#[test]
fn a_config_space_that_cannot_be_used_leaves_the_queues_alone() {
    let device = Fake::new(Defect::None);
    let foreign = Fake { config: Some([7; CONFIG_LEN]), ..Fake::default() };
    let error = start(&device, &foreign, WINDOW, &rings(), 3).unwrap_err();
    assert_eq!(error, InitError::Config(ConfigError::Magic { found: 0x0707_0707 }));
    // The window that is there is shorter than announced.
    let error = start(&device, &Fake::config(), WINDOW / 2, &rings(), 3).unwrap_err();
    assert!(matches!(error, InitError::Config(ConfigError::Window { .. })));
    assert!(device.state.borrow().queues.is_empty());
    assert_eq!(device.state.borrow().statuses, [0, 1, 3, 11, 0, 0, 1, 3, 11, 0]);
}

#[test]
fn a_device_that_does_not_start_is_reset_before_its_memory_is_freed() {
    for defect in [Defect::Legacy, Defect::RefusesFeatures, Defect::FewQueues, Defect::QueueMissing] {
        let device = Fake::new(defect);
        start(&device, &Fake::config(), WINDOW, &rings(), 0).unwrap_err();
        assert_eq!(device.state.borrow().statuses.last(), Some(&0));
    }
}
