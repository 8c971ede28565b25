//! The rings' publication and notification rules under a model checker (loom): the very code of
//! `ring::split::index`, `ring::packed::position` and `ring::packed::event` over words whose
//! every reordering is tried. A lost wake-up is a consumer that sleeps for ever, which loom finds
//! as a deadlock.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc as StdArc;

use guest_driver_model::ring::packed::event::{Area, Notifying, Waiting};
use guest_driver_model::ring::packed::position::{Position, observe, publish};
use guest_driver_model::ring::split::index::{Consumer, Producer, Wish};
use guest_driver_model::ring::word::Word;
use loom::model::Builder;
use loom::sync::atomic::{AtomicU16, Ordering, fence};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

/// A word of shared memory, as the model has it. Without `BARRIERS` the code's full barriers
/// do nothing.
#[derive(Clone)]
struct Modelled<const BARRIERS: bool>(Arc<AtomicU16>);

impl<const BARRIERS: bool> Modelled<BARRIERS> {
    fn new(value: u16) -> Self {
        Self(Arc::new(AtomicU16::new(value)))
    }
}

impl<const BARRIERS: bool> Word for Modelled<BARRIERS> {
    fn load(&self) -> u16 {
        self.0.load(Ordering::Relaxed)
    }

    fn load_acquire(&self) -> u16 {
        self.0.load(Ordering::Acquire)
    }

    fn store(&self, value: u16) {
        self.0.store(value, Ordering::Relaxed);
    }

    fn store_release(&self, value: u16) {
        self.0.store(value, Ordering::Release);
    }

    fn full_barrier() {
        if BARRIERS {
            fence(Ordering::SeqCst);
        }
    }
}

/// An eventfd: a count that a reader takes, and waits for.
#[derive(Clone)]
struct Eventfd(Arc<(Mutex<bool>, Condvar)>);

impl Eventfd {
    fn new() -> Self {
        Self(Arc::new((Mutex::new(false), Condvar::new())))
    }

    fn signal(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_one();
    }

    fn wait(&self) {
        let mut signalled = self.0.0.lock().unwrap();
        while !*signalled {
            signalled = self.0.1.wait(signalled).unwrap();
        }
        *signalled = false;
    }
}

/// How the consumer says when it wants to be notified.
#[derive(Clone, Copy, Debug)]
enum Suppression {
    Flag,
    EventIdx,
}

const BOTH: [Suppression; 2] = [Suppression::Flag, Suppression::EventIdx];

/// One street: its ends, and the slots between them.
struct Street<const BARRIERS: bool> {
    producer: Producer<Modelled<BARRIERS>>,
    consumer: Consumer<Modelled<BARRIERS>>,
    slots: StdArc<[Modelled<BARRIERS>]>,
    eventfd: Eventfd,
}

/// `bit`: NO_NOTIFY or NO_INTERRUPT.
fn street<const BARRIERS: bool>(suppression: Suppression, bit: u16, start: u16) -> Street<BARRIERS> {
    let (index, word) = (Modelled::new(start), Modelled::new(0));
    let wish = |word: Modelled<BARRIERS>| match suppression {
        Suppression::Flag => Wish::Flag { word, bit },
        Suppression::EventIdx => Wish::Event { word },
    };
    let mut consumer = Consumer::new(index.clone(), wish(word.clone()), start);
    // As a driver that takes a ring over and finds work to do.
    consumer.ask_for_none();
    Street {
        producer: Producer::new(index, wish(word), start),
        consumer,
        slots: (0..4).map(|_| Modelled::new(0)).collect(),
        eventfd: Eventfd::new(),
    }
}

/// The producer's end of a street.
struct Sender<const BARRIERS: bool> {
    producer: Producer<Modelled<BARRIERS>>,
    slots: StdArc<[Modelled<BARRIERS>]>,
    eventfd: Eventfd,
}

impl<const BARRIERS: bool> Sender<BARRIERS> {
    /// Fills slots, publishes them together, and notifies if it must.
    fn send(&mut self, items: impl IntoIterator<Item = u16>) {
        for item in items {
            self.slots[usize::from(self.producer.next() % 4)].store(item);
            self.producer.advance();
        }
        self.producer.publish();
        if self.producer.needs_notification() {
            self.eventfd.signal();
        }
    }
}

/// What a consumer does before it arms.
#[derive(Clone, Copy, Debug)]
enum Wait {
    /// It sleeps as soon as it finds nothing, as `--wait interrupt`.
    Interrupt,
    /// It looks so often before, as `--wait adaptive`.
    Adaptive(u32),
}

/// The consumer's end of a street.
struct Receiver<const BARRIERS: bool> {
    consumer: Consumer<Modelled<BARRIERS>>,
    slots: StdArc<[Modelled<BARRIERS>]>,
    eventfd: Eventfd,
    wait: Wait,
    /// It is worth its while to take so many items; it leaves fewer where they are.
    wanted: u16,
}

impl<const BARRIERS: bool> Receiver<BARRIERS> {
    /// Takes what is there.
    fn take(&mut self) -> Vec<u16> {
        let index = self.consumer.observe();
        self.consumer.accept(index);
        let mut items = Vec::new();
        if self.consumer.known() < self.wanted {
            return items;
        }
        while self.consumer.known() > 0 {
            items.push(self.slots[usize::from(self.consumer.next() % 4)].load());
            self.consumer.advance();
        }
        items
    }

    /// Takes what is there; sleeps until there is something. The order of steps is that of
    /// `programs::session` and of every driver of a ring.
    fn receive(&mut self) -> Vec<u16> {
        let mut looks = match self.wait {
            Wait::Interrupt => 1,
            Wait::Adaptive(looks) => looks,
        };
        loop {
            let items = self.take();
            if !items.is_empty() {
                return items;
            }
            looks = looks.saturating_sub(1);
            if looks > 0 {
                thread::yield_now();
                continue;
            }
            self.consumer.ask_for(self.wanted);
            if self.consumer.observe().wrapping_sub(self.consumer.next()) < self.wanted {
                self.eventfd.wait();
            }
            self.consumer.ask_for_none();
        }
    }
}

impl<const BARRIERS: bool> Street<BARRIERS> {
    fn ends(self, wait: Wait) -> (Sender<BARRIERS>, Receiver<BARRIERS>) {
        let Self { producer, consumer, slots, eventfd } = self;
        let sender = Sender { producer, slots: slots.clone(), eventfd: eventfd.clone() };
        (sender, Receiver { consumer, slots, eventfd, wait, wanted: 1 })
    }
}

fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// Bursts of these lengths arrive, in order and whole, whoever is faster.
fn one_way<const BARRIERS: bool>(
    suppression: Suppression,
    bit: u16,
    start: u16,
    wait: Wait,
    bursts: &'static [u16],
) {
    check(3, move || {
        let (mut sender, mut receiver) = street::<BARRIERS>(suppression, bit, start).ends(wait);
        let producer = thread::spawn(move || {
            let mut item = 0;
            for burst in bursts {
                sender.send((0..*burst).map(|at| item + at + 1));
                item += burst;
            }
        });
        let total: u16 = bursts.iter().sum();
        let mut got = Vec::new();
        while got.len() < usize::from(total) {
            got.extend(receiver.receive());
        }
        assert!(got.into_iter().eq(1..=total));
        producer.join().unwrap();
    });
}

/// NO_NOTIFY and NO_INTERRUPT are both 1; what differs is whose word it is. The indices wrap
/// on the way.
#[test]
fn no_wake_up_is_lost_on_either_street() {
    for suppression in BOTH {
        one_way::<true>(suppression, 1, 0xffff, Wait::Interrupt, &[1, 1]);
        one_way::<true>(suppression, 1, 0xfffe, Wait::Interrupt, &[2, 1]);
        one_way::<true>(suppression, 1, 0, Wait::Interrupt, &[1, 1, 1]);
    }
}

#[test]
fn no_wake_up_is_lost_between_polling_and_sleeping() {
    for suppression in BOTH {
        one_way::<true>(suppression, 1, 0xffff, Wait::Adaptive(2), &[1, 1]);
        one_way::<true>(suppression, 1, 0, Wait::Adaptive(3), &[1, 2]);
    }
}

/// A consumer that wants two items together is woken for the second, or for both.
#[test]
fn no_wake_up_is_lost_when_more_than_one_item_is_waited_for() {
    for suppression in BOTH {
        for bursts in [&[1, 1], &[2, 0], &[1, 2]] {
            check(3, move || {
                let (mut sender, mut receiver) = street::<true>(suppression, 1, 0xffff).ends(Wait::Interrupt);
                receiver.wanted = 2;
                let producer = thread::spawn(move || {
                    sender.send(0..bursts[0]);
                    sender.send(bursts[0]..bursts[0] + bursts[1]);
                });
                assert!(receiver.receive().starts_with(&[0, 1]));
                producer.join().unwrap();
            });
        }
    }
}

/// Requests one way and answers the other, as the available and the used ring are: each
/// side is producer and consumer, and either can be asleep.
#[test]
fn no_wake_up_is_lost_when_both_sides_sleep() {
    for suppression in BOTH {
        for wait in [Wait::Interrupt, Wait::Adaptive(2)] {
            check(2, move || {
                let (mut available, mut device) = street::<true>(suppression, 1, 0xffff).ends(wait);
                let (mut used, mut driver) = street::<true>(suppression, 1, 0xffff).ends(wait);
                let other = thread::spawn(move || {
                    let mut served = 0;
                    while served < 2 {
                        let requests = device.receive();
                        served += requests.len();
                        used.send(requests);
                    }
                });
                available.send([1]);
                available.send([2]);
                let mut answers = Vec::new();
                while answers.len() < 2 {
                    answers.extend(driver.receive());
                }
                assert_eq!(answers, [1, 2]);
                other.join().unwrap();
            });
        }
    }
}

/// That the model would find it.
#[test]
#[should_panic(expected = "deadlock")]
fn without_the_barriers_the_flag_loses_a_wake_up() {
    one_way::<false>(Suppression::Flag, 1, 0, Wait::Interrupt, &[1]);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_barriers_the_event_index_loses_a_wake_up() {
    one_way::<false>(Suppression::EventIdx, 1, 0, Wait::Interrupt, &[1]);
}

/// Slots of the packed ring.
const SLOTS: u16 = 2;

/// A descriptor: what it says, and its flags.
#[derive(Clone)]
struct Slot<const BARRIERS: bool> {
    says: Modelled<BARRIERS>,
    flags: Modelled<BARRIERS>,
}

/// A packed ring with the wish of its driver, who waits for what the device uses.
struct Packed<const BARRIERS: bool> {
    slots: StdArc<[Slot<BARRIERS>]>,
    wish: Area<Modelled<BARRIERS>>,
    eventfd: Eventfd,
}

impl<const BARRIERS: bool> Packed<BARRIERS> {
    fn new() -> Self {
        let slot = |_| Slot { says: Modelled::new(0), flags: Modelled::new(0) };
        let wish = Area { event: Modelled::new(0), flags: Modelled::new(1) };
        Self { slots: (0..SLOTS).map(slot).collect(), wish, eventfd: Eventfd::new() }
    }

    fn slot(&self, at: Position) -> &Slot<BARRIERS> {
        &self.slots[usize::from(at.slot())]
    }
}

/// The driver makes so many descriptors available, one after the other, as the ring has room;
/// the device gives each back with what it says doubled. The driver sleeps for them.
fn packed_ring<const BARRIERS: bool>(by_event: bool, total: u16) {
    check(2, move || {
        let ring = StdArc::new(Packed::<BARRIERS>::new());
        let theirs = ring.clone();
        let device = thread::spawn(move || {
            let mut at = Position::START;
            let mut calls = Notifying::new(theirs.wish.clone(), by_event);
            for _ in 0..total {
                let slot = theirs.slot(at);
                while !at.is_available(observe(&slot.flags)) {
                    thread::yield_now();
                }
                slot.says.store(2 * slot.says.load());
                publish(&slot.flags, at.used_flags());
                at = at.advanced(1, SLOTS);
                calls.published(1);
                if calls.needs_notification(at, SLOTS) {
                    theirs.eventfd.signal();
                }
            }
        });
        let (mut next, mut used) = (Position::START, Position::START);
        let wish = Waiting::new(ring.wish.clone());
        for item in 1..=total {
            let slot = ring.slot(next);
            slot.says.store(item);
            publish(&slot.flags, next.avail_flags());
            next = next.advanced(1, SLOTS);
            let slot = ring.slot(used);
            while !used.is_used(observe(&slot.flags)) {
                match by_event {
                    true => wish.ask_for(used),
                    false => wish.ask_for_all(),
                }
                if !used.is_used(observe(&slot.flags)) {
                    ring.eventfd.wait();
                }
                wish.ask_for_none();
            }
            assert_eq!(slot.says.load(), 2 * item, "flags came before the rest");
            used = used.advanced(1, SLOTS);
        }
        device.join().unwrap();
    });
}

/// The last of them is in the second lap.
#[test]
fn a_packed_ring_loses_no_wake_up_and_shows_no_slot_too_early() {
    for by_event in [false, true] {
        packed_ring::<true>(by_event, 3);
    }
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_barriers_a_packed_rings_flags_lose_a_wake_up() {
    packed_ring::<false>(false, 1);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_barriers_a_packed_rings_event_loses_a_wake_up() {
    packed_ring::<false>(true, 1);
}
