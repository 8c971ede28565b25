//! Listening sockets: made with mode 0660 and a group, never world-writable; a
//! stale one is replaced only when nobody listens on it; gone when dropped.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, umask};
use nix::unistd::{Group, chown};
use thiserror::Error;

/// Why a socket cannot be listened on.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Somebody else serves it.
    #[error("{0}: another process listens on this socket; stop it, or name another path")]
    InUse(PathBuf),
    /// Something else has the name.
    #[error("{0}: exists and is no socket; it is left alone, name another path")]
    NotASocket(PathBuf),
    /// There is no such group.
    #[error("there is no group '{0}': create it, or name another in the configuration")]
    NoGroup(String),
    /// The system refused.
    #[error("{path}: cannot {what}: {source}")]
    System {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// A listening socket of the broker.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

/// The group that sockets get, looked up once.
///
/// # Errors
/// When there is no such group.
pub fn group(name: Option<&str>) -> Result<Option<Group>, SocketError> {
    let Some(name) = name else { return Ok(None) };
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(Some(group)),
        _ => Err(SocketError::NoGroup(name.into())),
    }
}

impl Listener {
    /// Makes the socket and listens on it, without blocking.
    ///
    /// # Errors
    /// When the name is taken or the system refuses.
    pub fn bind(path: &Path, group: Option<&Group>) -> Result<Self, SocketError> {
        let failed = |what: &'static str| {
            let path = path.to_owned();
            move |source: io::Error| SocketError::System { path, what, source }
        };
        remove_stale(path)?;
        // The socket has its mode from the moment it exists. Done before any thread
        // starts: the mask is the process's.
        let before = umask(Mode::from_bits_truncate(0o117));
        let bound = UnixListener::bind(path);
        umask(before);
        let listener = bound.map_err(failed("make the socket"))?;
        let made = Self { listener, path: path.to_owned() };
        if let Some(group) = group {
            chown(path, None, Some(group.gid))
                .map_err(|error| failed("give the socket to its group")(error.into()))?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(0o660))
            .map_err(failed("set the socket's mode"))?;
        made.listener.set_nonblocking(true).map_err(failed("listen"))?;
        Ok(made)
    }

    /// The next connection, if one waits.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
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
        self.listener.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.path));
    }
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotASocket(path.into()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|source| SocketError::System {
                path: path.into(),
                what: "remove the stale socket",
                source,
            })
        }
        // It answers, or may: it is not ours to remove.
        _ => Err(SocketError::InUse(path.into())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_socket_is_never_world_writable_and_goes_with_its_listener() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = Listener::bind(&path, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = Listener::bind(&path, None).unwrap();
        assert!(matches!(Listener::bind(&path, None), Err(SocketError::InUse(_))));
        assert!(path.exists());
        drop(listener);
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        fs::write(&path, "kept").unwrap();
        assert!(matches!(Listener::bind(&path, None), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
    }
}
