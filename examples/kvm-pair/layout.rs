//! Where everything is in a guest: in its memory, in its physical addresses, which are its
//! virtual ones as well, and in its interrupt vectors.

/// Bytes of a guest's memory, which starts at 0.
pub const MEMORY: u64 = 8 << 20;

/// Segment descriptors.
pub const GDT: u64 = 0x1000;
/// Interrupt gates.
pub const IDT: u64 = 0x2000;
/// The task's state: the stack that interrupts get.
pub const TSS: u64 = 0x3000;
/// How often each interrupt vector came, 4 bytes each.
pub const COUNTERS: u64 = 0x4000;
/// The end of the stack that interrupts get.
pub const RING0_STACK_END: u64 = 0x6000;
/// Not 0: the program is to end.
pub const STOP: u64 = 0x6000;
/// Of the program that uses the window: passes over it,
pub const PASSES: u64 = 0x6040;
/// loads of what must not be loaded,
pub const LEAKS: u64 = PASSES + 8;
/// and the address of a page to store to.
pub const TARGET: u64 = PASSES + 16;
/// The interrupt handlers, [`HANDLER`] bytes each.
pub const HANDLERS: u64 = 0x8000;
/// Bytes of a handler.
pub const HANDLER: u64 = 32;
/// The program.
pub const PROGRAM: u64 = 0x1_0000;
/// Page tables.
pub const PAGE_TABLES: u64 = 0x4_0000;
/// Bytes for them.
pub const PAGE_TABLES_LEN: u64 = 0x4_0000;
/// What programs write: times, or what they saw.
pub const RESULTS: u64 = 0x10_0000;
/// Bytes for that.
pub const RESULTS_LEN: u64 = 0x10_0000;
/// Queues of the peer's device, which carry nothing.
pub const QUEUES: u64 = 0x30_0000;
/// Rings and buffers of the owner's card.
pub const CARD: u64 = 0x40_0000;

/// Registers of the peer's device.
pub const REGISTERS: u64 = 0xc000_0000;
/// The owner's doorbells, [`DOORBELL_STRIDE`] bytes apart.
pub const DOORBELLS: u64 = 0xd000_0000;
/// From one vring's doorbell to the next one's.
pub const DOORBELL_STRIDE: u64 = 8;
/// Where programs end.
pub const PARK: u64 = 0xd100_0000;
/// Where the local APIC is, which cannot be chosen.
pub const APIC: u64 = 0xfee0_0000;
/// Virtual address of the local APIC: one that fits the 32 bits of an instruction.
pub const APIC_VIRTUAL: u64 = 0x3fe0_0000;
/// The peer's window.
pub const WINDOW: u64 = 0x10_0000_0000;
/// Bytes at [`WINDOW`] that have addresses.
pub const WINDOW_SPACE: u64 = 1 << 30;

/// First interrupt vector in use.
pub const FIRST_VECTOR: u8 = 0x40;
/// Where the message of an interrupt is written to: the first processor.
pub const MSI_ADDRESS: u64 = 0xfee0_0000;

/// Where interrupts of this vector are counted.
pub const fn counter(vector: u8) -> u64 {
    COUNTERS + vector as u64 * 4
}
