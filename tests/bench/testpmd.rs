//! DPDK's testpmd, as sender or as receiver: how it is started so that it needs no terminal, and
//! how it is asked for its counters while it forwards.

use std::fs;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost_pci_tests::Process;

use crate::contender::Count;
use crate::host::{RECEIVER, SENDER};

/// How long a start may take.
const START: Duration = Duration::from_secs(20);
/// How long an answer may take: the thread that answers shares its processor with one that polls.
const ANSWER: Duration = Duration::from_secs(5);
const PROMPT: &str = "testpmd> ";
/// Beginning of the lines of the driver's start in its output that are no news.
const PACKAGE: &str = "RTE Version: 'DPDK ";

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Sends packets of so many bytes as fast as it can.
    Sender(usize),
    /// Receives and forgets.
    Receiver,
    /// Both ends of a loop: has two ports, and sends out of the one what comes in at the other.
    /// Packets of so many bytes are in the loop once [`Testpmd::fill_loop`] has put them there.
    Ends(usize),
    /// The other half of the loop: likewise, on the receiver's processor.
    Forwarder,
}

/// How many packets are under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Entries of each ring.
    pub ring: usize,
    /// Packets of a burst.
    pub burst: usize,
    /// Packets that each end of a loop begins with.
    pub fill: usize,
}

/// Rings that are nearly full.
pub const DEEP: Depth = Depth { ring: 1024, burst: 32, fill: 896 };
/// What stays in a processor's second cache, whatever the packets' size: as our owners have.
pub const SHALLOW: Depth = Depth { ring: 256, burst: 32, fill: 128 };

/// A running one.
pub struct Testpmd {
    process: Process,
    input: PipeWriter,
    output: PipeReader,
    /// All that it has written.
    text: String,
    depth: Depth,
}

impl Testpmd {
    /// Starts it with a port a device, in a directory that is its alone or at least no other's of
    /// its role. It forwards when this returns.
    pub fn start(dir: &Path, role: Role, depth: Depth, devices: &[String]) -> Result<Self> {
        let (name, processor) = match role {
            Role::Sender(_) => ("sender", SENDER),
            Role::Receiver => ("receiver", RECEIVER),
            Role::Ends(_) => ("ends", SENDER),
            Role::Forwarder => ("forwarder", RECEIVER),
        };
        let (input, our_input) = std::io::pipe()?;
        let (output, their_output) = std::io::pipe()?;
        // Without a terminal it writes into a buffer, which it keeps until it is full.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "dpdk-testpmd"]);
        // Where DPDK keeps its files, rather than in /var/run/dpdk for ever.
        command.env("RUNTIME_DIRECTORY", dir);
        command.args(["--lcores", &format!("0@{processor},1@{processor}"), "--no-pci", "--no-telemetry"]);
        command.args(["--file-prefix", name, "-m", "256", "--single-file-segments"]);
        if !has_hugepages() {
            // Then all of its memory is one memfd, which it can share.
            command.arg("--no-huge");
        }
        command.arg("--force-max-simd-bitwidth=512");
        command.args(devices.iter().flat_map(|device| ["--vdev", device]));
        command.args(["--", "-i"]);
        if !matches!(role, Role::Ends(_)) {
            command.arg("--auto-start");
        }
        let Depth { ring, burst, .. } = depth;
        command.args(["--nb-cores=1", "--mbcache=512", "--total-num-mbufs=16384", "--no-flush-rx"]);
        command.args([format!("--burst={burst}"), format!("--rxd={ring}"), format!("--txd={ring}")]);
        command.arg("--no-mlockall");
        match role {
            Role::Sender(size) => command.args(["--forward-mode=txonly", &format!("--txpkts={size}")]),
            Role::Receiver => command.arg("--forward-mode=rxonly"),
            Role::Ends(size) => command.args(["--forward-mode=io", &format!("--txpkts={size}")]),
            Role::Forwarder => command.arg("--forward-mode=io"),
        };
        command.stdin(input).stdout(their_output);
        let process = Process::spawn_with_pipes(name, command, &dir.join(format!("{name}.log")))?;
        let mut testpmd = Self { process, input: our_input, output, text: String::new(), depth };
        testpmd.read_until_prompt(START)?;
        Ok(testpmd)
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Puts packets into the loop whose ends it is, and forwards from then on.
    pub fn fill_loop(&mut self) -> Result<()> {
        let Depth { burst, fill, .. } = self.depth;
        self.ask(&format!("start tx_first {}", fill / burst)).map(drop)
    }

    /// Forwards from now on, if it did not from the start.
    pub fn forward(&mut self) -> Result<()> {
        self.ask("start").map(drop)
    }

    /// Has it end in order: what it writes is in its file then.
    pub fn quit(&mut self) -> Result<()> {
        writeln!(self.input, "quit").context("testpmd takes no commands")?;
        self.process.wait(START).map(drop)
    }

    /// What its ports have received, together.
    pub fn received(&mut self) -> Result<Count> {
        let text = self.ask("show port stats all")?;
        let at = Instant::now();
        let number = |name: &str| sum_of(&text, name).with_context(|| format!("no {name} in {text}"));
        ensure!(number("RX-errors:")? == 0, "testpmd counts errors: {text}");
        Ok(Count { at, packets: number("RX-packets:")?, bytes: number("RX-bytes:")? })
    }

    /// What it has written.
    pub fn logs(&self) -> String {
        format!("{}:\n{}{}\n", self.process.name(), self.text, self.process.log())
    }

    fn ask(&mut self, command: &str) -> Result<String> {
        let before = self.text.len();
        writeln!(self.input, "{command}").context("testpmd takes no commands")?;
        self.read_until_prompt(ANSWER)?;
        let answer = self.text.get(before..).unwrap_or_default().to_owned();
        self.text.truncate(before);
        Ok(answer)
    }

    fn read_until_prompt(&mut self, timeout: Duration) -> Result<()> {
        let before = self.text.len();
        let deadline = Instant::now() + timeout;
        let mut bytes = [0; 4096];
        // The command is echoed behind the prompt before; the next one comes after the answer.
        while !self.text.get(before..).is_some_and(|new| new.ends_with(PROMPT)) {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut events = [PollFd::new(self.output.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut events, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO))?;
            let count = if ready > 0 { self.output.read(&mut bytes)? } else { 0 };
            if count == 0 {
                let what = if ready > 0 { "ended" } else { "does not answer" };
                bail!("testpmd {what}:\n{}", self.logs());
            }
            self.text += &String::from_utf8_lossy(bytes.get(..count).unwrap_or_default());
        }
        Ok(())
    }
}

/// The number behind a name.
fn number_after(text: &str, name: &str) -> Option<u64> {
    text.split_once(name)?.1.split_whitespace().next()?.parse().ok()
}

/// The sum of the numbers behind a name, if it is there at all.
fn sum_of(text: &str, name: &str) -> Option<u64> {
    let numbers = text.split(name).skip(1).map(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    numbers.reduce(|sum, number| Some(sum? + number?))?
}

/// Whether there are enough hugepages for two of them.
pub fn has_hugepages() -> bool {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let number = |name: &str| number_after(&text, name).unwrap_or(0);
    number("HugePages_Free:") * number("Hugepagesize:") >= 600 << 10
}

/// Its version, if it is there.
pub fn version() -> Option<String> {
    let output = Command::new("dpdk-testpmd").arg("-v").arg("--no-pci").arg("--no-huge").output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    Some(text.split_once(PACKAGE)?.1.split('\'').next()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_a_port_are_found() {
        let text = "
  ######################## NIC statistics for port 0  ########################
  RX-packets: 4242       RX-missed: 0          RX-bytes:  271488
  RX-errors: 0
  RX-nombuf:  0
";
        assert_eq!(number_after(text, "RX-packets:"), Some(4242));
        assert_eq!(number_after(text, "RX-bytes:"), Some(271_488));
        assert_eq!(number_after(text, "TX-packets:"), None);
        assert_eq!(sum_of(&text.repeat(2), "RX-packets:"), Some(8484));
        assert_eq!(sum_of(text, "TX-packets:"), None);
    }
}
