//! Both owners of a closed loop, in one process: each sends out of its one card what comes in at the
//! other, and packets are in the loop from the start.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use vhost_pci_tests::Process;

use crate::broker::{SOON, guest};
use crate::contender::{Count, Verdict};
use crate::host::SENDER;
use crate::testpmd::{Depth, Role, SHALLOW, Testpmd};

/// Who both owners are.
#[derive(Clone, Copy)]
pub enum Owners {
    /// One testpmd; the options of its devices.
    Dpdk(&'static str, Depth),
    /// One of our programs, with as many packets under way as [`SHALLOW`] has; the options of its rings.
    Ours(&'static [&'static str]),
}

impl Owners {
    /// Starts them with packets of so many bytes, connected to two sockets, in a directory.
    pub fn start(self, dir: &Path, size: usize, sockets: &[impl AsRef<Path>; 2]) -> Result<Ends> {
        match self {
            Self::Dpdk(options, depth) => {
                let devices: Vec<_> =
                    (0..).zip(sockets).map(|(at, socket)| card(at, socket, options)).collect();
                let mut ends = Testpmd::start(dir, Role::Ends(size), depth, &devices)?;
                ends.fill_loop()?;
                Ok(Ends::Dpdk(ends))
            }
            Self::Ours(options) => Rounds::start(dir, size, sockets, options).map(Ends::Ours),
        }
    }
}

/// A card of testpmd's: the driver's device on a socket.
pub fn card(at: usize, socket: impl AsRef<Path>, options: &str) -> String {
    format!("net_virtio_user{at},path={},{options}", socket.as_ref().display())
}

/// The process.
pub enum Ends {
    /// Testpmd.
    Dpdk(Testpmd),
    /// Ours.
    Ours(Rounds),
}

impl Ends {
    /// The process.
    pub fn process(&mut self) -> &mut Process {
        match self {
            Self::Dpdk(testpmd) => testpmd.process(),
            Self::Ours(rounds) => &mut rounds.process,
        }
    }

    /// Its id.
    pub fn pid(&self) -> u32 {
        match self {
            Self::Dpdk(testpmd) => testpmd.pid(),
            Self::Ours(rounds) => rounds.process.pid(),
        }
    }

    /// What both owners have received, together.
    pub fn received(&mut self) -> Result<Count> {
        match self {
            Self::Dpdk(testpmd) => testpmd.received(),
            Self::Ours(rounds) => rounds.received(),
        }
    }

    /// What they have found wrong in packets, if they look.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Dpdk(_) => Verdict::default(),
            Self::Ours(rounds) => rounds.verdict,
        }
    }

    /// What they have written.
    pub fn logs(&self) -> String {
        match self {
            Self::Dpdk(testpmd) => testpmd.logs(),
            Self::Ours(rounds) => format!("owners:\n{}", rounds.process.log()),
        }
    }
}

/// Our program with two cards, in which packets go round.
pub struct Rounds {
    process: Process,
    begin: Instant,
    /// Lines that were read.
    lines: usize,
    verdict: Verdict,
}

/// What it says once a second.
#[derive(Deserialize)]
struct Line {
    seconds: f64,
    rx_packets: u64,
    rx_bytes: u64,
    corrupted: u64,
    checked: u64,
}

/// Between two looks for a line.
const LOOK: Duration = Duration::from_millis(20);

impl Rounds {
    fn start(dir: &Path, size: usize, sockets: &[impl AsRef<Path>; 2], options: &[&str]) -> Result<Self> {
        let mut command = guest(SENDER)?;
        command.args(["owner-forward", "--wait", "poll", "--json-lines", "--check", "sample"]);
        command.args(["--size", &size.to_string(), "--inject", &SHALLOW.fill.to_string()]).args(options);
        for socket in sockets {
            command.arg("--socket").arg(socket.as_ref());
        }
        let process = Process::spawn("owners", command, &dir.join("owners.log"))?;
        Ok(Self { process, begin: Instant::now(), lines: 0, verdict: Verdict::default() })
    }

    /// What its next line says, for the time at which it says so.
    fn received(&mut self) -> Result<Count> {
        let deadline = Instant::now() + SOON;
        loop {
            let log = self.process.log();
            let lines: Vec<_> =
                log.lines().filter(|line| line.starts_with('{') && line.ends_with('}')).collect();
            if let Some(line) = lines.last()
                && lines.len() > self.lines
            {
                self.lines = lines.len();
                let Line { seconds, rx_packets, rx_bytes, corrupted, checked } =
                    serde_json::from_str(line).context("a line of the owners")?;
                self.verdict = Verdict { sampled: checked, corrupted, ..Verdict::default() };
                let at = self.begin + Duration::from_secs_f64(seconds);
                return Ok(Count { at, packets: rx_packets, bytes: rx_bytes });
            }
            ensure!(Instant::now() < deadline, "the owners say nothing:\n{log}");
            ensure!(self.process.exited()?.is_none(), "the owners have ended:\n{log}");
            thread::sleep(LOOK);
        }
    }
}
