//! Turns what the vhost crate decoded into [`Request`]s for the link, and the
//! link's replies into what the crate sends back. One decoder serves both sides:
//! which requests make sense is the link's to say.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam_channel::{Receiver, bounded};
use nix::sys::uio::pread;
use tracing::info;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandler};

use super::inspect;
use crate::link::message::{Marks, RegionRequest, Reply, Request, VringBase};
use crate::link::{Fault, Side};
use crate::runtime::dirty_log;
use crate::runtime::shown::Shown;
use crate::runtime::{Answer, Input, LinkPort, SessionId};

/// The handler of one session.
#[derive(Debug)]
pub struct Decoder {
    port: LinkPort,
    side: Side,
    session: SessionId,
    process: i32,
    shown: Shown,
    said_foreign: AtomicBool,
    acked_protocol: AtomicU64,
    declined: AtomicBool,
    fault: Mutex<Option<Fault>>,
}

impl Decoder {
    /// A decoder that asks the link behind `port`, for this process, which has files from us as `shown` says.
    pub fn new(port: LinkPort, side: Side, session: SessionId, (process, shown): (i32, Shown)) -> Self {
        Self {
            port,
            side,
            session,
            process,
            shown,
            said_foreign: AtomicBool::new(false),
            acked_protocol: AtomicU64::new(0),
            declined: AtomicBool::new(false),
            fault: Mutex::new(None),
        }
    }

    /// Whether the front-end wants answers to what it marks so.
    pub fn reply_ack(&self) -> bool {
        // Pairs with the store in `set_protocol_features`, on the same thread.
        let acked = self.acked_protocol.load(Ordering::Relaxed);
        acked & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    /// The fault by which the session ended, if the link does not know it yet.
    pub fn take_fault(&self) -> Option<Fault> {
        self.fault.lock().ok()?.take()
    }

    /// Whether the last request was declined: the crate has told the front-end, if it
    /// asked, and the session goes on.
    pub fn take_declined(&self) -> bool {
        // Pairs with the store in `ask`, on the same thread.
        self.declined.swap(false, Ordering::Relaxed)
    }

    /// Asks the link and waits for its answer.
    ///
    /// # Errors
    /// When the link refuses or declines, or has ended this session.
    pub fn ask(&self, request: Request) -> Result<Reply> {
        let refused = |reason: &str| Err(Error::ReqHandlerError(std::io::Error::other(reason.to_owned())));
        match self.begin(request, None).recv() {
            Ok(Reply::Refused(reason)) => refused(&reason),
            Ok(Reply::Declined) => {
                // Pairs with the swap in `take_declined`, on the same thread.
                self.declined.store(true, Ordering::Relaxed);
                refused("declined")
            }
            Ok(reply) => Ok(reply),
            // The link dropped the question: the session is over.
            Err(_) => Err(Error::Disconnected),
        }
    }

    /// Asks the link, and gives where the answer comes. The request with number
    /// `acknowledge` is acknowledged to the front-end by whoever has the answer.
    pub fn begin(&self, request: Request, acknowledge: Option<u32>) -> Receiver<Reply> {
        let (sender, answer) = bounded(1);
        let to = Answer { sender, acknowledge };
        self.port.send(Input::Request { side: self.side, session: self.session, request, answer: to });
        answer
    }

    fn done(&self, request: Request) -> Result<()> {
        self.ask(request).map(|_| ())
    }

    fn number(&self, request: Request) -> Result<u64> {
        match self.ask(request)? {
            Reply::Number(number) => Ok(number),
            _ => Err(Error::BackendInternalError),
        }
    }

    /// Remembers a fault that the link has not seen.
    fn faulty<T>(&self, result: std::result::Result<T, Fault>) -> Result<T> {
        result.map_err(|fault| {
            let error = Error::ReqHandlerError(std::io::Error::other(fault.to_string()));
            if let Ok(mut slot) = self.fault.lock() {
                *slot = Some(fault);
            }
            error
        })
    }

    /// Never an answer after which the front-end would miss a page.
    fn mark(&self, marks: &Marks) -> Result<()> {
        self.faulty(dirty_log::mark(marks).map_err(|error| Fault::Host(error.to_string())))
    }

    fn unsupported<T>(&self, what: &'static str) -> Result<T> {
        self.faulty(Err(Fault::Unsupported(what)))
    }

    fn region(&self, region: &VhostUserMemoryRegion, file: File) -> Result<RegionRequest> {
        let (file, file_len) = self.faulty(inspect::memory_file(file))?;
        let mut file = file.sent_by(self.process);
        if self.shown.has(self.process, file.identity()) {
            file = file.foreign();
            // Pairs with nothing: who says it first does not matter.
            if !self.said_foreign.swap(true, Ordering::Relaxed) {
                let (len, guest) = (region.memory_size, region.guest_phys_addr);
                info!(
                    link = self.port.name(),
                    "{len} bytes at {guest:#x} of the owner's VM are a window into another VM's memory: they are left out"
                );
            }
        }
        Ok(RegionRequest {
            guest: region.guest_phys_addr,
            frontend: region.user_addr,
            len: region.memory_size,
            offset: region.mmap_offset,
            file,
            file_len,
        })
    }

    fn eventfd(&self, fd: Option<File>) -> Result<Option<crate::link::descriptor::Eventfd>> {
        fd.map(|file| self.faulty(inspect::eventfd(file))).transpose()
    }
}

/// Reads where a stopped vring goes on. Two bytes through the file: the broker maps none of
/// the owner's memory, and believes what is there only if it can be.
fn vring_base(base: &VringBase) -> u32 {
    let mut bytes = [0; 2];
    let read = base.place.as_ref().and_then(|(file, offset)| {
        let offset = i64::try_from(*offset).ok()?;
        pread(file.as_fd(), &mut bytes, offset).ok()
    });
    let place = read.filter(|len| *len == bytes.len()).map(|_| u16::from_le_bytes(bytes));
    place.and_then(|place| base.format.base_of(place, base.size)).unwrap_or(base.fallback)
}

impl VhostUserBackendReqHandler for Decoder {
    fn set_owner(&self) -> Result<()> {
        self.done(Request::SetOwner)
    }

    fn reset_owner(&self) -> Result<()> {
        self.done(Request::ResetOwner)
    }

    fn reset_device(&self) -> Result<()> {
        self.unsupported("RESET_DEVICE")
    }

    fn get_features(&self) -> Result<u64> {
        self.number(Request::GetFeatures)
    }

    fn set_features(&self, features: u64) -> Result<()> {
        self.done(Request::SetFeatures(features))
    }

    fn set_mem_table(
        &self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions = regions
            .iter()
            .zip(files)
            .map(|(region, file)| self.region(region, file))
            .collect::<Result<Vec<_>>>()?;
        self.done(Request::SetMemTable(regions)).map(|()| None)
    }

    fn set_vring_num(&self, index: u32, num: u32) -> Result<()> {
        self.done(Request::SetVringNum { index, num })
    }

    fn set_vring_addr(
        &self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        desc: u64,
        used: u64,
        avail: u64,
        _log: u64,
    ) -> Result<()> {
        // A vring is marked as all else that is written, when VHOST_F_LOG_ALL is set, at its guest-physical address.
        self.done(Request::SetVringAddr { index, desc, avail, used })
    }

    fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        self.done(Request::SetVringBase { index, base })
    }

    fn get_vring_base(&self, index: u32) -> Result<VhostUserVringState> {
        match self.ask(Request::GetVringBase { index })? {
            Reply::VringBase(base) => {
                if let Some(marks) = &base.marks {
                    self.mark(marks)?;
                }
                Ok(VhostUserVringState::new(base.index, vring_base(&base)))
            }
            _ => Err(Error::BackendInternalError),
        }
    }

    fn set_vring_kick(&self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = self.eventfd(fd)?;
        self.done(Request::SetVringKick { index: index.into(), fd })
    }

    fn set_vring_call(&self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = self.eventfd(fd)?;
        self.done(Request::SetVringCall { index: index.into(), fd })
    }

    fn set_vring_err(&self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = self.eventfd(fd)?;
        self.done(Request::SetVringErr { index: index.into(), fd })
    }

    fn get_protocol_features(&self) -> Result<VhostUserProtocolFeatures> {
        // Retained: some bits are this project's own.
        self.number(Request::GetProtocolFeatures).map(VhostUserProtocolFeatures::from_bits_retain)
    }

    fn set_protocol_features(&self, features: u64) -> Result<()> {
        self.done(Request::SetProtocolFeatures(features))?;
        // Pairs with the load in `reply_ack`, on the same thread.
        self.acked_protocol.store(features, Ordering::Relaxed);
        Ok(())
    }

    fn get_queue_num(&self) -> Result<u64> {
        self.number(Request::GetQueueNum)
    }

    fn set_vring_enable(&self, index: u32, enable: bool) -> Result<()> {
        self.done(Request::SetVringEnable { index, enable })
    }

    fn get_config(&self, offset: u32, len: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        match self.ask(Request::GetConfig { offset, len }) {
            Ok(Reply::Config(bytes)) => Ok(bytes),
            Ok(_) => Err(Error::BackendInternalError),
            Err(error) => {
                // The crate answers it with an empty one, and takes it for no failure of its own.
                self.take_declined();
                Err(error)
            }
        }
    }

    fn set_config(&self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.done(Request::SetConfig)
    }

    fn get_shmem_config(&self) -> Result<VhostUserShMemConfig> {
        match self.ask(Request::GetShmemConfig)? {
            Reply::ShmemLen(len) => Ok(VhostUserShMemConfig::new(1, &[len])),
            _ => Err(Error::BackendInternalError),
        }
    }

    fn get_max_mem_slots(&self) -> Result<u64> {
        self.number(Request::GetMaxMemSlots)
    }

    fn add_mem_region(
        &self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let region = self.region(region, file)?;
        self.done(Request::AddMemReg(region)).map(|()| None)
    }

    fn remove_mem_region(&self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.done(Request::RemMemReg {
            guest: region.guest_phys_addr,
            frontend: region.user_addr,
            len: region.memory_size,
        })
    }

    fn set_gpu_socket(&self, _gpu: GpuBackend) -> Result<()> {
        self.unsupported("GPU_SET_SOCKET")
    }

    fn get_shared_object(&self, _uuid: VhostUserSharedMsg) -> Result<File> {
        self.unsupported("SHARED_OBJECT")
    }

    fn get_inflight_fd(&self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        self.unsupported("INFLIGHT_SHMFD")
    }

    fn set_inflight_fd(&self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        self.unsupported("INFLIGHT_SHMFD")
    }

    fn set_device_state_fd(
        &self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        self.unsupported("DEVICE_STATE")
    }

    fn check_device_state(&self) -> Result<()> {
        self.unsupported("DEVICE_STATE")
    }

    fn set_log_base(&self, log: &VhostUserLog, file: File) -> Result<()> {
        let (file, file_len) = self.faulty(inspect::memory_file_for(file, "a dirty log"))?;
        self.done(Request::SetLogBase { file, file_len, offset: log.mmap_offset, len: log.mmap_size })
    }
}
