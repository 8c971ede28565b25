//! A virtual machine: memory, interrupt routes, eventfds.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use guest_driver_model::owner::OwnerMemory;
use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES, KvmIrqRouting, kvm_enable_cap,
    kvm_irq_routing_entry,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::layout;
use crate::sys::slots::{self, HostRange};
use crate::tables;

/// The first interrupt line that is a message's. Those below are the IOAPIC's, of which there
/// is none.
const FIRST_GSI: u32 = 24;

/// A message-signalled interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// Where it is written to.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

impl Msi {
    /// The one that is this interrupt vector of the guest's only processor.
    pub const fn vector(vector: u8) -> Self {
        Self { address: layout::MSI_ADDRESS, data: vector as u32 }
    }
}

/// The virtual machine, with tables for its one processor in its memory.
pub struct Vm {
    fd: VmFd,
    cpuid: CpuId,
    memory: Arc<OwnerMemory>,
    /// By interrupt line.
    routes: Mutex<BTreeMap<u32, Msi>>,
}

impl Vm {
    /// A new one.
    ///
    /// # Errors
    /// If there is no KVM, or it refuses.
    pub fn new() -> anyhow::Result<Self> {
        let kvm = Kvm::new().context("opening /dev/kvm")?;
        let fd = kvm.create_vm().context("KVM_CREATE_VM")?;
        // Local APICs in the kernel, and nothing else: all interrupts are messages.
        let split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            args: [u64::from(FIRST_GSI), 0, 0, 0],
            ..kvm_enable_cap::default()
        };
        fd.enable_cap(&split).context("KVM_CAP_SPLIT_IRQCHIP")?;
        let memory = Arc::new(OwnerMemory::new(layout::MEMORY, 0).context("the guest's memory")?);
        slots::show(&fd, 0, 0, HostRange::of_memory(&memory), false).context("the memory's slot")?;
        tables::write(&memory)?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
        Ok(Self { fd, cpuid, memory, routes: Mutex::default() })
    }

    /// Its memory, which starts at guest-physical address 0.
    pub fn memory(&self) -> &Arc<OwnerMemory> {
        &self.memory
    }

    /// Its only processor, as it comes out of reset but for what it can do.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn processor(&self) -> anyhow::Result<VcpuFd> {
        let processor = self.fd.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        processor.set_cpuid2(&self.cpuid).context("KVM_SET_CPUID2")?;
        Ok(processor)
    }

    /// Shows a range of this process's memory to the guest.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn show(&self, slot: u32, guest_start: u64, range: HostRange, read_only: bool) -> io::Result<()> {
        slots::show(&self.fd, slot, guest_start, range, read_only)
    }

    /// Makes an interrupt line that is this message. A route is there before an eventfd feeds
    /// it: a signal without a route is lost.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn add_route(&self, msi: Msi) -> io::Result<u32> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let free = (FIRST_GSI..).find(|gsi| !routes.contains_key(gsi)).unwrap_or(u32::MAX);
        routes.insert(free, msi);
        match self.set_routes(&routes) {
            Ok(()) => Ok(free),
            Err(error) => {
                routes.remove(&free);
                Err(error)
            }
        }
    }

    /// Gives the line back.
    pub fn remove_route(&self, gsi: u32) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        routes.remove(&gsi);
        // Fewer routes than there were are not refused; and one too many harms nobody.
        let _ = self.set_routes(&routes);
    }

    fn set_routes(&self, routes: &BTreeMap<u32, Msi>) -> io::Result<()> {
        let entry = |(gsi, msi): (&u32, &Msi)| {
            let mut entry =
                kvm_irq_routing_entry { gsi: *gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            entry.u.msi.address_lo = msi.address as u32;
            entry.u.msi.address_hi = (msi.address >> 32) as u32;
            entry.u.msi.data = msi.data;
            entry
        };
        let entries: Vec<_> = routes.iter().map(entry).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| io::ErrorKind::OutOfMemory)?;
        self.fd.set_gsi_routing(&table).map_err(system)
    }

    /// From now on each signal of the eventfd is the line's interrupt. If it is signalled
    /// already, there is one at once.
    ///
    /// # Errors
    /// What KVM answers: EBUSY if any VM of the host uses the eventfd so.
    pub fn add_irqfd(&self, eventfd: &EventFd, gsi: u32) -> io::Result<()> {
        self.fd.register_irqfd(eventfd, gsi).map_err(system)
    }

    /// Not any more. What is signalled from now on stays in the eventfd.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn remove_irqfd(&self, eventfd: &EventFd, gsi: u32) -> io::Result<()> {
        self.fd.unregister_irqfd(eventfd, gsi).map_err(system)
    }

    /// From now on the guest's stores to this address signal the eventfd and nothing else.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn add_ioeventfd(&self, eventfd: &EventFd, address: u64) -> io::Result<()> {
        self.fd.register_ioevent(eventfd, &IoEventAddress::Mmio(address), NoDatamatch).map_err(system)
    }

    /// Not any more.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn remove_ioeventfd(&self, eventfd: &EventFd, address: u64) -> io::Result<()> {
        self.fd.unregister_ioevent(eventfd, &IoEventAddress::Mmio(address), NoDatamatch).map_err(system)
    }
}

fn system(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
