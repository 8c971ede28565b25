//! A broker with many links, and what the kernel says of its process.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use vhost_pci_tests::Process;

use crate::SOON;

/// In which something would have run, were there anything to do.
const MOMENT: Duration = Duration::from_millis(100);
/// How the broker's thread is called that is a link's clock: there while the link waits for a moment,
/// which is up to 2 s after a change, and a little longer.
const CLOCK: &str = "link ";

/// The socket of a link.
pub fn socket(folder: &Path, link: u32, side: &str) -> PathBuf {
    folder.join(format!("{link}-{side}"))
}

/// Where the project's other programs are: beside this one.
pub fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("where this program is")?;
    Ok(own.with_file_name(name))
}

/// A running broker.
pub struct Broker {
    process: Process,
    folder: PathBuf,
}

impl Broker {
    /// One with so many links, in a folder of this name.
    pub fn start(folder: &Path, name: &str, links: u32) -> Result<Self> {
        let folder = folder.join(name);
        fs::create_dir(&folder)?;
        let path = |name: &str| folder.join(name).display().to_string();
        let mut text = format!("control_socket = {:?}\n", path("control.sock"));
        for link in 0..links {
            let [owner, peer] = ["owner", "peer"].map(|side| socket(&folder, link, side));
            write!(
                text,
                "[[link]]\nname = \"{link}\"\nowner_socket = {owner:?}\npeer_socket = {peer:?}\nwindow = \"4M\"\n"
            )?;
        }
        fs::write(path("broker.toml"), text)?;
        let mut command = Command::new(program("vhost-pci-switch")?);
        command.args(["run", "--config", &path("broker.toml")]);
        let mut process = Process::spawn("broker", command, &folder.join("broker.log"))?;
        process.wait_log("the broker listens", SOON)?;
        Ok(Self { process, folder })
    }

    /// Where its sockets are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What it has and has used, now.
    pub fn usage(&self) -> Result<Usage> {
        Usage::of(self.process.pid()).context("what the broker has")
    }

    /// The same as soon as it is so, or after that time.
    pub fn usage_when(&self, most: Duration, so: impl Fn(&Usage) -> bool) -> Result<Usage> {
        let start = Instant::now();
        loop {
            let usage = self.usage()?;
            if so(&usage) || start.elapsed() > most {
                return Ok(usage);
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The same as soon as it has nothing left to do of what it was asked, or after that time: no
    /// link has a clock any more, and for a moment nothing has run.
    pub fn usage_at_rest(&self, most: Duration) -> Result<Usage> {
        let start = Instant::now();
        let mut before = self.usage()?;
        loop {
            thread::sleep(MOMENT);
            let now = self.usage()?;
            if now.is_at_rest_since(&before) || start.elapsed() > most {
                return Ok(now);
            }
            before = now;
        }
    }

    /// How many links are up, as it says.
    pub fn links_up(&self) -> Result<u32> {
        let status = self.status()?;
        let links = status.get("links").and_then(Value::as_array).context("status has no links")?;
        Ok(links.iter().filter(|link| link.get("state").is_some_and(|state| state == "up")).count() as u32)
    }

    /// Notifications that it has relayed for a link.
    pub fn relayed(&self, link: u32) -> Result<u64> {
        let status = self.status()?;
        let count = status.pointer(&format!("/links/{link}/counters/notifications_relayed"));
        count.and_then(Value::as_u64).context("status counts no notifications")
    }

    /// Waits until the broker has seen that a link's two sides have left.
    pub fn wait_until_left(&self, link: u32) -> Result<()> {
        let start = Instant::now();
        loop {
            let status = self.status()?;
            let left = |side: &str| {
                let state = status.pointer(&format!("/links/{link}/{side}/state"));
                state.is_some_and(|state| state == "absent")
            };
            if left("owner") && left("peer") {
                return Ok(());
            }
            ensure!(start.elapsed() < SOON, "link {link} still has a side that has left");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn status(&self) -> Result<Value> {
        let mut command = Command::new(program("vhost-pci-switch")?);
        command.args(["status", "--json", "--control-socket"]).arg(self.folder.join("control.sock"));
        let output = command.output()?;
        ensure!(output.status.success(), "status: {}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Ends it, in order.
    pub fn end(&mut self) -> Result<()> {
        let status = self.process.terminate(SOON)?;
        ensure!(status.success(), "the broker: {status}\n{}", self.process.log());
        Ok(())
    }
}

/// What a process has, and what it has used since its start.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Usage {
    /// Resident memory, KiB.
    pub resident_kib: u64,
    /// Of this, memory that is its own and memory that is shared or a file's.
    pub anonymous_kib: u64,
    /// Its part of what is resident.
    pub proportional_kib: u64,
    /// Page tables, KiB: not resident memory of the process, but the kernel's.
    pub page_tables_kib: u64,
    /// Threads.
    pub threads: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Ranges that are mapped (vm.max_map_count bounds them).
    pub mappings: u64,
    /// Processor time of its threads, microseconds.
    pub processor_us: u64,
    /// How often they went to sleep or were interrupted.
    pub switches: u64,
    /// Of its threads, those that are a link's clock.
    #[serde(skip)]
    pub clocks: u64,
}

impl Usage {
    fn of(pid: u32) -> Result<Self> {
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}"));
        let (rollup, status) = (read("smaps_rollup")?, read("status")?);
        let number = |text: &str, name: &str| -> Result<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let word = line.and_then(|line| line.split_whitespace().next());
            word.and_then(|word| word.parse().ok()).with_context(|| format!("the kernel tells no {name}"))
        };
        let mut usage = Self {
            resident_kib: number(&rollup, "Rss")?,
            anonymous_kib: number(&rollup, "Anonymous")?,
            proportional_kib: number(&rollup, "Pss")?,
            page_tables_kib: number(&status, "VmPTE")?,
            descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64,
            mappings: read("maps")?.lines().count() as u64,
            ..Self::default()
        };
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.path();
            // One that ends meanwhile counts no more.
            let read = |file: &str| fs::read_to_string(task.join(file));
            let (Ok(status), Ok(times), Ok(name)) = (read("status"), read("schedstat"), read("comm")) else {
                continue;
            };
            usage.threads += 1;
            usage.clocks += u64::from(name.starts_with(CLOCK));
            usage.switches +=
                number(&status, "voluntary_ctxt_switches")? + number(&status, "nonvoluntary_ctxt_switches")?;
            let nanoseconds: u64 =
                times.split_whitespace().next().context("no schedstat")?.parse().context("schedstat")?;
            usage.processor_us += nanoseconds / 1000;
        }
        Ok(usage)
    }

    /// Whether nothing has run since an earlier moment, and nothing is to run by itself.
    fn is_at_rest_since(&self, earlier: &Self) -> bool {
        self.clocks == 0 && (self.threads, self.switches) == (earlier.threads, earlier.switches)
    }

    /// What it has used from one moment to another, and what it had at the later one.
    pub fn between(earlier: &Self, later: &Self) -> Self {
        Self {
            processor_us: later.processor_us.saturating_sub(earlier.processor_us),
            switches: later.switches.saturating_sub(earlier.switches),
            ..*later
        }
    }
}
