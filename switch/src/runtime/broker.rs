//! The broker: has the sockets made, starts the links and the acceptor, and takes
//! all of it down again.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use thiserror::Error;
use tracing::{info, warn};

use super::acceptor::{Acceptor, CONTROL_RATE, Door, Doorkeeper, Purpose, Words};
use super::limits;
use super::links::{ChangeError, Links};
use super::port::Substitute;
use crate::config::Config;
use crate::confine::Confinement;
use crate::control::server::About;
use crate::guardian::Guardian;
use crate::opener::maker::Opened;
use crate::opener::{OpenError, Opener};

/// Why the broker cannot run.
#[derive(Debug, Error)]
pub enum BrokerError {
    /// The sockets cannot be made, or who may join a link cannot be told.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A link cannot begin.
    #[error(transparent)]
    Link(#[from] ChangeError),
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
    links: Links,
    doors: Doorkeeper,
    words: Words,
    control: UnixListener,
    opened: Vec<Opened>,
}

/// A running broker. Dropping it ends every session and removes every socket.
pub struct Broker {
    links: Arc<Links>,
    acceptor: Option<JoinHandle<()>>,
    doors: Doorkeeper,
    /// Whether the sessions stay as they are.
    leaves: bool,
}

impl Broker {
    /// Starts everything that the configuration names, as part of a process that is not confined.
    ///
    /// # Errors
    /// When a socket is taken, or the host refuses. Nothing is left behind then.
    pub fn start(config: &Config) -> Result<Self, BrokerError> {
        Self::bind(config, Opener::here(config)?)?.serve(Confinement::unconfined(), None)
    }

    /// Has the sockets made, and does all else that takes privileges. Starts no thread.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn bind(config: &Config, opener: Opener) -> Result<Bound, BrokerError> {
        let (count, limit) = (config.links.len(), limits::limit());
        let (needed, at_once) = limits::needed(&config.links);
        if needed > limit {
            return Err(BrokerError::Descriptors { links: count, needed, limit });
        }
        if at_once > limit {
            warn!(
                "{count} links take {at_once} descriptors when all are up, and the broker's limit is {limit}: the \
                 last to connect will be turned away; {}",
                limits::REMEDY
            );
        }
        limits::make_room(at_once, limit);
        let substitute = Substitute::new()?;
        let (doors, words) = Doorkeeper::new()?;
        let control = opener.control()?;
        let opened: Result<Vec<_>, _> = config.links.iter().map(|link| opener.open(&link.name)).collect();
        let opened = opened?;
        let links = Links::new(config, opener, substitute.clone(), doors.clone());
        Ok(Bound { config: config.clone(), substitute, links, doors, words, control, opened })
    }
}

impl Bound {
    /// Starts the links and lets VMMs connect. `confinement` is what `status` tells of this process;
    /// `guardian`: who takes memory back when it is killed.
    ///
    /// # Errors
    /// When the host refuses. Nothing is left behind then.
    pub fn serve(self, confinement: Confinement, guardian: Option<Guardian>) -> Result<Broker, BrokerError> {
        let Self { config, substitute, links, doors, words, control, opened } = self;
        let links = Arc::new(links.guarded(guardian));
        let mut broker =
            Broker { links: Arc::clone(&links), acceptor: None, doors: doors.clone(), leaves: false };
        doors.open(Door::new(control.into(), Purpose::Control, CONTROL_RATE, Instant::now()));
        for link in opened {
            links.begin(link)?;
        }
        let acceptor = Acceptor::new(Arc::new(About { links, confinement }), words, substitute)?;
        broker.acceptor = Some(thread::Builder::new().name("acceptor".into()).spawn(move || acceptor.run())?);
        info!(links = config.links.len(), control_socket = %config.control_socket.display(), "the broker listens");
        Ok(broker)
    }
}

impl Broker {
    /// Its links, which can be changed while it runs.
    pub fn links(&self) -> Arc<Links> {
        Arc::clone(&self.links)
    }

    /// Removes the sockets and leaves the sessions as they are, for a process that ends right after
    /// this: its guardian takes back what peers have and then disconnects the VMMs.
    pub fn leave(mut self) {
        self.leaves = true;
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.doors.stop();
        if let Some(acceptor) = self.acceptor.take() {
            drop(acceptor.join());
        }
        self.links.remove_sockets();
        if !self.leaves {
            self.links.ports().iter().for_each(super::LinkPort::end);
        }
    }
}

/// A generation that is even and larger than any of an earlier broker, or of an earlier link of this one: a
/// driver that outlives it sees that the link area is another. By the clock that never
/// goes back while the host is up, since no guest outlives that.
pub(crate) fn first_generation() -> u64 {
    let up = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    u64::try_from(up.as_micros()).unwrap_or(0) & !1
}
