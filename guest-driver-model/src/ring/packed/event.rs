//! Notification suppression of a packed ring (virtio 1.3, 2.8.14), for both halves.
//!
//! Owns: the words by which the sides tell each other when they want to be notified. It is
//! generic over the word, so that a model checker can run the very code that runs over shared
//! memory (`tests/ring_model.rs` does).
//!
//! As in a split ring (`ring::split::index`), no wake-up is lost because each side does
//! *store, full barrier, load*: who publishes stores a slot's flags and then loads the other
//! side's wish; who waits stores its wish and then loads the slot's flags.

use super::position::Position;
use crate::ring::word::Word;

/// RING_EVENT_FLAGS_ENABLE: notify of every descriptor.
pub const ENABLE: u16 = 0;
/// RING_EVENT_FLAGS_DISABLE: do not notify.
pub const DISABLE: u16 = 1;
/// RING_EVENT_FLAGS_DESC: notify of the descriptor that is named. Only where
/// VIRTIO_F_EVENT_IDX was negotiated.
pub const DESC: u16 = 2;

/// The two words of an event suppression area.
#[derive(Clone, Debug)]
pub struct Area<W> {
    /// A descriptor: [`Position::event`].
    pub event: W,
    /// When to notify.
    pub flags: W,
}

/// The wish of the side that waits, which it alone writes.
#[derive(Clone, Debug)]
pub struct Waiting<W> {
    area: Area<W>,
}

impl<W: Word> Waiting<W> {
    /// The wish stays what it is until it is changed for the first time.
    pub fn new(area: Area<W>) -> Self {
        Self { area }
    }

    /// Asks to be notified of every descriptor. The caller must then look at the ring once
    /// more, and sleep only if there is nothing.
    #[inline]
    pub fn ask_for_all(&self) {
        self.area.flags.store(ENABLE);
        W::full_barrier();
    }

    /// Asks to be notified of one descriptor, once. The caller must then look, as above.
    #[inline]
    pub fn ask_for(&self, at: Position) {
        self.area.event.store(at.event());
        // In any order: who sees one of them only has published before the barrier, and what it
        // published is seen by who looks after it.
        self.area.flags.store(DESC);
        W::full_barrier();
    }

    /// Asks not to be notified. One notification can come all the same.
    #[inline]
    pub fn ask_for_none(&self) {
        self.area.flags.store(DISABLE);
    }

    /// The word that names a descriptor, for who never asks for one.
    #[inline]
    pub fn unused_event(&self) -> &W {
        &self.area.event
    }
}

/// The wish of the other side, for the side that publishes.
#[derive(Clone, Debug)]
pub struct Notifying<W> {
    area: Area<W>,
    /// Whether the other side may name a descriptor.
    by_event: bool,
    /// Slots published since the wish was last looked at.
    unannounced: u32,
}

impl<W: Word> Notifying<W> {
    /// Nothing was published yet.
    pub fn new(area: Area<W>, by_event: bool) -> Self {
        Self { area, by_event, unannounced: 0 }
    }

    /// So many slots more were published.
    #[inline]
    pub fn published(&mut self, slots: u16) {
        self.unannounced = self.unannounced.saturating_add(slots.into());
    }

    /// Whether the other side must be notified of what was published since this was last
    /// asked; `end` is behind the last of it. What the other side names can be anything: the
    /// worst that comes of it is that it is notified too often or not at all.
    #[inline]
    pub fn needs_notification(&mut self, end: Position, size: u16) -> bool {
        let count = std::mem::take(&mut self.unannounced);
        if count == 0 {
            return false;
        }
        W::full_barrier();
        match self.area.flags.load() {
            DISABLE => false,
            DESC if self.by_event => {
                let behind = end.ahead_of(Position::of_event(self.area.event.load()), size);
                behind > 0 && behind as u32 <= count
            }
            _ => true,
        }
    }
}
