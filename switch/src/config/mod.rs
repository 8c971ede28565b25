//! The broker's configuration: what a file may say, and the values that follow.
//!
//! [`parse`] reports every mistake of a text at once, each with its line, and touches nothing else;
//! [`load`] reads the text from its file.

mod file;
mod read;
mod size;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vhost_pci_device::abi;

pub use file::{LoadError, load};
pub use size::{SizeError, parse_size};

use crate::kind::Device;

/// How long a peer's VMM has to confirm a change of its window, unless the file
/// says otherwise.
pub const DEFAULT_CONFIRM_TIMEOUT: Duration = Duration::from_millis(2000);
/// The window's length unless the file says otherwise, bytes.
pub const DEFAULT_WINDOW: u64 = 1 << 30;
/// Ranges that the window shows of an owner with an IOMMU, unless the file says
/// otherwise: each takes a memory slot of the peer's VMM.
pub const DEFAULT_MAX_MAPPINGS: usize = 256;
/// The most such ranges: what the link page has room for.
pub const MAX_MAX_MAPPINGS: usize = abi::MAX_MAPPINGS as usize;
/// Regions of memory that an owner may have, unless the file says otherwise: each takes a
/// descriptor of the broker.
pub const DEFAULT_MEMORY_REGIONS: usize = 16;
/// The most such regions.
pub const MAX_MEMORY_REGIONS: usize = 64;
/// The longest window, bytes.
pub const MAX_WINDOW: u64 = 1 << 46;
/// The most links that a broker has at once: what its guardian's table has room for.
pub const MAX_LINKS: usize = 4096;
/// The longest path that a Unix socket can have, bytes (`sun_path` less its end).
pub const MAX_SOCKET_PATH: usize = 107;

/// A configuration that can be run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Where `status` and `watch` ask.
    pub control_socket: PathBuf,
    /// The group that all sockets get; the broker's own if not given.
    pub group: Option<String>,
    /// How long a peer's VMM has to confirm a change of its window.
    pub confirm_timeout: Duration,
    /// Whether the broker gives up what it does not need.
    pub confine: Confine,
    /// The links, in the file's order. Names and sockets are unique.
    pub links: Vec<LinkConfig>,
}

/// Whether the broker gives up what it does not need: capabilities, files, system calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Confine {
    /// It keeps all that it was started with.
    Off,
    /// As far as the kernel lets it.
    #[default]
    BestEffort,
    /// All of it, or it does not run.
    Require,
}

impl Confine {
    /// The name in `status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::BestEffort => "best_effort",
            Self::Require => "require",
        }
    }

    /// That of this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Off, Self::BestEffort, Self::Require].into_iter().find(|policy| policy.name() == name)
    }
}

/// One owner device joined to one peer device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkConfig {
    /// The link's name in `status`, logs and errors.
    pub name: String,
    /// Where the owner's VMM connects.
    pub owner_socket: PathBuf,
    /// Where the peer's VMM connects.
    pub peer_socket: PathBuf,
    /// Length of the peer's window, bytes: a power of two, as a BAR is.
    pub window_len: u64,
    /// The owner's device.
    pub device: Device,
    /// What becomes of memory that the owner's IOMMU allows one direction only.
    pub one_way: OneWay,
    /// Ranges that the window shows at once of an owner with an IOMMU.
    pub max_mappings: usize,
    /// Regions of memory that the owner's VMM may bring.
    pub memory_regions: usize,
    /// Whether memory is taken that the owner's VMM can shorten.
    pub unsealed_memory: bool,
    /// Whether the owner can be migrated: its VMM may log, and a second one connect and wait.
    pub migration: bool,
    /// How often the link's VMMs may do what costs the broker something.
    pub rates: Rates,
    /// How notifications go.
    pub wiring: WiringPolicy,
    /// Where the peer's VMM connects its `ivshmem-doorbell`, if it has one.
    pub doorbell_socket: Option<PathBuf>,
    /// Who may be the owner.
    pub owner_admission: Admission,
    /// Who may be the peer, and its doorbell function.
    pub peer_admission: Admission,
}

/// Who may join a link on one side, of those whom the socket's mode lets connect. If it names
/// nobody, all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    /// These users may,
    pub users: Vec<Account>,
    /// and who is in one of these groups.
    pub groups: Vec<Account>,
}

/// A user or a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Account {
    /// By name, which the host knows.
    Name(String),
    /// By number.
    Number(u32),
}

/// How often each of a link's VMMs may do what costs the broker something, a second. Who comes more
/// often waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// Messages of a front-end.
    pub messages: u32,
    /// Notifications that the relay passes on.
    pub notifications: u32,
    /// Connections to each socket.
    pub connections: u32,
}

impl Default for Rates {
    fn default() -> Self {
        Self { messages: 50_000, notifications: 100_000, connections: 20 }
    }
}

/// The highest rate that can be given: as good as none.
pub const MAX_RATE: usize = 1_000_000_000;

/// How a link's notifications go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum WiringPolicy {
    /// From kernel to kernel, where the peer's VMM can; else by the broker's relay. The peer's
    /// VMM is handed the owner's eventfds.
    #[default]
    Direct,
    /// All by the broker's relay. No VMM is handed another's eventfds.
    Relay,
}

impl WiringPolicy {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Direct, Self::Relay];

    /// The name in the file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Relay => "relay",
        }
    }
}

/// What becomes of ranges that the owner's IOMMU lets its device only read, or only
/// write, where the peer's VMM cannot enforce that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OneWay {
    /// They are not mapped; the peer's driver has them copied, which checks the access.
    #[default]
    Refuse,
    /// They are mapped for reading and writing.
    Widen,
}

impl OneWay {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Refuse, Self::Widen];

    /// The name in the file and in `status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::Widen => "widen",
        }
    }
}

impl LinkConfig {
    /// How many of the owner's vrings the peer's device can show.
    pub fn max_vrings(&self) -> u16 {
        self.device.vrings
    }
}

/// A mistake in a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The line, counted from 1.
    pub line: usize,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.message)
    }
}

/// Reads a configuration file's text.
///
/// # Errors
/// Every mistake that the text has, in the order of lines.
pub fn parse(text: &str) -> Result<Config, Vec<Mistake>> {
    read::config(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::kind;

    const GOOD: &str = r#"
control_socket = "/run/vp/control.sock"

[[link]]
name = "a"
owner_socket = "/run/vp/a-owner.sock"
peer_socket = "/run/vp/a-peer.sock"
window = "2G"
"#;

    fn mistakes(text: &str) -> Vec<String> {
        parse(text).unwrap_err().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_good_file_gives_its_values_and_the_defaults() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.links.len(), 1);
        let link = &config.links[0];
        assert_eq!(link.window_len, 2 << 30);
        assert_eq!(link.device, kind::net::device(1, false));
        assert_eq!(link.max_vrings(), 2);
        let with = |keys: &str| parse(&format!("{GOOD}{keys}\n")).unwrap().links.remove(0).device;
        assert_eq!(with("offloads = true"), kind::net::device(1, true));
        assert_eq!(with("profile = \"net\"\nqueue_pairs = 3"), kind::net::device(3, false));
        assert!(link.migration);
        assert!(!parse(&format!("{GOOD}migration = false\n")).unwrap().links[0].migration);
        assert_eq!(config.confirm_timeout, DEFAULT_CONFIRM_TIMEOUT);
        assert_eq!(config.confine, Confine::BestEffort);
        for (word, confine) in
            [("true", Confine::BestEffort), ("false", Confine::Off), ("\"require\"", Confine::Require)]
        {
            assert_eq!(parse(&format!("confine = {word}\n{GOOD}")).unwrap().confine, confine);
        }
    }

    #[test]
    fn every_mistake_is_reported_with_its_line() {
        let text = r#"
control_sockets = "/run/x"
confirm_timeout_ms = 0
confine = "yes"

[[link]]
name = "a b"
owner_socket = "relative.sock"
window = "3G"
profile = "gpu"
queue_pairs = 100

[[link]]
name = "c"
owner_socket = "/run/c.sock"
peer_socket = "/run/c.sock"

[[link]]
name = "d"
owner_socket = "/run/d.sock"
peer_socket = "/run/d2.sock"
wiring = "relay"
doorbell_socket = "/run/d3.sock"

[[link]]
name = "e"
owner_socket = "/run/e.sock"
peer_socket = "/run/e2.sock"
offloads = "yes"
wiring = "fast"
doorbell_socket = "e"
"#;
        let found = mistakes(text);
        let has = |line: &str, part: &str| {
            assert!(
                found.iter().any(|m| m.starts_with(line) && m.contains(part)),
                "no '{line}…{part}' in {found:#?}"
            );
        };
        has("line 2:", "control_sockets");
        has("line 3:", "confirm_timeout_ms");
        has("line 4:", "true, false or \"require\"");
        has("line 6:", "peer_socket");
        has("line 7:", "name");
        has("line 8:", "absolute");
        has("line 9:", "power of two");
        has("line 10:", "net");
        has("line 11:", "queue_pairs");
        has("line 16:", "used already");
        has("line 23:", "no doorbell function");
        has("line 29:", "offloads must be true or false");
        has("line 30:", "\"direct\", \"relay\"");
        has("line 31:", "absolute");
        has("line 1:", "control_socket");
        assert!(found.windows(2).all(|w| line(&w[0]) <= line(&w[1])));
    }

    #[test]
    fn users_and_groups_are_named_or_numbered_and_an_empty_list_is_a_mistake() {
        let with = |keys: &str| parse(&format!("{GOOD}{keys}\n"));
        let link = with("owner_users = [\"vm1\", 1001]\npeer_groups = [\"kvm\"]").unwrap().links.remove(0);
        let users = vec![Account::Name("vm1".into()), Account::Number(1001)];
        assert_eq!(link.owner_admission, Admission { users, groups: Vec::new() });
        assert_eq!(link.peer_admission.groups, [Account::Name("kvm".into())]);
        assert!(link.peer_admission.users.is_empty());
        for (keys, words) in [
            ("owner_users = []", "owner_users names nobody"),
            ("owner_groups = [4294967295]", "not a user's or group's number"),
            ("peer_users = [-1]", "not a user's or group's number"),
            ("peer_users = [true]", "names in quotes or numbers"),
            ("peer_groups = \"kvm\"", "is a list"),
        ] {
            let found = with(keys).unwrap_err();
            assert!(found.len() == 1 && found[0].line == 9 && found[0].message.contains(words), "{found:?}");
        }
    }

    #[test]
    fn a_disk_has_its_own_keys_and_a_size_of_whole_sectors() {
        let with = |keys: &str| parse(&format!("{GOOD}profile = \"block\"\n{keys}\n"));
        let disk = |keys: &str| with(keys).unwrap().links.remove(0).device;
        assert_eq!(disk("size = \"8G\""), kind::block::device(8 << 30, 1, false));
        let all = disk("size = \"1536\"\nread_only = true\nnum_queues = 4");
        assert_eq!(all, kind::block::device(1536, 4, true));
        for (keys, line, words) in [
            ("", 4, "needs size"),
            ("size = 4096", 10, "string in quotes"),
            ("size = \"1000\"", 10, "whole number of sectors"),
            ("size = \"0\"", 10, "at least one sector"),
            ("size = \"1X\"", 10, "is not a size"),
            ("size = \"1M\"\nnum_queues = 65", 11, "from 1 to 64"),
            ("size = \"1M\"\nqueue_pairs = 1", 11, "no key 'queue_pairs'"),
            ("size = \"1M\"\noffloads = true", 11, "a [[link]] of a block device"),
        ] {
            let found = with(keys).unwrap_err();
            let is_that = found.len() == 1 && found[0].line == line && found[0].message.contains(words);
            assert!(is_that, "{keys}: {found:?}");
        }
        let found = parse(&format!("{GOOD}size = \"1M\"\n")).unwrap_err();
        assert!(found[0].message.contains("no key 'size'"), "{found:?}");
    }

    fn line(mistake: &str) -> usize {
        mistake[5..].split(':').next().unwrap().parse().unwrap()
    }

    #[test]
    fn a_syntax_error_does_not_hide_the_mistakes_after_it() {
        let found = mistakes("control_socket = \n[[link]]\nname = 5\n");
        assert!(found.iter().any(|m| m.starts_with("line 1:")), "{found:?}");
        assert!(found.iter().any(|m| m.starts_with("line 3:")), "{found:?}");
    }

    #[test]
    fn no_link_and_twice_the_same_name_are_mistakes() {
        assert!(mistakes("control_socket = \"/x\"\n")[0].contains("no [[link]]"));
        let twice = format!("{GOOD}\n[[link]]\nname = \"a\"\nowner_socket = \"/1\"\npeer_socket = \"/2\"\n");
        assert!(mistakes(&twice)[0].contains("'a'"));
    }
}
