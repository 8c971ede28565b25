//! The MSI-X table and its two masks. Which eventfds a vector has, and whether one of them
//! is pending, is not known here.

/// Bytes of a table entry.
const ENTRY_LEN: usize = 16;
/// Where an entry's vector control is.
const CONTROL: usize = 12;
/// Vector control: the vector is masked. The other bits are reserved.
const MASKED: u8 = 1;
/// `PCI_MSIX_FLAGS_ENABLE`.
const FLAG_ENABLE: u16 = 1 << 15;
/// `PCI_MSIX_FLAGS_MASKALL`.
const FLAG_MASK_ALL: u16 = 1 << 14;

/// What a vector sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Low half of the address.
    pub address_lo: u32,
    /// High half of the address.
    pub address_hi: u32,
    /// What is written there.
    pub data: u32,
}

/// The table.
#[derive(Clone, Debug)]
pub struct Table {
    bytes: Vec<u8>,
}

impl Table {
    /// A table after reset: every vector masked.
    pub fn new(vectors: u16) -> Self {
        let mut bytes = vec![0; usize::from(vectors) * ENTRY_LEN];
        for entry in bytes.chunks_exact_mut(ENTRY_LEN) {
            entry[CONTROL] = MASKED;
        }
        Self { bytes }
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        (self.bytes.len() / ENTRY_LEN) as u16
    }

    /// Fills `data` from `offset` of the table on; zero outside.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (value, byte) in data.iter_mut().zip(self.bytes.iter().skip(from)) {
            *value = *byte;
        }
    }

    /// Writes at `offset` of the table. What is outside, and what is reserved, is dropped.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for ((at, byte), value) in self.bytes.iter_mut().enumerate().skip(from).zip(data) {
            *byte = match at % ENTRY_LEN {
                CONTROL => value & MASKED,
                13.. => 0,
                _ => *value,
            };
        }
    }

    /// What a vector sends now. `None` while it is masked, MSI-X is off or masked as a whole
    /// (`flags`: message control), or there is no such vector.
    pub fn message(&self, vector: u16, flags: u16) -> Option<Message> {
        if flags & FLAG_ENABLE == 0 || flags & FLAG_MASK_ALL != 0 {
            return None;
        }
        let entry = self.bytes.chunks_exact(ENTRY_LEN).nth(vector.into())?;
        let word = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        (entry[CONTROL] & MASKED == 0).then(|| Message {
            address_lo: word(0),
            address_hi: word(4),
            data: word(8),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const ON: u16 = FLAG_ENABLE;

    #[test]
    fn a_vector_sends_what_was_programmed_and_only_unmasked() {
        let mut table = Table::new(3);
        table.write(16, &0xfee0_1000_u32.to_le_bytes());
        table.write(24, &0x4041_u32.to_le_bytes());
        assert_eq!(table.message(1, ON), None, "masked after reset");
        table.write(28, &[0xfe, 0xff, 0xff, 0xff]);
        let message = Message { address_lo: 0xfee0_1000, address_hi: 0, data: 0x4041 };
        assert_eq!(table.message(1, ON), Some(message));
        for flags in [0, FLAG_MASK_ALL, ON | FLAG_MASK_ALL] {
            assert_eq!(table.message(1, flags), None);
        }
        let mut control = [9; 4];
        table.read(28, &mut control);
        assert_eq!(control, [0; 4], "reserved bits stay zero");
        assert_eq!(table.message(2, ON), None);
        assert_eq!(table.message(u16::MAX, ON), None);
    }

    #[test]
    fn accesses_outside_the_table_do_nothing() {
        let mut table = Table::new(2);
        table.write(30, &[0xff; 8]);
        table.write(u64::MAX, &[0xff; 8]);
        let mut data = [7; 8];
        table.read(28, &mut data);
        assert_eq!(data, [1, 0, 0, 0, 0, 0, 0, 0]);
        table.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
