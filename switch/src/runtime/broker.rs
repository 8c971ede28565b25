//! The broker: makes the sockets, starts the links and the acceptor, and takes
//! all of it down again.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::time::{ClockId, clock_gettime};
use thiserror::Error;
use tracing::{info, warn};

use super::LinkPort;
use super::acceptor::{Acceptor, CONTROL_RATE, Door, Purpose};
use super::admission::{Rule, UnknownAccount};
use super::driver::LinkDriver;
use super::limits;
use super::port::Substitute;
use super::sockets::{self, Listener, SocketError};
use crate::config::{Config, OneWay};
use crate::confine::Confinement;
use crate::control::server::About;
use crate::guardian::{Guard, Guardian};
use crate::link::{Fault, Link, Side};

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

/// A broker whose sockets are there, and that serves nobody yet. Dropping it removes them.
pub struct Bound {
    config: Config,
    substitute: Substitute,
    ports: Vec<LinkPort>,
    doors: Vec<Door>,
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
        Self::bind(config)?.serve(Confinement::unconfined(), None)
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
        let now = Instant::now();
        let mut doors = vec![Door::new(bind(&config.control_socket)?, Purpose::Control, CONTROL_RATE, now)];
        for (link, port) in config.links.iter().zip(&ports) {
            let (owner, peer) = (Rule::new(link, Side::Owner)?, Rule::new(link, Side::Peer)?);
            let mut open = |socket, purpose| -> Result<(), SocketError> {
                doors.push(Door::new(bind(socket)?, purpose, link.rates.connections, now));
                Ok(())
            };
            open(&link.owner_socket, Purpose::Link(port.clone(), Side::Owner, owner))?;
            open(&link.peer_socket, Purpose::Link(port.clone(), Side::Peer, peer.clone()))?;
            if let Some(socket) = &link.doorbell_socket {
                open(socket, Purpose::Doorbell(port.clone(), peer))?;
            }
        }
        Ok(Bound { config: config.clone(), substitute, ports, doors })
    }
}

impl Bound {
    /// Starts the links and lets VMMs connect. `confinement` is what `status` tells of this process;
    /// `guardian`: who takes memory back when it is killed.
    ///
    /// # Errors
    /// When the host refuses. Nothing is left behind then.
    pub fn serve(self, confinement: Confinement, guardian: Option<Guardian>) -> Result<Broker, BrokerError> {
        let Self { config, substitute, ports, doors } = self;
        let mut broker = Broker {
            ports: ports.clone(),
            acceptor: None,
            stop: Arc::new(
                EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
                    .map_err(io::Error::from)?,
            ),
        };
        let generation = first_generation();
        for (index, (link_config, port)) in config.links.iter().zip(&ports).enumerate() {
            let name = link_config.name.clone();
            let link = Link::new(link_config.clone(), config.confirm_timeout, generation)
                .map_err(|fault| BrokerError::Link { link: name.clone(), fault })?;
            let link_id = if link_config.doorbell_socket.is_some() { new_link_id() } else { 0 };
            let guard = guardian
                .as_ref()
                .map_or_else(Guard::none, |guardian| guardian.link(index, &link_config.name, link_id));
            port.start(LinkDriver::new(link_config, link, link_id, port.clone())?.guarded(guard));
        }
        let stop = Arc::clone(&broker.stop);
        let about = Arc::new(About { ports, confinement, guardian });
        let acceptor = Acceptor::new(doors, about, stop, substitute)?;
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

impl Broker {
    /// Removes the sockets and leaves the sessions as they are, for a process that ends right after
    /// this: its guardian takes back what peers have and then disconnects the VMMs.
    pub fn leave(mut self) {
        self.remove_sockets();
        self.ports.clear();
    }

    fn remove_sockets(&mut self) {
        // Fails only when the count is at its end, which ends the acceptor as well.
        let _ = self.stop.write(1);
        if let Some(acceptor) = self.acceptor.take() {
            drop(acceptor.join());
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.remove_sockets();
        for port in &self.ports {
            port.end();
        }
    }
}

/// A generation that is even and larger than any of an earlier broker: a driver
/// that outlives a broker sees that the link area is another. By the clock that never
/// goes back while the host is up, since no guest outlives that.
pub(crate) fn first_generation() -> u64 {
    let up = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    u64::try_from(up.as_micros()).unwrap_or(0) & !1
}

/// A number for a link that no other link has, of this broker or another: its guests find
/// by it what belongs together.
fn new_link_id() -> u64 {
    // Its keys are random; that is all that is wanted of it.
    RandomState::new().hash_one(()) | 1
}
