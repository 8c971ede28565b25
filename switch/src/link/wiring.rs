//! What of the owner's eventfds the peer's VMM was handed, so that notifications need no
//! thread of the broker (`docs/vhost-user-extensions.md`, WIRING), and the steps to what it
//! should have. Never does I/O.
//!
//! Each vring has two ends: its kicks come from the owner and are the peer's interrupts; its
//! calls come from the peer. What is not carried by the peer's VMM the relay carries.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use vhost_pci_device::abi;

use super::descriptor::Eventfd;
use super::fault::Fault;
use super::message::{Effect, Side};

/// One direction of one vring's notifications: the vring, and whom they come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct End {
    /// The owner's vring.
    pub vring: u16,
    /// The owner: kicks. The peer: calls.
    pub from: Side,
}

/// The owner's eventfd of each end.
pub type Ends = BTreeMap<End, Eventfd>;

/// Numbers what the peer's VMM was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireId(pub u64);

/// What the peer's VMM is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct WireRequest {
    /// Which end.
    pub end: End,
    /// What is to be wired; none: what was wired is taken back.
    pub eventfd: Option<Eventfd>,
}

impl WireRequest {
    /// The virtqueue of the peer's device.
    pub fn queue(&self) -> u16 {
        abi::queue_of_vring(self.end.vring)
    }
}

/// What is known of an end. Of one that is not here nothing is wired.
#[derive(Debug)]
enum State {
    Wired(Eventfd),
    /// It was wired when the device stopped, or it was not.
    Doubtful(Eventfd),
    /// The VMM was asked for `wants` (None: to take it back), and has or may have `had`.
    Asked {
        id: WireId,
        had: Option<Eventfd>,
        wants: Option<Eventfd>,
        /// The device was stopped meanwhile.
        stopped: bool,
    },
    /// The VMM does not want this one.
    Refused(Eventfd),
}

/// The wiring of one peer.
#[derive(Debug)]
pub struct Wiring {
    timeout: Duration,
    ends: BTreeMap<End, State>,
    /// The device is not started: its VMM has taken everything back.
    is_stopped: bool,
    next: u64,
    /// Answers come in the order of the requests.
    unanswered: VecDeque<(WireId, Instant)>,
}

/// What a VMM's answer came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answered {
    /// Nothing further.
    Done,
    /// Calls of this end may have gone to an eventfd that the owner's VMM does not look at any
    /// more: the present one has to be signalled.
    SignalAgain(End),
}

impl Wiring {
    /// Nothing is wired. The peer's VMM has `timeout` to answer.
    pub fn new(timeout: Duration) -> Self {
        Self { timeout, ends: BTreeMap::new(), is_stopped: true, next: 0, unanswered: VecDeque::new() }
    }

    /// Asks for the next steps towards `wanted`.
    pub fn reconcile(&mut self, wanted: &Ends, now: Instant, effects: &mut Vec<Effect>) {
        let ends: BTreeSet<End> = self.ends.keys().chain(wanted.keys()).copied().collect();
        for end in ends {
            let wants = wanted.get(&end).cloned();
            let had = match (self.ends.get(&end), &wants) {
                // One question at a time.
                (Some(State::Asked { .. }), _) => continue,
                (Some(State::Wired(wired)), Some(wants)) if wired == wants => continue,
                (Some(State::Refused(refused)), Some(wants)) if refused == wants => continue,
                // It has nothing, unless it has been started again, of which we shall hear.
                (Some(State::Doubtful(_)), _) if self.is_stopped => continue,
                (Some(State::Refused(_)), None) => {
                    self.ends.remove(&end);
                    continue;
                }
                (Some(State::Wired(wired) | State::Doubtful(wired)), _) => Some(wired.clone()),
                (Some(State::Refused(_)) | None, _) => None,
            };
            self.next += 1;
            let id = WireId(self.next);
            self.unanswered.push_back((id, now + self.timeout));
            effects.push(Effect::WirePeer(id, WireRequest { end, eventfd: wants.clone() }));
            self.ends.insert(end, State::Asked { id, had, wants, stopped: false });
        }
    }

    /// The VMM answered.
    ///
    /// # Errors
    /// When it did not take back what it must: it cannot be relied on.
    pub fn answered(&mut self, id: WireId, result: Result<(), String>) -> Result<Answered, Fault> {
        match self.unanswered.front() {
            Some((oldest, _)) if *oldest == id => drop(self.unanswered.pop_front()),
            // The answer to a session that is gone already.
            _ => return Ok(Answered::Done),
        }
        let asked = |state: &State| matches!(state, State::Asked { id: asked, .. } if *asked == id);
        let Some(end) = self.ends.iter().find(|(_, state)| asked(state)).map(|(end, _)| *end) else {
            return Ok(Answered::Done);
        };
        let Some(State::Asked { had, wants, stopped, .. }) = self.ends.remove(&end) else {
            return Ok(Answered::Done);
        };
        match (wants, result) {
            (None, Err(reason)) if !stopped => return Err(Fault::Wiring(format!("refused to {reason}"))),
            (None, _) => {}
            (Some(wants), Ok(())) if stopped => drop(self.ends.insert(end, State::Doubtful(wants))),
            (Some(wants), Ok(())) => drop(self.ends.insert(end, State::Wired(wants))),
            // One that was stopped in between may take it now.
            (Some(_), Err(_)) if stopped => {}
            (Some(wants), Err(_)) => drop(self.ends.insert(end, State::Refused(wants))),
        }
        Ok(match end.from {
            Side::Peer if had.is_some() => Answered::SignalAgain(end),
            _ => Answered::Done,
        })
    }

    /// A queue of the device was stopped: its VMM has taken everything back.
    pub fn queue_stopped(&mut self, queue: u32) {
        self.stop(|end| u32::from(abi::queue_of_vring(end.vring)) == queue);
    }

    /// The device was started.
    pub fn device_started(&mut self) {
        self.is_stopped = false;
    }

    /// The device was stopped: its VMM has taken everything back.
    pub fn device_stopped(&mut self) {
        self.is_stopped = true;
        self.stop(|_| true);
    }

    fn stop(&mut self, concerned: impl Fn(&End) -> bool) {
        self.ends.retain(|end, state| match state {
            _ if !concerned(end) => true,
            State::Asked { had, stopped, .. } => {
                *had = None;
                *stopped = true;
                true
            }
            State::Wired(_) | State::Doubtful(_) | State::Refused(_) => false,
        });
    }

    /// The VMM left.
    pub fn disconnected(&mut self) {
        self.is_stopped = true;
        self.ends.clear();
        self.unanswered.clear();
    }

    /// Whether the peer's VMM has no eventfd but those of `wanted`.
    pub fn is_confined_to(&self, wanted: &Ends) -> bool {
        self.ends.iter().all(|(end, state)| {
            let is_wanted = |eventfd: &Eventfd| wanted.get(end) == Some(eventfd);
            match state {
                State::Wired(wired) => is_wanted(wired),
                State::Doubtful(wired) => self.is_stopped || is_wanted(wired),
                State::Asked { had, wants, .. } => had.iter().chain(wants).all(is_wanted),
                State::Refused(_) => true,
            }
        })
    }

    /// Whether the VMM carries this end, or is about to: whoever else waited for its signals
    /// would take them away.
    pub fn carries(&self, end: End) -> bool {
        self.ends.get(&end).is_some_and(|state| !matches!(state, State::Refused(_)))
    }

    /// Whether this end goes with no thread in between.
    pub fn is_direct(&self, end: End) -> bool {
        matches!(self.ends.get(&end), Some(State::Wired(_)))
    }

    /// Whether the VMM does not want this end's eventfd.
    pub fn is_refused(&self, end: End) -> bool {
        matches!(self.ends.get(&end), Some(State::Refused(_)))
    }

    /// When the VMM has to have answered.
    pub fn deadline(&self) -> Option<Instant> {
        self.unanswered.front().map(|(_, deadline)| *deadline)
    }

    /// Time passed.
    ///
    /// # Errors
    /// When the VMM did not answer in time.
    pub fn tick(&self, now: Instant) -> Result<(), Fault> {
        match self.deadline() {
            Some(deadline) if now >= deadline => {
                let timeout = self.timeout.as_millis();
                Err(Fault::Wiring(format!("did not answer within {timeout} ms that its wiring changed")))
            }
            _ => Ok(()),
        }
    }
}
