//! An owner with its link, and the peer's device for it, in memory: for programs that drive such devices
//! while the test plays the owners.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use guest_driver_model::link::{Access, Mapping};
use guest_driver_model::net::{OwnerConfig, OwnerLayout, OwnerPort};
use guest_driver_model::programs::stop::Stop;
use guest_driver_model::ring::split::layout::used_len;
use guest_driver_model::shm::SharedMemory;
use guest_driver_model::transport::{Transport, TransportError};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost_pci_device::abi::{self, DeviceConfig};
use virtio_bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;

use super::{IOVA, LinkWriter, TwoViews, device_config};

/// What happens when the driver notifies the control ring, on its thread.
pub type Hook = Box<dyn FnMut() + Send>;

/// A device that answers nothing by itself.
pub struct SilentDevice {
    config: DeviceConfig,
    window: SharedMemory,
    pub interrupt: EventFd,
    /// Times that the program saw to its doorbell: before each sleep, and every few rounds.
    pub looks: AtomicU64,
    /// It was unplugged.
    pub gone: AtomicBool,
    /// The kernel wants it back, and says so once.
    pub wanted: AtomicBool,
    /// How often it is open now.
    pub opened: AtomicU64,
    control: Mutex<ControlEnd>,
    pub on_control: Mutex<Option<Hook>>,
}

/// How far the device is with the control ring.
#[derive(Default)]
struct ControlEnd {
    served: u16,
    used: u16,
    /// Head, command and response of each chain that was taken and is not answered.
    open: Vec<(u16, u16, u64)>,
}

impl ControlEnd {
    fn take(&mut self, window: &SharedMemory) {
        let area = abi::CONTROL_OFFSET;
        while self.served != window.load_u16_acquire(area + abi::CONTROL_AVAIL + 2).unwrap() {
            let slot = u64::from(self.served % abi::CONTROL_RING_SIZE);
            let head = window.load_u16(area + abi::CONTROL_AVAIL + 4 + 2 * slot).unwrap();
            let descriptor = |index: u16| area + abi::CONTROL_DESC + 16 * u64::from(index);
            let request = window.load_u64(descriptor(head)).unwrap();
            let second = window.load_u16(descriptor(head) + 14).unwrap();
            let response = window.load_u64(descriptor(second)).unwrap();
            self.open.push((head, window.load_u16(request).unwrap(), response));
            self.served = self.served.wrapping_add(1);
        }
    }
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
    fn doorbell(&self, queue: u16) {
        if queue == abi::QUEUE_CONTROL
            && let Some(hook) = &mut *self.on_control.lock().unwrap()
        {
            hook();
        }
    }
    fn interrupt_fd(&self, _: u16) -> Option<BorrowedFd<'_>> {
        Some(self.interrupt.as_fd())
    }
    fn follow_doorbell(&self) {
        self.looks.fetch_add(1, Ordering::Relaxed);
    }
    fn check(&self) -> Result<(), TransportError> {
        match self.gone.load(Ordering::Relaxed) || self.wanted.swap(false, Ordering::Relaxed) {
            true => Err(TransportError::Gone { device: self.name().to_owned(), why: "unplugged" }),
            false => Ok(()),
        }
    }
    fn is_over(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
}

impl SilentDevice {
    /// Requests about the owner's memory that are not answered.
    pub fn asked(&self) -> usize {
        let mut control = self.control.lock().unwrap();
        control.take(&self.window);
        control.open.iter().filter(|(_, command, _)| is_job(*command)).count()
    }

    /// Answers all of them with this status, and other commands with OK.
    pub fn answer(&self, status: u32) {
        let mut control = self.control.lock().unwrap();
        control.take(&self.window);
        for (head, command, response) in std::mem::take(&mut control.open) {
            let status = if is_job(command) { status } else { abi::CTRL_OK };
            self.window.store_u32(response, status).unwrap();
            let used = abi::CONTROL_OFFSET + abi::CONTROL_USED;
            let slot = u64::from(control.used % abi::CONTROL_RING_SIZE);
            self.window.store_u32(used + 4 + 8 * slot, head.into()).unwrap();
            self.window.store_u32(used + 8 + 8 * slot, 8).unwrap();
            control.used = control.used.wrapping_add(1);
            self.window.store_u16_release(used + 2, control.used).unwrap();
        }
        self.interrupt.write(1).unwrap();
    }
}

fn is_job(command: u16) -> bool {
    [abi::CTRL_MAP, abi::CTRL_FETCH, abi::CTRL_STORE].contains(&command)
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
            wanted: AtomicBool::new(false),
            opened: AtomicU64::new(0),
            control: Mutex::default(),
            on_control: Mutex::default(),
        };
        Self { views, layout, link, device }
    }

    /// The owner has an IOMMU, and of its memory only the rings are shown.
    pub fn behind_iommu(config: OwnerConfig) -> Self {
        let mut side = Self::behind_open_iommu(config);
        let rings = side.layout.vrings().iter().map(|vring| vring.places);
        let pages: BTreeSet<_> = rings
            .flat_map(|at| {
                let end = at.used + u64::from(used_len(at.size));
                at.desc / abi::PAGE_SIZE..end.div_ceil(abi::PAGE_SIZE)
            })
            .collect();
        let page = |page: u64| Mapping {
            iova: IOVA + page * abi::PAGE_SIZE,
            len: abi::PAGE_SIZE,
            window_offset: abi::DATA_OFFSET + page * abi::PAGE_SIZE,
            access: Access::READ_WRITE,
        };
        side.link.mappings = pages.into_iter().map(page).collect();
        side
    }

    /// The same, with all shown for now.
    pub fn behind_open_iommu(config: OwnerConfig) -> Self {
        let mut side = Self::new(config);
        side.link.features |= 1 << VIRTIO_F_ACCESS_PLATFORM;
        side.link.status |= abi::LINK_S_IOMMU;
        side
    }

    /// All of the memory of an owner behind an IOMMU is shown from now on.
    pub fn show_all(&self, generation: u64) {
        let mappings = vec![self.views.mapping()];
        let link = LinkWriter { mappings, generation, table_generation: generation + 2, ..self.link.clone() };
        link.write(&self.views.window);
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

/// A device from its start on until the program lets it go, with a mapping of its window of its own.
pub struct Opened<'a> {
    device: &'a SilentDevice,
    window: SharedMemory,
}

impl<'a> Opened<'a> {
    pub fn of(side: &'a Side) -> Self {
        side.device.opened.fetch_add(1, Ordering::Relaxed);
        Self { device: &side.device, window: side.views.another_window() }
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.device.opened.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Transport for Opened<'_> {
    fn name(&self) -> &str {
        self.device.name()
    }
    fn config(&self) -> &DeviceConfig {
        self.device.config()
    }
    fn window(&self) -> &SharedMemory {
        &self.window
    }
    fn doorbell(&self, queue: u16) {
        self.device.doorbell(queue);
    }
    fn interrupt_fd(&self, queue: u16) -> Option<BorrowedFd<'_>> {
        self.device.interrupt_fd(queue)
    }
    fn follow_doorbell(&self) {
        self.device.follow_doorbell();
    }
    fn check(&self) -> Result<(), TransportError> {
        self.device.check()
    }
    fn is_over(&self) -> bool {
        self.device.is_over()
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
