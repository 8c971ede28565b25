//! The runtime: threads, sockets and descriptors around the links.
//!
//! | file | what it holds |
//! |---|---|
//! | [`port`] | how threads reach a link: its lock, and its clock |
//! | [`driver`] | what is around one link: events in, effects run |
//! | [`channel`] | the back-end channel to a VMM |
//! | [`backend_message`] | its messages as bytes |
//! | [`copy`] | copies between an owner's files and the control area |
//! | [`dirty_log`] | marks pages in an owner's dirty log |
//! | [`doorbell`] | the connection to a peer's doorbell function |
//! | [`areas`] | the broker's own memory in the window: link area, control area, witness |
//! | [`control_ring`] | serves the control ring |
//! | [`relay`] | the thread of a link that passes notifications on |
//! | [`limits`] | how many descriptors links take |
//! | `closing` | ends of connections that are turned away |
//! | [`shown`] | which files each process has in a window, and are not its own |
//! | [`rate`] | how often a VMM may do something |
//! | [`sockets`] | listening sockets |
//! | [`admission`] | who of those may join |
//! | `sys` | questions to the kernel, in `unsafe` code |
//! | [`links`] | the links that there are: plugged, unplugged, reloaded |
//! | [`acceptor`] | the thread that accepts connections |
//! | [`broker`] | puts it all together and takes it down again |

pub mod acceptor;
pub mod admission;
pub mod areas;
pub mod backend_message;
pub mod broker;
pub mod channel;
pub(crate) mod closing;
pub mod control_ring;
pub mod copy;
pub mod dirty_log;
pub mod doorbell;
pub mod driver;
pub mod limits;
pub mod links;
pub mod port;
pub mod rate;
pub mod relay;
pub mod shown;
pub mod sockets;
pub(crate) mod sys;

use std::os::unix::net::UnixStream;

use crossbeam_channel::Sender;

pub use closing::{Pass, Unclosed};
pub use port::LinkPort;
pub use sys::one_heap;

use crate::link::message::{Flood, Reply, Request};
use crate::link::report::LinkReport;
use crate::link::{Fault, Side};

/// Numbers the sessions of a broker, so that a late word of an ended session is
/// known as such.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionId(pub u64);

/// Numbers the back-end channels and doorbell connections of a link: a VMM may replace one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelId(pub u64);

/// What is sent to a link's thread.
#[derive(Debug)]
pub enum Input {
    /// A front-end connected.
    Connected {
        /// Which.
        side: Side,
        /// Its connection.
        stream: UnixStream,
        /// Kept until it is closed.
        pass: Pass,
    },
    /// A session asks.
    Request {
        /// Whose session.
        side: Side,
        /// Which session.
        session: SessionId,
        /// What it asks.
        request: Request,
        /// Where the answer goes.
        answer: Answer,
    },
    /// A session ended.
    Ended {
        /// Whose session.
        side: Side,
        /// Which session.
        session: SessionId,
        /// The fault that ended it.
        fault: Option<Fault>,
    },
    /// A VMM answered what it was asked on its back-end channel, the oldest first.
    ChannelAnswer {
        /// Which VMM.
        side: Side,
        /// The session that the channel belongs to.
        session: SessionId,
        /// Which of its channels.
        channel: ChannelId,
        /// The number of the request that it answers, as it says.
        request: u32,
        /// Whether it says that it has done it.
        done: bool,
    },
    /// A VMM closed its back-end channel, or sent something else than an answer.
    ChannelEnded {
        /// Which VMM.
        side: Side,
        /// The session that the channel belongs to.
        session: SessionId,
        /// Which of its channels.
        channel: ChannelId,
    },
    /// Somebody connected who may not join, and was turned away.
    NotPermitted {
        /// Where: a side's name, or `doorbell`.
        door: &'static str,
        /// Who.
        caller: admission::Caller,
    },
    /// A VMM connected the link's doorbell function.
    DoorbellConnected(UnixStream, Pass),
    /// Something came of a doorbell function's connection.
    Doorbell {
        /// Which connection.
        channel: ChannelId,
        /// What.
        word: doorbell::Word,
    },
    /// The control ring's doorbell rang.
    ControlDoorbell,
    /// A side does something more often than it may, and is made to wait.
    TooOften(Side, Flood),
    /// The link is to end. The answer comes when nobody has anything of the owner's any more (`true`), or
    /// the time for that is over.
    Unplug(Sender<bool>),
    /// Somebody wants the link's report.
    Report(Sender<LinkReport>),
}

/// How a session's question is answered.
#[derive(Debug)]
pub struct Answer {
    /// To the session's thread. Dropped unanswered when the session is over.
    pub sender: Sender<Reply>,
    /// The request's number, if the front-end wants an acknowledgement and nothing more: then
    /// that of [`Reply::Done`] and [`Reply::Declined`] is sent from where the answer becomes
    /// known, which saves the front-end a change of threads, and the session's thread
    /// need not wait for it.
    pub acknowledge: Option<u32>,
}
