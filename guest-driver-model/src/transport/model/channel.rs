//! The back-end channel: a thread that answers SHMEM_MAP and SHMEM_UNMAP, and
//! notices when the broker hangs up.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags};
use vhost::vhost_user::{Error, FrontendReqHandler, HandlerResult, VhostUserFrontendReqHandler};

use super::Vmm;
use super::window::{Refusal, Request, Shown};
use crate::transport::sys::event::Event;
use crate::transport::sys::fd::borrow_channel;
use crate::transport::sys::reservation::Reservation;
use crate::transport::{ANSWER_TIME, BrokerError};

/// The window as the broker changes it.
pub struct Window {
    reservation: Arc<Reservation>,
    shown: Mutex<Shown>,
    vmm: Vmm,
}

impl Window {
    /// An empty window of `len` bytes.
    pub fn new(len: u64, vmm: Vmm) -> io::Result<Self> {
        let shown = Mutex::new(Shown::new(len));
        Ok(Self { reservation: Arc::new(Reservation::new(len)?), shown, vmm })
    }

    /// The address range.
    pub fn reservation(&self) -> &Arc<Reservation> {
        &self.reservation
    }

    /// From now on the broker may map.
    pub fn start(&self) {
        self.shown().start();
    }

    fn shown(&self) -> std::sync::MutexGuard<'_, Shown> {
        // Its methods leave it whole even if they panicked.
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn map(&self, request: Request, fd: &dyn AsRawFd, writable: bool) -> io::Result<()> {
        let mut shown = self.shown();
        shown.map(request).map_err(refused)?;
        let done = self.reservation.show(request.offset, request.len, fd, request.file_offset, writable);
        done.inspect_err(|error| {
            tracing::warn!(%error, ?request, writable, "cannot map what the broker asked for");
            // It was just noted, and mmap left everything as it was.
            let _ = shown.unmap(request);
        })
    }

    fn unmap(&self, request: Request) -> io::Result<()> {
        let mut shown = self.shown();
        shown.unmap(request).map_err(refused)?;
        // Should this fail, the broker learns that the mapping may still be there.
        self.reservation.hide(request.offset, request.len)
    }
}

/// To the back-end: a reply other than zero. A broker that asks for the impossible is
/// broken, so each is worth a line.
fn refused(refusal: Refusal) -> io::Error {
    tracing::warn!("refused: {refusal}");
    io::Error::from_raw_os_error(match refusal {
        Refusal::Overlap { .. } => libc::EEXIST,
        Refusal::NotMapped(_) => libc::ENOENT,
        _ => libc::EINVAL,
    })
}

fn request(message: &VhostUserMMap) -> Request {
    Request {
        shmid: message.shmid,
        file_offset: message.fd_offset,
        offset: message.shm_offset,
        len: message.len,
    }
}

impl VhostUserFrontendReqHandler for Window {
    fn shmem_map(&self, message: &VhostUserMMap, fd: &dyn AsRawFd) -> HandlerResult<u64> {
        let asked = message.flags & VhostUserMMapFlags::WRITABLE.bits() != 0;
        let writable = asked || self.vmm == Vmm::LikeQemu;
        // In effect when this returns, and thus before the answer is sent: the window's
        // users are threads of this process, and mmap replaces pages for all of them.
        self.map(request(message), fd, writable).map(|()| 0)
    }

    fn shmem_unmap(&self, message: &VhostUserMMap) -> HandlerResult<u64> {
        // The file offset of an unmap means nothing.
        self.unmap(Request { file_offset: 0, ..request(message) }).map(|()| 0)
    }
}

/// The thread and what it shares.
pub struct Channel {
    gone: Arc<AtomicBool>,
    stop: Arc<Event>,
    thread: Option<JoinHandle<()>>,
}

impl Channel {
    /// Serves `handler` until the broker closes `main`, or this value is dropped.
    /// When the broker is gone, all of `wake` are signalled.
    pub fn spawn(
        handler: FrontendReqHandler<Window>,
        main: OwnedFd,
        wake: Vec<Arc<Event>>,
    ) -> Result<Self, BrokerError> {
        let gone = Arc::new(AtomicBool::new(false));
        let stop = Arc::new(Event::new()?);
        let thread = std::thread::Builder::new().name("model-vmm".into()).spawn({
            let (gone, stop) = (gone.clone(), stop.clone());
            move || {
                serve(handler, main.as_fd(), &stop);
                // Release: pairs with the acquire load in `is_gone`; nothing else is
                // published by it.
                gone.store(true, Ordering::Release);
                wake.iter().for_each(|event| event.signal());
            }
        })?;
        Ok(Self { gone, stop, thread: Some(thread) })
    }

    /// Whether the broker is gone.
    pub fn is_gone(&self) -> bool {
        // Acquire: pairs with the release store of the thread.
        self.gone.load(Ordering::Acquire)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.stop.signal();
        if let Some(thread) = self.thread.take() {
            // A panic of it was reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Answers requests until `main` or the channel is closed or broken, or `stop` is
/// signalled.
fn serve(mut handler: FrontendReqHandler<Window>, main: BorrowedFd<'_>, stop: &Event) {
    loop {
        let channel = borrow_channel(&handler);
        let mut fds = [
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
            // POLLHUP comes unasked, and is all we wait for here.
            PollFd::new(main, PollFlags::empty()),
            PollFd::new(channel, PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => {
                tracing::error!(%error, "poll of the back-end channel");
                return;
            }
        }
        let [stopped, ended, asked] = fds.map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
        if stopped || ended {
            return;
        }
        if asked {
            match handler.handle_request() {
                // Refusals have been answered; the channel is fine.
                Ok(_) | Err(Error::ReqHandlerError(_)) => {}
                Err(error) => {
                    tracing::error!(%error, "the broker's back-end channel is broken");
                    return;
                }
            }
        }
    }
}

/// Another descriptor of the broker's socket, to watch for its end. Answers that take
/// longer than [`ANSWER_TIME`] are errors from here on.
pub fn watch(socket: &UnixStream) -> io::Result<OwnedFd> {
    socket.set_read_timeout(Some(ANSWER_TIME))?;
    socket.set_write_timeout(Some(ANSWER_TIME))?;
    Ok(socket.try_clone()?.into())
}
