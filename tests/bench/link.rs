//! A broker with one link and our peer on it. The owner is the contender's.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use vhost_pci_tests::Process;

use crate::allocations::Answering;
use crate::board::{Board, Numbers};
use crate::broker::{Broker, SOON, this_program};
use crate::contender::{Count, Verdict};
use crate::host::RECEIVER;
use crate::peer::{Content, Contract};

/// The link, with its processes.
pub struct Link {
    // First the peer ends, then the broker with its directory.
    peer: Answering,
    board: Board,
    broker: Broker,
}

impl Link {
    /// A running broker and peer, which waits for packets of so many bytes.
    pub fn open(size: usize, content: Content, contract: Contract) -> Result<Self> {
        let broker = Broker::start(1)?;
        let board = Board::create(&broker.path("board"))?;
        let content = match content {
            Content::Pattern => "pattern",
            Content::Testpmd => "testpmd",
            Content::Sequence => "sequence",
        };
        let mut command = this_program(RECEIVER, "peer")?;
        command.arg("--socket").arg(broker.peer_socket(0)).arg("--board").arg(broker.path("board"));
        command.args(["--size", &size.to_string(), "--content", content, "--contract", contract.word()]);
        let mut peer = Answering::spawn("peer", command, &broker.path("peer.log"))?;
        peer.process().wait_log("the device is started", SOON)?;
        Ok(Self { peer, board, broker })
    }

    /// A file's path.
    pub fn path(&self, name: &str) -> PathBuf {
        self.broker.path(name)
    }

    /// Where the owner connects.
    pub fn owner_socket(&self) -> PathBuf {
        self.broker.owner_socket(0)
    }

    /// The receiver's process.
    pub fn peer(&mut self) -> &mut Process {
        self.peer.process()
    }

    /// How often the receiver has allocated.
    pub fn peer_allocations(&mut self) -> Result<u64> {
        self.peer.allocations()
    }

    /// Buffers that the receiver has searched for in the mapping table.
    pub fn searches(&self) -> Result<u64> {
        Ok(self.board.read()?.searches)
    }

    /// The processes' ids.
    pub fn pids(&self) -> [u32; 2] {
        [self.peer.pid(), self.broker.pid()]
    }

    /// What the peer has counted.
    pub fn received(&self) -> Result<Count> {
        let numbers = self.board.read()?;
        Ok(Count { at: Instant::now(), packets: numbers.packets, bytes: numbers.bytes })
    }

    /// What the peer has found wrong.
    pub fn verdict(&self) -> Result<Verdict> {
        let Numbers { sampled, headers, corrupted, .. } = self.board.read()?;
        Ok(Verdict { sampled, headers, corrupted })
    }

    /// What the owner's driver accepted, as the broker says.
    pub fn negotiated(&self) -> Result<String> {
        self.broker.negotiated()
    }

    /// What broker and peer have written.
    pub fn logs(&self) -> String {
        format!("{}peer:\n{}\n", self.broker.logs(), self.peer.log())
    }
}
