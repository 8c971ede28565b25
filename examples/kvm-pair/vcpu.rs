//! A guest's only processor: a thread that runs one program after the other at CPL 3, and
//! sleeps in between.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use guest_driver_model::owner::OwnerMemory;
use kvm_bindings::kvm_regs;
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::cpu;
use crate::layout::{self, PARK, PROGRAM, STOP};
use crate::tables;
use crate::vm::Vm;

/// Registers of the local APIC: spurious-interrupt vector, and the bit in it that turns the
/// APIC on.
const APIC_SPURIOUS: usize = 0xf0;
const APIC_ON: u8 = 1;

/// What answers the guest's loads and stores where no memory is.
pub trait Mmio: Send + Sync {
    /// A load.
    fn load(&self, address: u64, bytes: &mut [u8]);
    /// A store.
    fn store(&self, address: u64, bytes: &[u8]);
}

/// Nothing there: reads ones, ignores stores.
pub struct Nothing;

impl Mmio for Nothing {
    fn load(&self, _: u64, bytes: &mut [u8]) {
        bytes.fill(0xff);
    }

    fn store(&self, _: u64, _: &[u8]) {}
}

/// A program, and what is in the registers that it knows of (see `sys/blobs.rs`).
#[derive(Clone, Copy, Debug, Default)]
pub struct Program {
    /// Its bytes.
    pub code: &'static [u8],
    /// Its arguments. Where programs end, and the word that ends them, need not be named.
    pub arguments: kvm_regs,
}

/// The processor. When dropped, its program is told to end and its thread is waited for.
#[derive(Debug)]
pub struct Processor {
    khz: u32,
    memory: Arc<OwnerMemory>,
    programs: Option<Sender<Program>>,
    results: Receiver<anyhow::Result<u64>>,
    thread: Option<JoinHandle<()>>,
}

impl Processor {
    /// The processor of this VM, on the host's processor of this number, if that is to be
    /// had. Call it once for a VM.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn start(vm: &Vm, place: usize, mmio: Arc<dyn Mmio>) -> anyhow::Result<Self> {
        let mut vcpu = vm.processor()?;
        let mut apic = vcpu.get_lapic().context("KVM_GET_LAPIC")?;
        apic.regs[APIC_SPURIOUS] = -1;
        apic.regs[APIC_SPURIOUS + 1] |= APIC_ON as i8;
        vcpu.set_lapic(&apic).context("KVM_SET_LAPIC")?;
        let sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
        vcpu.set_sregs(&tables::registers(sregs)).context("KVM_SET_SREGS")?;
        let khz = vcpu.get_tsc_khz().context("KVM_GET_TSC_KHZ")?;
        let (programs, next) = mpsc::channel();
        let (done, results) = mpsc::channel();
        let memory = Arc::clone(vm.memory());
        let thread = thread::Builder::new().name("vcpu".into()).spawn(move || {
            cpu::pin(place);
            while let Ok(program) = next.recv() {
                let result = run(&mut vcpu, &program, mmio.as_ref());
                if done.send(result).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { khz, memory, programs: Some(programs), results, thread: Some(thread) })
    }

    /// The frequency of its time-stamp counter.
    pub fn khz(&self) -> u32 {
        self.khz
    }

    /// Lets it run a program. The one before must have ended.
    ///
    /// # Errors
    /// If its thread is gone.
    pub fn run(&self, program: Program) -> anyhow::Result<()> {
        self.memory.shared().store_u32(STOP, 0)?;
        self.memory.shared().write(PROGRAM, program.code)?;
        let programs = self.programs.as_ref().context("the processor has stopped")?;
        programs.send(program).ok().context("the processor's thread is gone")
    }

    /// Tells the program to end.
    ///
    /// # Errors
    /// If the memory is not there.
    pub fn stop(&self) -> anyhow::Result<()> {
        Ok(self.memory.shared().store_u32(STOP, 1)?)
    }

    /// Waits until the program has ended, and gives its result.
    ///
    /// # Errors
    /// If KVM stopped it, or it takes longer.
    pub fn wait(&self, most: Duration) -> anyhow::Result<u64> {
        match self.results.recv_timeout(most) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => bail!("the guest's program has not ended after {most:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!("the processor's thread is gone"),
        }
    }

    /// How many interrupts of this vector the guest has had.
    ///
    /// # Errors
    /// If the memory is not there.
    pub fn interrupts(&self, vector: u8) -> anyhow::Result<u32> {
        Ok(self.memory.shared().load_u32(layout::counter(vector))?)
    }
}

impl Drop for Processor {
    fn drop(&mut self) {
        let _ = self.stop();
        self.programs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Runs a program until it ends.
fn run(vcpu: &mut VcpuFd, program: &Program, mmio: &dyn Mmio) -> anyhow::Result<u64> {
    // RFLAGS: interrupts on; the bit that is always 1.
    let fixed = kvm_regs { rip: PROGRAM, rflags: 0x202, r9: PARK, r10: STOP, ..program.arguments };
    vcpu.set_regs(&fixed).context("KVM_SET_REGS")?;
    let result = loop {
        match vcpu.run() {
            Ok(VcpuExit::MmioWrite(PARK, bytes)) => {
                let bytes: [u8; 8] = bytes.try_into().context("a program ends by a store of 8 bytes")?;
                break u64::from_le_bytes(bytes);
            }
            Ok(VcpuExit::MmioWrite(address, bytes)) => mmio.store(address, bytes),
            Ok(VcpuExit::MmioRead(address, bytes)) => mmio.load(address, bytes),
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => bail!("the guest left its program: {exit:?}"),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => {
                let at = vcpu.get_regs().map(|regs| regs.rip).unwrap_or(0);
                bail!("KVM_RUN at {at:#x}: {error}");
            }
        }
    };
    // The store is over when the guest is entered again: not for more than that.
    vcpu.set_kvm_immediate_exit(1);
    let entered = vcpu.run().map(|exit| format!("{exit:?}"));
    vcpu.set_kvm_immediate_exit(0);
    ensure!(entered.as_ref().is_err_and(|error| error.errno() == libc::EINTR), "after the end: {entered:?}");
    Ok(result)
}
