//! The file system, as far as the kernel has Landlock: from now on nothing of it can be opened,
//! made, changed or removed by name, except that the process's own entry in `/proc` can be read. An
//! opener reads the configuration's folder and what the host says of its users, and makes and removes
//! sockets in their folders. No port can be bound or connected to, and no process outside signalled.
//!
//! What is open already, and what VMMs send, is not restricted: rights come with a descriptor.

use std::sync::OnceLock;

use landlock::{
    ABI, Access, AccessFs, AccessNet, LandlockStatus, PathBeneath, PathFd, PathFdError, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use thiserror::Error;

use super::Role;

/// The newest that this was tried with: newer kernels restrict no more than this by it, older ones
/// what they can.
const NEWEST: ABI = ABI::V7;

/// Where the kernel says what an eventfd is, and what is mapped.
const PROC: &str = "/proc/self";

/// Where users and groups are looked up, by libraries of the host's choice.
const USERS: [&str; 5] = ["/etc", "/usr/lib", "/lib", "/usr/lib64", "/lib64"];

/// Held for good: a rule is about a file that the kernel has in memory. The kernel forgets those in
/// `/proc` when nobody holds them, and makes new ones, for which no rule is.
static PROC_SELF: OnceLock<PathFd> = OnceLock::new();

/// Why files are not restricted.
#[derive(Debug, Error)]
pub enum FilesError {
    /// The kernel has no Landlock.
    #[error("this kernel was built without it (CONFIG_SECURITY_LANDLOCK), or is older than Linux 5.13")]
    NotImplemented,
    /// It has, and was told not to use it.
    #[error("this kernel has it, but not among the modules that it starts (lsm= on its command line)")]
    NotEnabled,
    /// A folder cannot be opened.
    #[error(transparent)]
    Folder(#[from] PathFdError),
    /// The kernel refused.
    #[error(transparent)]
    Ruleset(#[from] RulesetError),
}

/// Restricts this thread and those that it starts later. Gives the ABI that is in force.
///
/// # Errors
/// When the kernel has no Landlock, or refuses.
pub fn restrict(role: &Role<'_>) -> Result<i32, FilesError> {
    let proc_self = match PROC_SELF.get() {
        Some(held) => held,
        None => {
            let opened = PathFd::new(PROC)?;
            PROC_SELF.get_or_init(|| opened)
        }
    };
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .add_rule(PathBeneath::new(proc_self, AccessFs::ReadFile))?;
    if let Role::Opener { reads, sockets } = role {
        let users = USERS.iter().filter_map(|folder| PathFd::new(folder).ok());
        // In a folder that is not there nothing can be made either, which is said when it is tried.
        let reads = reads.iter().filter_map(|folder| PathFd::new(folder).ok()).chain(users);
        let sockets = sockets.iter().filter_map(|folder| PathFd::new(folder).ok());
        for folder in reads {
            ruleset = ruleset.add_rule(PathBeneath::new(folder, AccessFs::ReadFile | AccessFs::ReadDir))?;
        }
        for folder in sockets {
            ruleset =
                ruleset.add_rule(PathBeneath::new(folder, AccessFs::MakeSock | AccessFs::RemoveFile))?;
        }
    }
    let status = ruleset.restrict_self()?;
    match status.landlock {
        LandlockStatus::NotImplemented => Err(FilesError::NotImplemented),
        LandlockStatus::NotEnabled => Err(FilesError::NotEnabled),
        // Where nothing of it could be enforced there is none.
        LandlockStatus::Available { .. } if status.ruleset == RulesetStatus::NotEnforced => {
            Err(FilesError::NotEnabled)
        }
        LandlockStatus::Available { effective_abi, .. } => Ok((effective_abi as i32).min(NEWEST as i32)),
    }
}
