//! Forwarding between two owners, as a closed loop on two processors: one process holds both
//! owners' drivers and sends out of each what comes in at the other; the forwarder has the other
//! processor. A sender, a switch and a receiver that all poll would need three.
//!
//! What is counted are packets that the owners have received, both directions together: each has
//! been through the forwarder once.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde::Deserialize;
use tempfile::TempDir;
use vhost_pci_tests::Process;

use crate::broker::{Broker, SOON, guest};
use crate::contender::{Contender, Count, Kind, Running, Verdict, directory, signal_all};
use crate::host::{RECEIVER, SENDER};
use crate::ours::{PACKED, SPLIT};
use crate::testpmd::{Role, Testpmd};

/// In the name of each whose owners are ours.
pub const OUR_OWNERS: &str = "our owners";

/// DPDK's vhost switch: `net_vhost` ports of a testpmd.
pub struct Switch {
    name: &'static str,
    about: &'static str,
    /// Of the owners' devices.
    options: &'static str,
}

/// All that are measured.
pub const VHOST: [Switch; 2] = [
    Switch {
        name: "vhost switch split",
        about: "one testpmd with two net_virtio_user <-> testpmd between two net_vhost, split rings, both directions",
        options: SPLIT,
    },
    Switch {
        name: "vhost switch packed",
        about: "the same, packed rings, in order, no mergeable buffers, vectorised",
        options: PACKED,
    },
];

impl Contender for Switch {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn kind(&self) -> Kind {
        Kind::Switch
    }

    fn start(&self, size: usize) -> Result<Box<dyn Running>> {
        let dir = directory()?;
        let sockets = ["0.sock", "1.sock"].map(|name| dir.path().join(name));
        let vhost = |at: usize, socket: &Path| format!("net_vhost{at},iface={},queues=1", socket.display());
        let devices: Vec<_> = sockets.iter().enumerate().map(|(at, socket)| vhost(at, socket)).collect();
        let forwarder = Testpmd::start(dir.path(), Role::Forwarder, &devices)?;
        let ends = ends(dir.path(), size, &sockets, self.options)?;
        Ok(Box::new(SwitchRunning { ends, forwarder, _dir: dir }))
    }
}

/// Who both owners are.
enum Owners {
    /// One testpmd; the options of its devices.
    Dpdk(&'static str),
    /// One of our programs; what it is told besides.
    Ours(&'static [&'static str]),
}

/// Our forwarder: a peer of two links.
pub struct OurSwitch {
    name: &'static str,
    about: &'static str,
    owners: Owners,
}

/// All that are measured.
pub const OURS: [OurSwitch; 3] = [
    OurSwitch {
        name: "our forwarder, our owners",
        about: "one vhost-pci-guest owner-forward with two cards <-> vhost-pci-guest forward between two links, \
                split rings, both directions",
        owners: Owners::Ours(&["--inject", "128", "--ring-size", "256"]),
    },
    OurSwitch {
        name: "our forwarder split",
        about: "one testpmd with two net_virtio_user <-> vhost-pci-guest forward between two links, split rings, \
                both directions",
        owners: Owners::Dpdk(SPLIT),
    },
    OurSwitch {
        name: "our forwarder packed",
        about: "the same, packed rings, in order, no mergeable buffers, vectorised",
        owners: Owners::Dpdk(PACKED),
    },
];

impl Contender for OurSwitch {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn kind(&self) -> Kind {
        Kind::OurSwitch
    }

    fn start(&self, size: usize) -> Result<Box<dyn Running>> {
        let broker = Broker::start(2)?;
        let mut command = guest(RECEIVER)?;
        command.args(["forward", "--wait", "poll", "--json"]);
        for link in 0..2 {
            command.arg("--socket").arg(broker.peer_socket(link));
        }
        let forwarder = Process::spawn("forwarder", command, &broker.path("forwarder.log"))?;
        let sockets = [0, 1].map(|link| broker.owner_socket(link));
        let ends = match self.owners {
            Owners::Dpdk(options) => ends(&broker.path(""), size, &sockets, options).map(Ends::Dpdk),
            Owners::Ours(options) => Rounds::start(&broker, size, &sockets, options).map(Ends::Ours),
        };
        let ends = ends.with_context(|| format!("{}forwarder:\n{}", broker.logs(), forwarder.log()))?;
        Ok(Box::new(OurSwitchRunning { ends, forwarder, broker }))
    }
}

struct OurSwitchRunning {
    ends: Ends,
    forwarder: Process,
    broker: Broker,
}

/// The process that both owners are.
enum Ends {
    Dpdk(Testpmd),
    Ours(Rounds),
}

impl Ends {
    fn process(&mut self) -> &mut Process {
        match self {
            Self::Dpdk(testpmd) => testpmd.process(),
            Self::Ours(rounds) => &mut rounds.process,
        }
    }

    fn pid(&self) -> u32 {
        match self {
            Self::Dpdk(testpmd) => testpmd.pid(),
            Self::Ours(rounds) => rounds.process.pid(),
        }
    }

    fn received(&mut self) -> Result<Count> {
        match self {
            Self::Dpdk(testpmd) => testpmd.received(),
            Self::Ours(rounds) => rounds.received(),
        }
    }

    fn verdict(&self) -> Verdict {
        match self {
            Self::Dpdk(_) => Verdict::default(),
            Self::Ours(rounds) => rounds.verdict,
        }
    }

    fn logs(&self) -> String {
        match self {
            Self::Dpdk(testpmd) => testpmd.logs(),
            Self::Ours(rounds) => format!("owners:\n{}", rounds.process.log()),
        }
    }
}

/// Our program with two cards, in which packets go round.
struct Rounds {
    process: Process,
    begin: Instant,
    /// Lines that were read.
    lines: usize,
    verdict: Verdict,
}

/// What it says once a second.
#[derive(Deserialize)]
struct Round {
    seconds: f64,
    rx_packets: u64,
    rx_bytes: u64,
    corrupted: u64,
    checked: u64,
}

impl Rounds {
    fn start(broker: &Broker, size: usize, sockets: &[PathBuf; 2], options: &[&str]) -> Result<Self> {
        let mut command = guest(SENDER)?;
        command.args(["owner-forward", "--wait", "poll", "--json-lines", "--check", "sample"]);
        command.args(["--size", &size.to_string()]).args(options);
        for socket in sockets {
            command.arg("--socket").arg(socket);
        }
        let process = Process::spawn("owners", command, &broker.path("owners.log"))?;
        Ok(Self { process, begin: Instant::now(), lines: 0, verdict: Verdict::default() })
    }

    /// What its next line says, for the time at which it says so.
    fn received(&mut self) -> Result<Count> {
        let deadline = Instant::now() + SOON;
        loop {
            let log = self.process.log();
            let lines: Vec<_> =
                log.lines().filter(|line| line.starts_with('{') && line.ends_with('}')).collect();
            if let Some(line) = lines.last()
                && lines.len() > self.lines
            {
                self.lines = lines.len();
                let Round { seconds, rx_packets, rx_bytes, corrupted, checked } =
                    serde_json::from_str(line).context("a line of the owners")?;
                self.verdict = Verdict { sampled: checked, corrupted, ..Verdict::default() };
                let at = self.begin + Duration::from_secs_f64(seconds);
                return Ok(Count { at, packets: rx_packets, bytes: rx_bytes });
            }
            ensure!(Instant::now() < deadline, "the owners say nothing:\n{log}");
            thread::sleep(LOOK);
        }
    }
}

/// Between two looks for a line.
const LOOK: Duration = Duration::from_millis(20);

/// The forwarder's last line.
#[derive(Deserialize)]
struct Line {
    copied_per_packet: f64,
}

impl Running for OurSwitchRunning {
    fn pids(&self) -> Vec<u32> {
        vec![self.ends.pid(), self.forwarder.pid(), self.broker.pid()]
    }

    fn pause(&mut self) -> Result<()> {
        signal_all([self.ends.process(), &mut self.forwarder], Signal::SIGSTOP)
    }

    fn resume(&mut self) -> Result<()> {
        signal_all([&mut self.forwarder, self.ends.process()], Signal::SIGCONT)
    }

    fn received(&mut self) -> Result<Count> {
        self.ends.received()
    }

    fn verdict(&mut self) -> Result<Verdict> {
        Ok(self.ends.verdict())
    }

    fn negotiated(&mut self) -> Option<String> {
        self.broker.negotiated().ok()
    }

    fn copied_per_packet(&mut self) -> Result<Option<f64>> {
        self.forwarder.terminate(SOON)?;
        let text = self.forwarder.log();
        let line =
            text.lines().rev().find(|line| line.starts_with('{')).context("the forwarder says nothing")?;
        let Line { copied_per_packet } = serde_json::from_str(line).context("the forwarder's last line")?;
        Ok(Some(copied_per_packet))
    }

    fn logs(&self) -> String {
        format!("{}forwarder:\n{}\n{}", self.broker.logs(), self.forwarder.log(), self.ends.logs())
    }
}

/// A testpmd that is both owners, with packets in the loop.
fn ends(dir: &Path, size: usize, sockets: &[impl AsRef<Path>], options: &str) -> Result<Testpmd> {
    let owner = |(at, socket): (usize, &_)| {
        let socket: &Path = AsRef::as_ref(socket);
        format!("net_virtio_user{at},path={},{options}", socket.display())
    };
    let devices: Vec<_> = sockets.iter().enumerate().map(owner).collect();
    let mut ends = Testpmd::start(dir, Role::Ends(size), &devices)?;
    ends.fill_loop()?;
    Ok(ends)
}

struct SwitchRunning {
    ends: Testpmd,
    forwarder: Testpmd,
    _dir: TempDir,
}

impl Running for SwitchRunning {
    fn pids(&self) -> Vec<u32> {
        vec![self.ends.pid(), self.forwarder.pid()]
    }

    fn pause(&mut self) -> Result<()> {
        signal_all([self.ends.process(), self.forwarder.process()], Signal::SIGSTOP)
    }

    fn resume(&mut self) -> Result<()> {
        signal_all([self.forwarder.process(), self.ends.process()], Signal::SIGCONT)
    }

    fn received(&mut self) -> Result<Count> {
        self.ends.received()
    }

    fn logs(&self) -> String {
        format!("{}{}", self.forwarder.logs(), self.ends.logs())
    }
}
