//! What the broker gives up when its sockets are there and nobody is served yet: capabilities,
//! ever getting privileges again, files, and most system calls. What it does never needs them, so
//! that who takes the broker over has a process with a few sockets and memory files, and no more.
//!
//! | file | what it takes away |
//! |---|---|
//! | [`capabilities`] | all of them |
//! | [`files`] | the file system, but for removing the sockets and for `/proc/self` (Landlock) |
//! | [`system_calls`] | all but a list (seccomp) |
//!
//! Nothing of it can be taken back. It is the process's, so the program does it, and not
//! [`Broker::start`](crate::runtime::broker::Broker::start), which a program of another kind may
//! call. Threads that start later have inherited it.

pub mod capabilities;
pub mod files;
#[cfg(debug_assertions)]
pub mod hook;
pub mod system_calls;

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::warn;

use crate::config::{Config, Confine};

/// What is in force, at the time of a report.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// What the configuration says: `off`, `best_effort` or `require`.
    pub policy: String,
    /// System calls on the filter's list; `None`: all are allowed.
    pub system_calls: Option<usize>,
    /// The Landlock ABI by which files are out of reach; `None`: they are not.
    pub landlock_abi: Option<i32>,
    /// Whether the process has no capability, nor inherits one.
    pub no_capabilities: bool,
    /// Whether its bounding set is empty too. Only who has CAP_SETPCAP can empty it; without
    /// capabilities and with `no_new_privs` nothing follows from it.
    pub empty_bounding_set: bool,
    /// Whether the process and its children can never get more than they have.
    pub no_new_privs: bool,
    /// What is not in force, and why.
    pub missing: Vec<String>,
}

impl Confinement {
    /// That of a process that has given up nothing.
    pub fn unconfined() -> Self {
        Self { policy: Confine::Off.name().into(), ..Self::default() }
    }
}

/// The broker may not run so.
#[derive(Debug, Error)]
#[error(
    "confine = \"require\", but this broker cannot be confined: {}; with confine = true it would run with what \
     there is",
    .0.join("; ")
)]
pub struct ConfineError(Vec<String>);

/// Gives up what the configuration wants given up, but for removing files from `folders`. To be
/// called by a process that has one thread; by the broker when its sockets are bound.
///
/// # Errors
/// When something is missing that is required.
pub fn enter(policy: Confine, folders: &[PathBuf]) -> Result<Confinement, ConfineError> {
    if policy == Confine::Off {
        return Ok(Confinement::unconfined());
    }
    let mut now = Confinement { policy: policy.name().into(), ..Confinement::default() };
    match threads() {
        Some(1) | None => {}
        Some(count) => now.missing.push(format!("confinement of {} threads that run already", count - 1)),
    }
    let mut take = |missing: Option<String>| now.missing.extend(missing);
    now.no_new_privs = note(&mut take, "no_new_privs", capabilities::forgo_new()).is_some();
    if let Some(dropped) = note(&mut take, "no capabilities", capabilities::drop_all()) {
        now.no_capabilities = true;
        now.empty_bounding_set = dropped.empty_bounding_set;
    }
    warn_of_what_stays(folders);
    now.landlock_abi = note(&mut take, "landlock", files::restrict(folders));
    now.system_calls = note(&mut take, "seccomp", system_calls::restrict());
    match policy {
        Confine::Require if !now.missing.is_empty() => Err(ConfineError(now.missing)),
        _ => Ok(now),
    }
}

/// The layer's result, or a line on why there is none.
fn note<T, E: std::fmt::Display>(
    take: &mut impl FnMut(Option<String>),
    layer: &str,
    result: Result<T, E>,
) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            take(Some(format!("{layer}: {error}")));
            None
        }
    }
}

/// Threads of this process; `None` if the kernel does not tell.
fn threads() -> Option<usize> {
    fs::read_dir("/proc/self/task").ok().map(Iterator::count)
}

/// The folders of the broker's sockets, each once.
pub fn folders(config: &Config) -> Vec<PathBuf> {
    let links = config
        .links
        .iter()
        .flat_map(|link| [Some(&link.owner_socket), Some(&link.peer_socket), link.doorbell_socket.as_ref()]);
    let sockets = links.flatten().chain([&config.control_socket]);
    let mut folders: Vec<_> = sockets.filter_map(|socket| socket.parent()).map(Path::to_owned).collect();
    folders.sort();
    folders.dedup();
    folders
}

/// A root without capabilities is a user like others: it cannot remove what it has made in a
/// folder of somebody else's.
fn warn_of_what_stays(folders: &[PathBuf]) {
    for folder in folders {
        if access(folder, AccessFlags::W_OK).is_err() {
            warn!(
                folder = %folder.display(),
                "sockets in this folder will stay when the broker ends, as its user may not write there: run the \
                 broker as the folder's owner"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config;

    #[test]
    fn the_folders_of_all_sockets_are_each_named_once() {
        let config = config::parse(
            "control_socket = \"/run/c/s\"\n[[link]]\nname = \"l\"\nowner_socket = \"/run/o/1\"\n\
             peer_socket = \"/run/c/p\"\ndoorbell_socket = \"/run/d/d\"\n",
        )
        .unwrap();
        assert_eq!(folders(&config), ["/run/c", "/run/d", "/run/o"].map(PathBuf::from));
    }

    #[test]
    fn who_does_not_want_it_gets_nothing() {
        let config = config::parse(
            "control_socket = \"/s\"\nconfine = false\n[[link]]\nname = \"l\"\nowner_socket = \"/1\"\npeer_socket = \"/2\"\n",
        )
        .unwrap();
        assert_eq!(enter(config.confine, &folders(&config)).unwrap(), Confinement::unconfined());
    }
}
