//! Who uses the window: a driver, in the VMM's process, that attaches to the link and asks for
//! ranges; and the guest, which loads and stores all over the window at CPL 3, natively.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use guest_driver_model::control::{Command, ControlExchange, ControlRing, Exchange, Job, Outcome, Request};
use guest_driver_model::link::LinkPage;
use guest_driver_model::shm::SharedMemory;
use guest_driver_model::translate::{Access, Translation};
use guest_driver_model::transport::{Transport, TransportError, parse_config};
use kvm_bindings::kvm_regs;
use vhost_pci_device::Device;
use vhost_pci_device::abi::{CONFIG_LEN, DeviceConfig, PAGE_SIZE};

use crate::driver::Function;
use crate::layout::{LEAKS, PASSES, RESULTS, TARGET, WINDOW};
use crate::sys::{blobs, window};
use crate::vcpu::{Processor, Program};
use crate::vm::Vm;
use crate::vmm::KvmVmm;

/// The top 16 bits of words that the guest must never load.
pub const SECRET: u64 = 0x5ec7;
/// How long the guest may take for a pass, and the broker for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The two.
pub struct User {
    driver: Driver,
    page: LinkPage,
    ring: ControlRing,
    memory: SharedMemory,
    /// Window offsets that the guest uses: first and end of what can be written, first and end of
    /// what can only be read.
    ranges: [u64; 4],
}

/// The device, as a driver of the guest driver model sees it.
struct Driver {
    config: DeviceConfig,
    window: SharedMemory,
    /// Notifies virtqueue 0.
    doorbell: Box<dyn Fn() + Send + Sync>,
}

impl Transport for Driver {
    fn name(&self) -> &str {
        "the embedded device"
    }

    fn config(&self) -> &DeviceConfig {
        &self.config
    }

    fn window(&self) -> &SharedMemory {
        &self.window
    }

    fn doorbell(&self, queue: u16) {
        if queue == 0 {
            (self.doorbell)();
        }
    }

    fn interrupt_fd(&self, _: u16) -> Option<BorrowedFd<'_>> {
        None
    }

    fn check(&self) -> Result<(), TransportError> {
        Ok(())
    }
}

impl User {
    /// Attaches to the link, which must be up, and lets the guest begin.
    ///
    /// # Errors
    /// If the link does not come up.
    pub fn start(
        vm: &Vm,
        processor: &Processor,
        vmm: &KvmVmm,
        device: &Arc<Device>,
        function: &Function,
    ) -> anyhow::Result<Self> {
        let mut config = [0; CONFIG_LEN];
        for (at, bytes) in (function.config()..).step_by(4).zip(config.chunks_exact_mut(4)) {
            bytes.copy_from_slice(&function.load32(at).to_le_bytes());
        }
        let config = parse_config(&config);
        let keep: Arc<Device> = Arc::clone(device);
        let driver = Driver {
            config,
            window: window::memory(vmm.window(), keep)?,
            doorbell: Box::new(function.notifier(0)),
        };
        let page = LinkPage::new(&driver.window, &config)?;
        let start = Instant::now();
        let link = loop {
            match page.snapshot() {
                Ok(link) if link.up && link.vrings.iter().all(|vring| vring.enabled) => break link,
                _ => ensure!(start.elapsed() < PATIENCE, "the link does not come up"),
            }
            thread::sleep(Duration::from_millis(1));
        };
        let mut ring = ControlRing::new(&driver)?;
        ring.call(
            &driver,
            Command::Attach {
                generation: link.generation,
                interrupt: false,
                doorbell: None,
                quiesce: false,
                says_served: false,
            },
            PATIENCE,
        )?;
        let half = function.window_len() / 2;
        let ranges = [config.data_offset.value(), half, half, 2 * half];
        let memory = vm.memory().shared().clone();
        for word in [PASSES, LEAKS, TARGET] {
            memory.store_u64(word, 0)?;
        }
        let [first, end, read_first, read_end] = ranges.map(|offset| WINDOW + offset);
        let arguments = kvm_regs {
            rdi: first,
            rsi: end,
            r14: read_first,
            r15: read_end,
            r8: RESULTS,
            r11: PASSES,
            rbx: SECRET,
            ..kvm_regs::default()
        };
        processor.run(Program { code: blobs::hammer(), arguments })?;
        Ok(Self { driver, page, ring, memory, ranges })
    }

    /// Does what it is told:
    ///
    /// - `map IOVA r|rw` gives the window offset of the page, at which the guest stores from then
    ///   on in each pass, whatever the access;
    /// - `seen OFFSET` gives what the guest loaded last at the start of the page there, after two
    ///   more passes;
    /// - `leaks` gives how many secrets the guest has loaded.
    ///
    /// # Errors
    /// If the broker does not map it, or the guest has stopped.
    pub fn obey(&mut self, line: &str) -> anyhow::Result<String> {
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            ["map", iova, access] => {
                let access = if access == "r" { Access::READ } else { Access::READ_WRITE };
                let offset = self.map(iova.parse()?, access)?;
                self.memory.store_u64(TARGET, WINDOW + offset)?;
                Ok(offset.to_string())
            }
            ["seen", offset] => Ok(self.seen(offset.parse()?)?.to_string()),
            ["leaks"] => Ok(self.memory.load_u64(LEAKS)?.to_string()),
            _ => bail!("{line:?} is nothing to do"),
        }
    }

    fn seen(&self, offset: u64) -> anyhow::Result<u64> {
        let [first, end, read_first, read_end] = self.ranges;
        let page = match offset {
            _ if (first..end).contains(&offset) => offset - first,
            _ if (read_first..read_end).contains(&offset) => offset - read_first + (end - first),
            _ => bail!("the guest does not use the window at {offset:#x}"),
        } / PAGE_SIZE;
        let (before, start) = (self.memory.load_u64(PASSES)?, Instant::now());
        while self.memory.load_u64_acquire(PASSES)? < before + 2 {
            ensure!(start.elapsed() < PATIENCE, "the guest does not get on");
            thread::sleep(Duration::from_micros(50));
        }
        Ok(self.memory.load_u64(RESULTS + page * 8)?)
    }

    fn map(&mut self, iova: u64, access: Access) -> anyhow::Result<u64> {
        let mut exchange = ControlExchange::new(&mut self.ring, &self.driver, false);
        let request = Request::Map { iova, len: PAGE_SIZE, access };
        exchange.clear();
        let data = exchange.reserve(0).context("no room in the control area")?;
        let mut jobs = [Job::new(request, data)];
        exchange.carry_out(&mut jobs);
        ensure!(jobs[0].outcome == Outcome::Done, "it answers {:?}", jobs[0].outcome);
        let mut translation = Translation::new(&self.page.table()?.mappings);
        match translation.translate(iova, PAGE_SIZE as u32, access) {
            Ok(offset) => Ok(offset),
            Err(fault) => bail!("what was mapped is not in the table: {fault:?}"),
        }
    }
}
