//! Whether DPDK's own pairs deliver what they were given: as testpmd looks into no packet that it
//! receives, packets of a capture file go through a pair into another file, and every byte of both is
//! compared. Before the rounds, as it is not about speed.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use vhost_pci_tests::pcap;

use crate::contender::Verdict;
use crate::testpmd::{Role, Testpmd};

/// Packets, of which none can be dropped: fewer than any ring has entries.
const PACKETS: u64 = 500;
/// For the pair to connect.
const CONNECT: Duration = Duration::from_millis(300);
/// For all packets to arrive.
const ARRIVE: Duration = Duration::from_secs(5);

/// Sends packets of so many bytes through a pair, by the devices of its receiver and its sender.
///
/// # Errors
/// If it cannot be tried, or not all packets arrive.
pub fn check(dir: &Path, [receiver, sender]: [String; 2], size: usize) -> Result<Verdict> {
    let (from, to) = (dir.join("sent.pcap"), dir.join("received.pcap"));
    pcap::write(&from, PACKETS, size)?;
    let into_file = format!("net_pcap0,tx_pcap={}", to.display());
    let mut receiver = Testpmd::start(dir, Role::Forwarder, &[receiver, into_file])?;
    let out_of_file = format!("net_pcap0,rx_pcap={}", from.display());
    let mut sender = Testpmd::start(dir, Role::Ends(size), &[out_of_file, sender])?;
    thread::sleep(CONNECT);
    sender.forward()?;
    let begin = Instant::now();
    // Its own port counts; the file's has received nothing.
    while receiver.received()?.packets < PACKETS {
        if begin.elapsed() > ARRIVE {
            let arrived = receiver.received()?.packets;
            bail!("{arrived} of {PACKETS} packets arrived\n{}{}", receiver.logs(), sender.logs());
        }
        thread::sleep(Duration::from_millis(20));
    }
    receiver.quit().context("the receiver writes its file")?;
    let (same, all) = pcap::compare(&from, &to)?;
    let corrupted = if all { 0 } else { PACKETS - same.min(PACKETS - 1) };
    Ok(Verdict { sampled: PACKETS, corrupted, ..Verdict::default() })
}
