//! Configuration space: 256 bytes, and which of their bits can be written. Bytes beyond
//! them read as zero.

/// Length of what there is of configuration space, bytes.
pub const LEN: usize = 256;

/// `PCI_VENDOR_ID`.
const VENDOR_ID: u16 = 0x00;
/// `PCI_COMMAND`.
pub const COMMAND: u16 = 0x04;
/// `PCI_STATUS`.
const STATUS: u16 = 0x06;
/// `PCI_REVISION_ID`.
const REVISION_ID: u16 = 0x08;
/// `PCI_SUBSYSTEM_VENDOR_ID`.
const SUBSYSTEM: u16 = 0x2c;
/// `PCI_CAPABILITY_LIST`.
const CAPABILITY_LIST: u16 = 0x34;
/// `PCI_INTERRUPT_LINE`.
const INTERRUPT_LINE: u16 = 0x3c;

/// `PCI_COMMAND_MEMORY`: BARs answer.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// `PCI_COMMAND_MASTER`: MSI-X messages are sent.
pub const COMMAND_MASTER: u16 = 1 << 2;
/// `PCI_COMMAND_INTX_DISABLE`.
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// `PCI_STATUS_CAP_LIST`.
const STATUS_CAP_LIST: u16 = 1 << 4;

/// `PCI_CLASS_OTHERS`, which virtio functions of no other class have: the low byte is the
/// subclass.
const CLASS: u16 = 0x00ff;
/// Revision of a virtio function without legacy interface (virtio 1.3, 4.1.2.1).
const REVISION: u8 = 1;

/// Configuration space of a type 0 function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; LEN],
    writable: [u8; LEN],
}

impl ConfigSpace {
    /// All zero, nothing writable.
    pub const fn new() -> Self {
        Self { bytes: [0; LEN], writable: [0; LEN] }
    }

    /// The header of a virtio function with this PCI device number, whose first capability
    /// is at `capabilities`.
    pub fn of_function(device: u16, capabilities: u8) -> Self {
        let mut space = Self::new();
        let vendor = crate::abi::PCI_VENDOR_ID;
        let pair = |low: u16, high: u16| (u32::from(high) << 16 | u32::from(low)).to_le_bytes();
        space.set(VENDOR_ID, &pair(vendor, device));
        space.set(STATUS, &STATUS_CAP_LIST.to_le_bytes());
        let [subclass, class] = CLASS.to_le_bytes();
        space.set(REVISION_ID, &[REVISION, 0, subclass, class]);
        space.set(SUBSYSTEM, &pair(vendor, device));
        space.set(CAPABILITY_LIST, &[capabilities]);
        // There is no interrupt pin, so the bit that disables its interrupt means nothing.
        let command = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE;
        space.allow(COMMAND, &command.to_le_bytes());
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Sets bytes whether they can be written or not. What is outside is dropped.
    pub fn set(&mut self, offset: u16, data: &[u8]) {
        for (byte, value) in self.bytes.iter_mut().skip(offset.into()).zip(data) {
            *byte = *value;
        }
    }

    /// Lets these bits be written.
    pub fn allow(&mut self, offset: u16, mask: &[u8]) {
        for (byte, value) in self.writable.iter_mut().skip(offset.into()).zip(mask) {
            *byte = *value;
        }
    }

    /// Fills `data` from `offset` on.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        for (value, byte) in data.iter_mut().zip(self.bytes.iter().skip(offset.into())) {
            *value = *byte;
        }
    }

    /// Writes what can be written.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let from = usize::from(offset);
        let bytes = self.bytes.iter_mut().zip(&self.writable).skip(from);
        for ((byte, mask), value) in bytes.zip(data) {
            *byte = *byte & !mask | value & mask;
        }
    }

    /// Two bytes; zero outside.
    pub fn read16(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Four bytes; zero outside.
    pub fn read32(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Eight bytes; zero outside.
    pub fn read64(&self, offset: u16) -> u64 {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Whether a bit of the command register is set.
    pub fn commands(&self, bit: u16) -> bool {
        self.read16(COMMAND) & bit != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_writable_bits_change() {
        let mut space = ConfigSpace::of_function(0x1066, 0x40);
        space.write(0, &[0xff; 64]);
        assert_eq!(space.read32(0), 0x1066_1af4);
        assert_eq!(space.read16(COMMAND), 0x0406);
        assert_eq!(space.read32(REVISION_ID), 0x00ff_0001);
        assert_eq!(space.read16(STATUS), STATUS_CAP_LIST);
        assert_eq!(space.read64(0x10), 0, "no BAR is installed");
        assert_eq!(space.read32(0x3c), 0xff);
    }

    #[test]
    fn outside_there_is_nothing() {
        let mut space = ConfigSpace::of_function(0x1066, 0x40);
        space.write(u16::MAX, &[1; 8]);
        space.write(254, &[0xff; 8]);
        let mut data = [7; 8];
        space.read(252, &mut data);
        assert_eq!(data, [0; 8]);
        space.read(u16::MAX, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
