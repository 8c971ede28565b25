//! Pairing, following and calling with a function that is made of memory.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use super::function::{FunctionError, Plugged};
use super::page::DoorbellPage;
use super::page::tests::{GENERATION, page, set};
use super::*;
use crate::shm::SharedMemory;
use crate::transport::TransportError;

const KICK: u32 = vhost_pci_device::abi::DOORBELL_F_KICK;
const CALL: u32 = vhost_pci_device::abi::DOORBELL_F_CALL;
const LINK_ID: u64 = 7;

/// What was done to a function.
#[derive(Default)]
struct Seen {
    opened: usize,
    armed: Vec<u16>,
    rung: Vec<u32>,
}

/// A function of [`LINK_ID`] with as many vectors as there can be vrings, plugged in.
#[derive(Clone)]
struct Fake {
    memory: SharedMemory,
    interrupts: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
}

struct Opened(Fake, DoorbellPage);

impl Slots for Fake {
    fn plugged(&self) -> Vec<Plugged> {
        vec![Plugged { address: "00:05.0".into(), plugging: 1 }]
    }
    fn open(&self, _: &str, link_id: u64) -> Result<Box<dyn Function>, FunctionError> {
        self.seen.lock().unwrap().opened += 1;
        Ok(Box::new(Opened(self.clone(), DoorbellPage::new(self.memory.clone(), link_id)?)))
    }
}

impl Function for Opened {
    fn address(&self) -> &str {
        "00:05.0"
    }
    fn page(&self) -> &DoorbellPage {
        &self.1
    }
    fn vectors(&self) -> u16 {
        64
    }
    fn ring(&self, value: u32) {
        self.0.seen.lock().unwrap().rung.push(value);
    }
    fn arm(&self, vector: u16, _: &Event) -> Result<bool, TransportError> {
        self.0.seen.lock().unwrap().armed.push(vector);
        Ok(self.0.interrupts.load(Ordering::Relaxed))
    }
    fn has_to_go(&self) -> Option<&'static str> {
        None
    }
}

/// Remembers the vrings that were notified.
#[derive(Default)]
struct Virtqueues(Mutex<Vec<u16>>);

impl ByVirtqueue for Virtqueues {
    fn notify(&self, vring: u16) {
        self.0.lock().unwrap().push(vring);
    }
}

impl Virtqueues {
    fn take(&self) -> Vec<u16> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Fake {
    fn new(entries: &[(u32, u32, u32)]) -> Self {
        let interrupts = Arc::new(AtomicBool::new(true));
        Self { memory: page(entries), interrupts, seen: Arc::default() }
    }

    /// The doorbells of a device with so many vrings, this function plugged in.
    fn doorbells(&self, vrings: u16) -> Doorbells {
        Doorbells::with_slots("test", vrings, Box::new(self.clone())).unwrap()
    }

    fn generation(&self, generation: u64) {
        self.memory.store_u64(GENERATION, generation).unwrap();
    }

    fn take(&self) -> Seen {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

#[test]
fn a_call_that_meets_a_long_change_is_rung_anew_when_the_page_is_followed() {
    let fake = Fake::new(&[(CALL, 0, 9), (CALL, 0, 19), (0, 0, 0)]);
    let (doorbells, virtqueues) = (fake.doorbells(3), Virtqueues::default());
    doorbells.pair(LINK_ID).unwrap();
    doorbells.follow(&virtqueues);
    assert_eq!((fake.take().rung, virtqueues.take()), (vec![9, 19], vec![2]));
    // The call comes within the change, which outlasts it.
    fake.generation(3);
    doorbells.call(0, &virtqueues);
    doorbells.follow(&virtqueues);
    assert_eq!((fake.take().rung, virtqueues.take()), (vec![9, 9], vec![]));
    set(&fake.memory, 0, (CALL, 0, 10));
    set(&fake.memory, 1, (0, 0, 0));
    fake.generation(4);
    doorbells.follow(&virtqueues);
    // Each vring, also one that has no doorbell any more.
    assert_eq!((fake.take().rung, virtqueues.take()), (vec![10], vec![1, 2]));
    doorbells.follow(&virtqueues);
    assert_eq!((fake.take().rung, virtqueues.take()), (vec![], vec![]), "nothing new");
}

#[test]
fn vrings_that_a_new_page_has_no_entries_for_are_called_by_their_virtqueues() {
    let fake = Fake::new(&[(CALL, 0, 9); 2]);
    let (doorbells, virtqueues) = (fake.doorbells(2), Virtqueues::default());
    doorbells.pair(LINK_ID).unwrap();
    doorbells.follow(&virtqueues);
    fake.take();
    let count = std::mem::offset_of!(vhost_pci_device::abi::DoorbellHeader, vring_count);
    fake.memory.store_u32(count as u64, 0).unwrap();
    fake.generation(4);
    doorbells.follow(&virtqueues);
    assert_eq!((fake.take().rung, virtqueues.take()), (vec![], vec![0, 1]));
}

#[test]
fn no_vector_is_armed_while_the_page_changes_and_each_once() {
    let fake = Fake::new(&[(KICK, 5, 0), (0, 0, 0)]);
    let (doorbells, virtqueues) = (fake.doorbells(2), Virtqueues::default());
    fake.generation(3);
    doorbells.pair(LINK_ID).unwrap();
    doorbells.follow(&virtqueues);
    assert!(fake.take().armed.is_empty());
    fake.generation(4);
    doorbells.follow(&virtqueues);
    assert_eq!(fake.take().armed, [5]);
    set(&fake.memory, 1, (KICK, 6, 0));
    fake.generation(6);
    doorbells.follow(&virtqueues);
    assert_eq!(fake.take().armed, [6]);
}

#[test]
fn the_first_deaf_vector_ends_the_trials() {
    let entries: Vec<_> = (0..64).map(|vring| (KICK | CALL, vring, 100 + vring)).collect();
    let fake = Fake::new(&entries);
    fake.interrupts.store(false, Ordering::Relaxed);
    let (doorbells, virtqueues) = (fake.doorbells(64), Virtqueues::default());
    doorbells.pair(LINK_ID).unwrap();
    doorbells.follow(&virtqueues);
    let seen = fake.take();
    assert_eq!(seen.armed, [0]);
    assert_eq!(seen.rung, (100..164).collect::<Vec<_>>(), "calls need no vectors");
    // Until it is let go, no other is tried.
    fake.generation(4);
    doorbells.follow(&virtqueues);
    assert!(fake.take().armed.is_empty());
    assert_eq!(doorbells.pair(LINK_ID), None);
}

#[test]
fn a_function_whose_trial_was_too_slow_is_tried_again_later_and_ever_later() {
    let fake = Fake::new(&[(KICK, 3, 0)]);
    let (doorbells, virtqueues) = (fake.doorbells(1), Virtqueues::default());
    let seconds = Duration::from_secs;
    let mut now = Instant::now();
    fake.interrupts.store(false, Ordering::Relaxed);
    for pause in [60, 120, 240, 480, 960, 960] {
        assert!(doorbells.pair_at(LINK_ID, now).is_some());
        doorbells.follow(&virtqueues);
        assert_eq!(doorbells.pair_at(LINK_ID, now), None);
        assert_eq!(doorbells.pair_at(LINK_ID, now + seconds(pause - 1)), None);
        assert_eq!(fake.take().opened, 1);
        now += seconds(pause);
    }
    fake.interrupts.store(true, Ordering::Relaxed);
    let pairing = doorbells.pair_at(LINK_ID, now);
    assert_eq!(pairing, Some(Pairing { vectors: 64, number: 7 }));
    doorbells.follow(&virtqueues);
    assert_eq!(doorbells.pair_at(LINK_ID, now), pairing);
}
