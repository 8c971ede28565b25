//! Programs of `vhost-pci-guest` in a guest: started in the background, and what they print.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use vhost_pci_tests::Guest;

use crate::testbed::COMMAND;

const PAUSE: Duration = Duration::from_millis(100);

/// A program that runs in a guest, or did; its output is in a file there.
pub struct Program {
    name: &'static str,
}

impl Program {
    /// Starts it. `command` is a program of `vhost-pci-guest` with its arguments.
    pub fn start(guest: &mut Guest, command: &str) -> Result<Self> {
        // One of each kind a guest.
        let name = match command.split(' ').next() {
            Some("vfio-owner") => "vfio-owner",
            Some("revoke") => "revoke",
            Some("hold") => "hold",
            Some("echo") => "echo",
            Some("hammer") => "hammer",
            Some("blk") => "blk",
            Some("disk-check") => "disk-check",
            Some("datagrams") => "datagrams",
            Some("vf") => "vf",
            other => bail!("the program {other:?} has no log"),
        };
        let start = format!(
            "(vhost-pci-guest {command} >/tmp/{name}.out 2>/tmp/{name}.log; echo $? >/tmp/{name}.code) &\n\
             rm -f /tmp/{name}.code"
        );
        guest.sh_ok(&start, COMMAND)?;
        Ok(Self { name })
    }

    /// The JSON lines that it has printed.
    pub fn lines(&self, guest: &mut Guest) -> Result<Vec<Value>> {
        let text = guest.sh_ok(&format!("cat /tmp/{}.out", self.name), COMMAND)?;
        // The last line may be half there.
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// Waits until it has printed so many lines, and gives the last.
    pub fn wait_lines(&self, guest: &mut Guest, count: usize, timeout: Duration) -> Result<Value> {
        let deadline = Instant::now() + timeout;
        loop {
            let ended = self.code(guest)?;
            let mut lines = self.lines(guest)?;
            if lines.len() >= count {
                return lines.pop().context("no line was asked for");
            }
            if ended.is_some() || Instant::now() > deadline {
                bail!("{} (ended: {ended:?}) printed {lines:?} and wrote:\n{}", self.name, self.log(guest)?);
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Asks it to end, waits for that, and gives the last lines that it printed.
    pub fn end(self, guest: &mut Guest) -> Result<Vec<Value>> {
        guest.sh("kill $(pidof vhost-pci-guest)", COMMAND)?;
        self.wait(guest, COMMAND)
    }

    /// Waits for its end, and gives what it printed.
    pub fn wait(self, guest: &mut Guest, timeout: Duration) -> Result<Vec<Value>> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.code(guest)? {
                Some(0) => return self.lines(guest),
                None if Instant::now() < deadline => std::thread::sleep(PAUSE),
                code => bail!("{} ended: {code:?}; it wrote:\n{}", self.name, self.log(guest)?),
            }
        }
    }

    /// It has not ended.
    pub fn is_running(&self, guest: &mut Guest) -> Result<bool> {
        Ok(self.code(guest)?.is_none())
    }

    /// What it wrote besides its figures.
    pub fn messages(&self, guest: &mut Guest) -> Result<String> {
        Ok(guest.sh(&format!("cat /tmp/{}.log", self.name), COMMAND)?.text)
    }

    fn code(&self, guest: &mut Guest) -> Result<Option<i32>> {
        let code = guest.sh(&format!("cat /tmp/{}.code 2>/dev/null", self.name), COMMAND)?;
        Ok(code.text.trim().parse().ok())
    }

    fn log(&self, guest: &mut Guest) -> Result<String> {
        Ok(guest.sh(&format!("tail -n 30 /tmp/{0}.log /tmp/{0}.out", self.name), COMMAND)?.text)
    }
}

/// Runs a program to its end, and gives the last line that it printed.
pub fn run(guest: &mut Guest, command: &str, timeout: Duration) -> Result<Value> {
    let text =
        guest.sh_ok(&format!("vhost-pci-guest {command} 2>/tmp/run.log || cat /tmp/run.log"), timeout)?;
    let line = text.lines().last().context("it printed nothing")?;
    serde_json::from_str(line).with_context(|| format!("`{command}` printed {text}"))
}
