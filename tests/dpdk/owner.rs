//! Shows that an owner need not be QEMU: DPDK's own vhost-user front-end has its memory shown to
//! the peer, and every packet arrives whole.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use vhost_pci_tests::pcap;

use crate::Check;
use crate::link::{Judge, Link, Received, SOON, Sink};
use crate::testpmd::{RING, Source, Testpmd};

pub const CHECKS: &[Check] = &[
    Check { shows: "200000 packets of 64 bytes, each checked; the peer is there first", run: short_packets },
    Check {
        shows: "50000 packets of 1514 bytes, each checked, through packed rings; the owner is there first",
        run: long_packets,
    },
    Check {
        shows: "50000 packets of 64 bytes there and back, each compared, through packed rings in order, vectorised",
        run: echo_vectorised,
    },
    Check {
        shows: "20000 packets of 1514 bytes there and back, each compared, through packed rings with mergeable buffers",
        run: echo_packed,
    },
    Check { shows: "the same through split rings in order", run: echo_in_order },
    Check { shows: "64-byte packets as fast as it goes, counted", run: rate },
];

/// For all packets of a capture file to arrive.
const ARRIVE: Duration = Duration::from_secs(60);
/// For packets that should not come.
const NO_MORE: Duration = Duration::from_millis(300);
/// How long testpmd sends as fast as it can.
const RATE: Duration = Duration::from_secs(4);

fn short_packets(link: &mut Link) -> Result<()> {
    let (count, len) = (200_000, 64);
    let source = capture(link, count, len)?;
    let sink = link.start_sink(Judge::Content)?;
    link.wait("/peer/state", "started")?;
    let testpmd = Testpmd::start(link, &source, "")?;
    check_content(link, testpmd, sink, count, len)
}

fn long_packets(link: &mut Link) -> Result<()> {
    let (count, len) = (50_000, 1514);
    let source = capture(link, count, len)?;
    let testpmd = Testpmd::start(link, &source, ",packed_vq=1,in_order=1,mrg_rxbuf=0")?;
    link.wait("/owner/state", "started")?;
    let sink = link.start_sink(Judge::Content)?;
    check_content(link, testpmd, sink, count, len)
}

fn echo_vectorised(link: &mut Link) -> Result<()> {
    let options = ",packed_vq=1,in_order=1,mrg_rxbuf=0,vectorized=1";
    echo(link, 50_000, 64, options, &["VIRTIO_F_RING_PACKED", "VIRTIO_F_IN_ORDER"])
}

fn echo_packed(link: &mut Link) -> Result<()> {
    echo(link, 20_000, 1514, ",packed_vq=1,in_order=0", &["VIRTIO_F_RING_PACKED", "VIRTIO_NET_F_MRG_RXBUF"])
}

fn echo_in_order(link: &mut Link) -> Result<()> {
    echo(link, 20_000, 1514, ",in_order=1", &["VIRTIO_F_IN_ORDER", "VIRTIO_NET_F_MRG_RXBUF"])
}

/// Packets that go to the peer and come back, each where it was.
fn echo(link: &mut Link, count: u64, len: usize, options: &str, features: &[&str]) -> Result<()> {
    let (from, to) = (link.path("packets.pcap"), link.path("back.pcap"));
    pcap::write(&from, count, len)?;
    let mut peer = link.start_echo()?;
    link.wait("/peer/state", "started")?;
    let source = Source::Echoed { from: from.clone(), to: to.clone() };
    let testpmd = Testpmd::start(link, &source, options)?;
    // All but what testpmd has not written yet, which it does at its end.
    let (enough, deadline) = (pcap::file_len(count, len) * 9 / 10, Instant::now() + ARRIVE);
    while fs::metadata(&to).map_or(0, |file| file.len()) < enough {
        ensure!(
            Instant::now() < deadline,
            "not enough came back within {ARRIVE:?}; the peer:\n{}",
            peer.log()
        );
        thread::sleep(NO_MORE);
    }
    thread::sleep(NO_MORE);
    link.check_up()?;
    for feature in features {
        ensure!(link.owner_has(feature)?, "the owner's driver did not accept {feature}");
    }
    let sent = testpmd.finish()?;
    link.check_owner_gone()?;
    let status = peer.terminate(SOON)?;
    ensure!(status.success(), "echo: {status}:\n{}", peer.log());
    let (same, all) = pcap::compare(&from, &to)?;
    println!(
        "testpmd: sent {}, dropped {}; {same} packets came back as they were",
        sent.transmitted, sent.dropped
    );
    ensure!(all && same == count, "{same} of {count} packets are the same");
    Ok(())
}

fn capture(link: &Link, count: u64, len: usize) -> Result<Source> {
    let path = link.path("packets.pcap");
    pcap::write(&path, count, len)?;
    Ok(Source::Pcap(path))
}

fn check_content(link: &mut Link, testpmd: Testpmd, mut sink: Sink, count: u64, len: usize) -> Result<()> {
    sink.wait_packets(count, ARRIVE)?;
    thread::sleep(NO_MORE);
    link.check_up()?;
    let sent = testpmd.finish()?;
    link.check_owner_gone()?;
    let counters = sink.finish()?;
    let received = last(&counters)?;
    println!("testpmd: read {}, sent {}, dropped {}", sent.received, sent.transmitted, sent.dropped);
    println!(
        "sink: received {} packets, {} B; lost {}, reordered {}, corrupted {}, faults {}",
        received.packets,
        received.bytes,
        received.lost,
        received.reordered,
        received.corrupted,
        received.faults
    );
    ensure!((sent.received, sent.transmitted, sent.dropped) == (count, count, 0), "testpmd: {sent:?}");
    ensure!(received.packets == count && received.bytes == count * len as u64, "sink: {received:?}");
    let wrong = received.lost + received.reordered + received.corrupted + received.faults;
    ensure!(wrong == 0, "sink: {received:?}");
    Ok(())
}

fn rate(link: &mut Link) -> Result<()> {
    let len = 64;
    let mut sink = link.start_sink(Judge::Count)?;
    let testpmd = Testpmd::start(link, &Source::Txonly(len), "")?;
    sink.wait_packets(1, ARRIVE)?;
    thread::sleep(RATE);
    link.check_up()?;
    let sent = testpmd.finish()?;
    link.check_owner_gone()?;
    let counters = sink.finish()?;
    let received = last(&counters)?;
    for two in counters.windows(2) {
        let (packets, seconds) = (two[1].packets - two[0].packets, two[1].seconds - two[0].seconds);
        // The last interval is cut off by the end.
        if seconds > 0.9 && packets > 0 {
            println!("sink: {:.2} Mpps", packets as f64 / seconds / 1e6);
        }
    }
    println!(
        "testpmd: sent {}, dropped {} as the ring was full; sink: received {}, faults {}",
        sent.transmitted, sent.dropped, received.packets, received.faults
    );
    // The owner takes its memory back with packets still in the ring.
    let left = sent.transmitted.checked_sub(received.packets);
    ensure!(
        left.is_some_and(|left| left <= RING),
        "sent {}, received {}",
        sent.transmitted,
        received.packets
    );
    ensure!(received.bytes == received.packets * len as u64 && received.faults == 0, "sink: {received:?}");
    Ok(())
}

fn last(counters: &[Received]) -> Result<&Received> {
    counters.last().context("the sink printed no counters")
}
