//! The thread that answers what the broker asks, strictly in order.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError, Weak};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};

use super::ending::await_close;
use super::message::{self, Direction, Request};
use crate::device::{Shared, lock};
use crate::sys::event;
use crate::window::Request as Range;
use crate::window::aperture::WindowError;

/// The thread of one connection. It ends when the channel does, and ends the main socket then: a
/// broker whose channel is broken is of no use.
pub struct Channel {
    serving: Arc<Serving>,
    thread: JoinHandle<()>,
}

/// What the thread shares with the session.
#[derive(Default)]
struct Serving {
    /// Held while a request is taken, carried out and answered.
    busy: Mutex<()>,
    /// Nothing more is carried out. Held while something is: which takes no longer than the
    /// kernel, whatever was sent.
    over: Mutex<bool>,
}

impl Channel {
    /// Starts it.
    ///
    /// # Errors
    /// When the host gives no thread or descriptor.
    pub fn spawn(
        shared: &Arc<Shared>,
        channel: &UnixStream,
        main: &UnixStream,
        wiring: bool,
    ) -> io::Result<Self> {
        let (channel, main) = (channel.try_clone()?, main.try_clone()?);
        let serving = Arc::new(Serving::default());
        let thread = std::thread::Builder::new().name("vhost-pci channel".into()).spawn({
            // It may be busy with a descriptor when the device is gone.
            let (shared, serving) = (Arc::downgrade(shared), serving.clone());
            move || {
                if let Err(error) = serve(&shared, &serving, &channel, wiring)
                    && may_tell(&shared)
                {
                    tracing::warn!(%error, "the broker's back-end channel is broken");
                }
                // An error: it is shut down already.
                let _ = channel.shutdown(Shutdown::Both);
                let _ = main.shutdown(Shutdown::Both);
            }
        })?;
        Ok(Self { serving, thread })
    }

    /// Held against the thread's next request, unless it has one.
    pub fn try_idle(&self) -> Option<MutexGuard<'_, ()>> {
        match self.serving.busy.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(guard)) => Some(guard.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Nothing is carried out any more when this returns. The channel was shut down, so the thread
    /// ends, unless it is closing what the broker sent.
    pub fn end(self) {
        *lock(&self.serving.over) = true;
        await_close(&self.thread);
    }
}

fn may_tell(shared: &Weak<Shared>) -> bool {
    shared.upgrade().is_some_and(|shared| shared.may_tell())
}

fn serve(shared: &Weak<Shared>, serving: &Serving, channel: &UnixStream, wiring: bool) -> io::Result<()> {
    loop {
        // The read below has a time limit, for the rest of a message; not the wait for one.
        match poll(&mut [PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN)], None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let _busy = lock(&serving.busy);
        let Some(mut message) = message::receive(channel, wiring)? else {
            return Ok(());
        };
        let request = std::mem::replace(&mut message.request, Request::Impossible(""));
        let result = carry_out(request, |act| {
            let over = lock(&serving.over);
            match shared.upgrade() {
                Some(shared) if !*over => act(&shared),
                _ => Err(Refused::Impossible("the connection has ended")),
            }
        });
        if let Err(reason) = &result
            && may_tell(shared)
        {
            tracing::warn!(%reason, "refused what the broker asked for");
        }
        message.answer(channel, result.is_ok())?;
    }
}

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("{what} {range:x?}: {source}")]
    Window { what: &'static str, range: Range, source: WindowError },
    #[error("wire queue {queue}, {direction:?}: {source}")]
    Wire { queue: u32, direction: Direction, source: io::Error },
    #[error("{0}")]
    Impossible(&'static str),
}

type Act<'a> = &'a mut dyn FnMut(&Shared) -> Result<(), Refused>;

/// Carries out a request, with `on` what it is carried out on; then closes what came with it.
fn carry_out(request: Request, on: impl FnOnce(Act<'_>) -> Result<(), Refused>) -> Result<(), Refused> {
    match request {
        Request::Map(range, file) => on(&mut |shared| {
            shared.map(range, file.as_fd()).map_err(|source| Refused::Window { what: "map", range, source })
        }),
        Request::Unmap(range) => on(&mut |shared| {
            shared.unmap(range).map_err(|source| Refused::Window { what: "unmap", range, source })
        }),
        Request::Wire { queue, direction, event } => {
            let refused = |source| Refused::Wire { queue, direction, source };
            // Looked at before the device's lock: a vCPU may want that.
            let mut event = event.map(event::from_descriptor).transpose().map_err(refused)?;
            on(&mut |shared| shared.wire(queue, direction, event.take()).map_err(refused))
        }
        Request::Impossible(reason) => Err(Refused::Impossible(reason)),
    }
}
