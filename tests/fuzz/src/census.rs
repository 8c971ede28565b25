//! Descriptors and threads of the process: an input that is over leaves as many as there were.

use std::path::PathBuf;
use std::time::{Duration, Instant};
use std::{fs, thread};

/// How long the last thread of an input may take to end. The machine may be busy.
const PATIENCE: Duration = Duration::from_secs(3);

/// How many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Census {
    descriptors: usize,
    threads: usize,
}

impl Census {
    /// Of now.
    pub fn take() -> Self {
        let count = |folder| fs::read_dir(folder).map_or(0, Iterator::count);
        Self { descriptors: count("/proc/self/fd"), threads: count("/proc/self/task") }
    }

    /// Waits until there are as many again.
    ///
    /// # Panics
    /// When there stay more.
    pub fn is_as_before(self) {
        let end = Instant::now() + PATIENCE;
        loop {
            let now = Self::take();
            if now.descriptors <= self.descriptors && now.threads <= self.threads {
                return;
            }
            assert!(Instant::now() < end, "{self:?} before, {now:?} after: {:#?}", kinds());
            thread::yield_now();
        }
    }
}

fn kinds() -> Vec<PathBuf> {
    let entries = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    entries.filter_map(|entry| fs::read_link(entry.path()).ok()).collect()
}
