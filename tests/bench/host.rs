//! The machine: its two processors, what it is, and how much of it other processes use.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::{Pid, SysconfVar, sysconf};
use serde::Serialize;

/// The processor of every sender.
pub const SENDER: usize = 0;
/// The processor of every receiver.
pub const RECEIVER: usize = 1;

/// Keeps this thread on one processor.
pub fn pin_this_thread(processor: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(processor)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot run on processor {processor}"))
}

/// What is measured on.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    processors: usize,
    model: String,
    kernel: String,
    /// Of testpmd, if it is there.
    dpdk: Option<String>,
    /// DPDK's memory is in hugepages.
    hugepages: bool,
}

impl Machine {
    /// This one.
    pub fn this(dpdk: Option<String>, hugepages: bool) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo");
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            processors: cpu.lines().filter(|line| line.starts_with("processor")).count(),
            model: model.map_or("unknown", |(_, model)| model).trim().into(),
            kernel: read("/proc/sys/kernel/osrelease").trim().into(),
            dpdk,
            hugepages,
        }
    }

    /// For people.
    pub fn line(&self) -> String {
        let Self { processors, model, kernel, dpdk, hugepages } = self;
        let dpdk = dpdk.as_deref().unwrap_or("none");
        let pages = if *hugepages { "in hugepages" } else { "without hugepages" };
        format!("{processors} x {model}, Linux {kernel}, DPDK {dpdk} {pages}")
    }
}

/// Processor time used since the machine's start, in the kernel's ticks.
#[derive(Clone, Copy, Debug)]
pub struct Ticks {
    /// When they were read.
    at: Instant,
    all: u64,
    ours: u64,
}

impl Ticks {
    /// Of all, and of this process and these.
    pub fn now(pids: &[u32]) -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("how busy the machine is")?;
        let all = busy(&stat).context("/proc/stat has no line of all processors")?;
        let mut ours = used_by("/proc/self/stat")?;
        for pid in pids {
            ours += used_by(&format!("/proc/{pid}/stat"))?;
        }
        Ok(Self { at: Instant::now(), all, ours })
    }

    /// What others have used since an earlier moment, in percent of a processor.
    pub fn others_percent_since(self, earlier: Self) -> f64 {
        let seconds = self.at.duration_since(earlier.at).as_secs_f64();
        let all = self.all.saturating_sub(earlier.all);
        let others = all.saturating_sub(self.ours.saturating_sub(earlier.ours));
        let a_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
        others as f64 / a_second as f64 / seconds * 100.0
    }
}

/// Of /proc/stat: user, nice, system, irq, softirq and steal of all processors.
fn busy(stat: &str) -> Option<u64> {
    let numbers: Vec<u64> = stat
        .lines()
        .next()?
        .strip_prefix("cpu ")?
        .split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect();
    // Idle and waiting for I/O are the fourth and the fifth; guests count as user already.
    let (idle, rest) = (3..5, numbers.get(..8)?);
    Some(rest.iter().enumerate().filter(|(at, _)| !idle.contains(at)).map(|(_, number)| number).sum())
}

fn used_by(path: &str) -> Result<u64> {
    let stat = fs::read_to_string(path).with_context(|| format!("{path}: a process has ended"))?;
    user_and_system(&stat).with_context(|| format!("{path} has no times"))
}

/// Of /proc/PID/stat: the 14th and the 15th field. The second may hold anything.
fn user_and_system(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut number = || fields.next()?.parse::<u64>().ok();
    Some(number()? + number()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_not_counted() {
        assert_eq!(busy("cpu  1 2 4 1000 1000 8 16 32 64 128\ncpu0 1\n"), Some(63));
        assert_eq!(busy("cpu  1 2\n"), None);
    }

    #[test]
    fn times_of_a_process_with_any_name_are_found() {
        let stat = "7 (a) b) S 1 1 1 0 -1 0 1 2 3 4 500 60 7 8 20 0 1";
        assert_eq!(user_and_system(stat), Some(560));
    }
}
