//! What carries on beside the link that is looked at: a second link of the same broker, with an owner
//! and a peer without VMs, whose packets' round trips are measured; and questions to the broker.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Deserialize;
use vhost_pci_tests::{Process, Sandbox};

use crate::testbed::COMMAND;

/// The second link's sockets, beside the others.
pub const OWNER_SOCKET: &str = "beside-owner.sock";
pub const PEER_SOCKET: &str = "beside-peer.sock";

/// Packets a second, each when the one before has come back.
const RATE: &str = "500";
/// Between two questions.
const PAUSE: Duration = Duration::from_millis(50);

/// The second link, with a peer that sends each packet back.
pub struct Beside {
    peer: Process,
}

/// Its owner, which sends and measures until it is asked to end.
pub struct Pings(Process);

/// What it has found.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct RoundTrips {
    pub count: u64,
    pub lost: u64,
    pub corrupted: u64,
    pub p50_ns: u64,
    pub p99_ns: u64,
    pub max_ns: u64,
}

impl Beside {
    pub fn start(sandbox: &Sandbox) -> Result<Self> {
        let mut peer = guest(sandbox, "beside-peer", PEER_SOCKET, &["echo"])?;
        peer.wait_log("the device is started", COMMAND)?;
        Ok(Self { peer })
    }

    /// Starts its owner.
    pub fn pings(&self, sandbox: &Sandbox) -> Result<Pings> {
        let arguments = ["owner", "--mode", "ping", "--rate", RATE];
        let mut owner = guest(sandbox, "beside-owner", OWNER_SOCKET, &arguments)?;
        owner.wait_log("device is started", COMMAND)?;
        Ok(Pings(owner))
    }

    /// The peer has lived through it all.
    pub fn end(mut self) -> Result<()> {
        ensure!(self.peer.exited()?.is_none(), "the second link's peer ended:\n{}", self.peer.log());
        let status = self.peer.terminate(COMMAND)?;
        ensure!(status.success(), "the second link's peer: {status}\n{}", self.peer.log());
        Ok(())
    }
}

impl Pings {
    /// Ends it. All that it sent has come back, as it was.
    pub fn end(mut self) -> Result<RoundTrips> {
        #[derive(Deserialize)]
        struct Line {
            end: bool,
            tx_packets: u64,
            rx_packets: u64,
            faults: u64,
            links: u64,
            round_trips: Option<RoundTrips>,
        }
        let status = self.0.terminate(COMMAND)?;
        let log = self.0.log();
        ensure!(status.success(), "the second link's owner: {status}\n{log}");
        let line = log.lines().rev().find_map(|line| serde_json::from_str::<Line>(line).ok());
        let line = line.with_context(|| format!("the second link's owner wrote no figures:\n{log}"))?;
        let trips = line.round_trips.filter(|_| line.end).context("the second link's owner had no end")?;
        let lost = line.tx_packets - line.rx_packets;
        ensure!(
            (lost, trips.lost, trips.corrupted, line.faults, line.links) == (0, 0, 0, 0, 1),
            "the second link: {lost} packets lost, {trips:?}\n{log}"
        );
        ensure!(trips.count > 0, "the second link stands still\n{log}");
        Ok(trips)
    }
}

fn guest(sandbox: &Sandbox, name: &str, socket: &str, arguments: &[&str]) -> Result<Process> {
    let mut command = Command::new(sandbox.program("vhost-pci-guest")?);
    command.args(arguments).args(["--wait", "interrupt", "--json", "--socket"]);
    command.arg(sandbox.dir().join(socket));
    sandbox.process(name, command)
}

/// Asks the broker for its status over and over, by a thread of its own.
pub struct Questions {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(u64, Duration)>>,
}

impl Questions {
    pub fn start(socket: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let until = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut answers, mut longest) = (0, Duration::ZERO);
            // Relaxed: nothing is told by it but the end.
            while !until.load(Ordering::Relaxed) {
                let asked = Instant::now();
                ask(&socket).with_context(|| format!("question {} to the broker", answers + 1))?;
                answers += 1;
                longest = longest.max(asked.elapsed());
                std::thread::sleep(PAUSE);
            }
            Ok((answers, longest))
        });
        Self { stop, thread }
    }

    /// How many were answered, and how long the longest took.
    pub fn end(self) -> Result<(u64, Duration)> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the thread that asked the broker panicked"))?
    }
}

fn ask(socket: &Path) -> Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(COMMAND))?;
    stream.write_all(b"{\"command\":\"status\"}\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    ensure!(line.starts_with("{\"status\":"), "the answer is {line:?}");
    Ok(())
}
