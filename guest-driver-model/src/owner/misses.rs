//! The back-end channel of an owner with an IOMMU: a thread that answers the broker's
//! misses.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::OwnerIommu;
use super::iotlb::{VHOST_IOTLB_ACCESS_FAIL, VHOST_IOTLB_MISS, answer, receive};
use crate::transport::ANSWER_TIME;
use crate::transport::sys::event::Event;

/// The thread, until it is dropped.
#[derive(Debug)]
pub struct MissThread {
    stop: Arc<Event>,
    thread: Option<JoinHandle<()>>,
}

impl MissThread {
    /// Answers what comes on `channel` from `iommu`, until its other end is closed.
    ///
    /// # Errors
    /// What the system answers.
    pub fn spawn(channel: UnixStream, iommu: OwnerIommu) -> io::Result<Self> {
        // Of a message that has begun, the rest comes soon.
        channel.set_read_timeout(Some(ANSWER_TIME))?;
        channel.set_write_timeout(Some(ANSWER_TIME))?;
        let stop = Arc::new(Event::new()?);
        let thread = std::thread::Builder::new().name("owner-misses".into()).spawn({
            let stop = stop.clone();
            move || {
                if let Err(error) = serve(&channel, &iommu, &stop) {
                    tracing::debug!(%error, "the owner's back-end channel has ended");
                }
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for MissThread {
    fn drop(&mut self) {
        self.stop.signal();
        if let Some(thread) = self.thread.take() {
            // A panic of it was reported by the panic hook.
            let _ = thread.join();
        }
    }
}

fn serve(channel: &UnixStream, iommu: &OwnerIommu, stop: &Event) -> io::Result<()> {
    loop {
        let mut fds =
            [PollFd::new(stop.as_fd(), PollFlags::POLLIN), PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [stopped, asked] = fds.map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
        if stopped {
            return Ok(());
        }
        if asked {
            let message = receive(channel)?;
            let value = match message.iotlb {
                Some(miss) if miss.kind == VHOST_IOTLB_MISS => iommu.answer_miss(miss.iova, miss.perm),
                Some(report) if report.kind == VHOST_IOTLB_ACCESS_FAIL => {
                    iommu.note_denied(report.iova, report.perm);
                    0
                }
                _ => {
                    tracing::warn!(request = message.header.request, "the broker asks for the unknown");
                    1
                }
            };
            answer(channel, &message.header, value)?;
        }
    }
}
