//! Device registers behind a mapped BAR: loads and stores of exactly the width
//! asked for.
//!
//! An access outside the range, or across a register's alignment, behaves as an
//! absent PCI device does: loads give all ones, stores are dropped.

use std::ptr::NonNull;
use std::sync::Arc;

use crate::shm::mapping::MappedRange;
use crate::transport::virtio_pci::Registers;

/// A range of registers.
#[derive(Clone, Debug)]
pub struct Mmio {
    mapping: Arc<MappedRange>,
    offset: usize,
    len: usize,
}

impl Mmio {
    /// The `len` bytes at `offset` of `mapping`, if they are inside it.
    pub fn new(mapping: Arc<MappedRange>, offset: usize, len: usize) -> Option<Self> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= mapping.len());
        inside.then_some(Self { mapping, offset, len })
    }

    /// The address of a register of `T` at `at`, if it is inside and aligned.
    fn register<T>(&self, at: u64) -> Option<NonNull<T>> {
        let at = usize::try_from(at).ok()?;
        let end = at.checked_add(size_of::<T>())?;
        if end > self.len {
            return None;
        }
        let address = self.mapping.base().as_ptr().wrapping_add(self.offset + at);
        let register = NonNull::new(address.cast::<T>())?;
        register.is_aligned().then_some(register)
    }

    fn load<T: Copy>(&self, at: u64, absent: T) -> T {
        let Some(register) = self.register::<T>(at) else {
            return absent;
        };
        // SAFETY: `register` checked that the whole of `T` is aligned and inside
        // the range, which `new` checked to be inside the mapping; `self.mapping`
        // keeps it mapped. Only volatile accesses reach it, never a reference.
        // `T` is an unsigned integer (see the callers): every value is valid.
        unsafe { register.read_volatile() }
    }

    fn store<T: Copy>(&self, at: u64, value: T) {
        if let Some(register) = self.register::<T>(at) {
            // SAFETY: as in `load`; the mapping is writable by construction.
            unsafe { register.write_volatile(value) }
        }
    }
}

impl Registers for Mmio {
    fn read8(&self, at: u64) -> u8 {
        self.load(at, u8::MAX)
    }

    fn read16(&self, at: u64) -> u16 {
        u16::from_le(self.load(at, u16::MAX))
    }

    fn read32(&self, at: u64) -> u32 {
        u32::from_le(self.load(at, u32::MAX))
    }

    fn write8(&self, at: u64, value: u8) {
        self.store(at, value);
    }

    fn write16(&self, at: u64, value: u16) {
        self.store(at, value.to_le());
    }

    fn write32(&self, at: u64, value: u32) {
        self.store(at, value.to_le());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn registers_outside_the_range_are_absent() {
        let pages = Arc::new(MappedRange::locked_pages(4096).unwrap());
        assert!(Mmio::new(pages.clone(), 4000, 97).is_none());
        let mmio = Mmio::new(pages.clone(), 64, 16).unwrap();
        mmio.write32(12, 0x1234_5678);
        assert_eq!(mmio.read32(12), 0x1234_5678);
        assert_eq!(mmio.read16(12), 0x5678);
        mmio.write32(16, 1);
        assert_eq!(mmio.read32(13), u32::MAX, "unaligned");
        assert_eq!(mmio.read32(16), u32::MAX);
        assert_eq!(mmio.read8(u64::MAX), u8::MAX);
        let all = Mmio::new(pages, 0, 4096).unwrap();
        assert_eq!(all.read32(80), 0, "the store outside was dropped");
    }
}
