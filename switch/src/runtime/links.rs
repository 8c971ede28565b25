//! The links that a broker has, and how they change while it runs: one is plugged or unplugged, or the
//! difference to the configuration is made up. One change at a time; each is made by the thread that
//! was asked for it, and no link that is not meant notices (`docs/hotplug.md`).

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::{info, warn};

use super::acceptor::{Door, Doorkeeper, Purpose};
use super::broker::first_generation;
use super::driver::LinkDriver;
use super::port::Substitute;
use super::shown::Shown;
use super::{Input, LinkPort, limits};
use crate::config::{Config, LinkConfig, MAX_LINKS, OneWay};
use crate::guardian::{Guard, Guardian};
use crate::link::{Fault, Link, Side};
use crate::opener::maker::{self, Opened};
use crate::opener::{OpenError, Opener};

/// How much longer than its deadlines a link may take to say that it has ended.
const SLACK: Duration = Duration::from_secs(2);

/// Why links are not as they were asked to be.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// The configuration, or a socket.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is plugged.
    #[error("link '{0}' is there already; unplug it first, or have the broker reload its configuration")]
    IsThere(String),
    /// It is not.
    #[error("there is no link '{link}'; there are: {}", .known.join(", "))]
    IsNotThere {
        /// What was asked for.
        link: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// A broker has room for so many.
    #[error("there are {MAX_LINKS} links, and a broker has no more at once")]
    Full,
    /// Not even its listening sockets have room.
    #[error(
        "link '{link}': {needed} descriptors would be needed to listen for all links, and the broker's limit is \
         {limit}; {}",
        limits::REMEDY
    )]
    Descriptors {
        /// The link.
        link: String,
        /// What all of them need.
        needed: u64,
        /// The limit.
        limit: u64,
    },
    /// A link's configuration is impossible.
    #[error("link '{link}': {fault}")]
    Link {
        /// The link.
        link: String,
        /// Why.
        fault: Fault,
    },
    /// The peer may have memory of the owner still.
    #[error(
        "link '{link}' is unplugged, but the peer's VMM did not let go of the owner's memory within {milliseconds} ms \
         and may still reach it: end that VMM, or reset its device"
    )]
    Unconfirmed {
        /// The link.
        link: String,
        /// How long it had.
        milliseconds: u128,
    },
    /// The host has too little of something.
    #[error("the host gives no memory, descriptor or thread: {0}")]
    Host(#[from] io::Error),
}

impl ChangeError {
    /// A line for each mistake of the configuration.
    pub fn mistakes(&self) -> &[String] {
        match self {
            Self::Open(error) => error.mistakes(),
            _ => &[],
        }
    }
}

/// What a reload did. Links that are not named were not touched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Links that are new.
    pub plugged: Vec<String>,
    /// Links that are gone.
    pub unplugged: Vec<String>,
    /// Links whose settings are others: closed, and opened anew.
    pub changed: Vec<String>,
    /// What is not as the file wants it, and why: a line each.
    pub problems: Vec<String>,
}

struct Entry {
    config: LinkConfig,
    port: LinkPort,
    /// Its number to the guardian. A later link may have it again.
    number: usize,
    guard: Guard,
}

/// The links of a broker.
pub struct Links {
    /// As it was when the broker started: what is not a link's stays.
    config: Config,
    opener: Opener,
    guardian: Option<Guardian>,
    substitute: Substitute,
    doors: Doorkeeper,
    shown: Shown,
    list: Mutex<Vec<Entry>>,
    /// Held while links change.
    changing: Mutex<()>,
    uid: u32,
}

impl std::fmt::Debug for Links {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.list().iter().map(|entry| &entry.config.name)).finish()
    }
}

impl Links {
    /// None yet. To be called before the process is confined.
    pub(super) fn new(config: &Config, opener: Opener, substitute: Substitute, doors: Doorkeeper) -> Self {
        Self {
            config: Config { links: Vec::new(), ..config.clone() },
            opener,
            guardian: None,
            substitute,
            doors,
            shown: Shown::default(),
            list: Mutex::default(),
            changing: Mutex::default(),
            uid: geteuid().as_raw(),
        }
    }

    /// Links that somebody else has begun, without sockets: they can be asked, and unplugged.
    ///
    /// # Errors
    /// When the host gives no descriptor.
    pub fn of(config: &Config, links: Vec<(LinkConfig, LinkPort)>) -> Result<Self, ChangeError> {
        let (doors, _) = Doorkeeper::new()?;
        let links_of = Self::new(config, Opener::here(config)?, Substitute::new()?, doors);
        let entries = (0..).zip(links);
        links_of.list().extend(entries.map(|(number, (config, port))| Entry {
            config,
            port,
            number,
            guard: Guard::none(),
        }));
        Ok(links_of)
    }

    /// Has what happens told to a guardian.
    pub(super) fn guarded(mut self, guardian: Option<Guardian>) -> Self {
        self.guardian = guardian;
        self
    }

    /// The way to each link.
    pub fn ports(&self) -> Vec<LinkPort> {
        self.list().iter().map(|entry| entry.port.clone()).collect()
    }

    /// Who takes owners' memory back when the process is killed.
    pub fn guardian(&self) -> Option<u32> {
        self.guardian.as_ref().and_then(Guardian::pid)
    }

    /// Who opens links, if that is another process.
    pub fn opener(&self) -> Option<u32> {
        self.opener.pid()
    }

    /// Whether this user may change links: the broker's own, and root.
    pub fn may_change(&self, uid: u32) -> bool {
        uid == self.uid || uid == 0
    }

    /// The broker's user.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Removes all sockets.
    pub(super) fn remove_sockets(&self) {
        self.opener.close_all();
    }

    /// Begins a link that the configuration names, read anew. Gives its settings.
    ///
    /// # Errors
    /// When it is there, or is not in the configuration, or cannot be opened. Nothing has changed then.
    pub fn plug(&self, link: &str) -> Result<LinkConfig, ChangeError> {
        let _changing = self.change();
        if self.list().iter().any(|entry| entry.config.name == link) {
            return Err(ChangeError::IsThere(link.into()));
        }
        self.opener.read()?;
        let config = self.open(link)?;
        info!(link, "plugged");
        Ok(config)
    }

    /// Ends a link: its sockets are removed, its peer loses the owner's memory, then both VMMs are
    /// disconnected.
    ///
    /// # Errors
    /// When there is none of that name; or it has ended, and the peer may have something still.
    pub fn unplug(&self, link: &str) -> Result<(), ChangeError> {
        let _changing = self.change();
        let known: Vec<_> = self.list().iter().map(|entry| entry.config.name.clone()).collect();
        if !known.iter().any(|name| name == link) {
            return Err(ChangeError::IsNotThere { link: link.into(), known });
        }
        self.close(&BTreeSet::from([link.to_owned()])).map_or(Ok(()), Err)
    }

    /// Reads the configuration and makes up the difference: links that are new are opened, those that are
    /// gone closed, those with other settings closed and opened anew. Others are not touched.
    ///
    /// # Errors
    /// When the configuration has mistakes, or a new link cannot be opened. Nothing has changed then.
    pub fn reload(&self) -> Result<Difference, ChangeError> {
        let _changing = self.change();
        let wanted = self.opener.read()?;
        let mut difference = Difference { problems: self.unchangeable(&wanted), ..Difference::default() };
        let (mut ends, mut taken) = (BTreeSet::new(), BTreeSet::<PathBuf>::new());
        let mut fresh: Vec<&LinkConfig> = Vec::new();
        {
            let list = self.list();
            let is_there = |link: &LinkConfig| list.iter().any(|entry| entry.config.name == link.name);
            fresh.extend(wanted.links.iter().filter(|link| !is_there(link)));
            for entry in list.iter().filter(|entry| !wanted.links.contains(&entry.config)) {
                let name = entry.config.name.clone();
                let changed = wanted.links.iter().any(|link| link.name == name);
                if changed { &mut difference.changed } else { &mut difference.unplugged }.push(name.clone());
                taken.extend(maker::sockets(&entry.config).cloned());
                ends.insert(name);
            }
        }
        // Those whose sockets no other link has go first: if one cannot be opened, nothing has changed.
        let (later, now): (Vec<_>, Vec<_>) =
            fresh.into_iter().partition(|link| maker::sockets(link).any(|socket| taken.contains(socket)));
        let mut opened = BTreeSet::new();
        for link in now {
            if let Err(error) = self.open(&link.name) {
                let _ = self.close(&opened);
                return Err(error);
            }
            opened.insert(link.name.clone());
        }
        difference.plugged.extend(opened);
        difference.problems.extend(self.close(&ends).map(|error| error.to_string()));
        let mut open = |name: &String| {
            let failed = self.open(name).err().map(|error| format!("link '{name}' is closed: {error}"));
            difference.problems.extend(failed.iter().cloned());
            failed.is_none()
        };
        difference
            .plugged
            .extend(later.into_iter().map(|link| &link.name).filter(|name| open(name)).cloned());
        difference.changed.retain(&mut open);
        info!(
            plugged = ?difference.plugged, unplugged = ?difference.unplugged, changed = ?difference.changed,
            "the configuration is in force"
        );
        Ok(difference)
    }

    /// A line for each setting that a running broker keeps, and that is another now.
    fn unchangeable(&self, wanted: &Config) -> Vec<String> {
        let Config { control_socket, group, confirm_timeout, confine, links: _ } = &self.config;
        [
            ("control_socket", *control_socket != wanted.control_socket),
            ("group", *group != wanted.group),
            ("confirm_timeout_ms", *confirm_timeout != wanted.confirm_timeout),
            ("confine", *confine != wanted.confine),
        ]
        .into_iter()
        .filter(|(_, differs)| *differs)
        .map(|(key, _)| format!("{key} is another in the file: it counts when the broker is started anew"))
        .collect()
    }

    /// Opens a link of the configuration that was read last.
    fn open(&self, link: &str) -> Result<LinkConfig, ChangeError> {
        let opened = self.opener.open(link)?;
        self.begin(opened).inspect_err(|_| {
            // One that does not answer says so to the next who asks.
            let _ = self.opener.close(link);
        })
    }

    /// Begins a link whose sockets are there.
    ///
    /// # Errors
    /// When there is no room for it, or the host refuses.
    pub(super) fn begin(&self, opened: Opened) -> Result<LinkConfig, ChangeError> {
        let Opened { config, owner_rule, peer_rule, listeners } = opened;
        let name = &config.name;
        let number = self.room_for(&config)?;
        let link = Link::new(config.clone(), self.config.confirm_timeout, first_generation())
            .map_err(|fault| ChangeError::Link { link: name.clone(), fault })?;
        let link_id = if config.doorbell_socket.is_some() { new_link_id() } else { 0 };
        let port = LinkPort::new(name, self.substitute.clone());
        let driver = LinkDriver::new(&config, link, link_id, port.clone())?;
        let guardian = self.guardian.as_ref();
        let guard = guardian.map_or_else(Guard::none, |guardian| guardian.link(number, name, link_id));
        port.start(driver.guarded(guard.clone()).among(self.shown.clone()));
        let purposes = [
            Purpose::Link(port.clone(), Side::Owner, owner_rule),
            Purpose::Link(port.clone(), Side::Peer, peer_rule.clone()),
            Purpose::Doorbell(port.clone(), peer_rule),
        ];
        if config.one_way == OneWay::Widen {
            warn!(
                link = %name,
                "one_way = \"widen\": memory that this link's owner lets its device only read is mapped writable \
                 in the peer, and what it may only write readable"
            );
        }
        self.list().push(Entry { config: config.clone(), port, number, guard });
        for (listener, purpose) in listeners.into_iter().zip(purposes) {
            let door = Door::new(listener.into(), purpose, config.rates.connections, Instant::now());
            self.doors.open(door);
        }
        Ok(config)
    }

    /// The lowest number that is free, if there are descriptors for one link more.
    fn room_for(&self, config: &LinkConfig) -> Result<usize, ChangeError> {
        let list = self.list();
        let numbers: BTreeSet<_> = list.iter().map(|entry| entry.number).collect();
        let number = (0..MAX_LINKS).find(|number| !numbers.contains(number)).ok_or(ChangeError::Full)?;
        let limit = limits::limit();
        let (needed, _) = limits::needed(list.iter().map(|entry| &entry.config).chain([config]));
        if needed > limit {
            return Err(ChangeError::Descriptors { link: config.name.clone(), needed, limit });
        }
        Ok(number)
    }

    /// Ends these links, all at once. Gives an error for the first whose peer may have something still; the
    /// log has all.
    fn close(&self, names: &BTreeSet<String>) -> Option<ChangeError> {
        let ends: Vec<_> = {
            let list = self.list();
            let ends = list.iter().filter(|entry| names.contains(&entry.config.name));
            ends.map(|entry| (entry.port.clone(), entry.guard.clone())).collect()
        };
        let mut waiting = Vec::new();
        for (port, guard) in ends {
            // Nobody finds the way to it any more.
            if let Err(error) = self.opener.close(port.name()) {
                warn!(link = port.name(), %error, "its sockets stay");
            }
            self.doors.close(&port);
            let (sender, ended) = bounded(1);
            port.send(Input::Unplug(sender));
            waiting.push((port, guard, ended));
        }
        let mut unconfirmed = None;
        let time = 2 * self.config.confirm_timeout;
        let deadline = Instant::now() + time + SLACK;
        for (port, guard, ended) in waiting {
            // A link that a defect has ended says nothing, and has nothing.
            let confirmed = ended.recv_deadline(deadline).unwrap_or(false);
            port.end();
            guard.end();
            self.list().retain(|entry| !entry.port.is(&port));
            if confirmed {
                info!(link = port.name(), "unplugged");
            } else {
                let error =
                    ChangeError::Unconfirmed { link: port.name().into(), milliseconds: time.as_millis() };
                warn!("{error}");
                unconfirmed.get_or_insert(error);
            }
        }
        unconfirmed
    }

    fn list(&self) -> MutexGuard<'_, Vec<Entry>> {
        // A change of it is whole.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A number for a link that no other link has, of this broker or another: its guests find
/// by it what belongs together.
fn new_link_id() -> u64 {
    // Its keys are random; that is all that is wanted of it.
    RandomState::new().hash_one(()) | 1
}
