//! Capabilities (capabilities(7)): none is left but what the role needs, and none can be had again.

use std::io;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    no_new_privs, remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use super::Role;

/// What came of dropping them.
#[derive(Clone, Copy, Debug)]
pub struct Dropped {
    /// Whether the bounding set is empty. Only who has CAP_SETPCAP can empty it.
    pub empty_bounding_set: bool,
}

/// Neither this thread nor what it starts can get more than it has, by a program with a set-user-ID
/// bit or with capabilities of its own.
///
/// # Errors
/// When the kernel has no such thing.
pub fn forgo_new() -> io::Result<()> {
    set_no_new_privs(true)?;
    match no_new_privs()? {
        true => Ok(()),
        false => Err(io::Error::other("the kernel did not keep it")),
    }
}

/// What an opener keeps of what it has: the sockets that it makes may be for another group, and in folders
/// of somebody else's.
const OPENER: CapabilitySet =
    CapabilitySet::CHOWN.union(CapabilitySet::DAC_OVERRIDE).union(CapabilitySet::FOWNER);

/// This thread, and those that it starts later, have no capability from now on, but what the role
/// needs and it has.
///
/// # Errors
/// When the kernel refuses.
pub fn drop_for(role: &Role<'_>) -> io::Result<Dropped> {
    // First, as it takes a capability. A user without one cannot, and need not.
    let empty_bounding_set = empty_bounding_set();
    // Kernels before 4.3 have no ambient set, and so nothing in it.
    match clear_ambient_capability_set() {
        Ok(()) | Err(Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let kept = match role {
        Role::Broker => CapabilitySet::empty(),
        Role::Opener { .. } => capabilities(None)?.effective & OPENER,
    };
    let kept = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, kept)?;
    match capabilities(None)? == kept {
        true => Ok(Dropped { empty_bounding_set }),
        false => Err(io::Error::other("the kernel did not take them all")),
    }
}

fn empty_bounding_set() -> bool {
    for number in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << number);
        match capability_is_in_bounding_set(one) {
            // Past the last one that the kernel knows.
            Err(_) => return number > 0,
            Ok(false) => {}
            Ok(true) if remove_capability_from_bounding_set(one).is_ok() => {}
            Ok(true) => return false,
        }
    }
    true
}
