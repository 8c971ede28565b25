//! Signals of the queues' own eventfds, by a thread of its own.
//!
//! The broker has duplicates of these eventfds, which share their flags and their count: it can
//! make them blocking and full between any check and the write. So nobody writes them but this
//! thread, for which nobody waits: whoever has a signal leaves a bit, and wakes the thread by an
//! eventfd that only this process has.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::EventFd;

use super::events::Pair;
use crate::sys::event;

/// A queue's notification is to be signalled.
const KICK: u8 = 1 << 0;
/// A queue's interrupt is to be signalled.
const CALL: u8 = 1 << 1;

/// How long the end waits before it looks again whether the thread has ended.
const LOOK_AGAIN: Duration = Duration::from_micros(100);

/// What is to be signalled.
pub struct Signals {
    pairs: Arc<Vec<Pair>>,
    /// Bits by queue.
    raised: Vec<AtomicU8>,
    /// Wakes the thread. Nobody else has it.
    wake: EventFd,
    ending: AtomicBool,
}

/// The thread. Its drop ends it, whatever the broker does to the eventfds.
pub struct Signaller {
    signals: Arc<Signals>,
    thread: Option<JoinHandle<()>>,
}

impl Signals {
    /// Starts the thread for these queues.
    ///
    /// # Errors
    /// When the host gives no thread or descriptor.
    pub fn start(pairs: Arc<Vec<Pair>>) -> io::Result<Signaller> {
        let raised = pairs.iter().map(|_| AtomicU8::new(0)).collect();
        let signals = Arc::new(Self { pairs, raised, wake: event::new()?, ending: AtomicBool::new(false) });
        let thread = std::thread::Builder::new().name("vhost-pci signal".into()).spawn({
            let signals = signals.clone();
            move || signals.run()
        })?;
        Ok(Signaller { signals, thread: Some(thread) })
    }

    /// The eventfds.
    pub fn pairs(&self) -> &Arc<Vec<Pair>> {
        &self.pairs
    }

    /// Signals a queue's notification, soon.
    pub fn kick(&self, queue: usize) {
        self.raise(queue, KICK);
    }

    /// Signals a queue's interrupt, soon.
    pub fn call(&self, queue: usize) {
        self.raise(queue, CALL);
    }

    fn raise(&self, queue: usize, bit: u8) {
        let Some(raised) = self.raised.get(queue) else { return };
        // Release: pairs with the swap in `run`, which sees what led to the signal.
        if raised.fetch_or(bit, Ordering::Release) & bit == 0 {
            event::signal(&self.wake);
        }
    }

    /// Forgets what was raised. A signal that the thread has begun may still come.
    pub fn clear(&self) {
        for raised in &self.raised {
            // Relaxed: nothing is read on account of it.
            raised.store(0, Ordering::Relaxed);
        }
    }

    fn run(&self) {
        // Acquire: pairs with the store in the drop of `Signaller`.
        let is_ending = || self.ending.load(Ordering::Acquire);
        while !is_ending() {
            let mut fds = [PollFd::from_borrowed_fd(event::borrow(&self.wake), PollFlags::IN)];
            // An error is a signal handler's: there is nothing to do then, or there is.
            let _ = poll(&mut fds, None);
            // Before the bits are taken: a bit that comes later wakes again.
            event::drain(&self.wake);
            for (raised, pair) in self.raised.iter().zip(self.pairs.iter()) {
                // Acquire: pairs with `raise`.
                let bits = raised.swap(0, Ordering::Acquire);
                for (bit, its) in [(KICK, &pair.kick), (CALL, &pair.call)] {
                    if bits & bit != 0 && !is_ending() {
                        event::signal_shared(its);
                    }
                }
            }
        }
    }
}

impl Signaller {
    /// What the thread shares.
    pub fn signals(&self) -> &Arc<Signals> {
        &self.signals
    }
}

impl Drop for Signaller {
    fn drop(&mut self) {
        // Release: pairs with the loads in `run`.
        self.signals.ending.store(true, Ordering::Release);
        event::signal(&self.signals.wake);
        let Some(thread) = self.thread.take() else { return };
        while !thread.is_finished() {
            // A write that the broker made wait goes on when there is no count; then the thread ends.
            self.signals.pairs.iter().for_each(Pair::drain);
            std::thread::sleep(LOOK_AGAIN);
        }
        // A panic of it was reported by the panic hook.
        let _ = thread.join();
    }
}
