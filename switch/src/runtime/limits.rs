//! How many descriptors links take, and whether the process may have so many.

use std::io;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::close;

use crate::config::LinkConfig;

/// A link's own to which nobody is connected: listening sockets and areas.
const LISTENING: u64 = 3;
/// Both sides' connections and back-end channels, two witness pages and one that answers a fence, what the relay waits on, and
/// kick and call of the control ring.
const CONNECTED: u64 = 10;
/// The owner's kick, call and error eventfd of a vring, and the peer's kick and call.
const VRING: u64 = 5;
/// Of an owner that can be migrated: the connection and back-end channel of the VMM that waits, both VMMs' logs, and a copy
/// of one for a moment.
const MIGRATION: u64 = 5;
/// The kick, call and error eventfd of a vring of the VMM that waits.
const WAITING_VRING: u64 = 3;
/// A doorbell function's connection and page.
const DOORBELL: u64 = 2;
/// What a doorbell function is given of a vring at most, as its owner restarts it: numbers and
/// vectors ([`crate::link::doorbell`]).
const DOORBELL_VRING: u64 = 40;
/// The broker's own, and those of a moment.
const OWN: u64 = 24;
/// Of the limit, what a new connection to a link is not to begin with less than.
const RESERVE: u64 = 16;

/// What a message says that is about too low a limit.
pub const REMEDY: &str = "raise it: LimitNOFILE= of a systemd unit, ulimit -Hn of a shell";

/// Descriptors that links take to be listened for, and those that they may take when all are up: no
/// VMM can make its link take more.
pub fn needed<'c>(links: impl IntoIterator<Item = &'c LinkConfig>) -> (u64, u64) {
    links.into_iter().fold((OWN, OWN), |(listening, up), link| {
        let (vrings, regions) = (u64::from(link.max_vrings()), link.memory_regions as u64);
        let (listens, doorbell) = match link.doorbell_socket {
            Some(_) => (LISTENING + 1, DOORBELL + DOORBELL_VRING * vrings),
            None => (LISTENING, 0),
        };
        let migration = if link.migration { MIGRATION + regions + WAITING_VRING * vrings } else { 0 };
        (listening + listens, up + listens + CONNECTED + regions + doorbell + VRING * vrings + migration)
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
    fn a_link_takes_13_descriptors_at_most_and_one_for_each_region_and_10_for_each_pair() {
        let of = |keys: &str| {
            let text = format!(
                "control_socket = \"/c\"\n[[link]]\nname = \"l\"\nowner_socket = \"/o\"\npeer_socket = \"/p\"\n{keys}"
            );
            needed(&config::parse(&text).unwrap().links)
        };
        let still = |keys: &str| of(&format!("migration = false\n{keys}"));
        assert_eq!(still(""), (OWN + 3, OWN + 13 + 10 + 16));
        assert_eq!(still("queue_pairs = 3\n"), (OWN + 3, OWN + 13 + 30 + 16));
        assert_eq!(still("memory_regions = 1\n"), (OWN + 3, OWN + 13 + 10 + 1));
        assert_eq!(still("doorbell_socket = \"/d\"\n"), (OWN + 4, OWN + 14 + 10 + 16 + 82));
        // The VMM that waits has regions and vrings, too.
        assert_eq!(of(""), (OWN + 3, OWN + 13 + 10 + 16 + 5 + 16 + 6));
    }

    #[test]
    fn the_last_descriptors_are_not_for_new_connections() {
        assert!(is_short(90, 100) && is_short(84, 100) && is_short(u64::MAX, u64::MAX));
        assert!(!is_short(83, 100));
    }
}
