//! How many descriptors links take, and whether the process may have so many.

use std::io;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::close;

use crate::config::LinkConfig;

/// A link's own to which nobody is connected: listening sockets and areas.
const LISTENING: u64 = 3;
/// Both sides' connections, the back-end channel, a region of the owner's memory, witness pages,
/// what the relay waits on, and kick and call of the control ring.
const CONNECTED: u64 = 9;
/// The owner's kick and call of a vring, and the peer's.
const VRING: u64 = 4;
/// The broker's own, and those of a moment.
const OWN: u64 = 24;
/// Of the limit, what a new connection to a link is not to begin with less than.
const RESERVE: u64 = 16;

/// What a message says that is about too low a limit.
pub const REMEDY: &str = "raise it: LimitNOFILE= of a systemd unit, ulimit -Hn of a shell";

/// Descriptors that links take to be listened for, and to be up all at once, at least: an owner
/// with several regions of memory, an IOMMU or a doorbell function takes some more.
pub fn needed(links: &[LinkConfig]) -> (u64, u64) {
    links.iter().fold((OWN, OWN), |(listening, up), link| {
        let own = LISTENING + u64::from(link.doorbell_socket.is_some());
        (listening + own, up + own + CONNECTED + VRING * u64::from(link.max_vrings()))
    })
}

/// Descriptors that this process may have.
pub fn limit() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft)
}

/// Has the kernel make room for so many descriptors now. Later, in a process with threads, it
/// waits some 20 ms for all processors each time that the table doubles.
pub fn make_room(descriptors: u64, limit: u64) {
    let last = descriptors.min(limit).saturating_sub(1);
    let Ok(last) = i32::try_from(last) else { return };
    // Only a matter of speed, if it fails.
    if let Ok(number) = fcntl(io::stderr(), FcntlArg::F_DUPFD_CLOEXEC(last)) {
        let _ = close(number);
    }
}

/// Whether so few descriptors are left that a connection which just got this one is better
/// turned away: some of what its VMM sends would be lost. The kernel gives the lowest number
/// that is free, so all below are taken.
pub fn is_short(descriptor: u64, limit: u64) -> bool {
    descriptor.saturating_add(RESERVE) >= limit
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config;

    #[test]
    fn a_link_with_one_pair_takes_20_descriptors_and_each_pair_8_more() {
        let text = |pairs: u32| {
            format!(
                "control_socket = \"/c\"\n[[link]]\nname = \"l\"\nowner_socket = \"/o\"\npeer_socket = \"/p\"\n\
                 queue_pairs = {pairs}\n"
            )
        };
        let of = |pairs| needed(&config::parse(&text(pairs)).unwrap().links);
        assert_eq!(of(1), (OWN + 3, OWN + 20));
        assert_eq!(of(3), (OWN + 3, OWN + 36));
    }

    #[test]
    fn the_last_descriptors_are_not_for_new_connections() {
        assert!(is_short(90, 100) && is_short(84, 100) && is_short(u64::MAX, u64::MAX));
        assert!(!is_short(83, 100));
    }
}
