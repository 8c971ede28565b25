//! The owner's RAM: a memfd that can neither shrink nor grow.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use crate::shm::SharedMemory;
use crate::shm::mapping::MappedRange;

/// Memory of an owner, and where its guest sees it.
#[derive(Debug)]
pub struct OwnerMemory {
    file: OwnedFd,
    memory: SharedMemory,
    front_end_address: u64,
    guest_start: u64,
}

impl OwnerMemory {
    /// `len` bytes (a multiple of the page size) of zeroed memory at the guest-physical
    /// address `guest_start`.
    ///
    /// # Errors
    /// What the system answers; `InvalidInput` if the range wraps.
    pub fn new(len: u64, guest_start: u64) -> io::Result<Self> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        if guest_start.checked_add(len).is_none() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create(c"vhost-pci-owner-ram", flags)?;
        ftruncate(&file, i64::try_from(len).map_err(invalid)?)?;
        // A peer that maps it must not die of SIGBUS because the file got shorter.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
        let mapping = Arc::new(MappedRange::of_file(&file, 0, usize::try_from(len).map_err(invalid)?)?);
        let front_end_address = mapping.base().addr().get() as u64;
        Ok(Self { file, memory: mapping.shared(), front_end_address, guest_start })
    }

    /// The memory, as the owner's driver uses it.
    pub fn shared(&self) -> &SharedMemory {
        &self.memory
    }

    /// Length, bytes.
    pub fn len(&self) -> u64 {
        self.memory.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.memory.is_empty()
    }

    /// Guest-physical address of the first byte.
    pub fn guest_start(&self) -> u64 {
        self.guest_start
    }

    /// Where the front-end has it mapped, which is what vring addresses are told in.
    pub fn front_end_address(&self) -> u64 {
        self.front_end_address
    }

    /// The file, for a memory table.
    pub fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_memory_keeps_its_length() {
        let memory = OwnerMemory::new(1 << 20, 1 << 32).unwrap();
        assert!(ftruncate(&memory.file, 0).is_err());
        assert!(ftruncate(&memory.file, 2 << 20).is_err());
        assert_eq!(memory.shared().load_u64((1 << 20) - 8).unwrap(), 0);
        assert!(OwnerMemory::new(1 << 20, u64::MAX).is_err());
    }
}
