//! What our owner and our peer do in the steady state besides moving packets: system calls, counted by
//! perf or strace, allocations, by a counting allocator, and buffers that are not in the mapping of the
//! one before.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde::Serialize;
use vhost_pci_tests::Process;

use crate::allocations::Answering;
use crate::broker::{SOON, this_program};
use crate::host::{SENDER, Ticks};
use crate::link::Link;
use crate::measure::{MOST_OTHERS, wait_until_quiet};
use crate::peer::{Content, Contract};

/// Bytes of a packet.
const SIZE: usize = 64;
/// Until everything has been allocated that will be.
const WARM_UP: Duration = Duration::from_millis(500);
/// Packets that are counted for at least.
const PACKETS: u64 = 1_000_000;
/// How long it may take for them to pass.
const LONGEST: Duration = Duration::from_secs(10);
/// For a counter to look at a process.
const ATTACH: Duration = Duration::from_millis(100);
/// As long as they are counted for, at least.
const WINDOW: Duration = Duration::from_secs(1);

/// What was counted.
#[derive(Clone, Debug, Serialize)]
pub struct Counts {
    /// Packets that passed while allocations and searches were counted, and while system calls were.
    pub packets: u64,
    pub packets_during_calls: u64,
    /// By the owner and by the peer, all threads of each, without those of the next line.
    pub system_calls: [u64; 2],
    /// Times that they gave up their processor as nothing had come for a thousand looks: the other
    /// side was not running, because of somebody else.
    pub yields: [u64; 2],
    /// What counted them.
    pub counted_by: &'static str,
    /// Which they were, where that is known.
    pub system_calls_by_name: Vec<String>,
    /// By the owner and by the peer.
    pub allocations: [u64; 2],
    /// Buffers that the peer searched for in the mapping table.
    pub searches: u64,
    /// What others used meanwhile, percent of a processor: who has to wait because the other side
    /// does not run yields its processor, by a system call.
    pub others_percent: f64,
}

/// How often it is tried to count while nobody else uses the processors.
const TRIES: usize = 3;

/// Counts once, while nobody else uses the processors if that can be had.
///
/// # Errors
/// Without perf and strace, or if the link does not work: with the logs of what failed.
pub fn take() -> Result<Counts> {
    let counter = Counter::new().context("neither perf nor strace can count system calls here")?;
    for _ in 1..TRIES {
        wait_until_quiet();
        let counts = take_once(counter)?;
        if counts.others_percent <= MOST_OTHERS {
            return Ok(counts);
        }
    }
    wait_until_quiet();
    take_once(counter)
}

/// What counts system calls of a process that runs, until it is interrupted.
#[derive(Clone, Copy, Debug)]
enum Counter {
    /// Does not stop who is counted.
    Perf,
    /// Stops who is counted at each call, so that the other side may have to wait, and yields its
    /// processor by a call of its own.
    Strace,
}

/// Perf's names for all of them, and for one.
const CALLS: &str = "raw_syscalls:sys_enter";
const YIELDS: &str = "syscalls:sys_enter_sched_yield";
/// The call's name.
const YIELD: &str = "sched_yield";

impl Counter {
    /// The better one that works here.
    fn new() -> Option<Self> {
        let works = |program: &str, args: &[&str]| {
            Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
        };
        // It needs privileges, too.
        if works("perf", &["stat", "-e", CALLS, "-e", YIELDS, "true"]) {
            return Some(Self::Perf);
        }
        works("strace", &["-V"]).then_some(Self::Strace)
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Perf => "perf",
            Self::Strace => "strace",
        }
    }

    fn command(self, pid: u32, file: &Path) -> Command {
        let mut command = Command::new(self.name());
        match self {
            Self::Perf => {
                command.args(["stat", "-x", ",", "-e", CALLS, "-e", YIELDS, "-p", &pid.to_string(), "-o"])
            }
            Self::Strace => command.args(["-f", "-q", "-c", "-p", &pid.to_string(), "-o"]),
        };
        command.arg(file);
        command
    }

    /// How often what was called.
    fn calls(self, text: &str) -> Vec<(&str, u64)> {
        match self {
            Self::Perf => perf_calls(text),
            Self::Strace => strace_calls(text).collect(),
        }
    }
}

fn take_once(counter: Counter) -> Result<Counts> {
    let mut link = Link::open(SIZE, Content::Pattern, Contract::Copy)?;
    let mut command = this_program(SENDER, "owner")?;
    command.args(["--mode", "gen", "--check", "none", "--wait", "poll"]);
    command.args(["--size", &SIZE.to_string(), "--socket"]).arg(link.owner_socket());
    let mut owner = Answering::spawn("owner", command, &link.path("owner.log"))?;
    owner.process().wait_log("the owner's device is started", SOON)?;
    thread::sleep(WARM_UP);
    let allocations = [owner.allocations()?, link.peer_allocations()?];
    let (searches, warm) = (link.searches()?, link.received()?);
    let pids = [owner.pid(), link.pids()[0]];
    let mut counters = Vec::new();
    for (at, pid) in pids.into_iter().enumerate() {
        let command = counter.command(pid, &link.path(&format!("calls{at}")));
        counters.push(Process::spawn(counter.name(), command, &link.path(&format!("counter{at}.log")))?);
    }
    let [_, broker] = link.pids();
    let all = [&pids[..], &[broker], &counters.iter().map(Process::pid).collect::<Vec<_>>()].concat();
    thread::sleep(ATTACH);
    // System calls are counted from now on, the rest since it was warm.
    let from = link.received()?;
    let (begin, ticks) = (Instant::now(), Ticks::now(&all)?);
    let mut to = from;
    while to.packets - from.packets < PACKETS || begin.elapsed() < WINDOW {
        ensure!(begin.elapsed() < LONGEST, "fewer than {PACKETS} packets in {LONGEST:?}\n{}", link.logs());
        thread::sleep(Duration::from_millis(20));
        to = link.received()?;
    }
    let others_percent = Ticks::now(&all)?.others_percent_since(ticks);
    for counter in &mut counters {
        counter.signal(Signal::SIGINT)?;
        counter.wait(SOON)?;
    }
    let allocations = [owner.allocations()? - allocations[0], link.peer_allocations()? - allocations[1]];
    let mut counts = Counts {
        packets: to.packets - warm.packets,
        packets_during_calls: to.packets - from.packets,
        system_calls: [0; 2],
        yields: [0; 2],
        counted_by: counter.name(),
        system_calls_by_name: Vec::new(),
        allocations,
        searches: link.searches()? - searches,
        others_percent,
    };
    for (at, who) in ["owner", "peer"].into_iter().enumerate() {
        let text = fs::read_to_string(link.path(&format!("calls{at}")));
        let text = text.with_context(|| format!("no calls were counted: {}", counters[at].log()))?;
        let calls = counter.calls(&text);
        // Strace's table is empty if there were none; perf says so.
        ensure!(!calls.is_empty() || matches!(counter, Counter::Strace), "perf counted nothing: {text}");
        for (name, count) in calls {
            let sum = if name == YIELD { &mut counts.yields } else { &mut counts.system_calls };
            sum[at] += count;
            counts.system_calls_by_name.push(format!("{who}: {count} {name}"));
        }
    }
    Ok(counts)
}

/// Of perf's lines of numbers: yields, and all other calls together. Nothing if it has not counted.
fn perf_calls(lines: &str) -> Vec<(&'static str, u64)> {
    let count = |event: &str| {
        // How often, unit, event.
        let row = lines.lines().find(|line| line.contains(event))?;
        row.split_once(',')?.0.parse::<u64>().ok()
    };
    match (count(CALLS), count(YIELDS)) {
        (Some(calls), Some(yields)) => vec![(YIELD, yields), ("others", calls.saturating_sub(yields))],
        _ => Vec::new(),
    }
}

/// Of strace's table: names and how often they were called.
fn strace_calls(table: &str) -> impl Iterator<Item = (&str, u64)> {
    // % time, seconds, usecs/call, calls, errors (or nothing), syscall.
    let rows = table.lines().filter_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        Some((*words.last()?, words.get(3)?.parse().ok()?))
    });
    rows.filter(|(name, _)| *name != "total")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rows_of_straces_table_are_found() {
        let table = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.000030          10         3         1 poll
 40.00    0.000020          20         1           sched_yield
------ ----------- ----------- --------- --------- ----------------
100.00    0.000050          12         4         1 total
";
        assert!(strace_calls(table).eq([("poll", 3), ("sched_yield", 1)]));
        assert_eq!(strace_calls("").count(), 0);
    }

    #[test]
    fn perfs_numbers_are_found() {
        let lines = "# started on Sat\n\n42,,raw_syscalls:sys_enter,1000,100.00,,\n\
                     40,,syscalls:sys_enter_sched_yield,1000,100.00,,\n";
        assert_eq!(perf_calls(lines), [(YIELD, 40), ("others", 2)]);
        assert_eq!(perf_calls(&lines.replace("42,", "<not counted>,")), []);
    }
}
