//! DPDK into DPDK, two processes: its vhost-user front-end into its back-end, and memif.

use std::path::Path;

use anyhow::Result;
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::contender::{Contender, Count, Kind, Running, Verdict, directory, signal_all};
use crate::content;
use crate::ours::{PACKED, SPLIT};
use crate::testpmd::{DEEP, Depth, Role, Testpmd};

/// A way to set up a pair.
pub struct Pair {
    name: &'static str,
    about: &'static str,
    kind: Kind,
    /// Of the receiver, which is started first, and of the sender; `SOCKET` stands for a path.
    devices: [&'static str; 2],
    /// Behind the sender's.
    options: &'static str,
    burst: usize,
}

/// All that are measured.
pub const PAIRS: [Pair; 7] = [
    Pair {
        name: "vhost split",
        about: "net_virtio_user -> net_vhost, split ring of 1024, bursts of 32",
        kind: Kind::Vhost,
        devices: ["net_vhost0,iface=SOCKET,queues=1", "net_virtio_user0,path=SOCKET,"],
        options: SPLIT,
        burst: 32,
    },
    Pair {
        name: "vhost packed",
        about: "net_virtio_user -> net_vhost, packed ring of 1024, in order, no mergeable buffers, \
                vectorised, bursts of 32",
        kind: Kind::Vhost,
        devices: ["net_vhost0,iface=SOCKET,queues=1", "net_virtio_user0,path=SOCKET,"],
        options: PACKED,
        burst: 32,
    },
    Pair {
        name: "vhost packed, bursts of 64",
        about: "net_virtio_user -> net_vhost, packed ring of 1024, in order, no mergeable buffers, \
                vectorised, bursts of 64",
        kind: Kind::Vhost,
        devices: ["net_vhost0,iface=SOCKET,queues=1", "net_virtio_user0,path=SOCKET,"],
        options: PACKED,
        burst: 64,
    },
    Pair {
        name: "memif copy",
        about: "net_memif -> net_memif: the sender copies into the ring, the receiver out of it; \
                ring of 2048, bursts of 32",
        kind: Kind::Memif,
        devices: [
            "net_memif0,role=server,id=0,socket=SOCKET,socket-abstract=no,bsize=2048,rsize=11",
            "net_memif0,role=client,id=0,socket=SOCKET,socket-abstract=no,bsize=2048,",
        ],
        options: "rsize=11",
        burst: 32,
    },
    Pair {
        name: "memif copy, bursts of 64",
        about: "net_memif -> net_memif: the sender copies into the ring, the receiver out of it; \
                ring of 2048, bursts of 64",
        kind: Kind::Memif,
        devices: [
            "net_memif0,role=server,id=0,socket=SOCKET,socket-abstract=no,bsize=2048,rsize=11",
            "net_memif0,role=client,id=0,socket=SOCKET,socket-abstract=no,bsize=2048,",
        ],
        options: "rsize=11",
        burst: 64,
    },
    Pair {
        name: "memif copy 4096, bursts of 64",
        about: "net_memif -> net_memif: the sender copies into the ring, the receiver out of it; \
                ring of 4096, bursts of 64",
        kind: Kind::Memif,
        devices: [
            "net_memif0,role=server,id=0,socket=SOCKET,socket-abstract=no,bsize=2048,rsize=12",
            "net_memif0,role=client,id=0,socket=SOCKET,socket-abstract=no,bsize=2048,",
        ],
        options: "rsize=12",
        burst: 64,
    },
    Pair {
        name: "memif zero-copy, bursts of 64",
        about: "net_memif -> net_memif: the sender's buffers are the ring's, the receiver copies out \
                of them; ring of 1024, bursts of 64",
        kind: Kind::Memif,
        devices: [
            "net_memif0,role=server,id=0,socket=SOCKET,socket-abstract=no,rsize=10",
            "net_memif0,role=client,id=0,socket=SOCKET,socket-abstract=no,zero-copy=yes,",
        ],
        options: "rsize=10",
        burst: 64,
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
        content::of_pair(dir.path(), self.devices(dir.path()), size).map(Some)
    }

    fn start(&self, size: usize) -> Result<Box<dyn Running>> {
        let dir = directory()?;
        let [receiver, sender] = self.devices(dir.path());
        let depth = Depth { burst: self.burst, ..DEEP };
        let receiver = Testpmd::start(dir.path(), Role::Receiver, depth, &[receiver])?;
        let sender = Testpmd::start(dir.path(), Role::Sender(size), depth, &[sender])?;
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
