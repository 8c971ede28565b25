//! A front-end's connection, which has one descriptor only: that of the vhost crate's handler,
//! which the crate keeps to itself. The session's thread reads from it; the link answers on it,
//! and ends it. With a descriptor for each, a broker would have room for fewer links.
#![allow(unsafe_code)]

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::{BackendReqHandler, Result};

use super::decode::Decoder;

/// The connection as its session's thread has it. Closes when dropped.
pub struct Connection {
    handler: BackendReqHandler<Decoder>,
    line: Line,
}

/// The connection as others have it: as long as it is open.
#[derive(Clone, Debug)]
pub struct Line(Arc<Mutex<Option<RawFd>>>);

impl Connection {
    /// A connection whose messages this decoder takes.
    pub fn new(stream: UnixStream, decoder: Arc<Decoder>) -> Self {
        let handler = BackendReqHandler::from_stream(stream, decoder);
        let line = Line(Arc::new(Mutex::new(Some(handler.as_raw_fd()))));
        Self { handler, line }
    }

    /// For others.
    pub fn line(&self) -> Line {
        self.line.clone()
    }

    /// Takes one message that the vhost crate knows, and has it answered.
    ///
    /// # Errors
    /// The crate's.
    pub fn handle_request(&mut self) -> Result<()> {
        self.handler.handle_request()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the handler owns the descriptor and closes it only on drop, which the borrow
        // of `self` prevents.
        unsafe { BorrowedFd::borrow_raw(self.handler.as_raw_fd()) }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Before the handler is dropped, which closes the descriptor.
        *self.line.lock() = None;
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("line", &self.line).finish_non_exhaustive()
    }
}

impl Line {
    /// Does something with the connection, unless it is closed. Not to wait: the session's
    /// thread cannot end meanwhile.
    pub fn with<T>(&self, act: impl FnOnce(BorrowedFd<'_>) -> T) -> Option<T> {
        let number = self.lock();
        // SAFETY: the number is that of the handler's descriptor, which is open while the number
        // is here: `Connection` takes it out, under the lock that is held until `act` has
        // returned, before it drops the handler.
        number.map(|number| act(unsafe { BorrowedFd::borrow_raw(number) }))
    }

    fn lock(&self) -> MutexGuard<'_, Option<RawFd>> {
        // A number, or none, is whole whatever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
