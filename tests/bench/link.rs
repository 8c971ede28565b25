//! A broker with one link and our peer on it. The owner is the contender's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use vhost_pci_tests::Process;

use crate::board::Board;
use crate::contender::{Count, Verdict, directory, programs};
use crate::host::RECEIVER;
use crate::peer::Content;

/// For whatever should take a moment.
pub const SOON: Duration = Duration::from_secs(20);

/// The link, with its processes.
pub struct Link {
    // First the processes end, then their directory goes.
    peer: Process,
    broker: Process,
    board: Board,
    dir: TempDir,
}

impl Link {
    /// A running broker and peer, which waits for packets of so many bytes.
    pub fn open(size: usize, content: Content) -> Result<Self> {
        let dir = directory()?;
        let path = |name: &str| dir.path().join(name).display().to_string();
        let text = format!(
            "control_socket = {:?}\n[[link]]\nname = \"compare\"\nowner_socket = {:?}\npeer_socket = {:?}\n",
            path("control.sock"),
            path("owner.sock"),
            path("peer.sock"),
        );
        fs::write(path("broker.toml"), text)?;
        let mut command = Command::new(programs()?.join("vhost-pci-switch"));
        command.args(["run", "--config", &path("broker.toml")]);
        let mut broker = Process::spawn("broker", command, &dir.path().join("broker.log"))?;
        broker.wait_log("the broker listens", SOON)?;
        let board = Board::create(&dir.path().join("board"))?;
        let content = match content {
            Content::Pattern => "pattern",
            Content::Testpmd => "testpmd",
        };
        let mut command = pinned(RECEIVER, &std::env::current_exe().context("where this program is")?);
        command.args(["peer", "--socket", &path("peer.sock"), "--board", &path("board")]);
        command.args(["--size", &size.to_string(), "--content", content]);
        let mut peer = Process::spawn("peer", command, &dir.path().join("peer.log"))?;
        peer.wait_log("the device is started", SOON)?;
        Ok(Self { peer, broker, board, dir })
    }

    /// A file's or socket's path.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The receiver's process.
    pub fn peer(&mut self) -> &mut Process {
        &mut self.peer
    }

    /// The processes' ids.
    pub fn pids(&self) -> [u32; 2] {
        [self.peer.pid(), self.broker.pid()]
    }

    /// What the peer has counted.
    pub fn received(&self) -> Result<Count> {
        let numbers = self.board.read()?;
        Ok(Count { at: Instant::now(), packets: numbers.packets, bytes: numbers.bytes })
    }

    /// What the peer has found wrong.
    pub fn verdict(&self) -> Result<Verdict> {
        let numbers = self.board.read()?;
        Ok(Verdict { sampled: numbers.sampled, corrupted: numbers.corrupted })
    }

    /// What the owner's driver accepted, as the broker says.
    pub fn negotiated(&self) -> Result<String> {
        let mut command = Command::new(programs()?.join("vhost-pci-switch"));
        let output =
            command.args(["status", "--json", "--control-socket"]).arg(self.path("control.sock")).output()?;
        ensure!(output.status.success(), "status: {}", String::from_utf8_lossy(&output.stderr));
        let status: Value = serde_json::from_slice(&output.stdout)?;
        let features = status.pointer("/links/0/owner/features").and_then(Value::as_array);
        let words = features.into_iter().flatten().filter_map(Value::as_str);
        Ok(words.collect::<Vec<_>>().join(" "))
    }

    /// What broker and peer have written.
    pub fn logs(&self) -> String {
        format!("broker:\n{}\npeer:\n{}\n", self.broker.log(), self.peer.log())
    }
}

/// A program that runs on one processor.
pub fn pinned(processor: usize, program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", &processor.to_string()]).arg(program);
    command
}
