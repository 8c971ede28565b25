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

use crate::ring::word::Word;

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
/// How far ahead it may be. What is further than `TOO_FAR` and a ring behind is ahead.
const MOST_AHEAD: u16 = 0x1000;

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
    /// [`Self::ask_for`] or [`Self::ask_for_none`] is called for the first time.
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
        // An entry that was seen long ago: it makes no difference to anybody who waits.
        // Once in many thousand entries, and nothing is loaded for it.
        let behind = index.wrapping_sub(self.event);
        if behind > TOO_FAR && behind <= u16::MAX - MOST_AHEAD {
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

    /// Asks the other side to notify when `count` entries are there to be taken, or as many
    /// as can be asked for together. Returns how many that is, at least 1. The caller must
    /// then look at the index once more, and sleep only if they are not.
    ///
    /// To be called before each sleep: with an event index the other side notifies once.
    /// By a flag it can only be asked to notify of every entry.
    #[inline]
    pub fn ask_for(&mut self, count: u16) -> u16 {
        let count = count.clamp(1, MOST_AHEAD);
        match &self.wish {
            Wish::Flag { word, .. } => word.store(0),
            Wish::Event { word } => {
                self.event = self.next.wrapping_add(count - 1);
                word.store(self.event);
            }
        }
        W::full_barrier();
        count
    }

    /// Asks the other side not to notify. One notification can come all the same.
    #[inline]
    pub fn ask_for_none(&mut self) {
        match &self.wish {
            Wish::Flag { word, bit } => word.store(*bit),
            Wish::Event { .. } => self.leave_event_behind(),
        }
    }
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
