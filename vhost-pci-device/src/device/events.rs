//! The device's own eventfds: one pair a virtqueue, for the device's whole life, so that no
//! start or reset of it makes or closes a descriptor.

use std::io;

use vmm_sys_util::eventfd::EventFd;

use crate::sys::event;

/// The two notifications of a virtqueue, as the broker relays them.
pub struct Pair {
    /// The driver's notification (SET_VRING_KICK).
    pub kick: EventFd,
    /// The driver's interrupt (SET_VRING_CALL).
    pub call: EventFd,
}

impl Pair {
    /// A pair without counts.
    ///
    /// # Errors
    /// What the system answers.
    pub fn new() -> io::Result<Self> {
        Ok(Self { kick: event::new()?, call: event::new()? })
    }

    /// Takes the counts away.
    pub fn drain(&self) {
        event::drain(&self.kick);
        event::drain(&self.call);
    }

    /// Takes a count away that leaves no room for a signal, which no driver's and no owner's is.
    pub fn drain_full(&self) {
        for its in [&self.kick, &self.call] {
            if event::is_full(its) {
                event::drain(its);
            }
        }
    }
}
