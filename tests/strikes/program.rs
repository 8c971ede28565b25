//! One of the guests' programs, and what it says of its packets while it runs.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use vhost_pci_tests::Process;

/// Between two of its lines.
pub const EVERY_MS: u64 = 20;

/// What a program has counted since its start.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Counts {
    pub tx_packets: u64,
    pub rx_packets: u64,
    pub lost: u64,
    pub reordered: u64,
    pub corrupted: u64,
    pub dropped: u64,
    pub faults: u64,
    pub links: u64,
    pub rescued: u64,
}

impl Counts {
    /// These and those of another program.
    pub fn and(self, other: Self) -> Self {
        Self {
            tx_packets: self.tx_packets + other.tx_packets,
            rx_packets: self.rx_packets + other.rx_packets,
            lost: self.lost + other.lost,
            reordered: self.reordered + other.reordered,
            corrupted: self.corrupted + other.corrupted,
            dropped: self.dropped + other.dropped,
            faults: self.faults + other.faults,
            links: self.links + other.links,
            rescued: self.rescued + other.rescued,
        }
    }
}

/// What arrives at one side of a link, whichever program is there.
#[derive(Debug)]
pub struct Arrivals(Mutex<Gap>);

#[derive(Debug)]
struct Gap {
    last: Instant,
    longest: Duration,
    /// Times that more had arrived.
    times: u64,
}

impl Arrivals {
    /// None until now.
    pub fn new() -> Arc<Self> {
        let gap = Gap { last: Instant::now(), longest: Duration::ZERO, times: 0 };
        Arc::new(Self(Mutex::new(gap)))
    }

    fn gap(&self) -> MutexGuard<'_, Gap> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn more(&self, now: Instant) {
        let mut gap = self.gap();
        gap.longest = gap.longest.max(now.duration_since(gap.last));
        gap.last = now;
        gap.times += 1;
    }

    /// From now on the longest time without a packet is looked for.
    pub fn begin(&self) {
        self.gap().longest = Duration::ZERO;
    }

    /// The longest time without a packet since [`Self::begin`], as exact as the programs' lines
    /// are frequent.
    pub fn longest(&self) -> Duration {
        self.gap().longest
    }

    /// How often something has arrived.
    pub fn times(&self) -> u64 {
        self.gap().times
    }
}

/// A running program.
pub struct Program {
    pub process: Process,
    counts: Arc<Mutex<Counts>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Program {
    /// Starts `command`, which prints its counters as JSON lines. Its messages go to `log`.
    pub fn start(name: &str, mut command: Command, log: &Path, arrivals: Arc<Arrivals>) -> Result<Self> {
        let (output, input) = std::io::pipe().context("a pipe")?;
        let every = EVERY_MS.to_string();
        command.args(["--json-lines", "--report-every-ms", &every]).stdin(std::process::Stdio::null());
        command.stdout(input);
        let process = Process::spawn_with_pipes(name, command, log)?;
        let counts = Arc::new(Mutex::new(Counts::default()));
        let reader = thread::spawn({
            let counts = counts.clone();
            move || {
                let mut received = 0;
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    // The last line of a program that was killed may be cut off.
                    let Ok(now) = serde_json::from_str::<Counts>(&line) else { continue };
                    if now.rx_packets > received {
                        received = now.rx_packets;
                        arrivals.more(Instant::now());
                    }
                    *counts.lock().unwrap_or_else(PoisonError::into_inner) = now;
                }
            }
        });
        Ok(Self { process, counts, reader: Some(reader) })
    }

    /// What it has said last.
    pub fn counts(&self) -> Counts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it said last of all: it has ended.
    pub fn last_counts(&mut self) -> Counts {
        if let Some(reader) = self.reader.take() {
            // It ends with the pipe.
            let _ = reader.join();
        }
        self.counts()
    }
}
