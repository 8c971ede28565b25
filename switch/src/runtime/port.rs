//! How threads reach a link: each input is applied by the thread that has it, under
//! the link's lock. Nothing that is done under it waits for anybody but the guardian, which only listens: sessions wait
//! for answers, and channels for VMMs, outside. So a change goes from one VMM's
//! socket to the other's without a change of threads in between.
//!
//! A link's own thread is its clock. It runs while the link waits for a moment, and a little
//! longer; a link that is up and at rest has none. Where the host gives no thread for it, the
//! acceptor looks at all links from time to time ([`Substitute`]).

use std::sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};
use std::{fmt, io};

use nix::sys::eventfd::{EfdFlags, EventFd};
use tracing::error;

use super::Input;
use super::driver::LinkDriver;

/// How long a clock stays that has nothing to wait for: changes come in rows, and starting a
/// thread for each would slow them down.
const LINGER: Duration = Duration::from_millis(300);

/// The thread of a link that tells it when a time has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Clock {
    /// There is none.
    #[default]
    Stopped,
    /// It sleeps until then, at most.
    Until(Instant),
    /// It has nothing to wait for, and will end.
    Lingers,
}

/// What is behind the lock.
#[derive(Default)]
struct Inner {
    /// None before the link starts, and when it has ended.
    driver: Option<LinkDriver>,
    clock: Clock,
    /// It was said that there is no thread for the clock.
    told: bool,
}

impl Inner {
    fn next_wake(&self) -> Option<Instant> {
        self.driver.as_ref().and_then(LinkDriver::next_wake)
    }
}

#[derive(Default)]
struct Shared {
    name: String,
    inner: Mutex<Inner>,
    wakes_clock: Condvar,
    substitute: Option<Substitute>,
}

/// How the acceptor is asked to be the clock of links for which the host gives no thread.
#[derive(Clone, Debug)]
pub struct Substitute(Arc<EventFd>);

impl Substitute {
    /// One for all links of a broker.
    ///
    /// # Errors
    /// When the host gives no descriptor.
    pub fn new() -> io::Result<Self> {
        let eventfd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self(Arc::new(eventfd)))
    }

    /// Readable when a link asks.
    pub fn eventfd(&self) -> &EventFd {
        &self.0
    }

    fn ask(&self) {
        // Fails only when its count is at its end: then it is asked already.
        let _ = self.0.write(1);
    }
}

/// The way to one link.
#[derive(Clone, Default)]
pub struct LinkPort(Arc<Shared>);

impl fmt::Debug for LinkPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LinkPort")
    }
}

impl LinkPort {
    /// The way to the link of this name, which has not begun.
    pub fn new(name: &str, substitute: Substitute) -> Self {
        Self(Arc::new(Shared { name: name.into(), substitute: Some(substitute), ..Shared::default() }))
    }

    /// Whether both are the way to the same link: another one of its name is not.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The link's name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Lets the link begin.
    pub fn start(&self, driver: LinkDriver) {
        self.lock().driver = Some(driver);
    }

    /// Has the link take an input. One that has ended drops it, and with it any question
    /// in it.
    pub fn send(&self, input: Input) {
        let _ends = EndsPanicked(self);
        let mut inner = self.lock();
        let Some(driver) = inner.driver.as_mut() else { return };
        driver.take(input);
        self.set_clock(&mut inner);
    }

    /// Ends the link: its sessions, channels and its clock.
    pub fn end(&self) {
        let driver = self.lock().driver.take();
        self.0.wakes_clock.notify_one();
        drop(driver);
    }

    /// Sees to it that the clock wakes up when the link next has something to do.
    fn set_clock(&self, inner: &mut Inner) {
        let Some(next) = inner.next_wake() else { return };
        match inner.clock {
            Clock::Until(until) if until <= next => {}
            Clock::Until(_) | Clock::Lingers => {
                inner.clock = Clock::Until(next);
                self.0.wakes_clock.notify_one();
            }
            Clock::Stopped => match self.start_clock() {
                Ok(()) => {
                    inner.clock = Clock::Until(next);
                    inner.told = false;
                }
                Err(error) => {
                    if let Some(substitute) = &self.0.substitute {
                        substitute.ask();
                    }
                    if !std::mem::replace(&mut inner.told, true) {
                        error!(
                            link = %self.0.name,
                            %error,
                            "the host gives the broker no thread (pids.max or TasksMax of its control group, \
                             ulimit -u): deadlines of this link are late by a few hundred milliseconds"
                        );
                    }
                }
            },
        }
    }

    /// Does what the link's clock would do, if it has none and one is wanted, and tries to start
    /// it. Says whether the link still needs this. Waits for nobody.
    pub fn stand_in(&self) -> bool {
        let _ends = EndsPanicked(self);
        let mut inner = match self.0.inner.try_lock() {
            Ok(inner) => inner,
            // Whoever has it sets the clock.
            Err(TryLockError::WouldBlock) => return true,
            Err(TryLockError::Poisoned(poisoned)) => lost(poisoned.into_inner()),
        };
        if inner.clock != Clock::Stopped {
            return false;
        }
        let now = Instant::now();
        if inner.next_wake().is_some_and(|next| now >= next)
            && let Some(driver) = inner.driver.as_mut()
        {
            driver.time_passed(now);
        }
        self.set_clock(&mut inner);
        inner.clock == Clock::Stopped && inner.next_wake().is_some()
    }

    fn start_clock(&self) -> io::Result<()> {
        let port = self.clone();
        thread::Builder::new().name(format!("link {}", self.0.name)).spawn(move || port.run_clock())?;
        Ok(())
    }

    /// The clock: tells the link when a time has come, until there is nothing to wait for.
    fn run_clock(&self) {
        let _ends = EndsPanicked(self);
        let mut inner = self.lock();
        loop {
            let now = Instant::now();
            if let Some(driver) = inner.driver.as_mut() {
                driver.time_passed(now);
            }
            let next = inner.next_wake();
            // A link that has ended waits for nothing more.
            if inner.driver.is_none() || (next.is_none() && inner.clock == Clock::Lingers) {
                inner.clock = Clock::Stopped;
                return;
            }
            inner.clock = next.map_or(Clock::Lingers, Clock::Until);
            let time = next.map_or(LINGER, |next| next.saturating_duration_since(now));
            let waited = self.0.wakes_clock.wait_timeout(inner, time);
            inner = waited.map_or_else(|poisoned| lost(poisoned.into_inner().0), |(inner, _)| inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(|poisoned| lost(poisoned.into_inner()))
    }
}

/// Has a thread look at a link that this one panicked in, so that its sessions end.
struct EndsPanicked<'p>(&'p LinkPort);

impl Drop for EndsPanicked<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let port = self.0.clone();
            // Without a thread the link's next input does it.
            drop(thread::Builder::new().spawn(move || drop(port.lock())));
        }
    }
}

/// A thread panicked inside the link: its state means nothing any more. The link ends,
/// and with it the sessions of both sides; others go on.
fn lost(mut inner: MutexGuard<'_, Inner>) -> MutexGuard<'_, Inner> {
    if inner.driver.take().is_some() {
        error!("a link is broken by a defect of the broker, and has ended; please report it");
    }
    inner
}
