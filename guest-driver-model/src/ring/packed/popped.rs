//! The chains that the device half has taken and not yet given back.
//!
//! Owns: private copies of how many slots each chain takes, in order. The ring itself does
//! not tell any more once its slots are overwritten.

/// A chain that was popped.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Popped {
    /// The buffer id that its driver gave it.
    pub(super) id: u16,
    /// Slots that it takes.
    pub(super) slots: u16,
    /// The device only reads it.
    pub(super) read_only: bool,
}

/// A queue with room for as many chains as a ring has slots.
#[derive(Debug)]
pub(super) struct PoppedChains {
    /// A power of two of places, where counters wrap.
    places: Box<[Popped]>,
    first: u32,
    last: u32,
    /// From the first one on: given back, and not yet shown to the driver.
    pushed: u32,
}

impl PoppedChains {
    pub(super) fn new(size: u16) -> Self {
        let places = vec![Popped::default(); usize::from(size).next_power_of_two()];
        Self { places: places.into(), first: 0, last: 0, pushed: 0 }
    }

    #[inline]
    fn place(&mut self, at: u32) -> Option<&mut Popped> {
        let mask = self.places.len() - 1;
        self.places.get_mut(at as usize & mask)
    }

    /// One more. There are never more than slots.
    #[inline]
    pub(super) fn add(&mut self, chain: Popped) {
        let last = self.last;
        if let Some(place) = self.place(last) {
            *place = chain;
        }
        self.last = last.wrapping_add(1);
    }

    /// Forgets the last `count` ones. Returns how many slots they take.
    pub(super) fn put_back(&mut self, count: usize) -> u16 {
        let mut slots = 0;
        for _ in 0..count {
            if self.last == self.first.wrapping_add(self.pushed) {
                break;
            }
            self.last = self.last.wrapping_sub(1);
            let last = self.last;
            slots += self.place(last).map_or(0, |chain| chain.slots);
        }
        slots
    }

    /// The next one is given back: that with this id, if there are several in any order.
    #[inline]
    pub(super) fn push_used(&mut self, id: u16) -> Option<Popped> {
        let next = self.first.wrapping_add(self.pushed);
        if next == self.last {
            return None;
        }
        let chain = *self.place(next)?;
        if chain.id != id {
            return self.push_other(next, id);
        }
        self.pushed += 1;
        Some(chain)
    }

    #[cold]
    fn push_other(&mut self, next: u32, id: u16) -> Option<Popped> {
        let mut at = next;
        while at != self.last {
            let chain = *self.place(at)?;
            if chain.id == id {
                let other = std::mem::replace(self.place(next)?, chain);
                *self.place(at)? = other;
                self.pushed += 1;
                return Some(chain);
            }
            at = at.wrapping_add(1);
        }
        None
    }

    /// Those that were given back are still popped.
    pub(super) fn take_back_used(&mut self) {
        self.pushed = 0;
    }

    /// The driver sees those that were given back.
    #[inline]
    pub(super) fn flush(&mut self) {
        self.first = self.first.wrapping_add(self.pushed);
        self.pushed = 0;
    }

    /// How many are given back or not.
    pub(super) fn len(&self) -> usize {
        self.last.wrapping_sub(self.first) as usize
    }
}
