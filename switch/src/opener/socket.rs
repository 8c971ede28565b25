//! One listening socket: made with mode 0660 and a group, never world-writable; a stale one is
//! replaced only when nobody listens on it.

use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
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
    /// The process gave up this folder.
    #[error(
        "{0}: cannot make the socket: permission denied; while the broker runs, its user has to be allowed to write \
         to the folder, which has to be one, or below one, in which the configuration had sockets when the broker \
         started: name another path, or start it anew"
    )]
    OutOfReach(PathBuf),
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

/// A socket that was made: its file, as long as that is the same one.
#[derive(Debug)]
pub struct Made {
    path: PathBuf,
    file: (u64, u64),
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

/// Makes the socket and listens on it, without blocking.
///
/// # Errors
/// When the name is taken or the system refuses. Nothing is left behind then.
pub fn bind(path: &Path, group: Option<&Group>) -> Result<(UnixListener, Made), SocketError> {
    let failed = |what: &'static str| {
        let path = path.to_owned();
        move |source: io::Error| match source.kind() {
            io::ErrorKind::PermissionDenied if what == MAKE => SocketError::OutOfReach(path),
            _ => SocketError::System { path, what, source },
        }
    };
    remove_stale(path)?;
    // The socket has its mode from the moment it exists. The mask is the process's: who makes sockets
    // has one thread, or makes them before others start.
    let before = umask(Mode::from_bits_truncate(0o117));
    let bound = UnixListener::bind(path);
    umask(before);
    let listener = bound.map_err(failed(MAKE))?;
    let metadata = fs::symlink_metadata(path).map_err(failed("look at the socket"))?;
    let made = Made { path: path.to_owned(), file: identity(&metadata) };
    let set_up = || -> Result<(), SocketError> {
        if let Some(group) = group {
            chown(path, None, Some(group.gid))
                .map_err(|error| failed("give the socket to its group")(error.into()))?;
        }
        fs::set_permissions(path, Permissions::from_mode(0o660)).map_err(failed("set the socket's mode"))?;
        listener.set_nonblocking(true).map_err(failed("listen"))
    };
    match set_up() {
        Ok(()) => Ok((listener, made)),
        Err(error) => {
            made.remove();
            Err(error)
        }
    }
}

const MAKE: &str = "make the socket";

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

impl Made {
    /// Removes it, unless another has taken its place.
    pub fn remove(self) {
        let same = fs::symlink_metadata(&self.path).is_ok_and(|there| identity(&there) == self.file);
        if same {
            drop(fs::remove_file(&self.path));
        }
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
    fn a_socket_is_never_world_writable_and_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (_listener, made) = bind(&path, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        made.remove();
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _kept = bind(&path, None).unwrap();
        assert!(matches!(bind(&path, None), Err(SocketError::InUse(_))));
        assert!(path.exists());
    }

    #[test]
    fn a_socket_that_another_broker_made_in_its_place_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (first, made) = bind(&path, None).unwrap();
        drop(first);
        // Another file under the name. The first one's number is not free while a link to it is there.
        fs::hard_link(&path, folder.path().join("kept")).unwrap();
        let (_second, other) = bind(&path, None).unwrap();
        made.remove();
        assert!(path.exists());
        other.remove();
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        fs::write(&path, "kept").unwrap();
        assert!(matches!(bind(&path, None), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
    }
}
