//! The driver's word of which link it serves at this moment (9.1), for whoever takes the window away without
//! asking the driver: the broker's guardian.

use std::sync::atomic::{Ordering, fence};

use vhost_pci_device::abi::{self, DeviceConfig};

use crate::shm::SharedMemory;

/// The word, as it was said last.
#[derive(Debug)]
pub(crate) struct Served {
    /// Where it is in the window; nowhere, if the control area has no room for it.
    at: Option<u64>,
    said: u64,
}

impl Served {
    /// Nothing is served yet.
    pub fn new(config: &DeviceConfig) -> Self {
        let inside = config.control_len.value().checked_sub(abi::CONTROL_SERVED_FROM_END);
        Self { at: inside.and_then(|inside| config.control_offset.value().checked_add(inside)), said: 0 }
    }

    /// Says that the vrings of this generation are served from now on; 0: none are. Whether that is new: the
    /// link page has to be looked at once more then, before anything of the owner's is touched. Whoever takes the
    /// window away changes the page, and then looks for the word.
    pub fn say(&mut self, window: &SharedMemory, generation: u64) -> bool {
        if self.said == generation {
            return false;
        }
        self.said = generation;
        // Release: what was written while the last word held is written. What is not mapped takes no word,
        // and has nothing that could be taken away.
        if let Some(at) = self.at {
            let _ = window.store_u64_release(at, generation);
        }
        // Pairs with the fence behind the link page's generation: one of the two sees what the other stored.
        fence(Ordering::SeqCst);
        generation != 0
    }

    /// The control area is another one, in which nothing was said.
    pub fn forget(&mut self) {
        self.said = 0;
    }
}
