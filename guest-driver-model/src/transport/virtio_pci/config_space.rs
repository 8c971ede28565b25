//! PCI configuration space: how it is read, and the registers of it that a driver
//! of a virtio function needs.

use std::io;

/// `PCI_COMMAND`.
pub const COMMAND: u16 = 0x04;
/// `PCI_COMMAND_MEMORY`: BARs answer.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// `PCI_COMMAND_MASTER`: without it a device's MSI-X messages are lost.
pub const COMMAND_MASTER: u16 = 1 << 2;
/// `PCI_COMMAND_INTX_DISABLE`.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// `PCI_STATUS`.
pub const STATUS: u16 = 0x06;
/// `PCI_STATUS_CAP_LIST`: there is a capability list.
pub const STATUS_CAP_LIST: u16 = 1 << 4;
/// `PCI_CAPABILITY_LIST`.
pub const CAPABILITY_LIST: u16 = 0x34;

/// The 256 bytes (or more) of a function's configuration space.
pub trait ConfigSpace {
    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    /// What the system answers; a read past the end is one too.
    fn read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// What the system answers.
    fn write(&self, offset: u16, bytes: &[u8]) -> io::Result<()>;
}

/// A byte.
pub(super) fn read8(space: &dyn ConfigSpace, offset: u16) -> io::Result<u8> {
    let mut byte = [0];
    space.read(offset, &mut byte)?;
    Ok(u8::from_le_bytes(byte))
}

/// Two bytes, little-endian.
pub(super) fn read16(space: &dyn ConfigSpace, offset: u16) -> io::Result<u16> {
    let mut bytes = [0; 2];
    space.read(offset, &mut bytes)?;
    Ok(u16::from_le_bytes(bytes))
}

/// Four bytes, little-endian.
pub(super) fn read32(space: &dyn ConfigSpace, offset: u16) -> io::Result<u32> {
    let mut bytes = [0; 4];
    space.read(offset, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Lets BARs answer and the device send interrupts and DMA; no INTx.
///
/// # Errors
/// What the system answers.
pub fn enable(space: &dyn ConfigSpace) -> io::Result<()> {
    let command = read16(space, COMMAND)?;
    let wanted = command | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE;
    if wanted == command {
        return Ok(());
    }
    space.write(COMMAND, &wanted.to_le_bytes())
}
