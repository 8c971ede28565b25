//! The broker: makes the sockets, starts the links and the acceptor, and takes
//! all of it down again.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::time::{ClockId, clock_gettime};
use thiserror::Error;
use tracing::{info, warn};

use super::admission::{Caller, Rule, UnknownAccount};
use super::driver::LinkDriver;
use super::limits;
use super::port::Substitute;
use super::relay::Relay;
use super::sockets::{self, Listener, SocketError};
use super::{Input, LinkPort};
use crate::config::{Config, OneWay};
use crate::confine::Confinement;
use crate::control::server::{self, About};
use crate::link::{Fault, Link, Side};

/// The token of the eventfd that ends the acceptor.
const STOP: u64 = u64::MAX;
/// The token of what asks it to stand in for clocks.
const STAND_IN: u64 = u64::MAX - 1;
/// How often it does.
const STAND_IN_MS: u16 = 100;

/// Why the broker cannot run.
#[derive(Debug, Error)]
pub enum BrokerError {
    /// A socket cannot be listened on.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Who may join a link cannot be told.
    #[error(transparent)]
    Admission(#[from] UnknownAccount),
    /// A link's configuration is impossible.
    #[error("link '{link}': {fault}")]
    Link {
        /// The link.
        link: String,
        /// Why.
        fault: Fault,
    },
    /// Not even the listening sockets have room.
    #[error(
        "{links} links need {needed} descriptors to be listened for, and the broker's limit is {limit}; {}",
        limits::REMEDY
    )]
    Descriptors {
        /// Links of the configuration.
        links: usize,
        /// What they need.
        needed: u64,
        /// The limit.
        limit: u64,
    },
    /// The host has too little of something.
    #[error("the host gives no memory, descriptor or thread: {0}")]
    Host(#[from] io::Error),
}

/// What a listening socket is for.
enum Purpose {
    Link(LinkPort, Side, Rule),
    Doorbell(LinkPort, Rule),
    Control,
}

/// A broker whose sockets are there, and that serves nobody yet. Dropping it removes them.
pub struct Bound {
    config: Config,
    substitute: Substitute,
    ports: Vec<LinkPort>,
    listeners: Vec<(Listener, Purpose)>,
}

/// A running broker. Dropping it ends every session and removes every socket.
pub struct Broker {
    ports: Vec<LinkPort>,
    acceptor: Option<JoinHandle<()>>,
    stop: Arc<EventFd>,
}

impl Broker {
    /// Starts everything that the configuration names, as part of a process that is not confined.
    ///
    /// # Errors
    /// When a socket is taken, or the host refuses. Nothing is left behind then.
    pub fn start(config: &Config) -> Result<Self, BrokerError> {
        Self::bind(config)?.serve(Confinement::unconfined())
    }

    /// Makes the sockets, and does all else that takes privileges. Starts no thread.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn bind(config: &Config) -> Result<Bound, BrokerError> {
        let (links, limit) = (config.links.len(), limits::limit());
        let (needed, at_once) = limits::needed(&config.links);
        if needed > limit {
            return Err(BrokerError::Descriptors { links, needed, limit });
        }
        if at_once > limit {
            warn!(
                "{links} links take {at_once} descriptors when all are up, and the broker's limit is {limit}: the \
                 last to connect will be turned away; {}",
                limits::REMEDY
            );
        }
        limits::make_room(at_once, limit);
        let group = sockets::group(config.group.as_deref())?;
        let bind = |path: &PathBuf| Listener::bind(path, group.as_ref());
        let substitute = Substitute::new()?;
        let ports: Vec<_> =
            config.links.iter().map(|link| LinkPort::new(&link.name, substitute.clone())).collect();
        let mut listeners = vec![(bind(&config.control_socket)?, Purpose::Control)];
        for (link, port) in config.links.iter().zip(&ports) {
            let (owner, peer) = (Rule::new(link, Side::Owner)?, Rule::new(link, Side::Peer)?);
            listeners.push((bind(&link.owner_socket)?, Purpose::Link(port.clone(), Side::Owner, owner)));
            listeners.push((bind(&link.peer_socket)?, Purpose::Link(port.clone(), Side::Peer, peer.clone())));
            if let Some(socket) = &link.doorbell_socket {
                listeners.push((bind(socket)?, Purpose::Doorbell(port.clone(), peer)));
            }
        }
        Ok(Bound { config: config.clone(), substitute, ports, listeners })
    }
}

impl Bound {
    /// Starts the links and lets VMMs connect. `confinement` is what `status` tells of this process.
    ///
    /// # Errors
    /// When the host refuses. Nothing is left behind then.
    pub fn serve(self, confinement: Confinement) -> Result<Broker, BrokerError> {
        let Self { config, substitute, ports, listeners } = self;
        let mut broker = Broker {
            ports: ports.clone(),
            acceptor: None,
            stop: Arc::new(
                EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
                    .map_err(io::Error::from)?,
            ),
        };
        let generation = first_generation();
        for (link_config, port) in config.links.iter().zip(&ports) {
            let name = link_config.name.clone();
            let link = Link::new(link_config.clone(), config.confirm_timeout, generation)
                .map_err(|fault| BrokerError::Link { link: name.clone(), fault })?;
            let relay = Relay::new(&name, port.clone())?;
            let link_id = if link_config.doorbell_socket.is_some() { new_link_id() } else { 0 };
            port.start(LinkDriver::new(&name, link, link_id, port.clone(), relay)?);
        }
        let stop = Arc::clone(&broker.stop);
        let about = Arc::new(About { ports, confinement });
        let acceptor = Acceptor::new(listeners, about, stop, substitute)?;
        broker.acceptor = Some(thread::Builder::new().name("acceptor".into()).spawn(move || acceptor.run())?);
        for link in config.links.iter().filter(|link| link.one_way == OneWay::Widen) {
            warn!(
                link = %link.name,
                "one_way = \"widen\": memory that this link's owner lets its device only read is mapped writable \
                 in the peer, and what it may only write readable"
            );
        }
        info!(links = config.links.len(), control_socket = %config.control_socket.display(), "the broker listens");
        Ok(broker)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // Fails only when the count is at its end, which ends the acceptor as well.
        let _ = self.stop.write(1);
        if let Some(acceptor) = self.acceptor.take() {
            drop(acceptor.join());
        }
        for port in &self.ports {
            port.end();
        }
    }
}

/// A generation that is even and larger than any of an earlier broker: a driver
/// that outlives a broker sees that the link area is another. By the clock that never
/// goes back while the host is up, since no guest outlives that.
fn first_generation() -> u64 {
    let up = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    u64::try_from(up.as_micros()).unwrap_or(0) & !1
}

/// A number for a link that no other link has, of this broker or another: its guests find
/// by it what belongs together.
fn new_link_id() -> u64 {
    // Its keys are random; that is all that is wanted of it.
    RandomState::new().hash_one(()) | 1
}

struct Acceptor {
    epoll: Epoll,
    listeners: Vec<(Listener, Purpose)>,
    about: Arc<About>,
    substitute: Substitute,
    /// How often descriptors ran short.
    short: u64,
}

impl Acceptor {
    fn new(
        listeners: Vec<(Listener, Purpose)>,
        about: Arc<About>,
        stop: Arc<EventFd>,
        substitute: Substitute,
    ) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(stop.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, STOP))?;
        epoll.add(substitute.eventfd(), EpollEvent::new(EpollFlags::EPOLLIN, STAND_IN))?;
        for (token, (listener, _)) in (0..).zip(&listeners) {
            epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, token))?;
        }
        Ok(Self { epoll, listeners, about, substitute, short: 0 })
    }

    fn run(mut self) {
        let mut events = [EpollEvent::empty(); 64];
        let mut stands_in = false;
        loop {
            let timeout = if stands_in { STAND_IN_MS.into() } else { EpollTimeout::NONE };
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => continue,
                Err(error) => {
                    warn!(%error, "no more connections can be accepted");
                    return;
                }
            };
            for event in &events[..count] {
                match event.data() {
                    STOP => return,
                    STAND_IN => {
                        let _ = self.substitute.eventfd().read();
                        stands_in = true;
                    }
                    token => self.accept(token as usize),
                }
            }
            // All of them: each tries to get its thread.
            stands_in = stands_in && self.about.ports.iter().filter(|port| port.stand_in()).count() > 0;
        }
    }

    fn accept(&mut self, token: usize) {
        let Some((listener, purpose)) = self.listeners.get(token) else { return };
        match (listener.accept(), purpose) {
            (Ok(None), _) => {}
            // Those are short, and how to see what is wrong.
            (Ok(Some(stream)), Purpose::Control) => server::serve(stream, &self.about),
            (Ok(Some(stream)), _) if limits::is_short(number(&stream), limits::limit()) => {
                self.say_short("a connection is turned away");
            }
            (Ok(Some(stream)), Purpose::Link(port, side, rule)) => {
                if permits(port, side.name(), rule, &stream) {
                    port.send(Input::Connected { side: *side, stream });
                }
            }
            (Ok(Some(stream)), Purpose::Doorbell(port, rule)) => {
                if permits(port, "doorbell", rule, &stream) {
                    port.send(Input::DoorbellConnected(stream));
                }
            }
            (Err(error), _) if error.raw_os_error() == Some(nix::Error::EMFILE as i32) => {
                self.say_short("a connection waits");
                // It is still there: do not spin on it.
                thread::sleep(Duration::from_millis(100));
            }
            (Err(error), _) => {
                warn!(%error, "a connection cannot be accepted");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }

    /// The first time, and each time that it has happened twice as often: VMMs can cause it.
    fn say_short(&mut self, what: &str) {
        self.short += 1;
        if self.short.is_power_of_two() {
            let limit = limits::limit();
            warn!(
                times = self.short,
                "{what}: nearly all of the {limit} descriptors that the broker may have are in use; {}",
                limits::REMEDY
            );
        }
    }
}

/// Whether who connected may join; the link is told of who may not.
fn permits(port: &LinkPort, door: &'static str, rule: &Rule, stream: &UnixStream) -> bool {
    match Caller::of(stream) {
        Ok(caller) if rule.admits(&caller, stream) => true,
        Ok(caller) => {
            port.send(Input::NotPermitted { door, caller });
            false
        }
        Err(error) => {
            warn!(%error, door, "the kernel does not say who connected, who is turned away");
            false
        }
    }
}

/// The number of a connection's descriptor.
fn number(stream: &UnixStream) -> u64 {
    // It is never negative.
    stream.as_raw_fd().unsigned_abs().into()
}
