//! What a hostile driver stores into a ring: descriptors, indices, flags, tables and buffers.

use guest_driver_model::ring::RingPlaces;

use crate::input::Input;
use crate::memory::Guarded;

/// Flags of packed descriptors.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Stores of a driver's into its ring, mostly such as make sense.
#[derive(Clone, Copy, Debug)]
pub struct Writer {
    /// Where the ring is in the memory.
    pub places: RingPlaces,
    /// What has to be added to a place in the memory to have its address.
    pub base: u64,
    /// Where entries of indirect tables are written, and small buffers are.
    pub tables: u64,
    /// Buffers are within so many bytes from here on.
    pub buffers: u64,
    /// The ring's format.
    pub is_packed: bool,
}

impl Writer {
    /// One store.
    pub fn write(&self, window: &mut Guarded, input: &mut Input<'_>) {
        let slot = u64::from(input.byte()) % u64::from(self.places.size);
        match (input.byte() % 8, self.is_packed) {
            (0..=2, _) => {
                let descriptor = self.descriptor(input);
                window.put(self.places.desc + 16 * slot, &descriptor);
            }
            // An entry of an indirect table.
            (3, _) => {
                let descriptor = self.descriptor(input);
                window.put(self.tables + 16 * slot, &descriptor);
            }
            (4, false) => {
                let head = u16::from(input.byte()).to_le_bytes();
                window.put(self.places.avail + 4 + 2 * slot, &head);
            }
            (5, false) => {
                let index = input.word().to_le_bytes();
                window.put(self.places.avail + 2, &index);
            }
            (6, false) => {
                let word = input.word().to_le_bytes();
                let places = [self.places.avail, self.places.used, self.places.used + 2];
                window.put(input.pick(&places), &word);
            }
            // Flags of a slot; then an event suppression area.
            (4 | 5, true) => {
                let flags = input.word().to_le_bytes();
                window.put(self.places.desc + 16 * slot + 14, &flags);
            }
            (6, true) => {
                let word = input.double().to_le_bytes();
                window.put(input.pick(&[self.places.avail, self.places.used]), &word);
            }
            _ => {
                let at = self.buffers + u64::from(input.word()) * 2;
                let bytes = input.bytes(16);
                window.put(at, bytes);
            }
        }
    }

    /// The bytes of a descriptor in this ring's format.
    fn descriptor(&self, input: &mut Input<'_>) -> [u8; 16] {
        let choice = input.byte();
        let at = |place: u64| self.base.wrapping_add(place);
        let (addr, len) = match choice & 0x30 {
            // Buffers of a few bytes or pages, and tables.
            0 => (at(self.tables + 16 * u64::from(input.byte())), 16 * u32::from(input.byte() % 9)),
            0x10 => (at(self.buffers + u64::from(input.word()) * 2), u32::from(input.word())),
            0x20 => (at(self.buffers + u64::from(input.word()) * 2), u32::from(input.byte())),
            _ => (input.field(self.base), input.field(0) as u32),
        };
        let flags = u16::from(choice & 7);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        let id = u16::from(input.byte()).to_le_bytes();
        match self.is_packed {
            false => {
                bytes[12..14].copy_from_slice(&flags.to_le_bytes());
                bytes[14..].copy_from_slice(&id);
            }
            true => {
                // Available in the first round of the ring, used by it, or of the round behind.
                let round = [AVAIL, AVAIL, USED, AVAIL | USED][usize::from(choice >> 6)];
                bytes[12..14].copy_from_slice(&id);
                bytes[14..].copy_from_slice(&(flags | round).to_le_bytes());
            }
        }
        bytes
    }
}
