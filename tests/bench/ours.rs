//! Our driver half as owner into our peer, through a real broker. And the same peer with DPDK's
//! `net_virtio_user` as owner.

use anyhow::Result;
use nix::sys::signal::Signal;
use vhost_pci_tests::Process;

use crate::broker::guest;
use crate::contender::{Contender, Count, Kind, Running, Verdict, signal_all};
use crate::content;
use crate::host::SENDER;
use crate::link::Link;
use crate::peer::{Content, Contract};
use crate::testpmd::{DEEP, Role, Testpmd};

/// Our owner into our peer.
pub struct Ours {
    name: &'static str,
    about: &'static str,
    kind: Kind,
    contract: Contract,
    /// The owner's rings.
    rings: &'static [&'static str],
}

/// The owner's options for packed rings.
const OUR_PACKED: &[&str] = &["--packed", "--in-order"];

/// All that are measured.
pub const OURS: [Ours; 4] = [
    Ours {
        name: "ours copy",
        about: "our owner, which writes every byte of each packet, -> our peer, which takes a private copy of \
                each; split rings of 512",
        kind: Kind::Ours,
        contract: Contract::Copy,
        rings: &[],
    },
    Ours {
        name: "ours copy packed",
        about: "the same, packed rings, in order",
        kind: Kind::Ours,
        contract: Contract::Copy,
        rings: OUR_PACKED,
    },
    Ours {
        name: "ours in place",
        about: "our owner, which writes every byte of each packet, -> our peer, which reads the first 64 bytes \
                of each where they lie; split rings",
        kind: Kind::InPlace,
        contract: Contract::InPlace,
        rings: &[],
    },
    Ours {
        name: "ours in place packed",
        about: "the same, packed rings, in order",
        kind: Kind::InPlace,
        contract: Contract::InPlace,
        rings: OUR_PACKED,
    },
];

impl Contender for Ours {
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
        content::of_ours(size, self.contract, self.rings).map(Some)
    }

    fn start(&self, size: usize) -> Result<Box<dyn Running>> {
        let link = Link::open(size, Content::Pattern, self.contract)?;
        let mut command = guest(SENDER)?;
        command.args(["owner", "--mode", "gen", "--check", "none", "--wait", "poll", "--json"]);
        command.args(self.rings).args(["--size", &size.to_string(), "--socket"]).arg(link.owner_socket());
        let owner = Process::spawn("owner", command, &link.path("owner.log"))?;
        Ok(Box::new(OursRunning { owner, link }))
    }
}

struct OursRunning {
    owner: Process,
    link: Link,
}

impl Running for OursRunning {
    fn pids(&self) -> Vec<u32> {
        [&self.link.pids()[..], &[self.owner.pid()]].concat()
    }

    fn pause(&mut self) -> Result<()> {
        signal_all([&mut self.owner, self.link.peer()], Signal::SIGSTOP)
    }

    fn resume(&mut self) -> Result<()> {
        signal_all([self.link.peer(), &mut self.owner], Signal::SIGCONT)
    }

    fn received(&mut self) -> Result<Count> {
        self.link.received()
    }

    fn verdict(&mut self) -> Result<Verdict> {
        self.link.verdict()
    }

    fn negotiated(&mut self) -> Option<String> {
        self.link.negotiated().ok()
    }

    fn logs(&self) -> String {
        format!("{}owner:\n{}", self.link.logs(), self.owner.log())
    }
}

/// DPDK's front-end into our peer.
pub struct IntoOurs {
    name: &'static str,
    about: &'static str,
    /// Of its device.
    options: &'static str,
}

/// All that are measured.
pub const INTO_OURS: [IntoOurs; 2] = [
    IntoOurs {
        name: "virtio-user into ours, split",
        about: "net_virtio_user -> our peer, which takes a private copy of each packet; split ring \
                of 1024, bursts of 32",
        options: SPLIT,
    },
    IntoOurs {
        name: "virtio-user into ours, packed",
        about: "the same, packed ring, in order, no mergeable buffers, vectorised",
        options: PACKED,
    },
];

impl Contender for IntoOurs {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn kind(&self) -> Kind {
        Kind::Mixed
    }

    fn check_content(&self, size: usize) -> Result<Option<Verdict>> {
        content::into_ours(size, self.options).map(Some)
    }

    fn start(&self, size: usize) -> Result<Box<dyn Running>> {
        let link = Link::open(size, Content::Testpmd, Contract::Copy)?;
        let device = format!("net_virtio_user0,path={},{}", link.owner_socket().display(), self.options);
        let owner = Testpmd::start(&link.path(""), Role::Sender(size), DEEP, &[device])?;
        Ok(Box::new(IntoOursRunning { owner, link }))
    }
}

/// `net_virtio_user` with split rings.
pub const SPLIT: &str = "queue_size=1024";
/// With packed ones, and whatever else makes it faster.
pub const PACKED: &str = "queue_size=1024,packed_vq=1,in_order=1,mrg_rxbuf=0,vectorized=1";
pub const PACKED_256: &str = "queue_size=256,packed_vq=1,in_order=1,mrg_rxbuf=0,vectorized=1";

struct IntoOursRunning {
    owner: Testpmd,
    link: Link,
}

impl Running for IntoOursRunning {
    fn pids(&self) -> Vec<u32> {
        [&self.link.pids()[..], &[self.owner.pid()]].concat()
    }

    fn pause(&mut self) -> Result<()> {
        signal_all([self.owner.process(), self.link.peer()], Signal::SIGSTOP)
    }

    fn resume(&mut self) -> Result<()> {
        signal_all([self.link.peer(), self.owner.process()], Signal::SIGCONT)
    }

    fn received(&mut self) -> Result<Count> {
        self.link.received()
    }

    fn verdict(&mut self) -> Result<Verdict> {
        self.link.verdict()
    }

    fn negotiated(&mut self) -> Option<String> {
        self.link.negotiated().ok()
    }

    fn logs(&self) -> String {
        format!("{}{}", self.link.logs(), self.owner.logs())
    }
}
