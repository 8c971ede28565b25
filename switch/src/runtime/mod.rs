//! The runtime: threads, sockets and descriptors around the links.
//!
//! | file | what it holds |
//! |---|---|
//! | [`driver`] | a link's thread: events in, effects run |
//! | [`channel`] | the thread that asks a peer's VMM for changes of its window |
//! | [`miss_channel`] | the thread that tells an owner's VMM of IOTLB misses |
//! | [`copy`] | copies between an owner's files and the control area |
//! | [`areas`] | the broker's own memory in the window: link area, control area, witness |
//! | [`control_ring`] | serves the control ring |
//! | [`relay`] | the thread of a link that passes notifications on |
//! | [`sockets`] | listening sockets and who may connect |
//! | [`broker`] | puts it all together and takes it down again |

pub mod areas;
pub mod broker;
pub mod channel;
pub mod control_ring;
pub mod copy;
pub mod driver;
pub mod miss_channel;
pub mod relay;
pub mod sockets;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::Sender;

use crate::link::message::{MissId, OpId, Reply, Request};
use crate::link::report::LinkReport;
use crate::link::{Fault, Side};

/// Numbers the sessions of a broker, so that a late word of an ended session is
/// known as such.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionId(pub u64);

/// What is sent to a link's thread.
#[derive(Debug)]
pub enum Input {
    /// A front-end connected.
    Connected {
        /// Which.
        side: Side,
        /// Its connection.
        stream: UnixStream,
    },
    /// A session asks.
    Request {
        /// Whose session.
        side: Side,
        /// Which session.
        session: SessionId,
        /// What it asks.
        request: Request,
        /// Where the answer goes. Dropped unanswered when the session is over.
        answer: Sender<Reply>,
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
    /// The peer's VMM answered a change of its window.
    WindowDone {
        /// The session whose VMM it is.
        session: SessionId,
        /// The change.
        op: OpId,
        /// Its answer.
        result: Result<(), String>,
    },
    /// The owner's VMM answered a miss.
    MissDone {
        /// The session whose VMM it is.
        session: SessionId,
        /// The miss.
        id: MissId,
        /// Whether it says that it told the translation.
        told: bool,
    },
    /// The control ring's doorbell rang.
    ControlDoorbell,
    /// Somebody wants the link's report.
    Report(Sender<LinkReport>),
    /// The broker ends.
    Shutdown,
}

/// Where a link's thread takes its input.
#[derive(Clone, Debug)]
pub struct LinkPort {
    input: Sender<Input>,
    /// Set while a doorbell is in the channel: a guest that rings in a loop puts
    /// one there, not thousands.
    doorbell_pending: Arc<AtomicBool>,
}

impl LinkPort {
    /// A port that sends to `input`.
    pub fn new(input: Sender<Input>) -> Self {
        Self { input, doorbell_pending: Arc::new(AtomicBool::new(false)) }
    }

    /// Sends to the link's thread. What is sent to a link that has ended is dropped,
    /// and with it any question in it.
    pub fn send(&self, input: Input) {
        drop(self.input.send(input));
    }

    /// Tells that the control ring's doorbell rang.
    pub fn ring_doorbell(&self) {
        // AcqRel: pairs with the swap in `doorbell_taken`, so that what the guest wrote
        // before it rang is seen by the link that takes the ring.
        if !self.doorbell_pending.swap(true, Ordering::AcqRel) {
            self.send(Input::ControlDoorbell);
        }
    }

    /// The link takes the doorbell; the next ring is sent again.
    pub fn doorbell_taken(&self) {
        // AcqRel: pairs with the swap in `ring_doorbell`.
        self.doorbell_pending.swap(false, Ordering::AcqRel);
    }
}
