//! What direct wiring saves: a process that waits for eventfds and signals others. Each
//! eventfd that the device has registered is joined to one of this process's, as if the VMM
//! that registers them had no access to those of the other VM's.
//!
//! It measures, and is no model: what is masked or taken back while a signal is on its way
//! may be lost.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, bail};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use vhost_pci_device::Held;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::child::{Child, Parent};
use crate::sys::fd;
use crate::vmm::held;

/// The process, as the VMM sees it.
#[derive(Clone, Debug)]
pub struct Relay {
    process: Arc<Mutex<Child>>,
    next: Arc<AtomicU64>,
}

/// One half of a joint: an eventfd of the VMM's own, and what keeps it joined.
pub struct Joint {
    /// The eventfd.
    pub own: EventFd,
    /// The joint, until dropped.
    pub held: Held,
}

impl Relay {
    /// Starts the process.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn start() -> anyhow::Result<Self> {
        let process = Arc::new(Mutex::new(Child::start(&["relay"])?));
        Ok(Self { process, next: Arc::default() })
    }

    /// An eventfd that is signalled when `source` is.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn after(&self, source: &EventFd) -> io::Result<Joint> {
        let own = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let held = self.join(source, &own)?;
        Ok(Joint { own, held })
    }

    /// An eventfd that signals `target` when it is signalled.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn before(&self, target: &EventFd) -> io::Result<Joint> {
        let own = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let held = self.join(&own, target)?;
        Ok(Joint { own, held })
    }

    fn join(&self, source: &EventFd, target: &EventFd) -> io::Result<Held> {
        // Relaxed: only a number.
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        process.give(&format!("source {number}"), source).map_err(io::Error::other)?;
        process.give(&format!("target {number}"), target).map_err(io::Error::other)?;
        let process = Arc::clone(&self.process);
        Ok(held(move || {
            // Fails only if the process is gone.
            let _ = process.lock().unwrap_or_else(PoisonError::into_inner).tell(&format!("part {number}"));
        }))
    }
}

/// Joints by number: source, and target once it is known.
type Joints = Mutex<HashMap<u64, (EventFd, Option<EventFd>)>>;

/// The process.
///
/// # Errors
/// If the parent is gone.
pub fn run(parent: &Parent) -> anyhow::Result<()> {
    let joints: Arc<Joints> = Arc::default();
    let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
    let (theirs, waits) = (Arc::clone(&joints), Arc::clone(&epoll));
    thread::Builder::new().name("relay".into()).spawn(move || pass_on(&waits, &theirs))?;
    parent.obey(|parent, line| {
        let (what, number) = line.split_once(' ').context("a number is missing")?;
        let number = number.parse()?;
        let mut joints = joints.lock().unwrap_or_else(PoisonError::into_inner);
        match what {
            "source" => {
                joints.insert(number, (fd::eventfd(parent.take()?), None));
            }
            "target" => {
                let (source, target) = joints.get_mut(&number).context("no source")?;
                *target = Some(fd::eventfd(parent.take()?));
                // Each signal wakes the thread once; nobody reads the eventfd.
                let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, number);
                epoll.add(fd::borrow(source), event)?;
            }
            "part" => {
                let (source, _) = joints.remove(&number).context("no joint")?;
                epoll.delete(fd::borrow(&source))?;
            }
            what => bail!("{what:?} is nothing to do"),
        }
        Ok(String::new())
    })
}

fn pass_on(epoll: &Epoll, joints: &Joints) {
    let mut events = [EpollEvent::empty(); 16];
    while let Ok(count) = epoll.wait(&mut events, EpollTimeout::NONE) {
        let joints = joints.lock().unwrap_or_else(PoisonError::into_inner);
        for event in &events[..count] {
            if let Some((_, Some(target))) = joints.get(&event.data()) {
                // Fails only if the count is full: then it is signalled.
                let _ = target.write(1);
            }
        }
    }
}
