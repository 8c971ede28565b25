//! What a processor in long mode has to find in memory before it runs a program at CPL 3:
//! segments, interrupt gates, handlers, a task state, page tables. Bytes and their places,
//! nothing else.
//!
//! The handlers are the only code at CPL 0, and as short as can be, since not every KVM runs
//! such code natively: one counts its vector's interrupts, and tells the local APIC.

use guest_driver_model::owner::OwnerMemory;
use guest_driver_model::shm::ShmError;
use kvm_bindings::{kvm_segment, kvm_sregs};

use crate::layout::{self, GDT, IDT, PAGE_TABLES, TSS};

/// Code of handlers.
const KERNEL_CODE: u16 = 0x08;
/// Data and stack of programs.
const USER_DATA: u16 = 0x18 | 3;
/// Code of programs.
const USER_CODE: u16 = 0x20 | 3;
/// The task.
const TASK: u16 = 0x28;
const TASK_LEN: u64 = 0x68;

const PAGE: u64 = 4096;
/// What an entry of a page directory maps.
const LARGE_PAGE: u64 = 2 << 20;
/// Present, writable, and for CPL 3: at every level.
const ENTRY: u64 = 0b111;
/// This entry maps a large page.
const LARGE: u64 = 1 << 7;
/// Write-through and uncached.
const UNCACHED: u64 = 0b11 << 3;

/// Registers of the local APIC.
const APIC_EOI: u64 = 0xb0;

/// Writes all tables into a guest's memory.
///
/// # Errors
/// If the memory is too small.
pub fn write(memory: &OwnerMemory) -> Result<(), ShmError> {
    segments(memory)?;
    interrupts(memory)?;
    Pages { memory, used: 1 }.write()
}

fn segments(memory: &OwnerMemory) -> Result<(), ShmError> {
    let task = 0x89 << 40 | (TSS & 0xff_ffff) << 16 | (TASK_LEN - 1);
    // Nothing; code and data for CPL 0; data and code for CPL 3; the task, of two entries.
    let entries = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        task,
        0,
    ];
    for (place, entry) in (GDT..).step_by(8).zip(entries) {
        memory.shared().store_u64(place, entry)?;
    }
    // RSP0, which is not aligned in there; and no I/O bitmap: programs use no ports.
    memory.shared().write(TSS + 4, &layout::RING0_STACK_END.to_le_bytes())?;
    memory.shared().store_u16(TSS + 0x66, TASK_LEN as u16)
}

fn interrupts(memory: &OwnerMemory) -> Result<(), ShmError> {
    for vector in layout::FIRST_VECTOR..=0xef {
        let handler = layout::HANDLERS + u64::from(vector) * layout::HANDLER;
        let mut code = vec![0xff, 0x04, 0x25]; // inc dword ptr [counter]
        code.extend_from_slice(&(layout::counter(vector) as u32).to_le_bytes());
        code.extend_from_slice(&[0xc7, 0x04, 0x25]); // mov dword ptr [EOI], 0
        code.extend_from_slice(&((layout::APIC_VIRTUAL + APIC_EOI) as u32).to_le_bytes());
        code.extend_from_slice(&[0, 0, 0, 0]);
        code.extend_from_slice(&[0x48, 0xcf]); // iretq
        memory.shared().write(handler, &code)?;
        // An interrupt gate; the handler is below 64 KiB.
        let gate = 0x8e00 << 32 | u64::from(KERNEL_CODE) << 16 | handler & 0xffff;
        memory.shared().store_u64(IDT + u64::from(vector) * 16, gate)?;
        memory.shared().store_u64(IDT + u64::from(vector) * 16 + 8, 0)?;
    }
    Ok(())
}

/// The page tables: large pages, virtual addresses equal to physical ones but for the local
/// APIC's.
struct Pages<'a> {
    memory: &'a OwnerMemory,
    /// Pages that are tables; the first is the root.
    used: u64,
}

impl Pages<'_> {
    fn write(mut self) -> Result<(), ShmError> {
        self.map(0, layout::MEMORY, 0)?;
        self.map(layout::REGISTERS, LARGE_PAGE, UNCACHED)?;
        self.map(layout::DOORBELLS, LARGE_PAGE, UNCACHED)?;
        self.map(layout::PARK, LARGE_PAGE, UNCACHED)?;
        self.map(layout::WINDOW, layout::WINDOW_SPACE, 0)?;
        self.map_page(layout::APIC_VIRTUAL, layout::APIC | UNCACHED)
    }

    fn map(&mut self, start: u64, len: u64, bits: u64) -> Result<(), ShmError> {
        (start..start + len).step_by(LARGE_PAGE as usize).try_for_each(|at| self.map_page(at, at | bits))
    }

    fn map_page(&mut self, at: u64, physical: u64) -> Result<(), ShmError> {
        let pointers = self.below(PAGE_TABLES + (at >> 39 & 511) * 8)?;
        let directory = self.below(pointers + (at >> 30 & 511) * 8)?;
        self.memory.shared().store_u64(directory + (at >> 21 & 511) * 8, physical | ENTRY | LARGE)
    }

    /// The table that the entry at this place leads to.
    fn below(&mut self, place: u64) -> Result<u64, ShmError> {
        let entry = self.memory.shared().load_u64(place)?;
        if entry != 0 {
            return Ok(entry & !(PAGE - 1));
        }
        let table = PAGE_TABLES + self.used * PAGE;
        debug_assert!(self.used * PAGE < layout::PAGE_TABLES_LEN);
        self.used += 1;
        self.memory.shared().store_u64(place, table | ENTRY)?;
        Ok(table)
    }
}

/// The special registers of a processor that runs programs at CPL 3 with these tables.
pub fn registers(mut sregs: kvm_sregs) -> kvm_sregs {
    let segment = |selector: u16, kind: u8| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl: 3,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = kvm_segment { l: 1, ..segment(USER_CODE, 11) };
    let data = kvm_segment { db: 1, ..segment(USER_DATA, 3) };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: TSS,
        limit: TASK_LEN as u32 - 1,
        selector: TASK,
        type_: 11,
        present: 1,
        ..kvm_segment::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 7 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 256 * 16 - 1);
    // Paging and protection; extended addresses; long mode, enabled and active.
    sregs.cr0 = 1 << 31 | 1 << 5 | 1;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 1 << 5;
    sregs.efer = 1 << 8 | 1 << 10;
    sregs
}
