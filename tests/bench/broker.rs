//! A broker with links, in a directory of its own, and how this project's programs are started.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use vhost_pci_tests::Process;

use crate::contender::directory;

/// For whatever should take a moment.
pub const SOON: Duration = Duration::from_secs(20);

/// A running broker.
pub struct Broker {
    // First the process ends, then its directory goes.
    process: Process,
    dir: TempDir,
}

impl Broker {
    /// With so many links, numbered from 0.
    pub fn start(links: usize) -> Result<Self> {
        let dir = directory()?;
        let path = |name: &str| dir.path().join(name);
        let mut text = format!("control_socket = {:?}\n", path("control.sock"));
        for link in 0..links {
            // Writing to a string does not fail.
            let _ = write!(
                text,
                "[[link]]\nname = \"compare-{link}\"\nowner_socket = {:?}\npeer_socket = {:?}\n\
                 unsealed_memory = true\n",
                path(&owner_socket(link)),
                path(&peer_socket(link)),
            );
        }
        fs::write(path("broker.toml"), text)?;
        let mut command = Command::new(programs()?.join("vhost-pci-switch"));
        command.args(["run", "--config"]).arg(path("broker.toml"));
        let mut process = Process::spawn("broker", command, &path("broker.log"))?;
        process.wait_log("the broker listens", SOON)?;
        Ok(Self { process, dir })
    }

    /// A file's path.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where the owner of a link connects.
    pub fn owner_socket(&self, link: usize) -> PathBuf {
        self.path(&owner_socket(link))
    }

    /// Where the peer of a link connects.
    pub fn peer_socket(&self, link: usize) -> PathBuf {
        self.path(&peer_socket(link))
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What the owner's driver of the first link accepted.
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

    /// What it has written.
    pub fn logs(&self) -> String {
        format!("broker:\n{}\n", self.process.log())
    }
}

fn owner_socket(link: usize) -> String {
    format!("owner{link}.sock")
}

fn peer_socket(link: usize) -> String {
    format!("peer{link}.sock")
}

/// Where the project's other programs are: beside this one.
fn programs() -> Result<PathBuf> {
    let program = std::env::current_exe().context("where this program is")?;
    Ok(program.parent().map(Path::to_owned).unwrap_or_default())
}

/// `vhost-pci-guest`, on one processor.
pub fn guest(processor: usize) -> Result<Command> {
    Ok(pinned(processor, &programs()?.join("vhost-pci-guest")))
}

/// This program, on one processor, in the role of this name.
pub fn this_program(processor: usize, role: &str) -> Result<Command> {
    let program = std::env::current_exe().context("where this program is")?;
    let mut command = pinned(processor, &program);
    command.arg(role);
    Ok(command)
}

/// A program that runs on one processor.
fn pinned(processor: usize, program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", &processor.to_string()]).arg(program);
    command
}
