//! Of a packet, and of its ring, no byte is fetched twice.
#![allow(clippy::unwrap_used)]

use super::{OwnerConfig, OwnerLayout, OwnerPort, PacketBurst, PeerPort};
use crate::link::{Access, LinkSnapshot, Mapping};
use crate::ring::fetch_tests::{assert_fetched_once, memory};
use crate::shm::trace;

#[test]
fn a_burst_of_packets_is_fetched_once_by_either_side() {
    for (mergeable, indirect) in [(false, false), (true, false), (false, true), (true, true)] {
        let config = OwnerConfig { buffer_len: 128, mergeable, indirect, ..OwnerConfig::default() };
        let memory = memory(1 << 20);
        let layout = OwnerLayout::new(config, 0, 1 << 20).unwrap();
        let mut owner = OwnerPort::new(&memory, &layout, 0).unwrap();
        let whole = Mapping { iova: 0, len: 1 << 20, window_offset: 0, access: Access::READ_WRITE };
        let snapshot = LinkSnapshot {
            generation: 2,
            owner: true,
            up: true,
            owner_device: 1,
            features: config.features(),
            mappings: vec![whole],
            vrings: layout.infos(0),
        };
        let mut peer = PeerPort::new(&memory, &snapshot).unwrap();
        let frames: Vec<Vec<u8>> = (0..20).map(|n| vec![n as u8; 20 + 10 * n]).collect();
        let slices = || frames.iter().map(Vec::as_slice);
        let short = || slices().filter(|frame| mergeable || frame.len() <= 116);

        assert_eq!(owner.tx_burst(0, slices()), Ok(20));
        let mut burst = PacketBurst::default();
        let (received, fetched) = trace::fetches_of(|| peer.rx_burst(0, &mut burst, 32));
        assert_eq!(received, Ok(20));
        assert!(burst.frames().eq(slices()));
        assert_fetched_once(fetched);

        assert_eq!(peer.tx_burst(0, short()), Ok(short().count()));
        burst.clear();
        let (received, fetched) = trace::fetches_of(|| owner.rx_burst(0, &mut burst, 64));
        assert_eq!(received, Ok(short().count()));
        assert!(burst.frames().eq(short()));
        assert_fetched_once(fetched);
    }
}
