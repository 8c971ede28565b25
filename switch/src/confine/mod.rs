//! What the broker gives up when its sockets are there and nobody is served yet: capabilities,
//! ever getting privileges again, files, and most system calls. What it does never needs them, so
//! that who takes the broker over has a process with a few sockets and memory files, and no more.
//! Its guardian gives up the same; its opener keeps what makes sockets.
//!
//! | file | what it takes away |
//! |---|---|
//! | [`capabilities`] | all of them |
//! | [`files`] | the file system, but for `/proc/self` (Landlock) |
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
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::Confine;

/// Which process it is, and so what it keeps.
#[derive(Clone, Copy, Debug)]
pub enum Role<'a> {
    /// The broker or its guardian: nothing but what it has.
    Broker,
    /// The opener: what makes sockets.
    Opener {
        /// Folders that it reads, besides those in which the host says who its users are.
        reads: &'a [PathBuf],
        /// Folders in which it makes sockets and removes them.
        sockets: &'a [PathBuf],
    },
}

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

/// Gives up what the configuration wants given up, but for what the role needs. To be
/// called by a process that has one thread; by the broker when its sockets are bound.
///
/// # Errors
/// When something is missing that is required.
pub fn enter(policy: Confine, role: &Role<'_>) -> Result<Confinement, ConfineError> {
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
    if let Some(dropped) = note(&mut take, "no capabilities", capabilities::drop_for(role)) {
        now.no_capabilities = true;
        now.empty_bounding_set = dropped.empty_bounding_set;
    }
    now.landlock_abi = note(&mut take, "landlock", files::restrict(role));
    now.system_calls = note(&mut take, "seccomp", system_calls::restrict(role));
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config;

    #[test]
    fn who_does_not_want_it_gets_nothing() {
        let config = config::parse(
            "control_socket = \"/s\"\nconfine = false\n[[link]]\nname = \"l\"\nowner_socket = \"/1\"\npeer_socket = \"/2\"\n",
        )
        .unwrap();
        assert_eq!(enter(config.confine, &Role::Broker).unwrap(), Confinement::unconfined());
    }
}
