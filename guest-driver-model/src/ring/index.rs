//! Index publication and notification suppression: the whole memory ordering of a
//! split ring, for both halves.
//!
//! Owns: the four words of a ring that both sides watch. Never looks at a slot or a
//! descriptor. It is generic over the word, so that a model checker can run the very
//! code that runs over shared memory.
//!
//! A ring is two one-way streets. On the available ring the driver produces and the
//! device consumes; on the used ring the other way round. A producer publishes its
//! index; a consumer may set a flag (in the ring that *it* writes) that asks the
//! producer not to notify it:
//!
//! | street | index | flag, set by the consumer |
//! |---|---|---|
//! | available | `avail.idx` | `used.flags` NO_NOTIFY (virtio 1.3, 2.7.10) |
//! | used | `used.idx` | `avail.flags` NO_INTERRUPT (2.7.7) |
//!
//! No wake-up is lost because each side does *store, full barrier, load* on the two
//! words: the producer stores the index and then loads the flag, the consumer clears
//! the flag and then loads the index. At least one of them sees the other's store.

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

/// The producer's end of a street.
#[derive(Clone, Debug)]
pub struct Producer<W> {
    index: W,
    other_flags: W,
    suppress: u16,
    next: u16,
    published: u16,
    unannounced: bool,
}

impl<W: Word> Producer<W> {
    /// A producer that goes on at `start`, which the index holds already or is about
    /// to. `suppress` is the bit of `other_flags` by which the consumer asks not to
    /// be notified.
    pub fn new(index: W, other_flags: W, suppress: u16, start: u16) -> Self {
        Self { index, other_flags, suppress, next: start, published: start, unannounced: false }
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
            self.published = self.next;
            self.unannounced = true;
        }
    }

    /// Whether the other side must be notified of what was published since this was
    /// last asked.
    #[inline]
    pub fn needs_notification(&mut self) -> bool {
        if !std::mem::take(&mut self.unannounced) {
            return false;
        }
        W::full_barrier();
        self.other_flags.load() & self.suppress == 0
    }
}

/// The consumer's end of a street.
#[derive(Clone, Debug)]
pub struct Consumer<W> {
    index: W,
    own_flags: W,
    suppress: u16,
    next: u16,
    seen: u16,
}

impl<W: Word> Consumer<W> {
    /// A consumer that goes on at `start`. `suppress` is the bit of `own_flags` by
    /// which it asks not to be notified.
    pub fn new(index: W, own_flags: W, suppress: u16, start: u16) -> Self {
        Self { index, own_flags, suppress, next: start, seen: start }
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
    #[inline]
    pub fn set_notifications(&mut self, enabled: bool) {
        self.own_flags.store(if enabled { 0 } else { self.suppress });
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

    #[test]
    fn both_ends_store_then_bar_then_load() {
        let mut producer = Producer::new(word("index"), word("flags"), 1, 0);
        let mut consumer = Consumer::new(word("index"), word("flags"), 1, 0);
        producer.advance();
        producer.advance();
        producer.publish();
        producer.publish();
        assert!(producer.needs_notification() && !producer.needs_notification());
        assert_eq!(LOG.take(), ["release index 2", "barrier", "load flags"]);
        consumer.set_notifications(true);
        consumer.observe();
        assert_eq!(LOG.take(), ["store flags 0", "barrier", "acquire index"]);
        consumer.set_notifications(false);
        assert_eq!(LOG.take(), ["store flags 1"]);
    }
}
