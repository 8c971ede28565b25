//! A program that a test starts on the host: its log, its end, and the promise that it does not
//! outlive the test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use crate::sys;

const POLL: Duration = Duration::from_millis(5);
/// How much of a log an error quotes.
const TAIL_LINES: usize = 40;

/// A running program. Dropping it kills it; so does the end of this process, however it comes.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with no input; what it writes goes to `log`.
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let file = new_log(log)?;
        command.stdin(Stdio::null()).stdout(file);
        Self::spawn_with_pipes(name, command, log)
    }

    /// As [`Process::spawn`], but standard input and output are the caller's.
    pub fn spawn_with_pipes(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let file = File::options().create(true).append(true).open(log);
        command.stderr(file.with_context(|| format!("{name}: cannot write {}", log.display()))?);
        let child = sys::spawn_dying_with_us(command).with_context(|| format!("{name}: does not start"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// The name it was given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How often its threads have gone to sleep until now. A program that sleeps all the time
    /// adds nothing to that.
    pub fn voluntary_switches(&self) -> Result<u64> {
        let mut sum = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let status = fs::read_to_string(task?.path().join("status"))?;
            let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            sum += count.context("the kernel counts no context switches")?.trim().parse::<u64>()?;
        }
        Ok(sum)
    }

    /// What it has written until now.
    pub fn log(&self) -> String {
        fs::read(&self.log).map_or_else(
            |error| format!("({}: {error})", self.log.display()),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    /// How it ended, or `None` while it runs.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("{}: waiting for it", self.name))
    }

    /// Waits for its end.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{}: still runs after {timeout:?}{}", self.name, tail(&self.log));
            }
            thread::sleep(POLL);
        }
    }

    /// Waits until `text` stands in its log. Fails when the program ends before.
    pub fn wait_log(&mut self, text: &str, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            // In this order, or the last words of a program that ended would be missed.
            let exited = self.exited()?;
            if self.log().contains(text) {
                return Ok(());
            }
            if let Some(status) = exited {
                bail!("{}: ended ({status}) and never wrote {text:?}{}", self.name, tail(&self.log));
            }
            if Instant::now() >= deadline {
                bail!("{}: did not write {text:?} within {timeout:?}{}", self.name, tail(&self.log));
            }
            thread::sleep(POLL);
        }
    }

    /// Asks it to end (SIGTERM) and waits for that.
    pub fn terminate(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(timeout)
    }

    /// Ends it at once (SIGKILL). No error if it has ended already.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("{}: killing it", self.name))?;
        self.child.wait().with_context(|| format!("{}: waiting for it", self.name))?;
        Ok(())
    }

    /// Sends a signal. Nothing happens if the program has ended.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.exited()?.is_some() {
            return Ok(());
        }
        let pid = i32::try_from(self.child.id()).context("a process id")?;
        signal::kill(Pid::from_raw(pid), signal).with_context(|| format!("{}: sending {signal}", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it has ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines of a log, as an error's continuation.
pub(crate) fn tail(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let name = log.file_name().unwrap_or(log.as_os_str()).to_string_lossy();
    if lines.is_empty() {
        return format!("\n  ({name} is empty)");
    }
    let last = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n  | ");
    format!("\n  the end of {name}:\n  | {last}")
}

/// Makes a log anew: two processes of one name in turn do not share one.
pub(crate) fn new_log(log: &Path) -> Result<File> {
    // Append: standard output and standard error each have the file open.
    fs::write(log, "")
        .and_then(|()| File::options().append(true).open(log))
        .with_context(|| format!("cannot write {}", log.display()))
}
