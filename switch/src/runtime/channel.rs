//! The back-end channel to a peer's VMM: one thread asks for changes of its window,
//! one after the other, and waits for each answer. Only this thread waits: QEMU
//! answers SHMEM_MAP before it tells its new memory table on the other socket.

use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::{io, thread};

use crossbeam_channel::{Receiver, Sender, unbounded};
use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags};
use vhost::vhost_user::{Backend, VhostUserFrontendReqHandler};
use vhost_pci_device::abi;

use super::{Input, LinkPort, SessionId};
use crate::link::descriptor::MemoryFile;
use crate::link::message::OpId;

/// A file that can be mapped into the window.
#[derive(Clone, Debug)]
pub enum Source {
    /// The owner's.
    Owner(MemoryFile),
    /// The broker's own.
    Own(Arc<OwnedFd>),
}

impl AsRawFd for Source {
    fn as_raw_fd(&self) -> i32 {
        use std::os::fd::AsFd;
        match self {
            Self::Owner(file) => file.as_fd().as_raw_fd(),
            Self::Own(fd) => fd.as_raw_fd(),
        }
    }
}

/// A change of the window with all that the VMM has to be told.
#[derive(Debug)]
pub enum Change {
    /// Map `len` bytes of the file from `file_offset` on.
    Map {
        /// Where in the window.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The file.
        source: Source,
        /// Where in the file.
        file_offset: u64,
        /// Whether the guest may store.
        writable: bool,
    },
    /// Unmap exactly what was mapped at `offset`.
    Unmap {
        /// Where in the window.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// The channel to one peer's VMM. Closes when dropped.
#[derive(Debug)]
pub struct Channel {
    changes: Sender<(OpId, Change)>,
    stream: UnixStream,
}

impl Channel {
    /// Starts the thread. Answers go to the link as those of this session.
    ///
    /// # Errors
    /// When the host gives no descriptor or thread.
    pub fn open(stream: UnixStream, port: LinkPort, session: SessionId, name: &str) -> io::Result<Self> {
        let (changes, queue) = unbounded();
        let clone = stream.try_clone()?;
        thread::Builder::new()
            .name(format!("{name} window"))
            .spawn(move || serve(clone, &queue, &port, session))?;
        Ok(Self { changes, stream })
    }

    /// Asks for one change. Its answer comes as [`Input::WindowDone`].
    pub fn ask(&self, op: OpId, change: Change) {
        // A thread that is gone left because the VMM is: the link hears of that.
        drop(self.changes.send((op, change)));
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // Wakes the thread, also where the VMM keeps its end open and silent.
        drop(self.stream.shutdown(Shutdown::Both));
    }
}

fn serve(stream: UnixStream, queue: &Receiver<(OpId, Change)>, port: &LinkPort, session: SessionId) {
    let backend = Backend::from_stream(stream);
    backend.set_reply_ack_flag(true);
    backend.set_shmem_flag(true);
    for (op, change) in queue {
        let result = carry_out(&backend, &change);
        port.send(Input::WindowDone { session, op, result });
    }
}

fn carry_out(backend: &Backend, change: &Change) -> Result<(), String> {
    let request = |offset, len, file_offset, flags| VhostUserMMap {
        shmid: abi::SHMID_WINDOW,
        padding: [0; 7],
        fd_offset: file_offset,
        shm_offset: offset,
        len,
        flags,
    };
    let (what, answer) = match change {
        Change::Map { offset, len, source, file_offset, writable } => {
            let flags = if *writable { VhostUserMMapFlags::WRITABLE.bits() } else { 0 };
            let answer = backend.shmem_map(&request(*offset, *len, *file_offset, flags), source);
            (format!("map {len:#x} bytes at window offset {offset:#x}"), answer)
        }
        Change::Unmap { offset, len } => {
            let answer = backend.shmem_unmap(&request(*offset, *len, 0, 0));
            (format!("unmap {len:#x} bytes at window offset {offset:#x}"), answer)
        }
    };
    answer.map(|_| ()).map_err(|error| format!("{what}: {error}"))
}
