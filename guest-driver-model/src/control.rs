//! The control ring (`docs/vhost-pci-device.md`, section 9): the driver tells the
//! device what it serves and what it found broken, and asks it for memory that the window
//! does not show.
//!
//! Owns: the ring and the buffers in the control area of the window. Never believes
//! that the device answers: each wait has an end, and a buffer that the device has
//! not given back is not used again.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost_pci_device::abi::{self, FaultKind};
use zerocopy::IntoBytes;

use self::batch::{Batch, JOB};
use crate::ring::{AddError, Buffer, Completion, DriverFault, DriverRing, Fault, RingPlaces};
use crate::shm::{SharedMemory, ShmError};
use crate::transport::Transport;

mod batch;
pub mod exchange;
pub(crate) mod served;

pub use self::batch::ControlExchange;
pub use self::exchange::{Exchange, Job, Nobody, Outcome, Request};

const REQUEST_LEN: u64 = size_of::<abi::ControlRequest>() as u64;
const RESPONSE_LEN: u64 = size_of::<abi::ControlResponse>() as u64;
/// Bytes between two buffers: a request, and the response behind it.
const BUFFER_STRIDE: u64 = 64;
/// Commands that the ring has room for: two descriptors each.
const SLOTS: u64 = abi::CONTROL_RING_SIZE as u64 / 2;

/// The driver's mark (9.1): a device that starts anew brings a new area, and the mark is
/// not in it.
const MARK: u64 = u64::from_le_bytes(*b"VPdriver");

/// What the ring, its buffers and the driver's words take at least, bytes.
pub(crate) const AREA_LEN: u64 = abi::CONTROL_BUFFERS + SLOTS * BUFFER_STRIDE + abi::CONTROL_SERVED_FROM_END;

const _: () = {
    assert!(REQUEST_LEN + RESPONSE_LEN <= BUFFER_STRIDE);
    assert!(AREA_LEN <= abi::CONTROL_LEN);
};

/// A command to the device (9.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The driver serves the vrings of this generation.
    Attach {
        /// The link page's generation.
        generation: u64,
        /// The driver waits for interrupts; otherwise it polls.
        interrupt: bool,
        /// It has the link's doorbell function, with so many MSI-X vectors.
        doorbell: Option<u16>,
        /// A device of this VM uses the window: the driver says [`Command::Release`] before what
        /// leaves the link page leaves the window.
        quiesce: bool,
        /// It keeps its word of what it serves at each moment (9.1).
        says_served: bool,
    },
    /// The driver has let go of all vrings.
    Detach,
    /// Its device has let go of all that is not in the mapping table of this generation.
    Release {
        /// The table's generation.
        table: u64,
    },
    /// The driver has stopped serving a vring that is broken.
    Fault {
        /// The owner's vring.
        vring: u16,
        /// What is wrong.
        kind: FaultKind,
        /// What was seen.
        value: u64,
    },
}

impl From<Fault> for Command {
    fn from(fault: Fault) -> Self {
        Self::Fault { vring: fault.vring, kind: fault.kind, value: fault.value }
    }
}

impl Command {
    /// As it goes to the device.
    fn to_abi(self) -> abi::ControlRequest {
        let request = |command: u16| abi::ControlRequest { command: command.into(), ..Default::default() };
        match self {
            Self::Attach { generation, interrupt, doorbell, quiesce, says_served } => {
                let flag = |set, flag| if set { flag } else { 0 };
                let flags = flag(interrupt, abi::ATTACH_F_INTERRUPT)
                    | flag(doorbell.is_some(), abi::ATTACH_F_DOORBELL)
                    | flag(quiesce, abi::ATTACH_F_QUIESCE)
                    | flag(says_served, abi::ATTACH_F_SERVED);
                abi::ControlRequest {
                    flags: flags.into(),
                    value: generation.into(),
                    len: doorbell.map_or(0, u64::from).into(),
                    ..request(abi::CTRL_ATTACH)
                }
            }
            Self::Detach => request(abi::CTRL_DETACH),
            Self::Release { table } => {
                abi::ControlRequest { value: table.into(), ..request(abi::CTRL_RELEASE) }
            }
            Self::Fault { vring, kind, value } => abi::ControlRequest {
                vring: vring.into(),
                kind: (kind as u32).into(),
                value: value.into(),
                ..request(abi::CTRL_FAULT)
            },
        }
    }
}

/// What the device said to a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The command.
    pub command: Command,
    /// `CTRL_*` result: `CTRL_OK` if all is well.
    pub status: u32,
}

/// Why a command has not been done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The control area is not inside the window.
    #[error("control area: {0}")]
    Area(#[from] ShmError),
    /// The device has taken all commands and given none back.
    #[error("the device has not answered {SLOTS} control commands")]
    Full,
    /// The device did not answer in time. It may still do so.
    #[error("the device did not answer {command:?} within {waited:?}")]
    Timeout {
        /// The command.
        command: Command,
        /// How long was waited.
        waited: Duration,
    },
    /// The device broke the ring.
    #[error("control ring: {0}")]
    Ring(#[from] DriverFault),
    /// The device refuses.
    #[error("the device answers {command:?} with status {status} ({})", status_name(*status))]
    Refused {
        /// The command.
        command: Command,
        /// Its answer.
        status: u32,
    },
}

fn status_name(status: u32) -> &'static str {
    match status {
        abi::CTRL_OK => "ok",
        abi::CTRL_UNKNOWN => "unknown command",
        abi::CTRL_INVALID => "invalid",
        abi::CTRL_STALE => "not the current generation",
        abi::CTRL_DENIED => "denied",
        abi::CTRL_COPY => "to be copied",
        abi::CTRL_BUSY => "too many denials",
        abi::CTRL_NO_ROOM => "no room in the window",
        abi::CTRL_FAILED => "the owner's side failed",
        _ => "?",
    }
}

/// The driver's end of the control ring. Belongs to one appearance of the control
/// area: when the link area has been gone, a new one is made.
#[derive(Debug)]
pub struct ControlRing {
    ring: DriverRing,
    window: SharedMemory,
    buffers: u64,
    mark: u64,
    in_flight: [Option<Command>; SLOTS as usize],
    completions: Vec<Completion>,
    /// Not yet asked for; at most one for each slot.
    answers: Vec<Answer>,
    batch: Batch,
}

impl ControlRing {
    /// A fresh ring in the control area of the device's window, which must be mapped.
    ///
    /// # Errors
    /// If the control area is not inside the window.
    pub fn new(transport: &dyn Transport) -> Result<Self, ControlError> {
        let area = transport.config().control_offset.value();
        let places = RingPlaces {
            size: abi::CONTROL_RING_SIZE,
            desc: area + abi::CONTROL_DESC,
            avail: area + abi::CONTROL_AVAIL,
            used: area + abi::CONTROL_USED,
        };
        let window = transport.window().clone();
        // Descriptors hold window offsets.
        let ring = DriverRing::new(abi::QUEUE_CONTROL, &places, &window, 0, None)?;
        let buffers = area + abi::CONTROL_BUFFERS;
        let end = |from_end| area + transport.config().control_len.value().saturating_sub(from_end);
        let mark = end(abi::CONTROL_MARK_FROM_END);
        window.store_u64(mark, MARK)?;
        let in_flight = [None; SLOTS as usize];
        let batch = Batch::new(buffers + SLOTS * BUFFER_STRIDE, end(abi::CONTROL_SERVED_FROM_END));
        Ok(Self {
            ring,
            window,
            buffers,
            mark,
            in_flight,
            completions: Vec::new(),
            answers: Vec::new(),
            batch,
        })
    }

    /// Whether this is still the control area that the ring was made in. If not, make
    /// another ring: the device counts from zero again.
    pub fn is_current(&self) -> bool {
        self.window.load_u64(self.mark) == Ok(MARK)
    }

    /// Gives the device a command, and does not wait.
    ///
    /// # Errors
    /// If there is no room, or the device broke the ring.
    pub fn send(&mut self, transport: &dyn Transport, command: Command) -> Result<(), ControlError> {
        let slot = self.in_flight.iter().position(Option::is_none).ok_or(ControlError::Full)?;
        let at = self.buffers + slot as u64 * BUFFER_STRIDE;
        self.window.write(at, command.to_abi().as_bytes())?;
        let pieces = [
            Buffer::readable(at, REQUEST_LEN as u32),
            Buffer::writable(at + REQUEST_LEN, RESPONSE_LEN as u32),
        ];
        match self.ring.add(&pieces, slot as u64) {
            Ok(()) => {}
            Err(AddError::Full | AddError::Invalid) => return Err(ControlError::Full),
        }
        if let Some(place) = self.in_flight.get_mut(slot) {
            *place = Some(command);
        }
        self.ring.publish();
        // Commands are rare: the device's wish not to be notified is not asked for, so
        // that a device that lost count still looks.
        transport.doorbell(abi::QUEUE_CONTROL);
        Ok(())
    }

    /// What the device has answered since this was last asked.
    ///
    /// # Errors
    /// If the device broke the ring.
    pub fn answers(&mut self) -> Result<Vec<Answer>, ControlError> {
        self.reap()?;
        Ok(std::mem::take(&mut self.answers))
    }

    /// Takes back what the device has given back, of commands and jobs.
    fn reap(&mut self) -> Result<(), DriverFault> {
        let mut completions = std::mem::take(&mut self.completions);
        completions.clear();
        let reaped = self.ring.reap(abi::CONTROL_RING_SIZE.into(), &mut completions);
        for completion in &completions {
            match completion.token & JOB {
                0 => self.command_done(*completion),
                _ => self.job_done(*completion),
            }
        }
        self.completions = completions;
        reaped.map(drop)
    }

    fn command_done(&mut self, completion: Completion) {
        let slot = completion.token;
        let Some(command) = self.in_flight.get_mut(slot as usize).and_then(Option::take) else { return };
        let at = self.buffers + slot * BUFFER_STRIDE + REQUEST_LEN;
        // An answer too short to have a status is one that refuses.
        let status = match u64::from(completion.len) < RESPONSE_LEN {
            true => abi::CTRL_INVALID,
            false => self.window.load_u32(at).unwrap_or(abi::CTRL_INVALID),
        };
        // Who never asks for answers misses the oldest.
        if self.answers.len() >= SLOTS as usize {
            self.answers.remove(0);
        }
        self.answers.push(Answer { command, status });
    }

    /// Gives the device a command and waits for its answer, at most `patience`.
    /// Answers to other commands that arrive meanwhile are dropped.
    ///
    /// # Errors
    /// If it does not come in time, or is not `CTRL_OK`.
    pub fn call(
        &mut self,
        transport: &dyn Transport,
        command: Command,
        patience: Duration,
    ) -> Result<(), ControlError> {
        // Answers that have come already are not this command's.
        self.answers()?;
        self.send(transport, command)?;
        let start = Instant::now();
        loop {
            if let Some(answer) = self.answers()?.into_iter().find(|answer| answer.command == command) {
                return match answer.status {
                    abi::CTRL_OK => Ok(()),
                    status => Err(ControlError::Refused { command, status }),
                };
            }
            let waited = start.elapsed();
            if waited >= patience {
                return Err(ControlError::Timeout { command, waited });
            }
            wait(transport.interrupt_fd(abi::QUEUE_CONTROL), patience - waited);
        }
    }
}

/// Sleeps until the interrupt, or a short while if there is none: it may also be an
/// older interrupt, or one that somebody else takes.
fn wait(interrupt: Option<BorrowedFd<'_>>, most: Duration) {
    let Some(interrupt) = interrupt else {
        std::thread::sleep(most.min(Duration::from_micros(100)));
        return;
    };
    let mut fds = [PollFd::new(interrupt, PollFlags::POLLIN)];
    // An interrupt can be lost (a vector shared and drained elsewhere): look again soon.
    let most = most.min(Duration::from_millis(20)).as_millis() as u16;
    if poll(&mut fds, PollTimeout::from(most.max(1))).is_ok_and(|ready| ready > 0) {
        // Non-blocking by the transport's contract. What it announced is looked at by
        // whoever loops around this.
        let _ = nix::unistd::read(interrupt, &mut [0; 8]);
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
