//! `soak --packets N`: an owner and a peer that wait by interrupts, two processes with a broker
//! between them, exchange N packets and more, while both pause at random moments, so that each
//! falls asleep and is woken at every moment there is. Not one of them may oversleep: a sleep
//! that its clock ends although there is work, of which no notification comes within a second
//! more, is a notification lost. Both programs count these (`rescued`).
//!
//! `tests/soak/run` builds the programs and starts this.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;
use vhost_pci_tests::Process;

/// For whatever should take a moment.
const SOON: Duration = Duration::from_secs(30);
/// Between two looks at the programs.
const LOOK: Duration = Duration::from_millis(100);
/// Between two lines for who watches.
const TELL: Duration = Duration::from_secs(5);
/// Packets a second below which something is wrong, on the busiest machine.
const SLOWEST: u64 = 20_000;
/// The longest pause, microseconds.
const PAUSE: &str = "2000";
/// Each side sleeps more often than once in so many packets, or this shows nothing.
const RARELY: u64 = 50_000;

/// A way to exchange packets.
struct Run {
    shows: &'static str,
    /// One in so many of the packets asked for.
    share: u64,
    peer: &'static str,
    owner: &'static [&'static str],
    wait: &'static str,
}

const RUNS: &[Run] = &[
    Run { shows: "both ways", share: 1, peer: "gen", owner: &["both"], wait: "interrupt" },
    Run { shows: "there and back", share: 10, peer: "echo", owner: &["echo-check"], wait: "interrupt" },
    Run {
        shows: "both ways, without EVENT_IDX",
        share: 10,
        peer: "gen",
        owner: &["both", "--no-event-idx"],
        wait: "interrupt",
    },
    Run {
        shows: "there and back, without EVENT_IDX",
        share: 10,
        peer: "echo",
        owner: &["echo-check", "--no-event-idx"],
        wait: "interrupt",
    },
    Run { shows: "both ways, adaptive", share: 10, peer: "gen", owner: &["both"], wait: "adaptive=20" },
];

/// What a program has counted since its start.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Counts {
    seconds: f64,
    tx_packets: u64,
    rx_packets: u64,
    lost: u64,
    reordered: u64,
    corrupted: u64,
    dropped: u64,
    faults: u64,
    sleeps: u64,
    rescued: u64,
    end: bool,
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let packets = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--packets", number] => number.parse().ok(),
        _ => None,
    };
    let Some(packets) = packets else {
        eprintln!("usage: soak --packets N");
        return ExitCode::from(2);
    };
    match soak(packets) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soak: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn soak(packets: u64) -> Result<()> {
    let start = Instant::now();
    let mut link = Link::open()?;
    let mut total = 0;
    for run in RUNS {
        match link.exchange(run, packets / run.share) {
            Ok(moved) => total += moved,
            Err(error) => {
                return Err(error.context(format!("{}; logs in {}", run.shows, link.keep().display())));
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("soak: passed: {total} packets in {seconds:.1} s, none slept over");
    Ok(())
}

/// A running broker with one link, and a directory for sockets and logs that is removed at the
/// end.
struct Link {
    dir: TempDir,
    programs: PathBuf,
    _broker: Process,
}

impl Link {
    fn open() -> Result<Self> {
        let program = std::env::current_exe().context("where this program is")?;
        let programs = program.parent().context("this program is in no directory")?.to_owned();
        // Short and below /tmp: a socket's path may have no more than 107 bytes.
        let dir = tempfile::Builder::new()
            .prefix("soak-")
            .tempdir_in("/tmp")
            .context("a directory for sockets and logs")?;
        let path = |name: &str| dir.path().join(name).display().to_string();
        let text = format!(
            "control_socket = {:?}\n[[link]]\nname = \"soak\"\nowner_socket = {:?}\npeer_socket = {:?}\n",
            path("control.sock"),
            path("owner.sock"),
            path("peer.sock"),
        );
        fs::write(path("broker.toml"), text)?;
        let mut command = Command::new(programs.join("vhost-pci-switch"));
        command.args(["run", "--config", &path("broker.toml")]);
        let mut broker = Process::spawn("broker", command, &dir.path().join("broker.log"))?;
        broker.wait_log("the broker listens", SOON)?;
        Ok(Self { dir, programs, _broker: broker })
    }

    /// Leaves the directory when the link is dropped.
    fn keep(&mut self) -> &Path {
        self.dir.disable_cleanup(true);
        self.dir.path()
    }

    /// A guest's program at a socket of the link.
    fn start(&self, name: &str, socket: &str, program: &[&str], wait: &str) -> Result<Process> {
        let mut command = Command::new(self.programs.join("vhost-pci-guest"));
        command.args(program).args(["--wait", wait, "--pauses-us", PAUSE, "--json-lines", "--socket"]);
        command.arg(self.dir.path().join(socket));
        Process::spawn(name, command, &self.dir.path().join(format!("{name}.log")))
    }

    /// Notifications that the relay has passed on.
    fn relayed(&self) -> Result<u64> {
        let mut command = Command::new(self.programs.join("vhost-pci-switch"));
        let socket = self.dir.path().join("control.sock");
        let output = command.args(["status", "--json", "--control-socket"]).arg(socket).output()?;
        ensure!(output.status.success(), "status: {}", String::from_utf8_lossy(&output.stderr));
        let status: Value = serde_json::from_slice(&output.stdout)?;
        let count = status.pointer("/links/0/counters/notifications_relayed").and_then(Value::as_u64);
        count.context("status counts no notifications")
    }

    /// Exchanges so many packets one way at least. Returns how many moved both ways.
    fn exchange(&self, run: &Run, packets: u64) -> Result<u64> {
        let before = self.relayed()?;
        let mut peer = self.start("peer", "peer.sock", &[run.peer], run.wait)?;
        peer.wait_log("the device is started", SOON)?;
        let limit = packets.to_string();
        let owner = [&["owner", "--packets", &limit, "--mode"], run.owner].concat();
        let mut owner = self.start("owner", "owner.sock", &owner, run.wait)?;
        let deadline = Instant::now() + SOON + Duration::from_secs(packets / SLOWEST);
        let mut told = Instant::now();
        let status = loop {
            if let Some(status) = owner.exited()? {
                break status;
            }
            ensure!(peer.exited()?.is_none(), "the peer ended:\n{}", peer.log());
            if Instant::now() > deadline {
                bail!("the owner has got no further than {:?}", latest(&owner));
            }
            if told.elapsed() > TELL {
                told = Instant::now();
                let Counts { seconds, tx_packets, rx_packets, sleeps, .. } = latest(&owner);
                println!(
                    "soak: {}: {seconds:.0} s, {tx_packets} packets to the peer, {rx_packets} to the owner, \
                     which slept {sleeps} times",
                    run.shows
                );
            }
            std::thread::sleep(LOOK);
        };
        ensure!(status.success(), "the owner: {status}\n{}", owner.log());
        let status = peer.terminate(SOON)?;
        ensure!(status.success(), "the peer: {status}\n{}", peer.log());
        let (owner, peer) = (latest(&owner), latest(&peer));
        judge("owner", &owner, packets)?;
        judge("peer", &peer, packets)?;
        let moved = owner.tx_packets + owner.rx_packets;
        let relayed = self.relayed()? - before;
        println!(
            "soak: {} ({}): {moved} packets in {:.1} s; the owner slept {} times, the peer {}; rescued by the \
             clock {}; a notification for {:.0} packets",
            run.shows,
            run.wait,
            owner.seconds,
            owner.sleeps,
            peer.sleeps,
            owner.rescued + peer.rescued,
            moved as f64 / relayed.max(1) as f64,
        );
        Ok(moved)
    }
}

/// The last line of counters that a program has printed.
fn latest(program: &Process) -> Counts {
    let log = program.log();
    log.lines().rev().find_map(|line| serde_json::from_str(line).ok()).unwrap_or_default()
}

fn judge(who: &str, counts: &Counts, packets: u64) -> Result<()> {
    ensure!(counts.end, "the {who} did not say how it ended: {counts:?}");
    let Counts { lost, reordered, corrupted, dropped, faults, .. } = *counts;
    ensure!(lost + reordered + corrupted + dropped + faults == 0, "the {who}: {counts:?}");
    ensure!(counts.rescued == 0, "the {who} slept over work {} times: {counts:?}", counts.rescued);
    ensure!(counts.sleeps >= packets / RARELY, "the {who} hardly ever slept: {counts:?}");
    Ok(())
}
