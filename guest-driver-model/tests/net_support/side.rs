//! An owner with its link, and the peer's device for it, in memory: for programs that drive such devices
//! while the test plays the owners.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use guest_driver_model::net::{OwnerConfig, OwnerLayout, OwnerPort};
use guest_driver_model::programs::stop::Stop;
use guest_driver_model::shm::SharedMemory;
use guest_driver_model::transport::{Transport, TransportError};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost_pci_device::abi::DeviceConfig;

use super::{IOVA, LinkWriter, TwoViews, device_config};

/// A device that answers nothing.
pub struct SilentDevice {
    config: DeviceConfig,
    window: SharedMemory,
    pub interrupt: EventFd,
    /// Times that the program saw to its doorbell: before each sleep, and every few rounds.
    pub looks: AtomicU64,
    /// It was unplugged.
    pub gone: AtomicBool,
}

impl Transport for SilentDevice {
    fn name(&self) -> &str {
        "memory"
    }
    fn config(&self) -> &DeviceConfig {
        &self.config
    }
    fn window(&self) -> &SharedMemory {
        &self.window
    }
    fn doorbell(&self, _: u16) {}
    fn interrupt_fd(&self, _: u16) -> Option<BorrowedFd<'_>> {
        Some(self.interrupt.as_fd())
    }
    fn follow_doorbell(&self) {
        self.looks.fetch_add(1, Ordering::Relaxed);
    }
    fn check(&self) -> Result<(), TransportError> {
        match self.gone.load(Ordering::Relaxed) {
            true => Err(TransportError::Gone { device: self.name().to_owned(), why: "unplugged" }),
            false => Ok(()),
        }
    }
    fn is_over(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
}

/// An owner with its link and the peer's device for it.
pub struct Side {
    pub views: TwoViews,
    pub layout: OwnerLayout,
    pub link: LinkWriter,
    pub device: SilentDevice,
}

impl Side {
    pub fn new(config: OwnerConfig) -> Self {
        let len = OwnerLayout::new(config, 0, u64::MAX >> 8).unwrap().end();
        let views = TwoViews::new(len);
        let layout = OwnerLayout::new(config, 0, len).unwrap();
        let link = LinkWriter::new(config.features(), vec![views.mapping()], layout.infos(IOVA));
        let interrupt = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
        let (config, window) = (device_config(&views.window), views.window.clone());
        let device = SilentDevice {
            config,
            window,
            interrupt,
            looks: AtomicU64::new(0),
            gone: AtomicBool::new(false),
        };
        Self { views, layout, link, device }
    }

    /// The owner's device is started, anew if it was before.
    pub fn start(&self, generation: u64) -> OwnerPort {
        let owner = OwnerPort::new(&self.views.owner, &self.layout, IOVA).unwrap();
        self.show(generation, self.link.status);
        owner
    }

    /// The same with other queues, for which the memory has room, of which the driver uses so many.
    pub fn start_as(&self, config: OwnerConfig, generation: u64, enabled: usize) -> OwnerPort {
        let layout = OwnerLayout::new(config, 0, self.views.owner.len()).unwrap();
        let owner = OwnerPort::new(&self.views.owner, &layout, IOVA).unwrap();
        let mut vrings = layout.infos(IOVA);
        vrings.iter_mut().skip(enabled).for_each(|vring| vring.enabled = false);
        self.write(LinkWriter { vrings, ..self.link.clone() }, generation);
        owner
    }

    pub fn show(&self, generation: u64, status: u32) {
        self.write(LinkWriter { status, ..self.link.clone() }, generation);
    }

    fn write(&self, link: LinkWriter, generation: u64) {
        LinkWriter { generation, table_generation: generation, ..link }.write(&self.views.window);
        self.device.interrupt.write(1).unwrap();
    }

    pub fn kick(&self, owner: &mut OwnerPort, vring: u16) {
        if owner.needs_kick(vring) {
            self.device.interrupt.write(1).unwrap();
        }
    }
}

/// Runs a program on the sides' devices while `test` plays their owners; then it is told to stop.
pub fn beside<T: Send>(sides: &[&Side], program: impl FnOnce(&Stop) -> T + Send, test: impl FnOnce()) -> T {
    // Also when the test fails: the scope waits for the program.
    struct AtEnd<'a>(&'a Stop, &'a [&'a Side]);
    impl Drop for AtEnd<'_> {
        fn drop(&mut self) {
            self.0.request();
            self.1.iter().for_each(|side| assert!(side.device.interrupt.write(1).is_ok()));
        }
    }
    let stop = Stop::default();
    thread::scope(|scope| {
        let program = scope.spawn(|| program(&stop));
        let at_end = AtEnd(&stop, sides);
        test();
        drop(at_end);
        program.join().unwrap()
    })
}
