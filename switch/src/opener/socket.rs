//! One listening socket: made with mode 0660 and a group, never world-writable; a stale one is
//! replaced only when nobody listens on it.

use std::fs::{self, File, Metadata, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Group, fchownat};
use thiserror::Error;

use crate::runtime::closing::{Pass, turn_away};

/// Why a socket cannot be listened on.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Somebody else serves it.
    #[error("{0}: another process listens on this socket; stop it, or name another path")]
    InUse(PathBuf),
    /// Something else has the name.
    #[error("{0}: exists and is no socket; it is left alone, name another path")]
    NotASocket(PathBuf),
    /// Somebody changed the folder meanwhile.
    #[error(
        "{0}: something else took the socket's place while it was made, and is left alone: see who may write to the \
         folder"
    )]
    Replaced(PathBuf),
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
    remove_stale(path)?;
    // The socket has its mode from the moment it exists. The mask is the process's: who makes sockets
    // has one thread, or makes them before others start.
    let before = umask(Mode::from_bits_truncate(0o117));
    let bound = UnixListener::bind(path);
    umask(before);
    let listener = bound.map_err(failed(path, MAKE))?;
    match set_up(&listener, path, group) {
        Ok(made) => Ok((listener, made)),
        Err(error) => {
            abandon(listener);
            Err(error)
        }
    }
}

/// Closes a listening socket to which somebody may have connected already. Never waits.
pub fn abandon(listener: UnixListener) {
    turn_away(listener, Pass::default());
}

/// Gives a socket that was made just now its group and its mode, also where the folder's default access
/// list came before the mask. Whoever may write to the folder can put anything in its place meanwhile: so
/// one file is looked at and changed, whatever has the name.
fn set_up(listener: &UnixListener, path: &Path, group: Option<&Group>) -> Result<Made, SocketError> {
    const LOOK: &str = "look at the socket";
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = open(path, flags, Mode::empty()).map_err(|error| failed(path, LOOK)(error.into()))?;
    let file = File::from(file);
    let metadata = file.metadata().map_err(failed(path, LOOK))?;
    // Nor is a socket that was made elsewhere one's own to give away.
    if !metadata.file_type().is_socket() || metadata.nlink() != 1 {
        return Err(SocketError::Replaced(path.into()));
    }
    let made = Made { path: path.to_owned(), file: identity(&metadata) };
    let set = || -> Result<(), SocketError> {
        if let Some(group) = group {
            fchownat(&file, "", None, Some(group.gid), AtFlags::AT_EMPTY_PATH)
                .map_err(|error| failed(path, "give the socket to its group")(error.into()))?;
        }
        let file = format!("/proc/self/fd/{}", file.as_raw_fd());
        fs::set_permissions(file, Permissions::from_mode(0o660))
            .map_err(failed(path, "set the socket's mode"))?;
        listener.set_nonblocking(true).map_err(failed(path, "listen"))
    };
    match set() {
        Ok(()) => Ok(made),
        Err(error) => {
            made.remove();
            Err(error)
        }
    }
}

fn failed(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> SocketError {
    let path = path.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::PermissionDenied if what == MAKE => SocketError::OutOfReach(path),
        _ => SocketError::System { path, what, source },
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
    if is_served(path) {
        return Err(SocketError::InUse(path.into()));
    }
    fs::remove_file(path).map_err(failed(path, "remove the stale socket"))
}

/// Whether somebody listens on a socket, or may: then it is not ours to remove. Waits for nobody, as its
/// backlog may be full for good.
fn is_served(path: &Path) -> bool {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let Ok(stream) = socket(AddressFamily::Unix, SockType::Stream, flags, None) else { return true };
    let connected = UnixAddr::new(path).and_then(|address| connect(stream.as_raw_fd(), &address));
    if connected.is_ok() {
        // Who listens may have answered with what is slow to close.
        turn_away(stream, Pass::default());
    }
    connected != Err(Errno::ECONNREFUSED)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use nix::sys::socket::{Backlog, listen};
    use nix::unistd::Gid;

    #[test]
    fn what_took_the_sockets_place_while_it_was_made_keeps_its_group_and_mode() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let (path, secret, other) = (at("s"), at("secret"), at("other"));
        fs::write(&secret, "").unwrap();
        fs::set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
        let _other = UnixListener::bind(&other).unwrap();
        fs::set_permissions(&other, Permissions::from_mode(0o600)).unwrap();
        let group =
            Group { name: String::new(), passwd: c"".into(), gid: Gid::from_raw(65_534), mem: vec![] };
        let takes_its_place: [&dyn Fn(); 3] =
            [&|| symlink(&secret, &path).unwrap(), &|| fs::hard_link(&secret, &path).unwrap(), &|| {
                fs::hard_link(&other, &path).unwrap()
            }];
        for takes_its_place in takes_its_place {
            let listener = UnixListener::bind(&path).unwrap();
            fs::remove_file(&path).unwrap();
            takes_its_place();
            let of =
                |path: &Path| fs::metadata(path).map(|file| (file.mode(), file.uid(), file.gid())).unwrap();
            let before = [of(&secret), of(&other)];
            assert!(matches!(set_up(&listener, &path, Some(&group)), Err(SocketError::Replaced(_))));
            assert_eq!([of(&secret), of(&other)], before);
            assert!(fs::symlink_metadata(&path).is_ok(), "it is left alone");
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_socket_whose_backlog_is_full_is_served_and_nobody_waits_for_room() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let _full = UnixStream::connect(&path).unwrap();
        let (says, hears) = mpsc::channel();
        let socket = path.clone();
        thread::spawn(move || says.send(bind(&socket, None)));
        let bound = hears.recv_timeout(Duration::from_secs(30));
        assert!(matches!(bound, Ok(Err(SocketError::InUse(_)))), "{bound:?}");
        assert!(path.exists());
    }

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
