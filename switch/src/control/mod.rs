//! The control socket: how `status` and `watch` ask a running broker, and `plug`, `unplug` and `reload`
//! change its links.
//!
//! The protocol is one JSON object a line each way (`docs/control-protocol.md`).

pub mod client;
pub mod render;
pub mod server;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::confine::Confinement;
#[cfg(debug_assertions)]
use crate::confine::hook::Forbidden;
use crate::link::report::LinkReport;
use crate::runtime::links::Difference;

/// What a client can ask. What changes links is for the broker's own user and root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "command", deny_unknown_fields)]
pub enum Query {
    /// The state of every link.
    Status,
    /// To begin a link that the configuration names.
    Plug {
        /// Its name.
        link: String,
    },
    /// To end a link.
    Unplug {
        /// Its name.
        link: String,
    },
    /// To read the configuration again and make up the difference.
    Reload,
    /// A test's: to do what the broker must not be able to do.
    #[cfg(debug_assertions)]
    Forbidden {
        /// What.
        call: Forbidden,
    },
}

/// What the broker answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The state of the broker and every link.
    Status(BrokerReport),
    /// The link is there now.
    Plugged(PluggedLink),
    /// The link of this name is gone.
    Unplugged(String),
    /// The configuration is in force.
    Reloaded(Difference),
    /// What came of doing what the broker must not be able to do.
    #[cfg(debug_assertions)]
    Forbidden(String),
    /// The question was not understood, or what it wants cannot be done.
    Error(String),
}

/// What a VMM has to know to join a link that was plugged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluggedLink {
    /// Its name.
    pub name: String,
    /// Where the owner's VMM connects.
    pub owner_socket: PathBuf,
    /// Where the peer's VMM connects.
    pub peer_socket: PathBuf,
    /// The owner's kind of device, by its name in the configuration.
    pub profile: String,
    /// Queues of the owner's device at most; the peer's has one more.
    pub vrings: u16,
}

/// The broker, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerReport {
    /// Its process.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Bytes of guest memory that its process has mapped, as the kernel lists them.
    /// Zero, always: a packet cannot pass through a process that cannot reach it.
    pub guest_bytes_mapped: u64,
    /// Packets, or parts of them, that the broker handled: those that peers' drivers had it
    /// copy (FETCH and STORE), and no others while no guest memory is mapped. `None` if the
    /// kernel does not tell.
    pub packets: Option<u64>,
    /// What its process has given up.
    pub confinement: Confinement,
    /// The process that takes owners' memory back when this one is killed; `None`: nobody does.
    pub guardian: Option<u32>,
    /// The process that makes sockets and reads the configuration; `None`: links cannot be plugged.
    #[serde(default)]
    pub opener: Option<u32>,
    /// Its links, in the configuration's order; those that were plugged later after them.
    pub links: Vec<LinkReport>,
}
