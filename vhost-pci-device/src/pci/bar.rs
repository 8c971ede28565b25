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

    /// Where it is, or `None` while it has no address: 0, or either half is being sized.
    pub fn address(self, space: &ConfigSpace, sizing: Sizing) -> Option<u64> {
        let address = space.read64(self.offset()) & self.mask();
        let fits = address.checked_add(self.len).is_some();
        (address != 0 && sizing == Sizing::default() && fits).then_some(address)
    }
}

/// Which halves of a BAR hold what a driver writes to learn the length (PCI 3.0, 6.2.5.1). What
/// configuration space keeps of that cannot tell: it is an address of a long BAR, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizing {
    halves: [bool; 2],
}

impl Sizing {
    /// Notes what a write to configuration space does to a BAR: all ones (but for the bits that
    /// are no address) in a half size it, any other write to that half is an address.
    pub fn note(&mut self, bar: Bar, offset: u16, data: &[u8]) {
        let (from, end) = (usize::from(offset), usize::from(offset).saturating_add(data.len()));
        for (sizing, at) in self.halves.iter_mut().zip([bar.offset(), bar.offset() + 4].map(usize::from)) {
            if from < at + 4 && at < end {
                let written = at.checked_sub(from).and_then(|at| data.get(at..at + 4));
                *sizing = written.is_some_and(|raw| raw[0] >= 0xf0 && raw[1..] == [0xff; 3]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A BAR with its registers.
    struct Bench {
        bar: Bar,
        space: ConfigSpace,
        sizing: Sizing,
    }

    impl Bench {
        fn new(len: u64) -> Self {
            let bar = Bar { number: 2, len, prefetchable: true };
            let mut space = ConfigSpace::new();
            bar.install(&mut space);
            Self { bar, space, sizing: Sizing::default() }
        }

        fn write(&mut self, offset: u16, data: &[u8]) -> Option<u64> {
            self.space.write(offset, data);
            self.sizing.note(self.bar, offset, data);
            self.bar.address(&self.space, self.sizing)
        }
    }

    #[test]
    fn sizing_tells_the_length() {
        for len in [0x1000, 32 << 10, 4 << 20, 1 << 30, 1 << 32, 1 << 40] {
            let mut bench = Bench::new(len);
            assert_eq!(bench.write(0x18, &u32::MAX.to_le_bytes()), None);
            assert_eq!(bench.write(0x1c, &u32::MAX.to_le_bytes()), None);
            let answer = bench.space.read64(0x18);
            assert_eq!(answer & 0xf, 0b1100);
            assert_eq!((!(answer & !0xf)).wrapping_add(1), len);
            // The driver puts back what was there, half by half.
            assert_eq!(bench.write(0x18, &0_u32.to_le_bytes()), None);
            assert_eq!(bench.write(0x1c, &(1_u32 << 8).to_le_bytes()), Some(1 << 40));
            assert_eq!(bench.write(0x18, &0xffff_fff0_u32.to_le_bytes()), None);
        }
    }

    #[test]
    fn every_multiple_of_the_length_is_an_address() {
        for len in (22..=31).map(|bits| 1_u64 << bits) {
            for k in [1, 2, 3, 5, 127, 1023, (1 << 32) / len - 1, (16 << 32) / len - 1, (17 << 32) / len - 1]
            {
                let address = k * len;
                let mut bench = Bench::new(len);
                bench.write(0x18, &u64::MAX.to_le_bytes());
                bench.write(0x18, &(address as u32).to_le_bytes());
                let halves = bench.write(0x1c, &((address >> 32) as u32).to_le_bytes());
                assert_eq!(halves, Some(address), "{len:#x} at {address:#x}");
                assert_eq!(Bench::new(len).write(0x18, &address.to_le_bytes()), Some(address));
            }
        }
    }

    #[test]
    fn an_address_is_one_when_both_halves_are_written() {
        let mut bench = Bench::new(32 << 10);
        assert_eq!(bench.bar.address(&bench.space, bench.sizing), None);
        assert_eq!(bench.write(0x18, &0xe000_1234_u32.to_le_bytes()), Some(0xe000_0000));
        assert_eq!(bench.write(0x1c, &1_u32.to_le_bytes()), Some(0x1_e000_0000));
    }

    #[test]
    fn bytes_size_nothing_and_end_a_sizing() {
        let mut bench = Bench::new(2 << 30);
        for offset in 0x18..0x1c {
            bench.write(offset, &[0xff]);
        }
        assert_eq!(bench.bar.address(&bench.space, bench.sizing), Some(2 << 30));
        assert_eq!(bench.write(0x18, &u32::MAX.to_le_bytes()), None);
        assert_eq!(bench.write(0x1b, &[0x80]), Some(2 << 30));
        assert_eq!(bench.write(u16::MAX, &[0xff; 8]), Some(2 << 30));
    }

    #[test]
    fn structures_do_not_overlap_and_fit() {
        let offsets =
            [COMMON_OFFSET, ISR_OFFSET, DEVICE_OFFSET, NOTIFY_OFFSET, MSIX_TABLE_OFFSET, MSIX_PBA_OFFSET];
        assert!(offsets.windows(2).all(|pair| pair[0] + STRUCTURE_LEN <= pair[1]));
        const { assert!(MSIX_PBA_OFFSET + STRUCTURE_LEN <= REGISTERS_LEN) };
    }
}
