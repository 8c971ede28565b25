//! The model VMM against the crate's own back-end half over a socket pair.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMMap, VhostUserMMapFlags, VhostUserMemoryRegion, VhostUserProtocolFeatures,
    VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Backend, BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
    VhostUserFrontendReqHandler,
};

use super::*;
use crate::shm::SharedMemory;
use crate::transport::tests::config_bytes;

const WINDOW: u64 = 4 << 20;
const PAGE: u64 = 4096;

/// A back-end that keeps what it is given.
#[derive(Default)]
struct Broker {
    protocol: VhostUserProtocolFeaturesOffered,
    channel: Option<mpsc::Sender<Backend>>,
    kicks: Vec<File>,
    calls: Vec<File>,
    enabled: usize,
    /// SET_PROTOCOL_FEATURES.
    accepted: u64,
}

struct VhostUserProtocolFeaturesOffered(VhostUserProtocolFeatures);

impl Default for VhostUserProtocolFeaturesOffered {
    fn default() -> Self {
        Self(VhostUserProtocolFeatures::all())
    }
}

fn unsupported<T>() -> Result<T> {
    Err(Error::InvalidOperation("not in this test"))
}

impl VhostUserBackendReqHandlerMut for Broker {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }
    fn reset_owner(&mut self) -> Result<()> {
        unsupported()
    }
    fn reset_device(&mut self) -> Result<()> {
        unsupported()
    }
    fn get_features(&mut self) -> Result<u64> {
        Ok(1 << 32 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }
    fn set_features(&mut self, features: u64) -> Result<()> {
        assert_eq!(features, 1 << 32 | 1 << 30);
        Ok(())
    }
    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        _: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        assert_eq!(regions.len(), 1);
        Ok(None)
    }
    fn set_vring_num(&mut self, _: u32, num: u32) -> Result<()> {
        assert!(num.is_power_of_two());
        Ok(())
    }
    fn set_vring_addr(
        &mut self,
        _: u32,
        _: VhostUserVringAddrFlags,
        _: u64,
        _: u64,
        _: u64,
        _: u64,
    ) -> Result<()> {
        Ok(())
    }
    fn set_vring_base(&mut self, _: u32, _: u32) -> Result<()> {
        Ok(())
    }
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        Ok(VhostUserVringState::new(index, 0))
    }
    fn set_vring_kick(&mut self, _: u8, fd: Option<File>) -> Result<()> {
        self.kicks.extend(fd);
        Ok(())
    }
    fn set_vring_call(&mut self, _: u8, fd: Option<File>) -> Result<()> {
        self.calls.extend(fd);
        Ok(())
    }
    fn set_vring_err(&mut self, _: u8, _: Option<File>) -> Result<()> {
        Ok(())
    }
    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(self.protocol.0)
    }
    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.accepted = features;
        Ok(())
    }
    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(3)
    }
    fn set_vring_enable(&mut self, _: u32, enable: bool) -> Result<()> {
        assert!(enable);
        self.enabled += 1;
        Ok(())
    }
    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(config_bytes(WINDOW, 2).to_vec())
    }
    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        unsupported()
    }
    fn set_backend_req_fd(&mut self, backend: Backend) {
        backend.set_reply_ack_flag(true);
        backend.set_shmem_flag(true);
        if let Some(channel) = &self.channel {
            channel.send(backend).unwrap();
        }
    }
    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        unsupported()
    }
    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }
    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unsupported()
    }
    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        unsupported()
    }
    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(8)
    }
    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<u64>> {
        unsupported()
    }
    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        unsupported()
    }
    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        unsupported()
    }
    fn check_device_state(&mut self) -> Result<()> {
        unsupported()
    }
    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(1, &[WINDOW]))
    }
    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        unsupported()
    }
}

/// A started model VMM and the broker's end of its back-end channel.
struct Link {
    transport: ModelTransport,
    channel: Backend,
    broker: Arc<Mutex<Broker>>,
    main: UnixStream,
}

fn connect() -> Link {
    connect_as(Vmm::Strict, VhostUserProtocolFeatures::all())
}

fn connect_as(vmm: Vmm, offered: VhostUserProtocolFeatures) -> Link {
    let (here, there) = UnixStream::pair().unwrap();
    let main = there.try_clone().unwrap();
    let (send, receive) = mpsc::channel();
    let protocol = VhostUserProtocolFeaturesOffered(offered);
    let broker = Arc::new(Mutex::new(Broker { protocol, channel: Some(send), ..Broker::default() }));
    let mut handler = BackendReqHandler::from_stream(there, broker.clone());
    std::thread::spawn(move || while handler.handle_request().is_ok() {});
    let transport = ModelTransport::start("test".into(), here, vmm).unwrap();
    Link { transport, channel: receive.recv().unwrap(), broker, main }
}

fn file(len: u64) -> (OwnedFd, SharedMemory) {
    let file = memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap();
    ftruncate(&file, len as i64).unwrap();
    let memory = SharedMemory::map(file.as_fd(), 0, len as usize).unwrap();
    (file, memory)
}

fn message(offset: u64, len: u64, file_offset: u64, flags: VhostUserMMapFlags) -> VhostUserMMap {
    VhostUserMMap {
        shm_offset: offset,
        len,
        fd_offset: file_offset,
        flags: flags.bits(),
        ..VhostUserMMap::default()
    }
}

const WRITABLE: VhostUserMMapFlags = VhostUserMMapFlags::WRITABLE;

#[test]
fn mappings_come_and_go_in_the_window() {
    let link = connect();
    let window = link.transport.window();
    assert_eq!(window.len(), WINDOW);
    assert_eq!(window.load_u64(2 * PAGE).unwrap(), 0, "nothing is mapped yet");
    let (fd, memory) = file(4 * PAGE);
    memory.store_u64(PAGE, 7).unwrap();

    link.channel.shmem_map(&message(2 * PAGE, 2 * PAGE, PAGE, WRITABLE), &fd).unwrap();
    assert_eq!(window.load_u64(2 * PAGE).unwrap(), 7);
    window.store_u64(3 * PAGE, 8).unwrap();
    assert_eq!(memory.load_u64(2 * PAGE).unwrap(), 8);

    link.channel.shmem_unmap(&message(2 * PAGE, 2 * PAGE, 0, WRITABLE)).unwrap();
    assert_eq!(window.load_u64(2 * PAGE).unwrap(), 0);
    window.store_u64(2 * PAGE, 9).unwrap();
    assert_eq!(memory.load_u64(PAGE).unwrap(), 7, "the store went nowhere");
}

#[test]
fn what_is_impossible_is_refused_and_changes_nothing() {
    let link = connect();
    let window = link.transport.window();
    let (fd, memory) = file(4 * PAGE);
    memory.store_u64(0, 7).unwrap();
    link.channel.shmem_map(&message(PAGE, 2 * PAGE, 0, WRITABLE), &fd).unwrap();
    let refused = [
        message(2 * PAGE, PAGE, 0, WRITABLE),
        message(WINDOW, PAGE, 0, WRITABLE),
        message(WINDOW - PAGE, 2 * PAGE, 0, WRITABLE),
        message(PAGE / 2, PAGE, 0, WRITABLE),
        message(8 * PAGE, PAGE, 1, WRITABLE),
    ];
    for request in &refused {
        assert!(link.channel.shmem_map(request, &fd).is_err(), "{request:?}");
    }
    assert!(link.channel.shmem_unmap(&message(PAGE, PAGE, 0, WRITABLE)).is_err());
    assert!(link.channel.shmem_unmap(&message(8 * PAGE, PAGE, 0, WRITABLE)).is_err());
    // A file that may only be read cannot be mapped for writing, and the place stays free.
    let read_only = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd))).unwrap();
    assert!(link.channel.shmem_map(&message(8 * PAGE, PAGE, 0, WRITABLE), &read_only).is_err());
    link.channel.shmem_map(&message(8 * PAGE, PAGE, 0, VhostUserMMapFlags::default()), &read_only).unwrap();
    assert_eq!(window.load_u64(PAGE).unwrap(), 7);
    assert_eq!(window.load_u64(8 * PAGE).unwrap(), 7);
    assert!(link.transport.check().is_ok(), "refusals do not end the link");
}

/// What the kernel says of the window's first page, rather than dying of a store to it.
fn first_page(link: &Link) -> String {
    let window = format!("{:?}", link.transport.window());
    let base = window.split_once("0x").unwrap().1.split_once(',').unwrap().0.to_owned();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().find(|line| line.starts_with(&format!("{base}-"))).unwrap().to_owned()
}

#[test]
fn a_read_only_mapping_is_read_only_unless_the_vmm_is_like_qemu() {
    let read_only = message(0, PAGE, 0, VhostUserMMapFlags::default());
    for (vmm, protection) in [(Vmm::Strict, "r--s"), (Vmm::LikeQemu, "rw-s")] {
        let link = connect_as(vmm, VhostUserProtocolFeatures::all());
        let (fd, _memory) = file(PAGE);
        link.channel.shmem_map(&read_only, &fd).unwrap();
        let line = first_page(&link);
        assert!(line.contains(protection), "{vmm:?}: {line}");
        // It is gone before the answer, and what is there instead can be touched.
        link.channel.shmem_unmap(&message(0, PAGE, 0, VhostUserMMapFlags::default())).unwrap();
        assert!(first_page(&link).contains("rw-p"));
        link.transport.window().store_u64(0, 1).unwrap();
    }
}

#[test]
fn strictness_is_accepted_if_it_is_offered_and_true() {
    let strict = VhostUserProtocolFeatures::from_bits_retain(1 << 61);
    let all = VhostUserProtocolFeatures::all();
    for (vmm, offered, accepted) in [
        (Vmm::Strict, all | strict, true),
        (Vmm::Strict, all - strict, false),
        (Vmm::LikeQemu, all | strict, false),
    ] {
        let link = connect_as(vmm, offered);
        let bits = link.broker.lock().unwrap().accepted;
        assert_eq!(bits & strict.bits() != 0, accepted, "{vmm:?} {offered:?}");
        assert_eq!(bits & 1 << 62, 0, "nothing else that is not known");
    }
}

#[test]
fn doorbells_and_interrupts_are_eventfds() {
    let link = connect();
    link.transport.doorbell(2);
    link.transport.doorbell(9);
    let broker = link.broker.lock().unwrap();
    assert_eq!((broker.kicks.len(), broker.calls.len(), broker.enabled), (3, 3, 3));
    let mut count = [0; 8];
    std::io::Read::read_exact(&mut &broker.kicks[2], &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
    std::io::Write::write_all(&mut &broker.calls[1], &1_u64.to_ne_bytes()).unwrap();
    let fd = link.transport.interrupt_fd(1).unwrap();
    assert_eq!(nix::unistd::read(fd, &mut count).unwrap(), 8);
    assert_eq!(
        nix::unistd::read(link.transport.interrupt_fd(0).unwrap(), &mut count),
        Err(nix::Error::EAGAIN)
    );
}

#[test]
fn a_broker_that_hangs_up_is_noticed_and_wakes_who_sleeps() {
    let link = connect();
    assert!(link.transport.check().is_ok());
    link.main.shutdown(std::net::Shutdown::Both).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while link.transport.check().is_ok() {
        assert!(Instant::now() < deadline, "the hang-up was not noticed");
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut count = [0; 8];
    while nix::unistd::read(link.transport.interrupt_fd(0).unwrap(), &mut count).is_err() {
        assert!(Instant::now() < deadline, "nobody was woken");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_back_end_without_shared_memory_is_no_broker() {
    let (here, there) = UnixStream::pair().unwrap();
    let offered = VhostUserProtocolFeatures::all() - VhostUserProtocolFeatures::SHMEM;
    let broker = Broker { protocol: VhostUserProtocolFeaturesOffered(offered), ..Broker::default() };
    let mut handler = BackendReqHandler::from_stream(there, Arc::new(Mutex::new(broker)));
    std::thread::spawn(move || while handler.handle_request().is_ok() {});
    let error = ModelTransport::start("test".into(), here, Vmm::Strict).err().unwrap();
    assert!(error.to_string().contains("SHMEM"), "{error}");
}
