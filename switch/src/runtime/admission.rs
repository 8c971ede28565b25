//! Who may join a link, of those whom a socket's mode lets connect: the kernel says who
//! connected (SO_PEERCRED, SO_PEERGROUPS of unix(7)), the configuration who may.

use std::io;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{Group, User};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::sys;
use crate::config::{Account, Admission, LinkConfig};
use crate::link::Side;

/// The configuration names somebody whom the host does not know.
#[derive(Debug, Error)]
#[error("link '{link}': {key} names '{name}', and there is no such {kind}: create it, or name another")]
pub struct UnknownAccount {
    link: String,
    key: String,
    name: String,
    kind: &'static str,
}

/// Who may join on one side. Names are looked up once, when the link is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    users: Vec<u32>,
    groups: Vec<u32>,
}

/// Who connected, at that time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The process, in the broker's namespace; 0 if it is not seen from there.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

impl Caller {
    /// Of a connection that was accepted.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = getsockopt(stream, sockopt::PeerCredentials)?;
        Ok(Self { pid: credentials.pid(), uid: credentials.uid(), gid: credentials.gid() })
    }
}

impl Rule {
    /// The rule for this side of a link.
    ///
    /// # Errors
    /// When it names somebody whom the host does not know.
    pub fn new(link: &LinkConfig, side: Side) -> Result<Self, UnknownAccount> {
        let Admission { users, groups } = match side {
            Side::Owner => &link.owner_admission,
            Side::Peer => &link.peer_admission,
        };
        let unknown = |keys: &'static str, kind: &'static str| {
            move |name: &str| UnknownAccount {
                link: link.name.clone(),
                key: format!("{}_{keys}", side.name()),
                name: name.into(),
                kind,
            }
        };
        let user = |name: &str| Some(User::from_name(name).ok()??.uid.as_raw());
        let group = |name: &str| Some(Group::from_name(name).ok()??.gid.as_raw());
        Ok(Self {
            users: numbers(users, user, unknown("users", "user"))?,
            groups: numbers(groups, group, unknown("groups", "group"))?,
        })
    }

    /// Whether the one at the other end of this connection, who is this, may join.
    pub fn admits(&self, caller: &Caller, stream: &UnixStream) -> bool {
        if self.users.is_empty() && self.groups.is_empty() {
            return true;
        }
        if self.users.contains(&caller.uid) || self.groups.contains(&caller.gid) {
            return true;
        }
        // Not asked for unless it matters.
        let others = || sys::supplementary_groups(stream).unwrap_or_default();
        !self.groups.is_empty() && others().iter().any(|group| self.groups.contains(group))
    }
}

fn numbers(
    accounts: &[Account],
    look_up: impl Fn(&str) -> Option<u32>,
    unknown: impl Fn(&str) -> UnknownAccount,
) -> Result<Vec<u32>, UnknownAccount> {
    let number = |account: &Account| match account {
        Account::Number(number) => Ok(*number),
        Account::Name(name) => look_up(name).ok_or_else(|| unknown(name)),
    };
    accounts.iter().map(number).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use nix::unistd::{getegid, geteuid, getgroups};

    fn rule(users: &[u32], groups: &[u32]) -> Rule {
        Rule { users: users.into(), groups: groups.into() }
    }

    #[test]
    fn who_is_named_or_in_a_named_group_may_join_and_nobody_else() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let (me, nobody) = (geteuid().as_raw(), u32::MAX - 1);
        let caller = Caller::of(&stream).unwrap();
        assert_eq!((caller.uid, caller.gid), (me, getegid().as_raw()));
        assert_eq!(caller.pid.unsigned_abs(), std::process::id());
        assert!(rule(&[], &[]).admits(&caller, &stream));
        assert!(rule(&[nobody, me], &[]).admits(&caller, &stream));
        assert!(rule(&[nobody], &[caller.gid]).admits(&caller, &stream));
        assert!(!rule(&[nobody], &[nobody]).admits(&caller, &stream));
        // Numbers of users are none of groups.
        let other = Caller { uid: 1_234_567, gid: 7_654_321, ..caller };
        assert!(!rule(&[7_654_321], &[1_234_567]).admits(&other, &stream));
    }

    #[test]
    fn every_group_of_the_caller_counts() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let groups: Vec<u32> = getgroups().unwrap().iter().map(|group| group.as_raw()).collect();
        assert_eq!(sys::supplementary_groups(&stream).unwrap(), groups);
        let caller = Caller { pid: 1, uid: u32::MAX - 1, gid: u32::MAX - 1 };
        for group in groups {
            assert!(rule(&[], &[group]).admits(&caller, &stream));
            // Who lists users only means them.
            assert!(!rule(&[group], &[]).admits(&caller, &stream));
        }
    }

    #[test]
    fn a_name_that_the_host_does_not_know_is_an_error_that_names_link_and_key() {
        let text = "control_socket = \"/c\"\n[[link]]\nname = \"l\"\nowner_socket = \"/o\"\npeer_socket = \"/p\"\n\
             owner_users = [\"root\", 7]\npeer_groups = [\"no-such-group\"]\n";
        let link = crate::config::parse(text).unwrap().links.remove(0);
        assert_eq!(Rule::new(&link, Side::Owner).unwrap(), rule(&[0, 7], &[]));
        let error = Rule::new(&link, Side::Peer).unwrap_err().to_string();
        assert!(
            error.contains("link 'l': peer_groups names 'no-such-group', and there is no such group"),
            "{error}"
        );
    }
}
