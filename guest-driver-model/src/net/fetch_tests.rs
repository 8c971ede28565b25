//! Of a packet, and of its ring, no byte is fetched twice.
#![allow(clippy::unwrap_used)]

use vhost_pci_device::abi;

use super::{OwnerConfig, OwnerLayout, OwnerPort, PacketBurst, PeerPort};
use crate::link::{Access, LinkPage, LinkSnapshot, Mapping};
use crate::ring::fetch_tests::{assert_fetched_once, memory as fresh};
use crate::shm::{SharedMemory, trace};

/// Of the fetches, those from this memory.
fn inside(memory: &SharedMemory, fetched: Vec<(usize, usize)>) -> Vec<(usize, usize)> {
    let (_, all) = trace::fetches_of(|| memory.read(0, &mut vec![0; memory.len() as usize]));
    let (start, len) = all[0];
    fetched.into_iter().filter(|(at, _)| (start..start + len).contains(at)).collect()
}

#[test]
fn a_burst_of_packets_is_fetched_once_by_either_side() {
    for (mergeable, indirect) in [(false, false), (true, false), (false, true), (true, true)] {
        let config = OwnerConfig { buffer_len: 128, mergeable, indirect, ..OwnerConfig::default() };
        let memory = fresh(1 << 20);
        let layout = OwnerLayout::new(config, 0, 1 << 20).unwrap();
        let mut owner = OwnerPort::new(&memory, &layout, 0).unwrap();
        let whole = Mapping { iova: 0, len: 1 << 20, window_offset: 0, access: Access::READ_WRITE };
        let snapshot = LinkSnapshot {
            generation: 2,
            owner: true,
            up: true,
            iommu: false,
            copy: false,
            table_generation: 0,
            owner_device: 1,
            features: config.features(),
            mappings: vec![whole],
            vrings: layout.infos(0),
            config: Vec::new(),
            log: None,
        };
        // Its generations may be, and are, looked at more than once.
        let link = fresh(abi::LINK_LEN);
        let config = abi::DeviceConfig { link_len: abi::LINK_LEN.into(), ..Default::default() };
        let page = LinkPage::new(&link, &config).unwrap();
        let mut peer = PeerPort::new(&memory, &page, &snapshot).unwrap();
        let frames: Vec<Vec<u8>> = (0..20).map(|n| vec![n as u8; 20 + 10 * n]).collect();
        let slices = || frames.iter().map(Vec::as_slice);
        let short = || slices().filter(|frame| mergeable || frame.len() <= 64);

        assert_eq!(owner.tx_burst(0, slices()), Ok(20));
        let mut burst = PacketBurst::default();
        let (received, fetched) = trace::fetches_of(|| peer.rx_burst(0, &mut burst, 32));
        assert_eq!(received, Ok(20));
        assert!(burst.frames().eq(slices()));
        assert_fetched_once(inside(&memory, fetched));

        assert_eq!(peer.tx_burst(0, short()), Ok(short().count()));
        burst.clear();
        let (received, fetched) = trace::fetches_of(|| owner.rx_burst(0, &mut burst, 64));
        assert_eq!(received, Ok(short().count()));
        assert!(burst.frames().eq(short()));
        assert_fetched_once(fetched);
    }
}
