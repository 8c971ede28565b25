//! Descriptors that nobody should write, in either format of a ring.

use virtio_bindings::virtio_ring::VRING_DESC_F_NEXT;

use crate::ring::RingPlaces;
use crate::ring::layout::DESC_LEN;
use crate::ring::packed::position::{AVAIL, USED};
use crate::ring::split::layout::{INDEX_AT, SLOTS_AT};
use crate::shm::{SharedMemory, ShmError};

/// `VIRTQ_DESC_F_NEXT`.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;

/// A descriptor. Its chain goes on behind it unless it is the last or says otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub struct Piece {
    /// A bus address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Those of its format that are not said by its place in the chain.
    pub flags: u16,
    /// Where it says that the chain goes on, with flag NEXT; the buffer id of a packed ring.
    pub next: Option<u16>,
}

/// Writes chains into a ring, from its first slot on.
pub struct Forge {
    memory: SharedMemory,
    places: RingPlaces,
    packed: bool,
    /// Chains that are available there already.
    posted: u16,
    chains: u16,
    slots: u16,
}

impl Forge {
    /// Of a ring that is fresh but for `posted` chains.
    pub fn new(memory: &SharedMemory, places: RingPlaces, packed: bool, posted: u16) -> Self {
        Self { memory: memory.clone(), places, packed, posted, chains: 0, slots: 0 }
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.places.size
    }

    /// Whether it is a packed one.
    pub fn is_packed(&self) -> bool {
        self.packed
    }

    /// The first byte and the length of the descriptors.
    pub fn descriptors(&self) -> (u64, u64) {
        (self.places.desc, u64::from(DESC_LEN) * u64::from(self.places.size))
    }

    /// Makes a chain available.
    ///
    /// # Errors
    /// If the ring is not in the memory.
    pub fn chain(&mut self, pieces: &[Piece]) -> Result<(), ShmError> {
        let (head, size) = (self.slots % self.places.size, self.places.size);
        for (nth, piece) in pieces.iter().enumerate() {
            let last = nth + 1 == pieces.len();
            let slot = head.wrapping_add(nth as u16) % size;
            let flags = piece.flags | if last { 0 } else { NEXT };
            let at = self.places.desc + u64::from(slot) * u64::from(DESC_LEN);
            if self.packed {
                let flags = flags | if nth as u16 + head < size { AVAIL } else { USED };
                write_entry(&self.memory, at, piece, flags, piece.next.unwrap_or(head), true)?;
            } else {
                let flags = flags | if piece.next.is_some() { NEXT } else { 0 };
                let next = piece.next.unwrap_or((slot + 1) % size);
                write_entry(&self.memory, at, piece, flags, next, false)?;
            }
        }
        self.slots = self.slots.wrapping_add(pieces.len() as u16);
        self.head(head)
    }

    /// Makes available what starts at this descriptor of a split ring, whatever it is.
    ///
    /// # Errors
    /// As [`Self::chain`].
    pub fn head(&mut self, head: u16) -> Result<(), ShmError> {
        self.chains = self.chains.wrapping_add(1);
        if self.packed {
            return Ok(());
        }
        let slot = u64::from(self.chains.wrapping_sub(1) % self.places.size);
        self.memory.store_u16(self.places.avail + SLOTS_AT + 2 * slot, head)?;
        self.available(self.chains.max(self.posted))
    }

    /// Says that chains up to this one are available, of a split ring.
    ///
    /// # Errors
    /// As [`Self::chain`].
    pub fn available(&self, index: u16) -> Result<(), ShmError> {
        self.memory.store_u16_release(self.places.avail + INDEX_AT, index)
    }

    /// Writes an indirect table to `at` in the memory; each entry goes on with the next one.
    ///
    /// # Errors
    /// If that is not in the memory.
    pub fn table(&self, at: u64, pieces: &[Piece]) -> Result<(), ShmError> {
        for (nth, piece) in pieces.iter().enumerate() {
            let more = nth + 1 < pieces.len() || piece.next.is_some();
            let flags = piece.flags | if more && !self.packed { NEXT } else { 0 };
            let next = piece.next.unwrap_or(nth as u16 + 1);
            write_entry(
                &self.memory,
                at + u64::from(DESC_LEN) * nth as u64,
                piece,
                flags,
                next,
                self.packed,
            )?;
        }
        Ok(())
    }
}

fn write_entry(
    memory: &SharedMemory,
    at: u64,
    piece: &Piece,
    flags: u16,
    next: u16,
    packed: bool,
) -> Result<(), ShmError> {
    memory.store_u64(at, piece.addr)?;
    memory.store_u32(at + 8, piece.len)?;
    let (first, second) = if packed { (next, flags) } else { (flags, next) };
    memory.store_u16(at + 12, first)?;
    memory.store_u16_release(at + 14, second)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn memory() -> SharedMemory {
        crate::owner::OwnerMemory::new(1 << 20, 0).unwrap().shared().clone()
    }

    #[test]
    fn chains_are_forged_where_the_format_has_them() {
        let piece = Piece { addr: 0x1234, len: 5, flags: 2, next: None };
        for packed in [false, true] {
            let memory = memory();
            let (places, _) = RingPlaces::at(0x1000, 8);
            let mut forge = Forge::new(&memory, places, packed, 0);
            forge.chain(&[piece, Piece { next: Some(99), ..piece }]).unwrap();
            forge.chain(&[piece]).unwrap();
            let half = |slot: u64, at: u64| memory.load_u16(places.desc + 16 * slot + at).unwrap();
            let (flags, next) = if packed { (14, 12) } else { (12, 14) };
            let lap = if packed { AVAIL } else { 0 };
            assert_eq!(memory.load_u64(places.desc + 16).unwrap(), 0x1234);
            assert_eq!(memory.load_u32(places.desc + 24).unwrap(), 5);
            assert_eq!(half(0, flags), NEXT | 2 | lap);
            assert_eq!(half(1, next), 99);
            // Where a split ring's descriptor says that it goes on, it does.
            assert_eq!(half(1, flags), if packed { 2 | lap } else { NEXT | 2 });
            assert_eq!(half(2, flags), 2 | lap);
            if !packed {
                assert_eq!(memory.load_u16(places.avail + INDEX_AT).unwrap(), 2);
                assert_eq!(memory.load_u16(places.avail + SLOTS_AT + 2).unwrap(), 2);
            }
        }
    }
}
