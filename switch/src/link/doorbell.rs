//! The link's doorbell function: an `ivshmem-doorbell` of the peer's VM, whose VMM uses the
//! eventfds that it is sent (`docs/vhost-pci-device.md`, 12). Decides what it is sent and what
//! the doorbell page says. Never does I/O.
//!
//! The VMM answers nothing. What it was sent counts when it has read it: it carries out what it
//! reads before its guest can ring again. It gives nothing back: the vectors of the function are
//! used up one by one, and so are the numbers that its guest rings.

use std::time::{Duration, Instant};

use vhost_pci_device::abi;

use super::descriptor::Eventfd;
use super::fault::Fault;
use super::message::{Effect, Side};
use super::wiring::{End, Ends};

/// Calls that the function is given at most for each vring, as each is a descriptor in the
/// broker and in the VMM. An owner that is a QEMU has two for each vring and changes between
/// them when its guest masks a vector; it brings new ones when its device starts anew.
const CALLS_PER_VRING: usize = 8;
/// Vectors that the function is given at most for each vring: one each time that the owner's
/// device starts anew.
const VECTORS_PER_VRING: u32 = 32;
/// Vectors that the function is given at most: the doorbell register has 8 bits for them.
const MAX_VECTORS: u32 = 256;

/// What the VMM is sent.
#[derive(Clone, Debug, PartialEq)]
pub enum DoorbellMessage {
    /// The next vector of its own.
    OwnVector(Eventfd),
    /// What a ring of vector 0 of this number signals.
    Peer(u16, Eventfd),
}

/// A doorbell function that is connected.
#[derive(Debug)]
pub struct Doorbell {
    timeout: Duration,
    /// By vector: the kick, and whether the VMM has read it.
    vectors: Vec<(Eventfd, bool)>,
    /// By number, from 1 on, likewise.
    calls: Vec<(Eventfd, bool)>,
    /// Until when the VMM has to have read what it was sent.
    deadline: Option<Instant>,
    armed: u32,
    /// Its VMM broke the rules: it is told nothing more, and carries nothing.
    is_refused: bool,
    wanted: Ends,
    generation: u64,
    page: Vec<abi::DoorbellEntry>,
}

impl Doorbell {
    /// One that was sent its greeting. Its VMM has `timeout` to read what it is sent.
    pub fn new(timeout: Duration, now: Instant) -> Self {
        Self {
            timeout,
            is_refused: false,
            vectors: Vec::new(),
            calls: Vec::new(),
            deadline: Some(now + timeout),
            armed: 0,
            wanted: Ends::new(),
            generation: 0,
            page: Vec::new(),
        }
    }

    /// Sends what is missing towards `wanted`, and lets the page say what is there. `armed`:
    /// vectors that the driver waits for. Says whether the page changes.
    pub fn reconcile(
        &mut self,
        wanted: &Ends,
        armed: u32,
        vrings: u16,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) -> bool {
        self.armed = armed.min(MAX_VECTORS).min(VECTORS_PER_VRING * u32::from(vrings));
        let wanted = if self.is_refused { Ends::new() } else { wanted.clone() };
        let before = effects.len();
        for (end, eventfd) in &wanted {
            match end.from {
                Side::Owner => self.give_vector(eventfd, effects),
                Side::Peer => self.give_call(eventfd, CALLS_PER_VRING * usize::from(vrings), effects),
            }
        }
        if effects.len() > before {
            self.deadline = Some(now + self.timeout);
            effects.push(Effect::WatchDoorbell);
        }
        self.wanted = wanted;
        let page: Vec<_> = (0..vrings).map(|vring| self.entry(vring)).collect();
        let changes = page != self.page;
        if changes {
            self.generation += 2;
            effects.push(Effect::PublishDoorbell(page.clone(), self.generation));
            self.page = page;
        }
        changes
    }

    fn give_vector(&mut self, eventfd: &Eventfd, effects: &mut Vec<Effect>) {
        let known = self.vectors.iter().any(|(known, _)| known == eventfd);
        if !known && self.vectors.len() < self.armed as usize {
            self.vectors.push((eventfd.clone(), false));
            effects.push(Effect::Doorbell(DoorbellMessage::OwnVector(eventfd.clone())));
        }
    }

    fn give_call(&mut self, eventfd: &Eventfd, most: usize, effects: &mut Vec<Effect>) {
        let known = self.calls.iter().any(|(known, _)| known == eventfd);
        if !known && self.calls.len() < most {
            self.calls.push((eventfd.clone(), false));
            // At most 8 for each of 64 vrings.
            let number = self.calls.len() as u16;
            effects.push(Effect::Doorbell(DoorbellMessage::Peer(number, eventfd.clone())));
        }
    }

    /// The VMM has read everything.
    pub fn read(&mut self) {
        self.deadline = None;
        self.vectors.iter_mut().chain(&mut self.calls).for_each(|(_, is_read)| *is_read = true);
    }

    fn entry(&self, vring: u16) -> abi::DoorbellEntry {
        let vector = self.vector(End { vring, from: Side::Owner });
        let number = self.number(End { vring, from: Side::Peer });
        let flags = vector.map_or(0, |_| abi::DOORBELL_F_KICK) | number.map_or(0, |_| abi::DOORBELL_F_CALL);
        abi::DoorbellEntry {
            flags: flags.into(),
            vector: vector.unwrap_or(0).into(),
            // Peer and vector (QEMU, docs/specs/ivshmem-spec.rst, Doorbell register).
            doorbell: (u32::from(number.unwrap_or(0)) << 16).into(),
            reserved: 0.into(),
        }
    }

    fn vector(&self, end: End) -> Option<u32> {
        let eventfd = self.wanted.get(&end)?;
        let index = self.vectors.iter().position(|(known, is_read)| known == eventfd && *is_read)?;
        u32::try_from(index).ok().filter(|index| *index < self.armed)
    }

    fn number(&self, end: End) -> Option<u16> {
        let eventfd = self.wanted.get(&end)?;
        let index = self.calls.iter().position(|(known, is_read)| known == eventfd && *is_read)?;
        u16::try_from(index + 1).ok()
    }

    /// Whether it carries this end.
    pub fn is_direct(&self, end: End) -> bool {
        match end.from {
            Side::Owner => self.vector(end).is_some(),
            Side::Peer => self.number(end).is_some(),
        }
    }

    /// Whether it carries this end, or will when the VMM has read what it was sent.
    pub fn carries(&self, end: End) -> bool {
        let known = |eventfd: &Eventfd| match end.from {
            Side::Owner => self.vectors.iter().take(self.armed as usize).any(|(known, _)| known == eventfd),
            Side::Peer => self.calls.iter().any(|(known, _)| known == eventfd),
        };
        self.wanted.get(&end).is_some_and(known)
    }

    /// Its VMM broke the rules. It keeps its place until it hangs up, with what it has not
    /// read: else it could collect descriptors without end.
    pub fn refuse(&mut self) {
        self.is_refused = true;
        self.deadline = None;
    }

    /// Whether its VMM broke the rules.
    pub fn is_refused(&self) -> bool {
        self.is_refused
    }

    /// When the VMM has to have read everything.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Time passed.
    ///
    /// # Errors
    /// When the VMM has not read what it was sent.
    pub fn tick(&self, now: Instant) -> Result<(), Fault> {
        match self.deadline {
            Some(deadline) if now >= deadline => Err(Fault::DoorbellUnread(self.timeout.as_millis())),
            _ => Ok(()),
        }
    }
}
