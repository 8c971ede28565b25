//! A word that both sides of a ring reach, and the orders in which it is reached.
//!
//! What a ring publishes and how it suppresses notifications is written over this trait, so
//! that a model checker can run the very code that runs over shared memory
//! (`tests/ring_model.rs` does).

use std::sync::atomic::{Ordering, fence};

use crate::shm::{Keeps, SharedWord};

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

impl<K: Keeps> Word for SharedWord<K> {
    #[inline]
    fn load(&self) -> u16 {
        // Relaxed: the callers put a full barrier before it, or need no order.
        SharedWord::load(self, Ordering::Relaxed)
    }

    #[inline]
    fn load_acquire(&self) -> u16 {
        // Acquire: pairs with the other side's `store_release` of the same word.
        SharedWord::load(self, Ordering::Acquire)
    }

    #[inline]
    fn store(&self, value: u16) {
        // Relaxed: flags; the callers put a full barrier after it where order matters.
        SharedWord::store(self, value, Ordering::Relaxed);
    }

    #[inline]
    fn store_release(&self, value: u16) {
        // Release: pairs with the other side's `load_acquire` of the same word.
        SharedWord::store(self, value, Ordering::Release);
    }

    #[inline]
    fn full_barrier() {
        // SeqCst: pairs with the other side's full barrier between its own store and load of
        // the same two words, see `ring::split::index`.
        fence(Ordering::SeqCst);
    }
}
