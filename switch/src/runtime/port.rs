//! How threads reach a link: each input is applied by the thread that has it, under
//! the link's lock. Nothing that is done under it waits for anybody: sessions wait
//! for answers, and channels for VMMs, outside. So a change goes from one VMM's
//! socket to the other's without a change of threads in between.
//!
//! A link's own thread is its clock, and sleeps otherwise.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Instant;

use tracing::error;

use super::Input;
use super::driver::LinkDriver;

/// What is behind the lock.
#[derive(Default)]
struct Inner {
    /// None before the link starts, and when it has ended.
    driver: Option<LinkDriver>,
    ended: bool,
    /// Until when the clock sleeps; None: until it is woken.
    sleeps_until: Option<Instant>,
}

#[derive(Default)]
struct Shared {
    inner: Mutex<Inner>,
    clock: Condvar,
}

/// The way to one link.
#[derive(Clone, Default)]
pub struct LinkPort(Arc<Shared>);

impl std::fmt::Debug for LinkPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LinkPort")
    }
}

impl LinkPort {
    /// Lets the link begin.
    pub fn start(&self, driver: LinkDriver) {
        self.lock().driver = Some(driver);
    }

    /// Has the link take an input. One that has ended drops it, and with it any question
    /// in it.
    pub fn send(&self, input: Input) {
        let _wakes = WakesClock(&self.0.clock);
        let mut inner = self.lock();
        let Some(driver) = inner.driver.as_mut() else { return };
        driver.take(input);
        let next = driver.next_wake();
        if next.is_some_and(|next| inner.sleeps_until.is_none_or(|until| next < until)) {
            inner.sleeps_until = next;
            self.0.clock.notify_one();
        }
    }

    /// Ends the link: its sessions, channels and its clock.
    pub fn end(&self) {
        let mut inner = self.lock();
        inner.ended = true;
        let driver = inner.driver.take();
        self.0.clock.notify_one();
        drop(inner);
        drop(driver);
    }

    /// The clock: tells the link when a time has come, until it ends.
    pub fn run_clock(&self) {
        let mut inner = self.lock();
        while !inner.ended {
            let now = Instant::now();
            if let Some(driver) = inner.driver.as_mut() {
                driver.time_passed(now);
            }
            inner.sleeps_until = inner.driver.as_ref().and_then(LinkDriver::next_wake);
            let waited = match inner.sleeps_until {
                None => self.0.clock.wait(inner),
                Some(until) => {
                    let time = until.saturating_duration_since(now);
                    self.0
                        .clock
                        .wait_timeout(inner, time)
                        .map(|(inner, _)| inner)
                        .map_err(|error| std::sync::PoisonError::new(error.into_inner().0))
                }
            };
            inner = waited.unwrap_or_else(|poisoned| lost(poisoned.into_inner()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(|poisoned| lost(poisoned.into_inner()))
    }
}

/// Has the clock look at a link that a thread panicked in, so that its sessions end.
struct WakesClock<'c>(&'c Condvar);

impl Drop for WakesClock<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.notify_one();
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
