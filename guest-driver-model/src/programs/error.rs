//! Why a program ends before its time. Each message holds its cause: it is to be
//! printed by itself, without the chain of sources behind it.

use std::io;
use std::time::Duration;

use super::confine::mailbox::Turn;
use crate::control::ControlError;
use crate::link::LinkError;
use crate::net::LayoutError;
use crate::owner::OwnerError;
use crate::ring::DriverFault;
use crate::shm::ShmError;
use crate::transport::TransportError;

/// What to do about a disk that cannot be opened.
fn disk_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::WouldBlock => "; another program serves it",
        _ => "",
    }
}

impl ProgramError {
    /// The broker, or the device, is not there, and may come back. `was_there`: it was before, so that
    /// it is no mistake to look for one; what is plugged anew is not all there at once.
    pub fn is_gone(&self, was_there: bool) -> bool {
        if was_there && matches!(self, Self::Transport(_)) {
            return true;
        }
        matches!(
            self,
            Self::Transport(TransportError::Gone { .. } | TransportError::Broker { .. })
                | Self::Owner(_)
                | Self::BrokerGone { .. }
        )
    }
}

/// Why a program ends before its time.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// No device was chosen.
    #[error(
        "which device? Give --device ADDRESS or --device auto in a guest, or --socket PATH for a broker's peer socket"
    )]
    NoDevice,
    /// Not two devices were chosen.
    #[error(
        "two devices are needed, and {given} given: give --device ADDRESS twice in a guest, or --socket PATH twice for two sockets of a broker"
    )]
    NotTwo {
        /// How many were.
        given: usize,
    },
    /// Not so many devices were chosen as can be bridged.
    #[error(
        "2 to {most} devices are needed, and {given} given: give --device ADDRESS for each in a guest (or --device all once, for all that there are), or --socket PATH for each of several sockets of a broker"
    )]
    NotSeveral {
        /// How many were.
        given: usize,
        /// How many can be.
        most: usize,
    },
    /// One was chosen twice.
    #[error(
        "the same device is given twice: each owner has a device of its own, which is named by its address"
    )]
    Twice,
    /// The device cannot be had, or is gone.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The device has no interrupts.
    #[error("{device} has no interrupts here: use --vfio, or --wait poll")]
    NoInterrupts {
        /// The device's name.
        device: String,
    },
    /// The link area is not where the config space says.
    #[error("link area: {0}")]
    Link(#[from] LinkError),
    /// The control area is not where the config space says.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The broker does not serve the owner.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// The broker has hung up on the owner.
    #[error("{socket}: the broker has closed the connection")]
    BrokerGone {
        /// The owner socket.
        socket: String,
    },
    /// The broker does not offer what the owner's driver needs.
    #[error("{socket}: the broker offers features {offered:#x}, which lack {missing:#x}")]
    Features {
        /// The owner socket.
        socket: String,
        /// What it offers.
        offered: u64,
        /// What is missing.
        missing: u64,
    },
    /// The two cards do not fit the owner's memory.
    #[error(transparent)]
    Crossover(#[from] crate::net::crossover::CrossoverError),
    /// The owner's port does not fit its memory.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// As above.
    #[error(transparent)]
    Memory(#[from] ShmError),
    /// The device broke a ring.
    #[error(transparent)]
    Ring(#[from] DriverFault),
    /// The network card cannot be had, or does not do what it must.
    #[error(transparent)]
    Nic(#[from] crate::nic::NicError),
    /// The tap interface cannot be had.
    #[error("tap interface {name}: {step}: {source}{advice}")]
    Tap {
        /// The interface's name.
        name: String,
        /// What was tried.
        step: &'static str,
        /// The system's answer.
        source: io::Error,
        /// What to do, or nothing.
        advice: &'static str,
    },
    /// There is no link to look at.
    #[error("{device}: no link within {waited:?}: is the owner there, and its driver?")]
    NoLink {
        /// The device's name.
        device: String,
        /// How long was waited.
        waited: Duration,
    },
    /// The device does not map what it should.
    #[error("the device does not map IOVA {iova:#x}: its answer is \"{answer}\"")]
    NotMapped {
        /// What was asked for.
        iova: u64,
        /// The answer.
        answer: &'static str,
    },
    /// The program in the other guest does not go on.
    #[error("the other side did not get to {turn:?} within {waited:?}")]
    NoTurn {
        /// What was waited for.
        turn: Turn,
        /// How long.
        waited: Duration,
    },
    /// There is no attack of this name.
    #[error("there is no attack {name}; there are {names}")]
    NoAttack {
        /// What was asked for.
        name: String,
        /// What there is.
        names: String,
    },
    /// Honest traffic does not come back after an attack.
    #[error("after {attack}: {back} of {packets} packets came back, {corrupted} with a wrong byte")]
    NotBack {
        /// The attack.
        attack: String,
        /// Packets that were to come back.
        packets: u64,
        /// Those that did.
        back: u64,
        /// Those that are none.
        corrupted: u64,
    },
    /// The disk cannot be served.
    #[error("the disk {path}: {source}{}", disk_advice(source))]
    Disk {
        /// The file or device.
        path: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The disk is not the one that the owner is told of.
    #[error(
        "the disk {path} has {has} bytes, and the owner is told that it has {told} (size in the link's configuration): give it a disk of that size, or change the configuration"
    )]
    DiskSize {
        /// The file or device.
        path: String,
        /// Bytes that it has.
        has: u64,
        /// Bytes that the owner is told of.
        told: u64,
    },
    /// A file does not have what was written to it.
    #[error("{path}: {wrong} blocks are not what they should be")]
    WrongBlocks {
        /// The file.
        path: String,
        /// How many.
        wrong: u64,
    },
    /// The system refused something else.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}
