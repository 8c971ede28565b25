//! Listening sockets as the acceptor has them. The [opener](crate::opener) makes and removes them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};

/// A listening socket of the broker, which does not block.
#[derive(Debug)]
pub struct Listener(UnixListener);

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self(listener)
    }
}

impl Listener {
    /// The next connection, if one waits.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.0.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                Ok(Some(stream))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
