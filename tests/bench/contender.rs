//! What can be measured: a sender and a receiver, one processor each. One file a kind.

use std::ops::AddAssign;
use std::time::Instant;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use tempfile::TempDir;
use vhost_pci_tests::Process;

/// What a contender is compared as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// This project's, with a private copy of each packet.
    Ours,
    /// This project's, with packets read where they lie.
    InPlace,
    /// DPDK's front-end into DPDK's back-end.
    Vhost,
    /// DPDK's memif.
    Memif,
    /// DPDK's front-end into our peer.
    Mixed,
    /// Forwarding between two owners by a process of DPDK's.
    Switch,
    /// The same by our peer.
    OurSwitch,
    /// What two processors, or one, do with nothing but the same bytes.
    Floor,
}

impl Kind {
    /// All that are compared, in the order in which they are drawn.
    pub const ALL: [Self; 7] =
        [Self::Ours, Self::InPlace, Self::Vhost, Self::Memif, Self::Mixed, Self::OurSwitch, Self::Switch];

    /// For people.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Ours => "ours, copy",
            Self::InPlace => "ours, in place",
            Self::Vhost => "DPDK vhost",
            Self::Memif => "DPDK memif",
            Self::Mixed => "virtio-user into ours",
            Self::Switch => "DPDK vhost switch",
            Self::OurSwitch => "our forwarder",
            Self::Floor => "bare ring",
        }
    }
}

/// A way to move packets from one processor to the other.
pub trait Contender {
    /// Short, for tables and JSON.
    fn name(&self) -> &'static str;
    /// Sender, receiver, and how they are set up.
    fn about(&self) -> &'static str;
    /// What it is compared as.
    fn kind(&self) -> Kind;
    /// The packet sizes that it is measured with.
    fn sizes(&self, asked: &[usize]) -> Vec<usize> {
        asked.to_vec()
    }
    /// Looks whether all of some packets that differ arrive, once each and with every byte.
    ///
    /// # Errors
    /// If that cannot be done: why, with the logs of what failed.
    fn check_content(&self, _size: usize) -> Result<Option<Verdict>> {
        Ok(None)
    }
    /// Starts it with packets of so many bytes. It runs when this returns.
    ///
    /// # Errors
    /// If it cannot run here: why, with the logs of what failed.
    fn start(&self, size: usize) -> Result<Box<dyn Running>>;
}

/// What the receiver has received since its start.
#[derive(Clone, Copy, Debug)]
pub struct Count {
    /// When that was.
    pub at: Instant,
    /// Packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What was found wrong with packets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verdict {
    /// Packets of which every byte was looked at.
    pub sampled: u64,
    /// Packets of which only the header was looked at.
    pub headers: u64,
    /// Of these, and of those with a wrong length; and packets that are missing, or came twice or late.
    pub corrupted: u64,
}

impl AddAssign for Verdict {
    fn add_assign(&mut self, Self { sampled, headers, corrupted }: Self) {
        self.sampled += sampled;
        self.headers += headers;
        self.corrupted += corrupted;
    }
}

/// A contender that runs.
pub trait Running {
    /// Its processes, besides this one.
    fn pids(&self) -> Vec<u32>;
    /// Stands still, so that the processors are free for a probe.
    fn pause(&mut self) -> Result<()>;
    /// Goes on.
    fn resume(&mut self) -> Result<()>;
    /// What the receiver has counted.
    fn received(&mut self) -> Result<Count>;
    /// What was found wrong until now.
    fn verdict(&mut self) -> Result<Verdict> {
        Ok(Verdict::default())
    }
    /// What the two sides have agreed on, if they say so.
    fn negotiated(&mut self) -> Option<String> {
        None
    }
    /// Bytes that were copied for each packet, if it counts them. Nothing runs any more afterwards.
    fn copied_per_packet(&mut self) -> Result<Option<f64>> {
        Ok(None)
    }
    /// What its programs have written, for who wants to know why it failed.
    fn logs(&self) -> String {
        String::new()
    }
}

/// A directory for sockets and logs. Removed when dropped.
pub fn directory() -> Result<TempDir> {
    // Short and below /tmp: a socket's path may have no more than 107 bytes.
    let folder = tempfile::Builder::new().prefix("compare-").tempdir_in("/tmp");
    folder.context("a directory for sockets and logs")
}

/// Sends a signal to each.
pub fn signal_all<'a>(processes: impl IntoIterator<Item = &'a mut Process>, signal: Signal) -> Result<()> {
    processes.into_iter().try_for_each(|process| process.signal(signal))
}
