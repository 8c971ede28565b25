//! The control socket: how `status` and `watch` ask a running broker.
//!
//! The protocol is one JSON object a line each way (`docs/control-protocol.md`).

pub mod client;
pub mod render;
pub mod server;

use serde::{Deserialize, Serialize};

use crate::confine::Confinement;
#[cfg(debug_assertions)]
use crate::confine::hook::Forbidden;
use crate::link::report::LinkReport;

/// What a client can ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "command", deny_unknown_fields)]
pub enum Query {
    /// The state of every link.
    Status,
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
    /// What came of doing what the broker must not be able to do.
    #[cfg(debug_assertions)]
    Forbidden(String),
    /// The question was not understood.
    Error(String),
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
    /// Its links, in the configuration's order.
    pub links: Vec<LinkReport>,
}
