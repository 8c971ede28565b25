//! What the broker's process has, as the kernel says.

use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;

/// What a process has, now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Open descriptors.
    pub descriptors: u64,
    /// Threads.
    pub threads: u64,
    /// Memory of its own, KiB.
    pub anonymous_kib: u64,
}

impl Usage {
    /// Of this process.
    pub fn of(pid: u32) -> Result<Self> {
        let count = |folder: &str| -> Result<u64> {
            Ok(fs::read_dir(format!("/proc/{pid}/{folder}"))?.count() as u64)
        };
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let line = rollup.lines().find_map(|line| line.strip_prefix("Anonymous:"));
        let word = line.and_then(|line| line.split_whitespace().next());
        Ok(Self {
            descriptors: count("fd")?,
            threads: count("task")?,
            anonymous_kib: word.context("the kernel tells no anonymous memory")?.parse()?,
        })
    }

    /// Whether it has no more descriptors and threads than then.
    pub fn is_within(&self, then: &Self) -> bool {
        self.descriptors <= then.descriptors && self.threads <= then.threads
    }
}
