//! Forwarding between two owners, as a closed loop on two processors: one process holds both
//! owners' drivers and sends out of each what comes in at the other; the forwarder has the other
//! processor. A sender, a switch and a receiver that all poll would need three.
//!
//! What is counted are packets that the owners have received, both directions together: each has
//! been through the forwarder once.

use std::path::Path;

use anyhow::Result;
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::contender::{Contender, Count, Kind, Running, directory, signal_all};
use crate::ours::{PACKED, SPLIT};
use crate::testpmd::{Role, Testpmd};

/// DPDK's vhost switch: `net_vhost` ports of a testpmd.
pub struct Switch {
    name: &'static str,
    about: &'static str,
    /// Of the owners' devices.
    options: &'static str,
}

/// All that are measured.
pub const SWITCHES: [Switch; 2] = [
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
