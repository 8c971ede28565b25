//! What the peer's driver says that it serves at this moment (`docs/vhost-pci-device.md`, 9.1), when its link
//! ends: a burst that it is in the middle of is completed in a window that is there. A ring of which some
//! stores came and others did not would stand still.
//!
//! Only for drivers that say so (ATTACH with SERVED). The page says first that the link is another one; then
//! the runtime looks at the driver's word until it is not of an earlier link, or the driver has had its time,
//! and only then the peer's VMM is asked to unmap anything. This file never does I/O.

use std::time::{Duration, Instant};

/// The longest that a driver has: it may get no processor for a while, or have been killed. A fourth of the
/// time for a change of the window, if that is shorter.
const PATIENCE: Duration = Duration::from_millis(100);

/// The driver that a link waits for, if it does.
#[derive(Debug)]
pub struct Served {
    patience: Duration,
    until: Option<Instant>,
}

impl Served {
    /// Nobody is waited for; `timeout` is that for a change of the window.
    pub fn new(timeout: Duration) -> Self {
        Self { patience: PATIENCE.min(timeout / 4), until: None }
    }

    /// The link that a driver serves is another one from now on. Who waits already waits for no longer than
    /// before.
    pub fn wait(&mut self, now: Instant) {
        self.until.get_or_insert(now + self.patience);
    }

    /// Whether what leaves the window has to stay in it for now.
    pub fn is_waited_for(&self) -> bool {
        self.until.is_some()
    }

    /// It serves no earlier link, or is not there any more.
    pub fn end(&mut self) {
        self.until = None;
    }

    /// Time passed.
    pub fn tick(&mut self, now: Instant) {
        self.until.take_if(|until| now >= *until);
    }

    /// When [`Self::tick`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.until
    }
}
