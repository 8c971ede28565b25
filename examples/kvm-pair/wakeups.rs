//! How often the threads of a process went to sleep of their own accord, and so were woken: the
//! kernel's word on who has taken part in something.

use std::collections::BTreeMap;
use std::time::Duration;
use std::{fs, io, thread};

use anyhow::{Context, bail};

/// For how long a process has to sleep to be at rest, and how often that is looked for.
const REST: Duration = Duration::from_millis(2);
const ATTEMPTS: usize = 500;

/// The count of each thread, by number and name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wakeups(BTreeMap<(String, String), u64>);

impl Wakeups {
    /// Of a process, now.
    ///
    /// # Errors
    /// If it is gone.
    pub fn of(process: u32) -> anyhow::Result<Self> {
        let mut counts = BTreeMap::new();
        for thread in fs::read_dir(format!("/proc/{process}/task"))? {
            let thread = thread?;
            let status = match fs::read_to_string(thread.path().join("status")) {
                Ok(status) => status,
                // It has just ended.
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(error.into()),
            };
            let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            let count = field("voluntary_ctxt_switches:").context("no voluntary_ctxt_switches")?.parse()?;
            let number = thread.file_name().to_string_lossy().into_owned();
            counts.insert((number, field("Name:").unwrap_or_default().to_owned()), count);
        }
        Ok(Self(counts))
    }

    /// Of a process that was just asked something, when it sleeps again.
    ///
    /// # Errors
    /// If it does not.
    pub fn at_rest(process: u32) -> anyhow::Result<Self> {
        let mut before = Self::of(process)?;
        for _ in 0..ATTEMPTS {
            thread::sleep(REST);
            let now = Self::of(process)?;
            if now == before {
                return Ok(now);
            }
            before = now;
        }
        bail!("the broker does not come to rest")
    }

    /// Those that there were since.
    #[must_use]
    pub fn since(mut self, before: &Self) -> Self {
        for (thread, count) in &mut self.0 {
            *count = count.saturating_sub(before.0.get(thread).copied().unwrap_or(0));
        }
        self.0.retain(|_, count| *count > 0);
        self
    }

    /// These and others.
    pub fn add(&mut self, others: &Self) {
        for (thread, count) in &others.0 {
            *self.0.entry(thread.clone()).or_default() += count;
        }
    }

    /// All threads' together.
    pub fn sum(&self) -> u64 {
        self.0.values().sum()
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
