//! The doorbell function of a link (`docs/vhost-pci-device.md`, section 12), by which
//! notifications go from VM to VM without the host's help.
//!
//! | file | what it holds |
//! |---|---|
//! | [`page`] | the page that says how notifications go |
//! | [`function`] | the PCI function, through VFIO |
//! | [`search`] | which function is the link's, and when to try again one that is unfit |
//!
//! Here: taking the function that belongs to a link, letting it go, and following its page. A
//! vector is unmasked when the page says what it is for, not before: QEMU on KVM ends itself
//! over a vector that is unmasked before it knows the eventfd.

mod function;
mod page;
mod search;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Instant;

use self::function::{Function, PciSlots, Slots};
use self::page::Changed;
use self::search::{LetGo, Search};
use super::Pairing;
use super::sys::event::Event;

/// No generation of a page: it is odd.
const NONE: u64 = 1;

/// What notifications of a vring that have no entry do.
pub trait ByVirtqueue {
    /// Notifies the virtqueue of a vring.
    fn notify(&self, vring: u16);
}

/// The doorbell function's part of a device: which it is, and the eventfds of its vectors.
pub struct Doorbells {
    /// The device's name, for messages.
    device: String,
    slots: Box<dyn Slots>,
    /// One a vring, signalled by the vector that the page names for it.
    kicks: Vec<Event>,
    paired: RwLock<Option<Paired>>,
    search: Mutex<Search>,
}

/// A function in use.
struct Paired {
    function: Box<dyn Function>,
    /// Which of the pluggings at its address it is.
    plugging: u64,
    link_id: u64,
    number: u32,
    /// The page's generation that was followed last.
    followed: AtomicU64,
    /// Kicks of some vring would get lost.
    deaf: AtomicBool,
    /// By vector: the vring whose eventfd it signals.
    armed: Mutex<Vec<Option<u16>>>,
}

impl Doorbells {
    /// For a device with this many vrings; none is paired yet.
    ///
    /// # Errors
    /// When the system gives no eventfds.
    pub fn new(device: &str, vrings: u16) -> io::Result<Self> {
        Self::with_slots(device, vrings, Box::new(PciSlots))
    }

    fn with_slots(device: &str, vrings: u16, slots: Box<dyn Slots>) -> io::Result<Self> {
        let kicks = (0..vrings).map(|_| Event::new()).collect::<io::Result<_>>()?;
        let (paired, search) = (RwLock::default(), Mutex::default());
        Ok(Self { device: device.to_owned(), slots, kicks, paired, search })
    }

    /// The eventfd that a vring's kicks signal when they arrive by the function.
    pub fn kick_fd(&self, vring: u16) -> Option<BorrowedFd<'_>> {
        self.kicks.get(usize::from(vring)).map(Event::as_fd)
    }

    /// Calls the owner for a vring.
    pub fn call(&self, vring: u16, virtqueue: &dyn ByVirtqueue) {
        match &*self.paired.read().unwrap_or_else(PoisonError::into_inner) {
            Some(paired) => paired.call(vring, virtqueue),
            None => virtqueue.notify(vring),
        }
    }

    /// Looks whether there is a function for the link, and whether the one in use still is one.
    pub fn pair(&self, link_id: u64) -> Option<Pairing> {
        self.pair_at(link_id, Instant::now())
    }

    fn pair_at(&self, link_id: u64, now: Instant) -> Option<Pairing> {
        let mut search = self.search.lock().unwrap_or_else(PoisonError::into_inner);
        let mut slot = self.paired.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(paired) = &*slot {
            let Some(reason) = paired.has_to_go(link_id) else { return Some(paired.pairing()) };
            let (doorbell, why) = (paired.function.address(), reason.why());
            tracing::warn!(device = self.device, doorbell, "letting the doorbell function go: {why}");
            search.let_go(paired.plugging, link_id, reason, now);
            *slot = None;
        }
        if link_id != 0 {
            let found = search.find(&*self.slots, &self.device, link_id, now);
            *slot = found.map(|(function, plugging, number)| Paired {
                armed: Mutex::new(vec![None; function.vectors().into()]),
                function,
                plugging,
                link_id,
                number,
                followed: AtomicU64::new(NONE),
                deaf: AtomicBool::new(false),
            });
        }
        slot.as_ref().map(Paired::pairing)
    }

    /// Does as the page says, if it has changed: unmasks vectors, and calls for each vring once.
    pub fn follow(&self, virtqueue: &dyn ByVirtqueue) {
        if let Some(paired) = &*self.paired.read().unwrap_or_else(PoisonError::into_inner) {
            paired.follow(&self.device, &self.kicks, virtqueue);
        }
    }
}

impl Paired {
    fn pairing(&self) -> Pairing {
        Pairing { vectors: self.function.vectors(), number: self.number }
    }

    fn call(&self, vring: u16, virtqueue: &dyn ByVirtqueue) {
        self.function.page().ring(vring, |entry| match entry.doorbell {
            Some(value) => self.function.ring(value),
            None => virtqueue.notify(vring),
        });
    }

    fn follow(&self, device: &str, kicks: &[Event], virtqueue: &dyn ByVirtqueue) {
        let page = self.function.page();
        // Relaxed: who follows twice does no harm. A change that goes on ends with an interrupt.
        let followed = self.followed.load(Ordering::Relaxed);
        if page.generation() == followed {
            return;
        }
        let mut armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        // A vector of an entry that is half written is none to unmask (12.3).
        let Some(Changed { generation, entries }) = page.changed(followed) else { return };
        // One that is deaf is enough: each takes the time of a trial. Relaxed: ordered with
        // nothing.
        let heard = self.deaf.load(Ordering::Relaxed)
            || (0_u16..).zip(&entries).zip(kicks).all(|((vring, entry), kick)| {
                entry.vector.is_none_or(|vector| self.hears(&mut armed, device, vring, vector, kick))
            });
        if !heard {
            self.deaf.store(true, Ordering::Relaxed);
        }
        self.followed.store(generation, Ordering::Relaxed);
        // What was rung by an entry that went meanwhile may have reached nobody (12.4). Each
        // follows the page as it is by now. All vrings, also those that lost their entry.
        for (vring, _) in (0_u16..).zip(kicks) {
            self.call(vring, virtqueue);
        }
    }

    /// Whether kicks of a vring arrive by the vector: arms it, if it is another one than before.
    fn hears(&self, armed: &mut [Option<u16>], device: &str, vring: u16, vector: u32, kick: &Event) -> bool {
        let number = u16::try_from(vector).ok();
        let Some((number, slot)) =
            number.and_then(|number| Some((number, armed.get_mut(usize::from(number))?)))
        else {
            tracing::warn!(device, vring, vector, "the doorbell function has no such vector");
            return false;
        };
        if *slot == Some(vring) {
            return true;
        }
        *slot = Some(vring);
        self.function.arm(number, kick).unwrap_or_else(|error| {
            tracing::warn!(device, vring, vector, "{error}");
            false
        })
    }

    /// Why it is of no more use, if it is not.
    fn has_to_go(&self, link_id: u64) -> Option<LetGo> {
        if self.link_id != link_id {
            return Some(LetGo::Other("the link is another one now"));
        }
        // Relaxed: ordered with nothing.
        if self.deaf.load(Ordering::Relaxed) {
            return Some(LetGo::Deaf);
        }
        self.function.has_to_go().map(LetGo::Other)
    }
}

#[cfg(test)]
mod tests;
