//! In the steady state nothing is allocated, and no buffer is searched for in the mapping table: a
//! million packets through an owner's port and a peer's, each way and each way to receive.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use allocation_counter::measure;
use guest_driver_model::net::{LentBurst, OwnerConfig, OwnerPort, PacketBurst, PeerPort};
use net_support::{Joined, join};

const BURST: usize = 32;
const WARM_UP: usize = 10_000;
/// Of the usual set-up, and of each other one.
const PACKETS: usize = 1_000_000;
const FEWER: usize = 100_000;

/// Packets of mixed lengths, one burst after the other, until so many have arrived.
fn pass(packets: usize, mut send: impl FnMut(&[&[u8]]) -> usize, mut receive: impl FnMut() -> usize) {
    let frames = [[7_u8; 1514]; BURST];
    let frames: [&[u8]; BURST] = std::array::from_fn(|at| &frames[at][..64 + at * 46]);
    let mut arrived = 0;
    while arrived < packets {
        let sent = send(&frames);
        let received = receive();
        assert!(sent + received > 0, "no packet moves any more");
        arrived += received;
    }
}

fn check(config: OwnerConfig, mut way: impl FnMut(usize, &mut OwnerPort, &mut PeerPort)) {
    let Joined { mut owner, mut peer, .. } = join(config);
    way(WARM_UP, &mut owner, &mut peer);
    let packets = if config == OwnerConfig::default() { PACKETS } else { FEWER };
    let allocated = measure(|| way(packets, &mut owner, &mut peer));
    assert_eq!((allocated.count_total, allocated.bytes_total), (0, 0), "allocations and bytes, {config:?}");
    // One range of memory: it is the first buffer's, and each other's.
    assert_eq!(peer.searches(), 0, "{config:?}");
}

fn configs() -> impl Iterator<Item = OwnerConfig> {
    [(2048, true, false), (256, true, true), (2048, false, false)].into_iter().map(
        |(buffer_len, mergeable, indirect)| OwnerConfig {
            buffer_len,
            mergeable,
            indirect,
            ..OwnerConfig::default()
        },
    )
}

#[test]
fn nothing_is_allocated_for_a_million_packets_that_are_received() {
    for config in configs() {
        let mut burst = PacketBurst::with_capacity(BURST, 2048);
        check(config, |packets, owner, peer| {
            let send = |frames: &[&[u8]]| owner.tx_burst(0, frames.iter().copied()).unwrap();
            pass(packets, send, || {
                burst.clear();
                peer.rx_burst(0, &mut burst, BURST).unwrap()
            });
        });
    }
}

#[test]
fn nothing_is_allocated_for_a_million_packets_that_are_sent_to_the_owner() {
    for config in configs() {
        let mut burst = PacketBurst::with_capacity(BURST, 2048);
        check(config, |packets, owner, peer| {
            let send = |frames: &[&[u8]]| peer.tx_burst(0, frames.iter().copied()).unwrap();
            pass(packets, send, || {
                burst.clear();
                owner.rx_burst(0, &mut burst, BURST).unwrap()
            });
        });
    }
}

#[test]
fn nothing_is_allocated_for_a_million_packets_in_place() {
    for config in configs() {
        let mut burst = LentBurst::with_capacity(BURST);
        check(config, |packets, owner, peer| {
            let send = |frames: &[&[u8]]| owner.tx_burst(0, frames.iter().copied()).unwrap();
            pass(packets, send, || {
                let lent = peer.rx_lend(0, &mut burst, BURST).unwrap();
                assert!(burst.iter().all(|packet| packet.head::<4>() == [7; 4]));
                assert_eq!(peer.rx_return(&mut burst).unwrap(), lent);
                lent
            });
        });
    }
}
