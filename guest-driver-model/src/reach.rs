//! What a peer's port needs besides the window: the mapping table as it is now, and the
//! device, which is asked for what the table does not show
//! (`docs/vhost-pci-device.md`, 7.2 and 9.4).
//!
//! Owns: the state of the table that the rings of a queue go by, and when to ask again for
//! what was not to be had. What the rings are for it does not know.

use std::ops::AddAssign;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::control::{Exchange, Job, Outcome, Request};
use crate::link::{LinkPage, LinkSnapshot, VringInfo};
use crate::ring::{
    Chain, ChainBurst, DeviceRing, Direction, Fault, Finding, Miss, OnMiss, Place, RingConfig, RingFeatures,
    Want,
};
use crate::shm::SharedMemory;
use crate::shm::log::WriteLog;
use crate::translate::{Access, Translation};

/// How often a burst asks the device before it ends without what it lacks.
const ROUNDS: usize = 4;
/// How long to leave the device alone when it had nothing: at first, and in the end.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LAST_PAUSE: Duration = Duration::from_millis(100);

/// What a port has asked the device for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Ranges that were to be mapped.
    pub maps: u64,
    /// Buffers and indirect tables fetched.
    pub fetched: u64,
    /// Their bytes.
    pub fetched_bytes: u64,
    /// Buffers stored.
    pub stored: u64,
    /// Their bytes.
    pub stored_bytes: u64,
    /// Requests that were not carried out, and are tried again.
    pub put_off: u64,
    /// Times that the mapping table was read after the port was made.
    pub table_reads: u64,
}

counts!(Demand { maps, fetched, fetched_bytes, stored, stored_bytes, put_off, table_reads });

impl AddAssign for Demand {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// The mapping table that a queue goes by.
#[derive(Debug)]
pub(crate) struct Tables {
    page: LinkPage,
    generation: u64,
    table_generation: u64,
    translation: Translation,
    reads: u64,
    /// Where what is written is marked.
    log: Option<Arc<WriteLog>>,
}

impl Tables {
    pub(crate) fn new(page: &LinkPage, snapshot: &LinkSnapshot, log: Option<Arc<WriteLog>>) -> Self {
        Self {
            page: page.clone(),
            generation: snapshot.generation,
            table_generation: snapshot.table_generation,
            translation: Translation::from(snapshot),
            reads: 0,
            log,
        }
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    pub(crate) fn translation(&self) -> &Translation {
        &self.translation
    }

    pub(crate) fn table_generation(&self) -> u64 {
        self.table_generation
    }

    pub(crate) fn reads(&self) -> u64 {
        self.reads
    }

    /// Brings the table up to date. Whether the link is still the port's: one load where
    /// nothing has changed.
    #[inline]
    pub(crate) fn is_current(&mut self) -> bool {
        self.page.table_generation() == self.table_generation || self.read()
    }

    /// Goes by the table of this generation, which somebody else has read.
    pub(crate) fn take(&mut self, table_generation: u64, translation: &Translation) {
        (self.table_generation, self.translation) = (table_generation, translation.clone());
    }

    /// Whether what was loaded from the window since the table was last brought up to date
    /// was there.
    #[inline]
    pub(crate) fn is_unchanged(&self) -> bool {
        self.page.table_is_at(self.table_generation)
    }

    /// Whether what was loaded from the window since the table had this generation was there.
    pub(crate) fn is_at(&self, table_generation: u64) -> bool {
        self.page.table_is_at(table_generation)
    }

    /// After a change: brings the table up to date. Whether there was one change only, so that
    /// what is in the table now, and was before, has been there all along. (A mapping that
    /// went and came back was nowhere meanwhile.)
    #[cold]
    pub(crate) fn is_one_change_later(&mut self) -> bool {
        let before = self.table_generation;
        self.is_current() && self.table_generation == before.wrapping_add(2)
    }

    /// Whether the link is still the port's, whatever became of the table.
    pub(crate) fn is_same_link(&self) -> bool {
        self.page.generation() == self.generation
    }

    #[cold]
    fn read(&mut self) -> bool {
        // A table that cannot be read now, or cannot be, is the session's to wait for or
        // to report.
        let Some(table) = self.page.table().ok().filter(|table| table.generation == self.generation) else {
            return false;
        };
        self.reads += 1;
        self.table_generation = table.table_generation;
        self.translation = Translation::new(&table.mappings);
        if let Some(log) = &self.log {
            log.set_ranges(table.log.map(|log| log.ranges(&table.mappings)).unwrap_or_default());
        }
        true
    }

    /// Whether each segment of the chain that was in the window is still there.
    pub(crate) fn hold(&mut self, chain: &Chain<'_>) -> bool {
        chain.segments.iter().all(|segment| match segment.place {
            Place::Window(offset) => {
                let access = if segment.writable { Access::WRITE } else { Access::READ };
                self.translation.translate(segment.iova, segment.len, access) == Ok(offset)
            }
            Place::Owner => true,
        })
    }
}

/// When to ask again.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Backoff {
    pause: Duration,
    until: Option<Instant>,
}

impl Backoff {
    /// How long not to ask; `None` if one may ask.
    pub(crate) fn left(&self) -> Option<Duration> {
        let left = self.until?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    pub(crate) fn had_nothing(&mut self) {
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LAST_PAUSE);
        self.until = Some(Instant::now() + self.pause);
    }

    pub(crate) fn had_something(&mut self) {
        *self = Self::default();
    }
}

/// A vring of the owner. `K` is what its kind of device keeps beside it.
#[derive(Debug)]
pub(crate) enum PortVring<K> {
    /// The owner's front-end has not enabled it.
    Absent,
    /// Its geometry cannot be used.
    Broken(Fault),
    /// In use, or dead from a fault of its own.
    Live(Box<LiveVring<K>>),
}

impl<K> PortVring<K> {
    pub(crate) fn new(
        vring: u16,
        info: &VringInfo,
        window: &SharedMemory,
        tables: &Tables,
        snapshot: &LinkSnapshot,
        kind: K,
    ) -> Self {
        if !info.enabled {
            return Self::Absent;
        }
        let features = RingFeatures::of(snapshot.features);
        let ring = RingConfig::new(info, features)
            .map_err(|kind| Fault { kind, vring, value: u64::from(info.size) })
            .and_then(|config| {
                DeviceRing::new(vring, &config, window, tables.translation().clone(), features)
            });
        match ring {
            Ok(ring) => Self::Live(Box::new(LiveVring::new(ring.on_miss(on_miss(snapshot)), tables, kind))),
            Err(fault) => Self::Broken(fault),
        }
    }

    #[inline]
    pub(crate) fn live(&mut self) -> Result<Option<&mut LiveVring<K>>, Fault> {
        match self {
            Self::Absent => Ok(None),
            Self::Broken(fault) => Err(*fault),
            Self::Live(live) => Ok(Some(live)),
        }
    }

    /// Why it is not served, if it was to be.
    pub(crate) fn fault(&self) -> Option<Fault> {
        match self {
            Self::Absent => None,
            Self::Broken(fault) => Some(*fault),
            Self::Live(live) => live.ring.fault(),
        }
    }

    /// Whether the owner's front-end has enabled it.
    pub(crate) fn is_enabled(&self) -> bool {
        !matches!(self, Self::Absent)
    }

    /// How long it will be before the device is asked again for what it lacks.
    pub(crate) fn pause(&self) -> Option<Duration> {
        match self {
            Self::Live(live) => live.backoff.left(),
            Self::Absent | Self::Broken(_) => None,
        }
    }
}

/// A vring in use, or dead from a fault of its own. On cache lines of its own, as its queue is.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct LiveVring<K> {
    pub(crate) ring: DeviceRing,
    /// Of the table by which its chains are popped.
    table_generation: u64,
    pub(crate) backoff: Backoff,
    /// What the kind of device keeps.
    pub(crate) kind: K,
}

impl<K> LiveVring<K> {
    /// A ring that was made with the tables of now.
    pub(crate) fn new(ring: DeviceRing, tables: &Tables, kind: K) -> Self {
        Self { ring, table_generation: tables.table_generation, backoff: Backoff::default(), kind }
    }

    /// Goes by the tables of now. Whether that is a change: what was popped before is then
    /// to be put back.
    #[inline]
    pub(crate) fn follow(&mut self, tables: &Tables) -> bool {
        let changed = self.table_generation != tables.table_generation;
        if changed {
            self.table_generation = tables.table_generation;
            self.ring.set_translation(tables.translation.clone());
        }
        changed
    }
}

/// What a ring does about a miss, by the link's status.
pub(crate) fn on_miss(snapshot: &LinkSnapshot) -> OnMiss {
    match (snapshot.iommu, snapshot.copy) {
        (_, true) => OnMiss::Copy,
        (true, false) => OnMiss::Map,
        (false, false) => OnMiss::Fault,
    }
}

/// What a burst works with besides its vring.
pub(crate) struct Reach<'a> {
    pub(crate) window: &'a SharedMemory,
    pub(crate) tables: &'a mut Tables,
    pub(crate) exchange: &'a mut dyn Exchange,
    pub(crate) demand: &'a mut Demand,
}

impl Reach<'_> {
    /// Pops up to `budget` chains into `chains`, which is empty; asks the device for what
    /// they lack if fewer than `need` can be had without. Room that was given out before is
    /// given back if the device is asked.
    pub(crate) fn pop<K>(
        &mut self,
        live: &mut LiveVring<K>,
        need: usize,
        budget: usize,
        direction: Direction,
        chains: &mut ChainBurst,
    ) -> Result<usize, Fault> {
        let mut popped = live.ring.pop_burst(budget, direction, chains)?;
        for round in 0..ROUNDS {
            if popped >= need || live.ring.misses().is_empty() {
                break;
            }
            if round == 0 {
                self.exchange.clear();
            }
            let wiser = self.resolve(live);
            // By another table, or with what was found out.
            live.ring.put_back(popped);
            chains.clear();
            live.follow(self.tables);
            popped = live.ring.pop_burst(budget, direction, chains)?;
            if !wiser {
                break;
            }
            if round + 1 == ROUNDS && popped < need {
                live.backoff.had_nothing();
            }
        }
        live.ring.forget_findings();
        Ok(popped)
    }

    /// Asks the device for all that the ring lacks. Whether to try again.
    #[cold]
    fn resolve<K>(&mut self, live: &mut LiveVring<K>) -> bool {
        if live.backoff.left().is_some() {
            return false;
        }
        let job = |miss: &Miss| {
            let (request, carried) = match miss.want {
                Want::Map(access) => (Request::Map { iova: miss.iova, len: miss.len, access }, 0),
                Want::Table(_) => {
                    let len = miss.len as u32;
                    (Request::Fetch { iova: miss.iova, len }, len)
                }
            };
            self.exchange.reserve(carried).map(|data| Job::new(request, data))
        };
        let misses = live.ring.misses().to_vec();
        let mut jobs: Vec<_> = misses.iter().map_while(job).collect();
        self.carry_out(&mut jobs);
        let mut wiser = false;
        for (miss, job) in misses.into_iter().zip(&jobs) {
            let finding = match (job.outcome, miss.want) {
                (Outcome::Done, Want::Map(_)) => None,
                (Outcome::Done, Want::Table(_)) => Some(Finding::Fetched(job.data)),
                (Outcome::Copy, Want::Map(_)) => Some(Finding::Copy),
                (Outcome::Denied, _) => Some(Finding::Denied),
                (Outcome::Later, _) | (Outcome::Copy, Want::Table(_)) => continue,
            };
            wiser = true;
            if let Some(finding) = finding {
                live.ring.found(miss, finding);
            }
        }
        match wiser {
            true => live.backoff.had_something(),
            false => live.backoff.had_nothing(),
        }
        self.tables.is_current() && wiser
    }

    /// Has the device carry out the jobs, and counts them.
    pub(crate) fn carry_out(&mut self, jobs: &mut [Job]) {
        self.exchange.carry_out(jobs);
        for job in jobs {
            match (job.request, job.outcome) {
                (Request::Map { .. }, _) => self.demand.maps += 1,
                (Request::Fetch { len, .. }, Outcome::Done) => {
                    self.demand.fetched += 1;
                    self.demand.fetched_bytes += u64::from(len);
                }
                (Request::Store { len, .. }, Outcome::Done) => {
                    self.demand.stored += 1;
                    self.demand.stored_bytes += u64::from(len);
                }
                (Request::Fetch { .. } | Request::Store { .. }, _) => {}
            }
            self.demand.put_off += u64::from(job.outcome == Outcome::Later);
        }
    }
}
