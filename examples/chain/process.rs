//! The processes of a chain: this program again, as the broker or as `vhost-pci-guest`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};
use serde_json::Value;
use vhost_pci_switch::config;
use vhost_pci_switch::runtime::broker::Broker;

/// How long a process may take to end when it is asked to.
const END: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(2);

/// A process. Ended when dropped.
pub struct Process {
    name: String,
    child: Child,
    /// The last JSON object that it printed.
    last: Arc<Mutex<Option<Value>>>,
    reader: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts `vhost-pci-guest` with these arguments.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn guest(name: &str, arguments: &[&str]) -> anyhow::Result<Self> {
        Self::start(name, &[&["guest"], arguments].concat())
    }

    /// Starts the broker of so many links in a folder, and waits until it listens.
    ///
    /// # Errors
    /// If it does not.
    pub fn broker(folder: &Path, links: u32) -> anyhow::Result<Self> {
        let folder = folder.to_str().context("the folder for sockets has no plain name")?;
        let broker = Self::start("broker", &["broker", folder, &links.to_string()])?;
        let start = Instant::now();
        while broker.last().is_none() {
            ensure!(start.elapsed() < END, "the broker does not start");
            thread::sleep(LOOK);
        }
        Ok(broker)
    }

    fn start(name: &str, arguments: &[&str]) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("where this program is")?;
        let mut child = Command::new(program)
            .args(arguments)
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "warn".into()))
            // The broker ends when it is closed.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let out = child.stdout.take().context("no standard output")?;
        let last = Arc::new(Mutex::new(None));
        let shared = Arc::clone(&last);
        let reader = thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if let Ok(value) = serde_json::from_str(&line) {
                    *shared.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
                }
            }
        });
        Ok(Self { name: name.to_owned(), child, last, reader: Some(reader) })
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The last JSON object that it printed.
    pub fn last(&self) -> Option<Value> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Seconds of processor time that it has taken, all threads and the kernel's work for it
    /// included.
    ///
    /// # Errors
    /// If it is gone.
    pub fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))
            .with_context(|| format!("{} is gone", self.name))?;
        // proc(5): the name in parentheses may hold anything; utime and stime are fields 14 and 15.
        let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat is not as proc(5) says")?;
        let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
        let ticks = ticks.sum::<Result<u64, _>>().context("/proc/PID/stat is not as proc(5) says")?;
        let per_second = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")?;
        Ok(ticks as f64 / per_second as f64)
    }

    /// Whether it has ended by itself.
    ///
    /// # Errors
    /// If it has failed.
    pub fn has_ended(&mut self) -> anyhow::Result<bool> {
        match self.child.try_wait()? {
            None => Ok(false),
            Some(status) if status.success() => Ok(true),
            Some(status) => bail!("{} has failed: {status}", self.name),
        }
    }

    /// Asks it to end. Returns the last JSON object that it printed.
    ///
    /// # Errors
    /// If it does not end, fails, or prints none.
    pub fn end(mut self) -> anyhow::Result<Value> {
        // It is this process's child, and was not waited for if it runs: the id is its own.
        if !self.has_ended()? {
            kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGTERM)?;
        }
        let start = Instant::now();
        while !self.has_ended()? {
            ensure!(start.elapsed() < END, "{} does not end within {END:?}", self.name);
            thread::sleep(LOOK);
        }
        if let Some(reader) = self.reader.take() {
            // It ends with the process's output.
            let _ = reader.join();
        }
        self.last().with_context(|| format!("{} has printed nothing", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The broker's process.
///
/// # Errors
/// If the broker does not start.
pub fn broker(folder: &Path, links: u32) -> anyhow::Result<()> {
    let folder = folder.display();
    let mut text = format!("control_socket = \"{folder}/control.sock\"\n");
    for link in 0..links {
        text += &format!(
            "[[link]]\nname = \"{link}\"\nowner_socket = \"{folder}/owner-{link}\"\n\
             peer_socket = \"{folder}/peer-{link}\"\n"
        );
    }
    let config = match config::parse(&text) {
        Ok(config) => config,
        Err(mistakes) => bail!("the configuration has mistakes: {mistakes:?}"),
    };
    let broker = Broker::start(&config)?;
    println!("{{}}");
    std::io::stdout().flush()?;
    // Until the parent is gone, or asks.
    let _ = std::io::stdin().read(&mut [0]);
    drop(broker);
    Ok(())
}
