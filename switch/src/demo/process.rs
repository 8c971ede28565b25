//! A process of the demo: this program again, with other arguments. It is ended when
//! dropped.

use std::cell::RefCell;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use crossbeam_channel::{Receiver, unbounded};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Line;

const POLL: Duration = Duration::from_millis(5);

/// A process, with the JSON lines that it prints.
pub struct Child {
    name: &'static str,
    child: RefCell<process::Child>,
    lines: Receiver<String>,
    latest: Line,
    log: PathBuf,
}

impl Child {
    /// Starts this program with `before`, `path`, `after` as arguments; what it has to
    /// say goes to `log`.
    pub fn start(
        name: &'static str,
        before: &[&str],
        path: &Path,
        after: &[&str],
        log: &Path,
    ) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("where this program is")?;
        let mut child = Command::new(program)
            .args(before)
            .arg(path)
            .args(after)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(log)?)
            .spawn()
            .with_context(|| format!("the {name} does not start"))?;
        let (sender, lines) = unbounded();
        let stdout = child.stdout.take().context("no pipe")?;
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { name, child: RefCell::new(child), lines, latest: Line::default(), log: log.into() })
    }

    /// What it is.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.borrow().id()
    }

    /// What it had to say.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        !matches!(self.child.borrow_mut().try_wait(), Ok(None))
    }

    /// Waits until the process has made a socket.
    pub fn wait_for(&self, socket: &Path, timeout: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + timeout;
        while !socket.exists() {
            if self.has_ended() || Instant::now() > deadline {
                bail!("the {} made no {}:\n{}", self.name, socket.display(), self.log());
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// The next JSON line.
    pub fn next_line(&mut self, timeout: Duration) -> anyhow::Result<Line> {
        let text = self
            .lines
            .recv_timeout(timeout)
            .with_context(|| format!("the {} says nothing:\n{}", self.name, self.log()))?;
        self.take(&text)
    }

    /// Takes the lines that are there.
    pub fn drain_lines(&mut self) -> anyhow::Result<()> {
        while let Ok(text) = self.lines.try_recv() {
            self.take(&text)?;
        }
        Ok(())
    }

    /// The newest line taken.
    pub fn latest(&self) -> Line {
        self.latest
    }

    /// The line that it prints when it ends.
    pub fn last_line(&mut self, timeout: Duration) -> anyhow::Result<Line> {
        while !self.latest.end {
            self.next_line(timeout)?;
        }
        Ok(self.latest)
    }

    /// Asks it to end.
    pub fn terminate(&self) -> anyhow::Result<()> {
        kill(Pid::from_raw(i32::try_from(self.pid())?), Signal::SIGTERM)?;
        Ok(())
    }

    fn take(&mut self, text: &str) -> anyhow::Result<Line> {
        self.latest =
            serde_json::from_str(text).with_context(|| format!("the {} printed: {text}", self.name))?;
        Ok(self.latest)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let mut child = self.child.borrow_mut();
        // Both fail only if it has ended, which is what is wanted.
        let _ = child.kill();
        let _ = child.wait();
    }
}
