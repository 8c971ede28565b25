//! Forwarding between two owners, as a closed loop on two processors: one process holds both
//! owners' drivers and sends out of each what comes in at the other; the forwarder has the other
//! processor. A sender, a switch and a receiver that all poll would need three.
//!
//! What is counted are packets that the owners have received, both directions together: each has
//! been through the forwarder once.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use serde::Deserialize;
use tempfile::TempDir;
use vhost_pci_tests::Process;

use crate::broker::{Broker, SOON, guest};
use crate::contender::{Contender, Count, Kind, Running, Verdict, directory, signal_all};
use crate::content;
use crate::ends::{Ends, Owners};
use crate::host::RECEIVER;
use crate::ours::{PACKED, PACKED_256};
use crate::testpmd::{DEEP, Depth, Role, SHALLOW, Testpmd};

/// In the name of each whose owners are ours.
pub const OUR_OWNERS: &str = "our owners";

/// Who passes packets from one owner to the other.
#[derive(Clone, Copy)]
enum Forwarder {
    /// A testpmd with a `net_vhost` for each.
    Dpdk(Depth),
    /// Our peer of two links.
    Ours,
}

/// A closed loop.
pub struct Switch {
    name: &'static str,
    about: &'static str,
    forwarder: Forwarder,
    owners: Owners,
}

/// Our owners: rings with as many entries as [`SHALLOW`] has.
const OURS: Owners = Owners::Ours(&["--ring-size", "256"]);

/// All that are measured.
pub const LOOPS: [Switch; 6] = [
    Switch {
        name: "our forwarder, our owners",
        about: "one vhost-pci-guest owner-forward with two cards <-> vhost-pci-guest forward between \
                two links, split rings of 256, 128 packets a card",
        forwarder: Forwarder::Ours,
        owners: OURS,
    },
    Switch {
        name: "our forwarder packed",
        about: "one testpmd with two net_virtio_user <-> vhost-pci-guest forward between two links, \
                packed rings of 1024, in order, no mergeable buffers, vectorised, 896 packets a card",
        forwarder: Forwarder::Ours,
        owners: Owners::Dpdk(PACKED, DEEP),
    },
    Switch {
        name: "our forwarder packed, 256",
        about: "one testpmd with two net_virtio_user <-> vhost-pci-guest forward between two links, \
                packed rings of 256, in order, no mergeable buffers, vectorised, 128 packets a card",
        forwarder: Forwarder::Ours,
        owners: Owners::Dpdk(PACKED_256, SHALLOW),
    },
    Switch {
        name: "vhost switch packed",
        about: "one testpmd with two net_virtio_user <-> testpmd between two net_vhost, packed rings \
                of 1024, in order, no mergeable buffers, vectorised, 896 packets a card",
        forwarder: Forwarder::Dpdk(DEEP),
        owners: Owners::Dpdk(PACKED, DEEP),
    },
    Switch {
        name: "vhost switch packed, 256",
        about: "one testpmd with two net_virtio_user <-> testpmd between two net_vhost, packed rings \
                of 256, in order, no mergeable buffers, vectorised, 128 packets a card",
        forwarder: Forwarder::Dpdk(SHALLOW),
        owners: Owners::Dpdk(PACKED_256, SHALLOW),
    },
    Switch {
        name: "vhost switch, our owners",
        about: "one vhost-pci-guest owner-forward with two cards <-> testpmd between two net_vhost, \
                split rings of 256, 128 packets a card",
        forwarder: Forwarder::Dpdk(SHALLOW),
        owners: OURS,
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
        match self.forwarder {
            Forwarder::Dpdk(_) => Kind::Switch,
            Forwarder::Ours => Kind::OurSwitch,
        }
    }

    fn check_content(&self, size: usize) -> Result<Option<Verdict>> {
        let check = |dir: &Path, sockets: &_, count| match self.owners {
            Owners::Dpdk(options, depth) => content::of_dpdks_owners(dir, size, sockets, (options, depth)),
            Owners::Ours(rings) => content::of_our_owners(dir, size, sockets, (rings, count)),
        };
        match self.forwarder {
            Forwarder::Dpdk(depth) => {
                let dir = directory()?;
                let sockets = sockets(dir.path());
                let _forwarder = vhost(dir.path(), depth, &sockets)?;
                // It drops what finds no room.
                check(dir.path(), &sockets, Some(SHALLOW.fill as u64)).map(Some)
            }
            Forwarder::Ours => {
                let broker = Broker::start(2)?;
                let _forwarder = forward(&broker, "adaptive")?;
                check(&broker.path(""), &[0, 1].map(|link| broker.owner_socket(link)), None).map(Some)
            }
        }
    }

    fn start(&self, size: usize) -> Result<Box<dyn Running>> {
        match self.forwarder {
            Forwarder::Dpdk(depth) => {
                let dir = directory()?;
                let sockets = sockets(dir.path());
                let forwarder = vhost(dir.path(), depth, &sockets)?;
                let ends = self.owners.start(dir.path(), size, &sockets)?;
                Ok(Box::new(VhostRunning { ends, forwarder, _dir: dir }))
            }
            Forwarder::Ours => {
                let broker = Broker::start(2)?;
                let forwarder = forward(&broker, "poll")?;
                let sockets = [0, 1].map(|link| broker.owner_socket(link));
                let ends = self.owners.start(&broker.path(""), size, &sockets);
                let ends =
                    ends.with_context(|| format!("{}forwarder:\n{}", broker.logs(), forwarder.log()))?;
                Ok(Box::new(OursRunning { ends, forwarder, broker }))
            }
        }
    }
}

/// DPDK's forwarder between two sockets that it makes.
fn vhost(dir: &Path, depth: Depth, sockets: &[impl AsRef<Path>; 2]) -> Result<Testpmd> {
    let vhost = |at: usize, socket: &Path| format!("net_vhost{at},iface={},queues=1", socket.display());
    let devices: Vec<_> = (0..).zip(sockets).map(|(at, socket)| vhost(at, socket.as_ref())).collect();
    Testpmd::start(dir, Role::Forwarder, depth, &devices)
}

fn sockets(dir: &Path) -> [PathBuf; 2] {
    ["0.sock", "1.sock"].map(|name| dir.join(name))
}

/// Our forwarder between the two links of a broker.
fn forward(broker: &Broker, wait: &str) -> Result<Process> {
    let mut command = guest(RECEIVER)?;
    command.args(["forward", "--wait", wait, "--json"]);
    for link in 0..2 {
        command.arg("--socket").arg(broker.peer_socket(link));
    }
    Process::spawn("forwarder", command, &broker.path("forwarder.log"))
}

struct OursRunning {
    ends: Ends,
    forwarder: Process,
    broker: Broker,
}

/// The forwarder's last line.
#[derive(Deserialize)]
struct Line {
    copied_per_packet: f64,
}

impl Running for OursRunning {
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

struct VhostRunning {
    ends: Ends,
    forwarder: Testpmd,
    _dir: TempDir,
}

impl Running for VhostRunning {
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

    fn verdict(&mut self) -> Result<Verdict> {
        Ok(self.ends.verdict())
    }

    fn logs(&self) -> String {
        format!("{}{}", self.forwarder.logs(), self.ends.logs())
    }
}
