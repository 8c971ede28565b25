//! The relay of a link: a thread that waits for the eventfds of one side's VMM and
//! signals the other's. It sees no packet.
//!
//! It never reads an eventfd. The waits are edge-triggered, so each signal wakes the
//! thread once, and a VMM that reads its own eventfd empty in between changes
//! nothing. A write can block: O_NONBLOCK belongs to the open file, which the VMM
//! that sent it has as well, and that VMM can fill the count. So every link has a
//! thread of its own, nobody ever waits for it, and what it is told stays bounded:
//! a VMM that does this stops the notifications of its own link and no other's.
//! The thread runs only while there is something to wire.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use std::{io, thread};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::write;
use tracing::warn;

use super::rate::Rate;
use super::{Input, LinkPort};
use crate::link::Side;
use crate::link::descriptor::Eventfd;
use crate::link::message::{Flood, Wire};

/// The token of what tells the relay of something new.
const WAKE: u64 = 0;
/// That is an eventfd which is always signalled, one for all relays: each looks at it once, and
/// once more whenever it is asked to. So a link needs no descriptor for it.
const LOOK_ONCE: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLONESHOT);
/// Signals that wait for the thread at most. One that is dropped beyond that has
/// met a thread that a VMM holds up.
const MAX_SIGNALS: usize = 64;

/// When the host is asked again for a thread that it did not give.
const AGAIN: Duration = Duration::from_millis(200);

/// What a link's notifications came to.
#[derive(Debug, Default)]
pub struct RelayCounters {
    /// The owner's kicks that were passed to the peer.
    pub kicks: AtomicU64,
    /// The peer's doorbells that were passed to the owner.
    pub calls: AtomicU64,
}

/// What the thread is to take next. The newest wiring counts.
#[derive(Debug, Default)]
struct Mailbox {
    /// What the thread waits on, while it runs.
    epoll: Option<Arc<Epoll>>,
    wiring: Option<Wiring>,
    signals: Vec<Eventfd>,
    /// The host gave no thread: when it is asked again.
    again: Option<Instant>,
}

/// A link's wires, all of them, and its control ring's doorbell.
#[derive(Clone, Debug, Default, PartialEq)]
struct Wiring {
    wires: Vec<Wire>,
    doorbell: Option<Eventfd>,
}

/// What link and thread share.
#[derive(Debug, Default)]
struct Shared {
    mailbox: Mutex<Mailbox>,
    counters: RelayCounters,
}

impl Shared {
    /// Held for a few instructions only, never while anything is waited for.
    fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the thread look into the mailbox, if it runs.
    fn wake(&self, mailbox: &Mailbox) {
        if let (Some(epoll), Ok(ready)) = (&mailbox.epoll, always_signalled()) {
            // Fails only for a descriptor that is not waited for: this one is from the start.
            let _ = epoll.modify(ready, &mut EpollEvent::new(LOOK_ONCE, WAKE));
        }
    }
}

/// The eventfd that is signalled, of this process.
fn always_signalled() -> io::Result<&'static EventFd> {
    static ALWAYS: OnceLock<EventFd> = OnceLock::new();
    if let Some(eventfd) = ALWAYS.get() {
        return Ok(eventfd);
    }
    let eventfd = EventFd::from_value_and_flags(1, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
    Ok(ALWAYS.get_or_init(|| eventfd))
}

/// A link's relay. When dropped the thread ends by itself.
#[derive(Debug)]
pub struct Relay {
    name: String,
    per_second: u32,
    port: LinkPort,
    shared: Arc<Shared>,
}

impl Relay {
    /// The relay of the link with this name and port, which passes on so many notifications a
    /// second at most: more are late, and several become one. Nothing is wired yet.
    ///
    /// # Errors
    /// When the host gives no descriptor.
    pub fn new(name: &str, port: LinkPort, per_second: u32) -> io::Result<Self> {
        // Now, not when there is something to relay.
        always_signalled()?;
        Ok(Self { name: name.into(), per_second, port, shared: Arc::default() })
    }

    /// Lets these wires be relayed, and no others.
    pub fn wire(&self, wires: &[Wire], doorbell: Option<&Eventfd>) {
        let wiring = Wiring { wires: wires.to_vec(), doorbell: doorbell.cloned() };
        self.tell(|mailbox| mailbox.wiring = Some(wiring));
    }

    /// Signals an eventfd once.
    pub fn signal(&self, eventfd: &Eventfd) {
        self.tell(|mailbox| {
            if mailbox.signals.len() < MAX_SIGNALS && !mailbox.signals.contains(eventfd) {
                mailbox.signals.push(eventfd.clone());
            }
        });
    }

    /// The link's counts.
    pub fn counters(&self) -> &RelayCounters {
        &self.shared.counters
    }

    fn tell(&self, change: impl FnOnce(&mut Mailbox)) {
        let mut mailbox = self.shared.mailbox();
        change(&mut mailbox);
        match mailbox.epoll {
            Some(_) => self.shared.wake(&mailbox),
            None => self.start(&mut mailbox),
        }
    }

    /// Starts the thread, which looks into the mailbox first of all.
    fn start(&self, mailbox: &mut Mailbox) {
        match Worker::spawn(self) {
            Ok(epoll) => {
                mailbox.epoll = Some(epoll);
                mailbox.again = None;
            }
            Err(error) => {
                // Said once: a guest causes this as often as it likes.
                if mailbox.again.replace(Instant::now() + AGAIN).is_none() {
                    warn!(
                        link = %self.name,
                        %error,
                        "the host gives no descriptor or thread to relay notifications with; it is asked again"
                    );
                }
            }
        }
    }

    /// When [`Self::time_passed`] has something to do: the host gave no thread.
    pub fn next_wake(&self) -> Option<Instant> {
        self.shared.mailbox().again
    }

    /// A time may have come.
    pub fn time_passed(&self, now: Instant) {
        let mut mailbox = self.shared.mailbox();
        if mailbox.again.is_some_and(|again| now >= again) {
            self.start(&mut mailbox);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let running = self.shared.mailbox().epoll.is_some();
        if running {
            self.wire(&[], None);
        }
    }
}

/// What to do when a source is signalled.
enum Action {
    Signal { target: Eventfd, from: Side },
    Control,
}

struct Route {
    source: Eventfd,
    action: Action,
}

impl Route {
    /// Whose signals these are.
    fn from(&self) -> Side {
        match self.action {
            Action::Signal { from, .. } => from,
            Action::Control => Side::Peer,
        }
    }
}

struct Worker {
    epoll: Arc<Epoll>,
    name: String,
    port: LinkPort,
    shared: Arc<Shared>,
    rate: Rate,
    routes: HashMap<u64, Route>,
    next_token: u64,
}

impl Worker {
    fn spawn(Relay { name, per_second, port, shared }: &Relay) -> io::Result<Arc<Epoll>> {
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        epoll.add(always_signalled()?, EpollEvent::new(LOOK_ONCE, WAKE))?;
        let mut worker = Self {
            epoll: Arc::clone(&epoll),
            name: name.clone(),
            port: port.clone(),
            shared: Arc::clone(shared),
            rate: Rate::new(*per_second, Instant::now()),
            routes: HashMap::new(),
            next_token: WAKE + 1,
        };
        thread::Builder::new().name(format!("{name} relay")).spawn(move || worker.run())?;
        Ok(epoll)
    }

    fn run(&mut self) {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => continue,
                Err(error) => {
                    warn!(link = %self.name, %error, "the relay cannot wait; notifications stop");
                    return;
                }
            };
            for event in &events[..count] {
                if event.data() == WAKE {
                    if !self.take_mail() {
                        return;
                    }
                } else if let Some(route) = self.routes.get(&event.data()) {
                    self.pass_on(route);
                    // Signals of that time are one in their eventfds.
                    if let Some(wait) = self.rate.take(Instant::now()) {
                        self.port.send(Input::TooOften(route.from(), Flood::Notifications));
                        thread::sleep(wait);
                    }
                }
            }
        }
    }

    /// Takes what is in the mailbox; false when there is nothing left to relay.
    fn take_mail(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut mailbox = shared.mailbox();
        let mut signals = std::mem::take(&mut mailbox.signals);
        if let Some(wiring) = mailbox.wiring.take() {
            signals.extend(self.rewire(wiring));
        }
        if signals.is_empty() && self.routes.is_empty() {
            mailbox.epoll = None;
            return false;
        }
        // Looks once more: with nothing wired this was all there was to do.
        if self.routes.is_empty() {
            shared.wake(&mailbox);
        }
        drop(mailbox);
        for eventfd in &signals {
            signal(eventfd);
        }
        true
    }

    /// Waits for other sources from now on. Gives what is to be signalled once: what was passed
    /// on last may have reached an eventfd that its VMM had looked at for the last time.
    fn rewire(&mut self, Wiring { wires, doorbell }: Wiring) -> Vec<Eventfd> {
        let mut again = Vec::new();
        for (_, route) in self.routes.drain() {
            // Fails only for a descriptor that is not waited for.
            let _ = self.epoll.delete(route.source.as_fd());
            if let Action::Signal { target, .. } = &route.action
                && let Some(wire) = wires.iter().find(|wire| wire.source == route.source)
                && wire.target != *target
            {
                again.push(wire.target.clone());
            }
        }
        let signals = wires.into_iter().map(|wire| {
            let action = Action::Signal { target: wire.target, from: wire.from };
            (wire.source, action)
        });
        for (source, action) in signals.chain(doorbell.map(|fd| (fd, Action::Control))) {
            let token = self.next_token;
            self.next_token += 1;
            // A source that was signalled before it is added wakes the relay at once:
            // nothing is lost between two wirings.
            let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, token);
            match self.epoll.add(source.as_fd(), event) {
                Ok(()) => {
                    self.routes.insert(token, Route { source, action });
                }
                Err(error) => warn!(link = %self.name, %error, "an eventfd cannot be relayed"),
            }
        }
        again
    }

    fn pass_on(&self, route: &Route) {
        match &route.action {
            Action::Control => self.port.send(Input::ControlDoorbell),
            Action::Signal { target, from } => {
                signal(target);
                let counter = match from {
                    Side::Owner => &self.shared.counters.kicks,
                    Side::Peer => &self.shared.counters.calls,
                };
                // Relaxed: a count for people, ordered with nothing.
                counter.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Signals an eventfd. Fails only when its count is at its end: then it is
/// signalled already.
fn signal(eventfd: &Eventfd) {
    let _ = write(eventfd.as_fd(), &1_u64.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::{Duration, Instant};

    fn pair() -> (EventFd, Eventfd) {
        let mine = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let theirs = mine.as_fd().try_clone_to_owned().unwrap();
        (mine, Eventfd::new(theirs))
    }

    fn relay() -> Relay {
        Relay::new("test", LinkPort::default(), 1_000_000).unwrap()
    }

    /// Waits until the thread has ended.
    fn end(relay: Relay) {
        let shared = Arc::clone(&relay.shared);
        drop(relay);
        let end = Instant::now() + Duration::from_secs(5);
        while shared.mailbox().epoll.is_some() {
            assert!(Instant::now() < end, "the thread does not end");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn wait_for(eventfd: &EventFd) -> bool {
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end {
            if eventfd.read().is_ok() {
                return true;
            }
            thread::sleep(Duration::from_millis(1));
        }
        false
    }

    #[test]
    fn each_signal_is_passed_on_although_nobody_reads_the_source() {
        let link = relay();
        let (kick, source) = pair();
        let (call, target) = pair();
        link.wire(&[Wire { vring: 0, from: Side::Owner, source, target }], None);
        for _ in 0..100 {
            kick.write(1).unwrap();
            assert!(wait_for(&call));
        }
        assert_eq!(link.counters().kicks.load(Ordering::Relaxed), 100);
        link.wire(&[], None);
        end(link);
        kick.write(1).unwrap();
        assert!(call.read().is_err());
    }

    #[test]
    fn a_signal_before_the_wiring_is_not_lost() {
        let link = relay();
        let (kick, source) = pair();
        let (call, target) = pair();
        kick.write(1).unwrap();
        link.wire(&[Wire { vring: 0, from: Side::Peer, source, target }], None);
        assert!(wait_for(&call));
    }

    #[test]
    fn a_replaced_target_is_signalled_once() {
        let link = relay();
        let (kick, source) = pair();
        let (_, old) = pair();
        let (call, target) = pair();
        link.wire(&[Wire { vring: 0, from: Side::Peer, source: source.clone(), target: old }], None);
        thread::sleep(Duration::from_millis(20));
        link.wire(&[Wire { vring: 0, from: Side::Peer, source, target }], None);
        assert!(wait_for(&call));
        thread::sleep(Duration::from_millis(20));
        assert!(call.read().is_err());
        drop(kick);
    }

    #[test]
    fn a_replaced_target_that_blocks_holds_up_nobody_who_tells_the_relay_something() {
        let link = relay();
        let (_kick, source) = pair();
        let (_, old) = pair();
        // Full, and a write to it waits.
        let full = EventFd::from_flags(EfdFlags::empty()).unwrap();
        full.write(u64::MAX - 1).unwrap();
        let target = Eventfd::new(full.as_fd().try_clone_to_owned().unwrap());
        link.wire(&[Wire { vring: 0, from: Side::Peer, source: source.clone(), target: old }], None);
        thread::sleep(Duration::from_millis(20));
        link.wire(&[Wire { vring: 0, from: Side::Peer, source, target: target.clone() }], None);
        thread::sleep(Duration::from_millis(20));
        let (told, hears) = std::sync::mpsc::channel();
        thread::spawn(move || {
            link.signal(&target);
            link.wire(&[], None);
            let _ = told.send(link);
        });
        let link = hears.recv_timeout(Duration::from_secs(5)).unwrap();
        full.read().unwrap();
        end(link);
    }

    #[test]
    fn a_signal_without_any_wire_is_sent_and_the_thread_ends() {
        let link = relay();
        let (interrupt, target) = pair();
        for _ in 0..100 {
            link.signal(&target);
            assert!(wait_for(&interrupt));
        }
        end(link);
    }
}
