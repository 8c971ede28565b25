//! DPDK into DPDK, two processes: its vhost-user front-end into its back-end, and memif.

use std::path::Path;

use anyhow::Result;
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::contender::{Contender, Count, Kind, Running, Verdict, directory, signal_all};
use crate::content;
use crate::ours::{PACKED, SPLIT};
use crate::testpmd::{Role, Testpmd};

/// A way to set up a pair.
pub struct Pair {
    name: &'static str,
    about: &'static str,
    kind: Kind,
    /// Of the receiver, which is started first, and of the sender; `SOCKET` stands for a path.
    devices: [&'static str; 2],
    /// Behind the sender's.
    options: &'static str,
}

/// All that are measured.
pub const PAIRS: [Pair; 4] = [
    Pair {
        name: "vhost split",
        about: "net_virtio_user -> net_vhost, split ring",
        kind: Kind::Vhost,
        devices: ["net_vhost0,iface=SOCKET,queues=1", "net_virtio_user0,path=SOCKET,"],
        options: SPLIT,
    },
    Pair {
        name: "vhost packed",
        about: "net_virtio_user -> net_vhost, packed ring, in order, no mergeable buffers, vectorised",
        kind: Kind::Vhost,
        devices: ["net_vhost0,iface=SOCKET,queues=1", "net_virtio_user0,path=SOCKET,"],
        options: PACKED,
    },
    Pair {
        name: "memif copy",
        about: "net_memif -> net_memif: the sender copies into the ring, the receiver out of it",
        kind: Kind::Memif,
        devices: [
            "net_memif0,role=server,id=0,socket=SOCKET,socket-abstract=no,bsize=2048,rsize=11",
            "net_memif0,role=client,id=0,socket=SOCKET,socket-abstract=no,bsize=2048,",
        ],
        options: "rsize=11",
    },
    Pair {
        name: "memif zero-copy",
        about: "net_memif -> net_memif: the sender's buffers are the ring's, the receiver copies out of them",
        kind: Kind::Memif,
        devices: [
            "net_memif0,role=server,id=0,socket=SOCKET,socket-abstract=no,rsize=10",
            "net_memif0,role=client,id=0,socket=SOCKET,socket-abstract=no,zero-copy=yes,",
        ],
        options: "rsize=10",
    },
];

impl Pair {
    /// Of the receiver and of the sender.
    fn devices(&self, dir: &Path) -> [String; 2] {
        let socket = dir.join("pair.sock").display().to_string();
        let [receiver, sender] = self.devices.map(|device| device.replace("SOCKET", &socket));
        [receiver, sender + self.options]
    }
}

impl Contender for Pair {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    fn check_content(&self, size: usize) -> Result<Option<Verdict>> {
        let dir = directory()?;
        content::check(dir.path(), self.devices(dir.path()), size).map(Some)
    }

    fn start(&self, size: usize) -> Result<Box<dyn Running>> {
        let dir = directory()?;
        let [receiver, sender] = self.devices(dir.path());
        let receiver = Testpmd::start(dir.path(), Role::Receiver, &[receiver])?;
        let sender = Testpmd::start(dir.path(), Role::Sender(size), &[sender])?;
        Ok(Box::new(PairRunning { sender, receiver, _dir: dir }))
    }
}

struct PairRunning {
    sender: Testpmd,
    receiver: Testpmd,
    _dir: TempDir,
}

impl Running for PairRunning {
    fn pids(&self) -> Vec<u32> {
        vec![self.sender.pid(), self.receiver.pid()]
    }

    fn pause(&mut self) -> Result<()> {
        signal_all([self.sender.process(), self.receiver.process()], Signal::SIGSTOP)
    }

    fn resume(&mut self) -> Result<()> {
        signal_all([self.receiver.process(), self.sender.process()], Signal::SIGCONT)
    }

    fn received(&mut self) -> Result<Count> {
        self.receiver.received()
    }

    fn logs(&self) -> String {
        format!("{}{}", self.receiver.logs(), self.sender.logs())
    }
}
