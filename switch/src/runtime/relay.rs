//! The relay: one thread that waits for the eventfds of one side's VMM and signals
//! the other's, for every link of the broker.
//!
//! It never reads an eventfd. The waits are edge-triggered, so each signal wakes the
//! thread once, and a VMM that reads its own eventfd empty in between changes
//! nothing. It sees no packet.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{io, thread};

use crossbeam_channel::{Receiver, Sender, unbounded};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::write;
use tracing::warn;

use super::LinkPort;
use crate::link::Side;
use crate::link::descriptor::Eventfd;
use crate::link::message::Wire;

/// The token of the eventfd by which the relay is told of new commands.
const WAKE: u64 = 0;

/// What a link's notifications came to.
#[derive(Debug, Default)]
pub struct RelayCounters {
    /// The owner's kicks that were passed to the peer.
    pub kicks: AtomicU64,
    /// The peer's doorbells that were passed to the owner.
    pub calls: AtomicU64,
}

enum Command {
    /// A link's wires, all of them, and its control ring's doorbell.
    Wire {
        link: usize,
        wires: Vec<Wire>,
        doorbell: Option<Eventfd>,
    },
    Stop,
}

/// What to do when a source is signalled.
enum Action {
    Signal { target: Eventfd, from: Side },
    Control,
}

struct Route {
    link: usize,
    source: Eventfd,
    action: Action,
}

/// A link's place at the relay.
#[derive(Clone, Debug)]
pub struct LinkRelay {
    link: usize,
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    counters: Arc<RelayCounters>,
}

impl LinkRelay {
    /// Lets these wires be relayed, and no others of the link.
    pub fn wire(&self, wires: &[Wire], doorbell: Option<&Eventfd>) {
        let command = Command::Wire { link: self.link, wires: wires.to_vec(), doorbell: doorbell.cloned() };
        drop(self.commands.send(command));
        wake(&self.wake);
    }

    /// The link's counts.
    pub fn counters(&self) -> &RelayCounters {
        &self.counters
    }
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Command")
    }
}

/// The relay's thread. Ends when dropped.
#[derive(Debug)]
pub struct Relay {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    thread: Option<thread::JoinHandle<()>>,
    counters: Vec<Arc<RelayCounters>>,
}

impl Relay {
    /// Starts the relay for links with these ports.
    ///
    /// # Errors
    /// When the host gives no descriptor or thread.
    pub fn start(ports: Vec<LinkPort>) -> io::Result<Self> {
        let (commands, queue) = unbounded();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&*wake, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, WAKE))?;
        let counters: Vec<_> = ports.iter().map(|_| Arc::default()).collect();
        let mut worker = Worker {
            epoll,
            queue,
            ports,
            counters: counters.clone(),
            routes: HashMap::new(),
            next_token: WAKE + 1,
        };
        let thread = thread::Builder::new().name("relay".into()).spawn(move || worker.run())?;
        Ok(Self { commands, wake, thread: Some(thread), counters })
    }

    /// The place of link number `link`, in the order of the ports.
    pub fn link(&self, link: usize) -> Option<LinkRelay> {
        Some(LinkRelay {
            link,
            commands: self.commands.clone(),
            wake: Arc::clone(&self.wake),
            counters: Arc::clone(self.counters.get(link)?),
        })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        drop(self.commands.send(Command::Stop));
        wake(&self.wake);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn wake(eventfd: &EventFd) {
    // Fails only when the count is at its end, and then the relay is awake.
    let _ = eventfd.write(1);
}

struct Worker {
    epoll: Epoll,
    queue: Receiver<Command>,
    ports: Vec<LinkPort>,
    counters: Vec<Arc<RelayCounters>>,
    routes: HashMap<u64, Route>,
    next_token: u64,
}

impl Worker {
    fn run(&mut self) {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => continue,
                Err(error) => {
                    warn!(%error, "the relay cannot wait; notifications stop");
                    return;
                }
            };
            for event in &events[..count] {
                if event.data() == WAKE {
                    if !self.commands() {
                        return;
                    }
                } else if let Some(route) = self.routes.get(&event.data()) {
                    self.pass_on(route);
                }
            }
        }
    }

    /// Takes all commands; false when the relay is to end.
    fn commands(&mut self) -> bool {
        while let Ok(command) = self.queue.try_recv() {
            match command {
                Command::Stop => return false,
                Command::Wire { link, wires, doorbell } => self.rewire(link, wires, doorbell),
            }
        }
        true
    }

    fn rewire(&mut self, link: usize, wires: Vec<Wire>, doorbell: Option<Eventfd>) {
        let epoll = &self.epoll;
        self.routes.retain(|_, route| {
            if route.link == link {
                // Fails only for a descriptor that is not waited for.
                let _ = epoll.delete(route.source.as_fd());
            }
            route.link != link
        });
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
                    self.routes.insert(token, Route { link, source, action });
                }
                Err(error) => warn!(%error, link, "an eventfd cannot be relayed"),
            }
        }
    }

    fn pass_on(&self, route: &Route) {
        match &route.action {
            Action::Control => self.ports[route.link].ring_doorbell(),
            Action::Signal { target, from } => {
                // Fails only when the count is at its end: then the target is signalled.
                let _ = write(target.as_fd(), &1u64.to_ne_bytes());
                let counters = &self.counters[route.link];
                let counter = match from {
                    Side::Owner => &counters.kicks,
                    Side::Peer => &counters.calls,
                };
                // Relaxed: a count for people, ordered with nothing.
                counter.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
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
        let (input, _output) = unbounded();
        let relay = Relay::start(vec![LinkPort::new(input)]).unwrap();
        let link = relay.link(0).unwrap();
        let (kick, source) = pair();
        let (call, target) = pair();
        link.wire(&[Wire { vring: 0, from: Side::Owner, source, target }], None);
        for _ in 0..100 {
            kick.write(1).unwrap();
            assert!(wait_for(&call));
        }
        assert_eq!(link.counters().kicks.load(Ordering::Relaxed), 100);
        link.wire(&[], None);
        drop(relay);
        kick.write(1).unwrap();
        assert!(call.read().is_err());
    }

    #[test]
    fn a_signal_before_the_wiring_is_not_lost() {
        let (input, _output) = unbounded();
        let relay = Relay::start(vec![LinkPort::new(input)]).unwrap();
        let (kick, source) = pair();
        let (call, target) = pair();
        kick.write(1).unwrap();
        relay.link(0).unwrap().wire(&[Wire { vring: 0, from: Side::Peer, source, target }], None);
        assert!(wait_for(&call));
    }
}
