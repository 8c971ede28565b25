//! The doorbell function of a link (`docs/vhost-pci-device.md`, section 12), by which
//! notifications go from VM to VM without the host's help.
//!
//! | file | what it holds |
//! |---|---|
//! | [`page`] | the page that says how notifications go |
//! | [`function`] | the PCI function, through VFIO |
//!
//! Here: finding the function that belongs to a link, letting it go, and following its page. A
//! vector is unmasked when the page says what it is for, not before: QEMU on KVM ends itself
//! over a vector that is unmasked before it knows the eventfd.

mod function;
mod page;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use std::{fs, io};

use self::function::Function;
use self::page::Changed;
use super::Pairing;
use super::sys::event::Event;
use super::sysfs::PciDevice;

/// A function that could not be used is tried again after so long: what is in the way may go.
const TRY_AGAIN: Duration = Duration::from_secs(5);
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
    /// One a vring, signalled by the vector that the page names for it.
    kicks: Vec<Event>,
    paired: RwLock<Option<Paired>>,
    search: Mutex<Search>,
}

/// A function in use.
struct Paired {
    function: Function,
    link_id: u64,
    number: u32,
    /// The page's generation that was followed last.
    followed: AtomicU64,
    /// Kicks of some vring would get lost.
    deaf: AtomicBool,
    /// By vector: the vring whose eventfd it signals.
    armed: Mutex<Vec<Option<u16>>>,
}

/// What was found unfit, and when.
#[derive(Default)]
struct Search {
    pairings: u32,
    /// By the folder in sysfs, which is another one when the function was plugged anew.
    unfit: HashMap<u64, Unfit>,
    /// That there is no function was said for this link.
    missed: Option<u64>,
}

struct Unfit {
    link_id: u64,
    /// When it may be tried again; never, if nothing but plugging it anew can help.
    again: Option<Instant>,
    why: String,
}

impl Doorbells {
    /// For a device with this many vrings; none is paired yet.
    ///
    /// # Errors
    /// When the system gives no eventfds.
    pub fn new(device: &str, vrings: u16) -> io::Result<Self> {
        let kicks = (0..vrings).map(|_| Event::new()).collect::<io::Result<_>>()?;
        Ok(Self { device: device.to_owned(), kicks, paired: RwLock::default(), search: Mutex::default() })
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
        let mut search = self.search.lock().unwrap_or_else(PoisonError::into_inner);
        let mut slot = self.paired.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(paired) = &*slot {
            // Relaxed: ordered with nothing.
            let deaf = paired.deaf.load(Ordering::Relaxed);
            let why = match paired.link_id == link_id {
                true if deaf => Some("a vector that its page names does not interrupt"),
                true => paired.function.has_to_go(),
                false => Some("the link is another one now"),
            };
            let Some(why) = why else { return Some(paired.pairing()) };
            let address = paired.function.address();
            tracing::warn!(
                device = self.device,
                doorbell = address,
                "letting the doorbell function go: {why}"
            );
            if let Some(folder) = PciDevice::at(address).ok().and_then(|device| folder(&device)) {
                let again = (!deaf).then(|| Instant::now() + TRY_AGAIN);
                search.unfit.insert(folder, Unfit { link_id, again, why: why.into() });
            }
            *slot = None;
        }
        if link_id != 0 {
            *slot = search.find(&self.device, link_id);
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
        for ((vring, entry), kick) in (0_u16..).zip(&entries).zip(kicks) {
            let Some(vector) = entry.vector else { continue };
            match usize::try_from(vector).ok().and_then(|vector| armed.get_mut(vector)) {
                None => {
                    tracing::warn!(device, vring, vector, "the doorbell function has no such vector");
                    self.deaf.store(true, Ordering::Relaxed);
                }
                Some(slot) if *slot == Some(vring) => {}
                Some(slot) => {
                    *slot = Some(vring);
                    let interrupts = self.function.arm(vector as u16, kick).unwrap_or_else(|error| {
                        tracing::warn!(device, vring, vector, "{error}");
                        false
                    });
                    if !interrupts {
                        self.deaf.store(true, Ordering::Relaxed);
                    }
                }
            }
        }
        self.followed.store(generation, Ordering::Relaxed);
        // What was rung by an entry that went meanwhile may have reached nobody (12.4). Each
        // follows the page as it is by now. All vrings, also those that lost their entry.
        for (vring, _) in (0_u16..).zip(kicks) {
            self.call(vring, virtqueue);
        }
    }
}

impl Search {
    /// The first function that is the link's.
    fn find(&mut self, device: &str, link_id: u64) -> Option<Paired> {
        let candidates: Vec<_> =
            Function::candidates().into_iter().filter_map(|pci| Some((folder(&pci)?, pci))).collect();
        // What was pulled out is not remembered.
        self.unfit.retain(|known, _| candidates.iter().any(|(folder, _)| folder == known));
        for (folder, pci) in &candidates {
            let known = self.unfit.get(folder).filter(|unfit| unfit.link_id == link_id);
            if known.is_some_and(|unfit| unfit.again.is_none_or(|again| Instant::now() < again)) {
                continue;
            }
            match Function::open(pci, link_id) {
                Ok(function) => {
                    self.pairings = self.pairings.wrapping_add(1);
                    self.unfit.remove(folder);
                    self.missed = None;
                    let vectors = function.vectors();
                    tracing::info!(
                        device,
                        doorbell = pci.address(),
                        vectors,
                        "notifications can go by the doorbell function"
                    );
                    return Some(Paired {
                        function,
                        link_id,
                        number: self.pairings,
                        followed: AtomicU64::new(NONE),
                        deaf: AtomicBool::new(false),
                        armed: Mutex::new(vec![None; vectors.into()]),
                    });
                }
                Err(error) => {
                    let why = error.to_string();
                    if known.is_none_or(|unfit| unfit.why != why) {
                        tracing::info!(
                            device,
                            doorbell = pci.address(),
                            "the doorbell function is not used: {why}"
                        );
                    }
                    let again = Some(Instant::now() + TRY_AGAIN);
                    self.unfit.insert(*folder, Unfit { link_id, again, why });
                }
            }
        }
        if self.missed.replace(link_id) != Some(link_id) {
            tracing::info!(device, "no doorbell function of this link: notifications go through the broker");
        }
        None
    }
}

/// What tells a function's folder in sysfs from that of a function plugged later.
fn folder(device: &PciDevice) -> Option<u64> {
    fs::metadata(device.folder()).ok().map(|metadata| metadata.ino())
}
