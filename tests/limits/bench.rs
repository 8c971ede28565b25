//! A broker with a link whose limits are low and a link with traffic.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;
use vhost_pci_tests::Process;

/// For whatever should take a moment.
const SOON: Duration = Duration::from_secs(20);
/// Packets a second that the owner of the link with traffic offers.
const OFFERED: &str = "20000";

/// What a program has counted since its start.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Counts {
    seconds: f64,
    rx_packets: u64,
    lost: u64,
    reordered: u64,
    corrupted: u64,
    faults: u64,
    end: bool,
}

/// Everything that runs.
pub struct Bench {
    broker: Process,
    owner: Process,
    peer: Process,
    // The last to be dropped.
    dir: TempDir,
    programs: PathBuf,
}

impl Bench {
    /// Starts it all; packets flow on the second link.
    pub fn start() -> Result<Self> {
        let program = std::env::current_exe().context("where this program is")?;
        let programs = program.parent().context("this program is in no directory")?.to_owned();
        // Short and below /tmp: a socket's path may have no more than 107 bytes.
        let mut dir = tempfile::Builder::new().prefix("limits-").tempdir_in("/tmp")?;
        // For who wants to know why it failed. Removed at the end.
        dir.disable_cleanup(true);
        let path = |name: &str| dir.path().join(name).display().to_string();
        let text = format!(
            "control_socket = {:?}\nconfirm_timeout_ms = 500\n\
             [[link]]\nname = \"bad\"\nowner_socket = {:?}\npeer_socket = {:?}\nwindow = \"64M\"\n\
             memory_regions = 2\nmessages_per_second = 200\nnotifications_per_second = 500\n\
             connections_per_second = 5\nwiring = \"relay\"\nmax_mappings = 2\n\
             [[link]]\nname = \"good\"\nowner_socket = {:?}\npeer_socket = {:?}\n",
            path("control.sock"),
            path("bad-owner.sock"),
            path("bad-peer.sock"),
            path("good-owner.sock"),
            path("good-peer.sock"),
        );
        fs::write(path("broker.toml"), text)?;
        let mut command = Command::new(programs.join("vhost-pci-switch"));
        command.args(["run", "--config", &path("broker.toml")]);
        let mut broker = Process::spawn("broker", command, &dir.path().join("broker.log"))?;
        broker.wait_log("the broker listens", SOON)?;
        let guest = |name: &str, arguments: &[&str]| {
            let mut command = Command::new(programs.join("vhost-pci-guest"));
            command.args(arguments).args(["--wait", "interrupt", "--json-lines", "--socket"]);
            command.arg(dir.path().join(format!("good-{name}.sock")));
            Process::spawn(name, command, &dir.path().join(format!("{name}.log")))
        };
        let mut peer = guest("peer", &["sink"])?;
        peer.wait_log("the device is started", SOON)?;
        let owner = guest("owner", &["owner", "--mode", "gen", "--rate", OFFERED])?;
        let bench = Self { broker, owner, peer, programs, dir };
        bench.wait("packets on the good link", || Ok((bench.received().rx_packets > 1000).then_some(())))?;
        Ok(bench)
    }

    /// Where the sockets and logs are.
    pub fn place(&self) -> &Path {
        self.dir.path()
    }

    /// The sockets of the link with low limits: owner's, peer's.
    pub fn sockets(&self) -> (PathBuf, PathBuf) {
        (self.dir.path().join("bad-owner.sock"), self.dir.path().join("bad-peer.sock"))
    }

    /// The control socket.
    pub fn control(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    /// What `status` says of the link with low limits.
    pub fn bad_link(&self) -> Result<Value> {
        let mut command = Command::new(self.programs.join("vhost-pci-switch"));
        let output = command.args(["status", "--json", "--control-socket"]).arg(self.control()).output()?;
        ensure!(output.status.success(), "status: {}", String::from_utf8_lossy(&output.stderr));
        let status: Value = serde_json::from_slice(&output.stdout)?;
        Ok(status.pointer("/links/0").context("status has no link")?.clone())
    }

    /// How often a counter of that link counted.
    pub fn counted(&self, counter: &str) -> Result<u64> {
        let link = self.bad_link()?;
        let counters = &link["counters"];
        let count = counters["faults"].get(counter).or_else(|| counters.get(counter));
        Ok(count.and_then(Value::as_u64).unwrap_or(0))
    }

    /// Waits until it has counted more; says how much more.
    pub fn wait_counted(&self, counter: &str, before: u64) -> Result<u64> {
        self.wait(counter, || Ok(self.counted(counter)?.checked_sub(before).filter(|more| *more > 0)))
    }

    /// The broker's log has a line with all of this, for the link with low limits.
    pub fn logged(&self, words: &[&str]) -> Result<()> {
        let log = self.broker.log();
        let has = |line: &str| words.iter().all(|words| line.contains(words)) && line.contains("bad");
        ensure!(log.lines().any(has), "no line with {words:?} in:\n{log}");
        Ok(())
    }

    /// Packets a second that the other link's peer receives meanwhile; none is lost.
    pub fn rate_of_other(&self, meanwhile: impl FnOnce(&Self) -> Result<()>) -> Result<f64> {
        let before = self.received();
        meanwhile(self)?;
        // The program tells each second.
        thread::sleep(Duration::from_millis(1200));
        let after = self.received();
        ensure!(after.rx_packets > before.rx_packets, "the other link stands still");
        ensure!(
            after.lost + after.reordered + after.corrupted + after.faults == 0,
            "the other link: {after:?}"
        );
        Ok((after.rx_packets - before.rx_packets) as f64 / (after.seconds - before.seconds))
    }

    fn received(&self) -> Counts {
        let log = self.peer.log();
        log.lines().rev().find_map(|line| serde_json::from_str(line).ok()).unwrap_or_default()
    }

    /// The broker's descriptors and threads.
    pub fn usage(&self) -> Result<(usize, usize)> {
        let count = |what: &str| {
            Ok::<_, std::io::Error>(fs::read_dir(format!("/proc/{}/{what}", self.broker.pid()))?.count())
        };
        Ok((count("fd")?, count("task")?))
    }

    /// The same, when it is no more than this, or after a while.
    pub fn usage_when(&self, most: (usize, usize)) -> Result<(usize, usize)> {
        let end = Instant::now() + SOON;
        loop {
            let usage = self.usage()?;
            if (usage.0 <= most.0 && usage.1 <= most.1) || Instant::now() > end {
                return Ok(usage);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends the traffic; all that was sent has arrived.
    pub fn end(mut self) -> Result<()> {
        self.owner.terminate(SOON)?;
        // What is in the ring still arrives.
        thread::sleep(Duration::from_millis(500));
        self.peer.terminate(SOON)?;
        let end = self.received();
        ensure!(
            end.end && end.lost + end.reordered + end.corrupted + end.faults == 0,
            "the other link: {end:?}"
        );
        self.broker.terminate(SOON)?;
        fs::remove_dir_all(self.dir.path())?;
        Ok(())
    }

    fn wait<T>(&self, what: &str, found: impl Fn() -> Result<Option<T>>) -> Result<T> {
        let end = Instant::now() + SOON;
        loop {
            if let Some(found) = found()? {
                return Ok(found);
            }
            if Instant::now() > end {
                bail!("waited too long for: {what}\n{}", self.broker.log());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}
