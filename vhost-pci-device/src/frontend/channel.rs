//! The thread that answers what the broker asks, strictly in order.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};

use super::message::{self, Direction, Request};
use crate::device::Shared;
use crate::sys::event;
use crate::window::Request as Range;
use crate::window::aperture::WindowError;

/// Starts the thread for one connection. It ends when the channel does, and ends the main
/// socket then: a broker whose channel is broken is of no use.
///
/// # Errors
/// When the host gives no thread or descriptor.
pub fn spawn(
    shared: Arc<Shared>,
    channel: &UnixStream,
    main: &UnixStream,
    wiring: bool,
) -> io::Result<JoinHandle<()>> {
    let (channel, main) = (channel.try_clone()?, main.try_clone()?);
    std::thread::Builder::new().name("vhost-pci channel".into()).spawn(move || {
        if let Err(error) = serve(&shared, &channel, wiring)
            && shared.may_tell()
        {
            tracing::warn!(%error, "the broker's back-end channel is broken");
        }
        // An error: it is shut down already.
        let _ = channel.shutdown(Shutdown::Both);
        let _ = main.shutdown(Shutdown::Both);
    })
}

fn serve(shared: &Shared, channel: &UnixStream, wiring: bool) -> io::Result<()> {
    loop {
        // The read below has a time limit, for the rest of a message; not the wait for one.
        match poll(&mut [PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN)], None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let _serving = shared.serving();
        let Some(mut message) = message::receive(channel, wiring)? else {
            return Ok(());
        };
        let request = std::mem::replace(&mut message.request, Request::Impossible(""));
        let result = carry_out(shared, request);
        if let Err(reason) = &result
            && shared.may_tell()
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

fn carry_out(shared: &Shared, request: Request) -> Result<(), Refused> {
    match request {
        Request::Map(range, file) => {
            shared.map(range, file.as_fd()).map_err(|source| Refused::Window { what: "map", range, source })
        }
        Request::Unmap(range) => {
            shared.unmap(range).map_err(|source| Refused::Window { what: "unmap", range, source })
        }
        Request::Wire { queue, direction, event } => {
            // Looked at before the device's lock: a vCPU may want that.
            let event = event.map(event::from_descriptor).transpose();
            event.and_then(|event| shared.wire(queue, direction, event)).map_err(|source| Refused::Wire {
                queue,
                direction,
                source,
            })
        }
        Request::Impossible(reason) => Err(Refused::Impossible(reason)),
    }
}
