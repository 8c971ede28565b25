//! A broker with one link, and the process that is the link's peer. The owner is the caller's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;
use vhost_pci_tests::Process;

use crate::cpu;

/// For whatever should take a moment.
pub const SOON: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);

/// What the sink has counted since its start.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Received {
    /// Since the first packet.
    pub seconds: f64,
    #[serde(rename = "rx_packets")]
    pub packets: u64,
    #[serde(rename = "rx_bytes")]
    pub bytes: u64,
    pub lost: u64,
    pub reordered: u64,
    pub corrupted: u64,
    pub faults: u64,
}

/// What the sink does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judge {
    /// Looks at every byte.
    Content,
    /// Counts it.
    Count,
}

/// A running broker, its link, and a directory for sockets and logs that is removed at the end.
pub struct Link {
    dir: TempDir,
    programs: PathBuf,
    broker: Process,
}

impl Link {
    pub fn open() -> Result<Self> {
        let program = std::env::current_exe().context("where this program is")?;
        let programs = program.parent().context("this program is in no directory")?.to_owned();
        // Short and below /tmp: a socket's path may have no more than 107 bytes.
        let dir = tempfile::Builder::new()
            .prefix("dpdk-")
            .tempdir_in("/tmp")
            .context("a directory for sockets and logs")?;
        let path = |name: &str| dir.path().join(name).display().to_string();
        let text = format!(
            "control_socket = {:?}\n[[link]]\nname = \"dpdk\"\nowner_socket = {:?}\npeer_socket = {:?}\n\
             unsealed_memory = true\n",
            path("control.sock"),
            path("owner.sock"),
            path("peer.sock"),
        );
        fs::write(path("broker.toml"), text)?;
        let mut command = Command::new(programs.join("vhost-pci-switch"));
        command.args(["run", "--config", &path("broker.toml")]);
        let mut broker = Process::spawn("broker", command, &dir.path().join("broker.log"))?;
        broker.wait_log("the broker listens", SOON)?;
        Ok(Self { dir, programs, broker })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Leaves the directory when the link is dropped.
    pub fn keep(&mut self) -> &Path {
        self.dir.disable_cleanup(true);
        self.dir.path()
    }

    /// Starts the peer: a process that has the window mapped as a VM's VMM would.
    pub fn start_sink(&self, judge: Judge) -> Result<Sink> {
        let check = match judge {
            Judge::Content => "pattern",
            Judge::Count => "none",
        };
        let mut command = Command::new("taskset");
        command.args(["-c", &cpu::of_sink()?.to_string()]).arg(self.programs.join("vhost-pci-guest"));
        command.args(["sink", "--wait", "poll", "--check", check, "--json-lines", "--socket"]);
        command.arg(self.path("peer.sock"));
        Ok(Sink(Process::spawn("sink", command, &self.path("sink.log"))?))
    }

    /// Starts a peer that sends each packet back.
    pub fn start_echo(&self) -> Result<Process> {
        let mut command = Command::new("taskset");
        command.args(["-c", &cpu::of_sink()?.to_string()]).arg(self.programs.join("vhost-pci-guest"));
        command.args(["echo", "--wait", "poll", "--socket"]).arg(self.path("peer.sock"));
        Process::spawn("echo", command, &self.path("echo.log"))
    }

    /// Whether the owner's driver accepted a feature.
    pub fn owner_has(&self, feature: &str) -> Result<bool> {
        let status = self.status()?;
        let features = status["links"][0]["owner"]["features"].as_array().cloned().unwrap_or_default();
        Ok(features.iter().any(|found| found == feature))
    }

    /// `vhost-pci-switch status --json`.
    pub fn status(&self) -> Result<Value> {
        let mut command = Command::new(self.programs.join("vhost-pci-switch"));
        let output =
            command.args(["status", "--json", "--control-socket"]).arg(self.path("control.sock")).output()?;
        ensure!(output.status.success(), "status: {}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Waits until a place in the link's status (a JSON pointer) has this value.
    pub fn wait(&self, pointer: &str, value: &str) -> Result<()> {
        let deadline = Instant::now() + SOON;
        loop {
            let status = self.status()?;
            let link = &status["links"][0];
            if link.pointer(pointer).is_some_and(|found| found == value) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{pointer} is not {value:?} within {SOON:?}: {link:#}");
            thread::sleep(POLL);
        }
    }

    /// Checks the broker while testpmd and the sink are connected, and prints what it says of them.
    pub fn check_up(&mut self) -> Result<()> {
        let status = self.check_broker()?;
        let link = &status["links"][0];
        ensure!(link["state"] == "up", "the link is {}: {}", link["state"], link["reason"]);
        println!(
            "owner: {} {}, {} B of its memory in the peer's window",
            words(&link["owner"]["features"]),
            words(&link["owner"]["protocol_features"]),
            link["window"]["mapped_bytes"],
        );
        Ok(())
    }

    /// Checks that nothing of the owner is left in the window after it has gone.
    pub fn check_owner_gone(&mut self) -> Result<()> {
        self.wait("/owner/state", "absent")?;
        let status = self.check_broker()?;
        let link = &status["links"][0];
        ensure!(link["window"]["mapped_bytes"] == 0, "left in the window: {}", link["window"]);
        let counters = &link["counters"];
        println!(
            "broker: packets {}, guest memory mapped {} B, kicks relayed {}, calls {}, mappings made {}, \
             revoked {}, faults {}",
            status["packets"],
            status["guest_bytes_mapped"],
            counters["kicks_relayed"],
            counters["calls_relayed"],
            counters["mappings_made"],
            counters["mappings_revoked"],
            counters["faults"],
        );
        Ok(())
    }

    /// No packet through the broker, no guest memory mapped, no fault.
    fn check_broker(&mut self) -> Result<Value> {
        ensure!(self.broker.exited()?.is_none(), "the broker ended:\n{}", self.broker.log());
        let status = self.status()?;
        ensure!(status["packets"] == 0, "packets through the broker: {}", status["packets"]);
        ensure!(status["guest_bytes_mapped"] == 0, "{} B mapped", status["guest_bytes_mapped"]);
        let faults = &status["links"][0]["counters"]["faults"];
        ensure!(*faults == json!({}), "faults: {faults}; the broker's log:\n{}", self.broker.log());
        Ok(status)
    }
}

/// The running `vhost-pci-guest sink`.
pub struct Sink(Process);

impl Sink {
    /// Waits until so many packets have arrived, by the counters that come once a second.
    pub fn wait_packets(&mut self, packets: u64, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let last = self.lines()?.pop();
            if last.is_some_and(|last| last.packets >= packets) {
                return Ok(());
            }
            if self.0.exited()?.is_some() || Instant::now() >= deadline {
                bail!("{packets} packets have not arrived within {timeout:?}; the sink:\n{}", self.0.log());
            }
            thread::sleep(POLL);
        }
    }

    /// Ends it. Gives all its counters, the last ones last.
    pub fn finish(mut self) -> Result<Vec<Received>> {
        let status = self.0.terminate(SOON)?;
        ensure!(status.success(), "sink: {status}:\n{}", self.0.log());
        self.lines()
    }

    fn lines(&self) -> Result<Vec<Received>> {
        let log = self.0.log();
        // One that is being written has no newline yet.
        let whole = log.split_inclusive('\n').filter(|line| line.starts_with('{') && line.ends_with('\n'));
        whole
            .map(|line| serde_json::from_str(line).with_context(|| format!("the sink wrote {line}")))
            .collect()
    }
}

fn words(list: &Value) -> String {
    let words = list.as_array().into_iter().flatten().filter_map(Value::as_str);
    words.collect::<Vec<_>>().join(" ")
}
