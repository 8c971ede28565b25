//! Index publication and notification suppression: the whole memory ordering of a
//! split ring, for both halves.
//!
//! Owns: the words of a ring that both sides watch. Never looks at a slot or a
//! descriptor. It is generic over the word, so that a model checker can run the very
//! code that runs over shared memory (`tests/ring_model.rs` does).
//!
//! A ring is two one-way streets. On the available ring the driver produces and the
//! device consumes; on the used ring the other way round. A producer publishes its
//! index; a consumer says, in the ring that *it* writes, when it wants to be notified:
//!
//! | street | index | consumer's word | the same with VIRTIO_F_EVENT_IDX |
//! |---|---|---|---|
//! | available | `avail.idx` | `used.flags` NO_NOTIFY (virtio 1.3, 2.7.10) | `avail_event`, behind the used ring |
//! | used | `used.idx` | `avail.flags` NO_INTERRUPT (2.7.7) | `used_event`, behind the available ring |
//!
//! The flag says *not at all*. The event index says *when you publish the entry with this
//! index*: once, and not again before the consumer has moved it. It cannot say *not at
//! all*, but one that lies behind the producer is as good until the producer has gone all
//! the way round.
//!
//! No wake-up is lost because each side does *store, full barrier, load* on the two
//! words: the producer stores the index and then loads the consumer's word, the consumer
//! stores its word and then loads the index. At least one of them sees the other's store.

use std::sync::atomic::{Ordering, fence};

use crate::shm::Word16;

/// A 16-bit word that both sides of a ring reach.
pub trait Word {
    /// A load without order.
    fn load(&self) -> u16;
    /// A load that later accesses stay behind.
    fn load_acquire(&self) -> u16;
    /// A store without order.
    fn store(&self, value: u16);
    /// A store that earlier accesses stay before.
    fn store_release(&self, value: u16);
    /// A barrier between earlier stores and later loads.
    fn full_barrier();
}

impl Word for Word16 {
    #[inline]
    fn load(&self) -> u16 {
        // Relaxed: the callers in this module put a full barrier before it, or need
        // no order.
        Word16::load(self, Ordering::Relaxed)
    }

    #[inline]
    fn load_acquire(&self) -> u16 {
        // Acquire: pairs with the other side's `store_release` of the same index.
        Word16::load(self, Ordering::Acquire)
    }

    #[inline]
    fn store(&self, value: u16) {
        // Relaxed: flags; the callers in this module put a full barrier after it
        // where order matters.
        Word16::store(self, value, Ordering::Relaxed);
    }

    #[inline]
    fn store_release(&self, value: u16) {
        // Release: pairs with the other side's `load_acquire` of the same index.
        Word16::store(self, value, Ordering::Release);
    }

    #[inline]
    fn full_barrier() {
        // SeqCst: pairs with the other side's full barrier between its own store and
        // load of the same two words (index, flag), see the module's top.
        fence(Ordering::SeqCst);
    }
}

/// The consumer's word: by what it says when it wants to be notified.
#[derive(Clone, Debug)]
pub enum Wish<W> {
    /// Flags, of which this bit asks not to be notified (2.7.7.1, 2.7.10.1).
    Flag {
        /// The flags.
        word: W,
        /// The bit.
        bit: u16,
    },
    /// The index of the entry to be notified of: VIRTIO_F_EVENT_IDX was negotiated
    /// (2.7.7.2, 2.7.10.2). The flags mean nothing then.
    Event {
        /// `avail_event` or `used_event`.
        word: W,
    },
}

/// Whether the entry `event` is among the `count` last ones published, of which
/// `published` is the index behind the last (2.7.7.2; Linux: `vring_need_event`).
#[inline]
fn is_among(event: u16, published: u16, count: u32) -> bool {
    u32::from(published.wrapping_sub(event).wrapping_sub(1)) < count
}

/// How far behind the known index a consumer leaves an event index that is to mean
/// nothing: further than a producer lags that has published and not asked yet.
const LAG: u16 = 0x1000;
/// How far behind it may fall. A producer can be a whole ring (2^15 entries) ahead of
/// what is known, and must not come round to it: `TOO_FAR` and a ring are less than 2^16.
const TOO_FAR: u16 = 0x6000;

/// The producer's end of a street.
#[derive(Clone, Debug)]
pub struct Producer<W> {
    index: W,
    wish: Wish<W>,
    next: u16,
    published: u16,
    /// Entries published since the consumer's word was last looked at.
    unannounced: u32,
}

impl<W: Word> Producer<W> {
    /// A producer that goes on at `start`, which the index holds already or is about
    /// to. `wish` is the consumer's, which is only loaded.
    pub fn new(index: W, wish: Wish<W>, start: u16) -> Self {
        Self { index, wish, next: start, published: start, unannounced: 0 }
    }

    /// The index of the slot to fill next.
    #[inline]
    pub fn next(&self) -> u16 {
        self.next
    }

    /// The index that the other side knows.
    #[inline]
    pub fn published(&self) -> u16 {
        self.published
    }

    /// The slot is filled.
    #[inline]
    pub fn advance(&mut self) {
        self.next = self.next.wrapping_add(1);
    }

    /// Slots that were filled and not published are to be filled again.
    #[inline]
    pub fn take_back(&mut self) {
        self.next = self.published;
    }

    /// Shows all filled slots to the other side, by one release store, if there are
    /// new ones.
    #[inline]
    pub fn publish(&mut self) {
        if self.next != self.published {
            self.index.store_release(self.next);
            let count = self.next.wrapping_sub(self.published);
            self.unannounced = self.unannounced.saturating_add(count.into());
            self.published = self.next;
        }
    }

    /// Whether the other side must be notified of what was published since this was
    /// last asked. An event index of its can have any value: the worst that comes of it
    /// is that it is notified too often or not at all.
    #[inline]
    pub fn needs_notification(&mut self) -> bool {
        let count = std::mem::take(&mut self.unannounced);
        if count == 0 {
            return false;
        }
        W::full_barrier();
        match &self.wish {
            Wish::Flag { word, bit } => word.load() & bit == 0,
            Wish::Event { word } => is_among(word.load(), self.published, count),
        }
    }
}

/// The consumer's end of a street.
#[derive(Clone, Debug)]
pub struct Consumer<W> {
    index: W,
    wish: Wish<W>,
    next: u16,
    seen: u16,
    /// The event index as this side last wrote it, if there is one.
    event: u16,
}

impl<W: Word> Consumer<W> {
    /// A consumer that goes on at `start`. Its `wish` stays what it is until
    /// [`Self::set_notifications`] is called for the first time.
    pub fn new(index: W, wish: Wish<W>, start: u16) -> Self {
        Self { index, wish, next: start, seen: start, event: start.wrapping_sub(LAG) }
    }

    /// The index of the slot to take next.
    #[inline]
    pub fn next(&self) -> u16 {
        self.next
    }

    /// Slots known to be filled and not taken. Loads nothing.
    #[inline]
    pub fn known(&self) -> u16 {
        self.seen.wrapping_sub(self.next)
    }

    /// Loads the index once. Returns it; it counts only after [`Self::accept`].
    #[inline]
    pub fn observe(&self) -> u16 {
        self.index.load_acquire()
    }

    /// Believes an observed index, which the caller has found plausible.
    #[inline]
    pub fn accept(&mut self, index: u16) {
        self.seen = index;
        // The entry there was seen long ago, so that it makes no difference to anybody
        // who waits. Once in many thousand entries, and nothing is loaded for it.
        if index.wrapping_sub(self.event) > TOO_FAR {
            self.leave_event_behind();
        }
    }

    #[cold]
    fn leave_event_behind(&mut self) {
        self.event = self.seen.wrapping_sub(LAG);
        if let Wish::Event { word } = &self.wish {
            word.store(self.event);
        }
    }

    /// A slot is taken.
    #[inline]
    pub fn advance(&mut self) {
        self.next = self.next.wrapping_add(1);
    }

    /// The last `count` slots taken are to be taken again.
    #[inline]
    pub fn put_back(&mut self, count: u16) {
        self.next = self.next.wrapping_sub(count);
    }

    /// Asks the other side to notify, or not to. After allowing it, the caller must
    /// look at the index once more before it sleeps.
    ///
    /// It is to be allowed before each sleep: with an event index the other side notifies
    /// once, when it publishes the next entry. One notification can come although it was
    /// just disallowed.
    #[inline]
    pub fn set_notifications(&mut self, enabled: bool) {
        match (&self.wish, enabled) {
            (Wish::Flag { word, bit }, _) => word.store(if enabled { 0 } else { *bit }),
            (Wish::Event { word }, true) => {
                self.event = self.next;
                word.store(self.event);
            }
            (Wish::Event { .. }, false) => self.leave_event_behind(),
        }
        if enabled {
            W::full_barrier();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    thread_local! {
        static LOG: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    }

    /// A word that notes what is done to it.
    struct Noted(&'static str, Cell<u16>);

    fn note(what: String) {
        LOG.with_borrow_mut(|log| log.push(what));
    }

    impl Word for Noted {
        fn load(&self) -> u16 {
            note(format!("load {}", self.0));
            self.1.get()
        }

        fn load_acquire(&self) -> u16 {
            note(format!("acquire {}", self.0));
            self.1.get()
        }

        fn store(&self, value: u16) {
            note(format!("store {} {value}", self.0));
            self.1.set(value);
        }

        fn store_release(&self, value: u16) {
            note(format!("release {} {value}", self.0));
            self.1.set(value);
        }

        fn full_barrier() {
            note("barrier".into());
        }
    }

    fn word(name: &'static str) -> Noted {
        Noted(name, Cell::new(0))
    }

    fn flag() -> Wish<Noted> {
        Wish::Flag { word: word("flags"), bit: 1 }
    }

    fn event(value: u16) -> Wish<Noted> {
        Wish::Event { word: Noted("event", Cell::new(value)) }
    }

    #[test]
    fn both_ends_store_then_bar_then_load() {
        for (wish, told) in [(flag as fn() -> _, "flags"), (|| event(0), "event")] {
            let mut producer = Producer::new(word("index"), wish(), 0);
            let mut consumer = Consumer::new(word("index"), wish(), 0);
            producer.advance();
            producer.advance();
            producer.publish();
            producer.publish();
            assert!(producer.needs_notification() && !producer.needs_notification());
            assert_eq!(LOG.take(), ["release index 2", "barrier", &format!("load {told}")]);
            consumer.set_notifications(true);
            consumer.observe();
            assert_eq!(LOG.take(), [&format!("store {told} 0"), "barrier", "acquire index"]);
            consumer.set_notifications(false);
            let off = if told == "flags" { 1 } else { 0_u16.wrapping_sub(LAG) };
            assert_eq!(LOG.take(), [format!("store {told} {off}")]);
        }
    }

    #[test]
    fn a_producer_notifies_when_it_passes_the_event_index_and_only_then() {
        // Both ends of the numbers, and the places where they wrap.
        for start in [0_u16, 1, 0x7fff, 0x8000, 0xfffe, 0xffff] {
            for count in [1_u16, 2, 3, 100, 0x7fff, 0x8000] {
                for (ahead, wanted) in [
                    (0, true),
                    (count - 1, true),
                    (count, false),
                    (0x8000, false),
                    (0xffff, false),
                    (0_u16.wrapping_sub(LAG), false),
                ] {
                    let mut producer = Producer::new(word("index"), event(start.wrapping_add(ahead)), start);
                    (0..count).for_each(|_| producer.advance());
                    producer.publish();
                    assert_eq!(producer.needs_notification(), wanted, "{start} + {count}, {ahead} ahead");
                    assert!(!producer.needs_notification(), "asked once more");
                }
            }
        }
    }

    #[test]
    fn a_producer_that_goes_all_round_between_two_questions_has_passed_the_event_index() {
        for rounds in [2_u32, 4, 1 << 18] {
            let mut producer = Producer::new(word("index"), event(7), 7);
            for _ in 0..rounds {
                producer.next = producer.next.wrapping_add(0x8000);
                producer.publish();
            }
            assert!(producer.needs_notification(), "{rounds} half rounds");
        }
    }

    #[test]
    fn a_consumer_that_polls_is_never_passed_at_its_event_index() {
        // As far apart as they can be: a whole ring, taken in one go.
        for size in [1_u16, 64, 256, 0x8000] {
            let mut consumer = Consumer::new(word("index"), event(0), 0);
            consumer.set_notifications(false);
            let mut producer = Producer::new(word("index"), event(0), 0);
            for _ in 0..1_000_000 / u32::from(size) {
                (0..size).for_each(|_| producer.advance());
                producer.publish();
                if let (Wish::Event { word: read }, Wish::Event { word: written }) =
                    (&producer.wish, &consumer.wish)
                {
                    read.1.set(written.1.get());
                }
                assert!(!producer.needs_notification());
                consumer.accept(producer.published());
                consumer.next = producer.published();
                LOG.take();
            }
        }
    }

    #[test]
    fn polling_touches_the_event_index_once_in_thousands_of_entries() {
        let mut consumer = Consumer::new(word("index"), event(0), 0);
        let mut index = 0_u16;
        for _ in 0..1_000_000 {
            index = index.wrapping_add(1);
            consumer.accept(index);
            consumer.advance();
        }
        let touched = LOG.take();
        assert!(touched.len() < 60 && touched.iter().all(|what| what.starts_with("store event")));
    }
}
