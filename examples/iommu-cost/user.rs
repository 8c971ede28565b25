//! A thread of the guest's that uses a page: reads and writes it, without pause, until it is
//! told to rest.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, Thread};

use crate::cpu;

/// The thread. It lives as long as the process.
#[derive(Debug)]
pub struct User {
    shared: Arc<Shared>,
    thread: Thread,
}

#[derive(Debug, Default)]
struct Shared {
    /// What to use, plus one; 0: nothing.
    wanted: AtomicU64,
    /// What was used last, likewise.
    used: AtomicU64,
}

impl User {
    /// A thread that uses things, by number, by `touch`.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub fn spawn(mut touch: impl FnMut(u64) + Send + 'static) -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let theirs = shared.clone();
        let thread = thread::Builder::new().name("user".into()).spawn(move || {
            cpu::guest();
            loop {
                // Acquire and release, here and below: what one thread did before it said so is
                // done for the other.
                let wanted = theirs.wanted.load(Ordering::Acquire);
                match wanted.checked_sub(1) {
                    Some(number) => touch(number),
                    None => {
                        theirs.used.store(0, Ordering::Release);
                        thread::park();
                    }
                }
                theirs.used.store(wanted, Ordering::Release);
            }
        })?;
        Ok(Self { shared, thread: thread.thread().clone() })
    }

    /// Has it use this, or rest. Returns when it does.
    pub fn set(&self, number: Option<u64>) {
        let wanted = number.map_or(0, |number| number + 1);
        self.shared.wanted.store(wanted, Ordering::Release);
        self.thread.unpark();
        while self.shared.used.load(Ordering::Acquire) != wanted {
            thread::yield_now();
        }
    }
}
