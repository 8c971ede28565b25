//! The function's two BARs, both 64 bits wide: registers (BAR 0), and the window (BAR 2,
//! prefetchable).

use super::config::ConfigSpace;

/// Number of the BAR with the registers.
pub const REGISTERS_BAR: u8 = 0;
/// Number of the BAR with the window.
pub const WINDOW_BAR: u8 = 2;

/// Length of the BAR with the registers, bytes. Each structure has a page of its own.
pub const REGISTERS_LEN: u64 = 32 << 10;
/// Common configuration structure: offset into BAR 0.
pub const COMMON_OFFSET: u64 = 0;
/// ISR status: offset into BAR 0.
pub const ISR_OFFSET: u64 = 0x1000;
/// Device-specific configuration: offset into BAR 0.
pub const DEVICE_OFFSET: u64 = 0x2000;
/// Notification area: offset into BAR 0.
pub const NOTIFY_OFFSET: u64 = 0x3000;
/// MSI-X table: offset into BAR 0.
pub const MSIX_TABLE_OFFSET: u64 = 0x4000;
/// MSI-X pending bits: offset into BAR 0.
pub const MSIX_PBA_OFFSET: u64 = 0x5000;
/// Length of the place that each structure has.
pub const STRUCTURE_LEN: u64 = 0x1000;

/// Bytes between the notify addresses of two queues: each has an address of its own, which
/// is what tells an ioeventfd without datamatch whose it is.
pub const NOTIFY_OFF_MULTIPLIER: u32 = 4;

/// Offset of the first BAR in configuration space.
const FIRST: u16 = 0x10;
/// Low bits of a BAR: 64 bits wide.
const MEMORY_64: u32 = 0b100;
/// Low bits of a BAR: prefetchable.
const PREFETCHABLE: u32 = 0b1000;

/// One of the BARs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its number, 0 to 5; it takes the next one's register, too.
    pub number: u8,
    /// Length, bytes; a power of two of at least 16.
    pub len: u64,
    /// Whether it is prefetchable.
    pub prefetchable: bool,
}

impl Bar {
    /// Offset of its register in configuration space.
    pub const fn offset(self) -> u16 {
        FIRST + 4 * self.number as u16
    }

    /// Which bits of its two registers hold an address.
    const fn mask(self) -> u64 {
        !(self.len - 1)
    }

    /// Gives configuration space its registers.
    pub fn install(self, space: &mut ConfigSpace) {
        let kind = MEMORY_64 | if self.prefetchable { PREFETCHABLE } else { 0 };
        space.set(self.offset(), &u64::from(kind).to_le_bytes());
        space.allow(self.offset(), &self.mask().to_le_bytes());
    }

    /// Where it is, or `None` while it has no address: 0, or what a driver writes to learn the
    /// length (PCI 3.0, 6.2.5.1), in either half.
    pub fn address(self, space: &ConfigSpace) -> Option<u64> {
        let address = space.read64(self.offset()) & self.mask();
        let low = self.mask() as u32;
        let sizing = (low != 0 && address as u32 == low) || (address >> 32) as u32 == u32::MAX;
        let fits = address.checked_add(self.len).is_some();
        (address != 0 && !sizing && fits).then_some(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sized(len: u64) -> u64 {
        let bar = Bar { number: 2, len, prefetchable: true };
        let mut space = ConfigSpace::new();
        bar.install(&mut space);
        space.write(0x18, &u32::MAX.to_le_bytes());
        assert_eq!(bar.address(&space), None);
        space.write(0x1c, &u32::MAX.to_le_bytes());
        assert_eq!(bar.address(&space), None);
        space.read64(0x18)
    }

    #[test]
    fn sizing_tells_the_length() {
        for len in [0x1000, 32 << 10, 4 << 20, 1 << 30, 1 << 32, 1 << 40] {
            let answer = sized(len);
            assert_eq!(answer & 0xf, 0b1100);
            assert_eq!((!(answer & !0xf)).wrapping_add(1), len);
        }
    }

    #[test]
    fn an_address_is_one_when_both_halves_are_written() {
        let bar = Bar { number: 0, len: 32 << 10, prefetchable: false };
        let mut space = ConfigSpace::new();
        bar.install(&mut space);
        assert_eq!(bar.address(&space), None);
        space.write(0x10, &0xe000_1234_u32.to_le_bytes());
        assert_eq!(bar.address(&space), Some(0xe000_0000));
        space.write(0x14, &1_u32.to_le_bytes());
        assert_eq!(bar.address(&space), Some(0x1_e000_0000));
    }

    #[test]
    fn structures_do_not_overlap_and_fit() {
        let offsets =
            [COMMON_OFFSET, ISR_OFFSET, DEVICE_OFFSET, NOTIFY_OFFSET, MSIX_TABLE_OFFSET, MSIX_PBA_OFFSET];
        assert!(offsets.windows(2).all(|pair| pair[0] + STRUCTURE_LEN <= pair[1]));
        const { assert!(MSIX_PBA_OFFSET + STRUCTURE_LEN <= REGISTERS_LEN) };
    }
}
