//! An owner's port and a peer's port over one memfd: what goes in comes out.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use guest_driver_model::link::VringInfo;
use guest_driver_model::net::{HEADER_LEN, MAX_FRAME, OwnerConfig, OwnerPort, PacketBurst, PeerPort};
use guest_driver_model::port::PortError;
use guest_driver_model::ring::{Buffer, DriverRing};
use net_support::{HandRing, IOVA, Joined, LinkWriter, WRITE, frame, join, link_page, pass};
use proptest::collection::vec;
use proptest::prelude::{ProptestConfig, any, prop_oneof, proptest};
use vhost_pci_device::abi::{self, FaultKind};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn frames_arrive_whole_in_order_and_once_in_both_directions(
        size_log in 6_u32..9,
        buffer_len in prop_oneof![proptest::strategy::Just(128_u32), proptest::strategy::Just(192), proptest::strategy::Just(2112)],
        mergeable in any::<bool>(),
        indirect in any::<bool>(),
        (packed, in_order) in any::<(bool, bool)>(),
        lens in vec(prop_oneof![0_usize..200, 0_usize..2000, 0_usize..9000], 1..200),
        bursts in vec((0_usize..40, 1_usize..40), 1..10),
    ) {
        let config = OwnerConfig { pairs: 1, ring_size: 1 << size_log, buffer_len, mergeable, indirect, packed, in_order, ..OwnerConfig::default() };
        let Joined { mut owner, mut peer, layout, .. } = join(config);
        let make = |limit: usize| -> Vec<_> {
            lens.iter().zip(0..).map(|(len, seed)| frame(seed, *len.min(&limit))).collect()
        };
        let bursts: Vec<_> = bursts.into_iter().chain([(8, 8)]).collect();
        let frames = make(layout.max_frame());
        pass(
            &frames,
            &bursts,
            |frames| owner.tx_burst(0, frames.iter().copied()).unwrap(),
            |burst, budget| peer.rx_burst(0, burst, budget).unwrap(),
        );
        assert_eq!(owner.counters().tx_packets, peer.counters().rx_packets);
        assert_eq!(owner.counters().tx_bytes, peer.counters().rx_bytes);
        let frames = make(if mergeable { layout.max_frame() } else { config.room() });
        pass(
            &frames,
            &bursts,
            |frames| peer.tx_burst(0, frames.iter().copied()).unwrap(),
            |burst, budget| owner.rx_burst(0, burst, budget).unwrap(),
        );
        assert_eq!(peer.counters().tx_packets, owner.counters().rx_packets);
        assert_eq!(peer.counters().tx_bytes, owner.counters().rx_bytes);
        assert_eq!((peer.counters().tx_drops, owner.counters().rx_drops), (0, 0));
    }
}

#[test]
fn ports_work_on_after_their_indices_wrap() {
    for (packed, in_order) in [(false, false), (false, true), (true, false), (true, true)] {
        work_on_after_a_wrap(OwnerConfig { ring_size: 64, packed, in_order, ..OwnerConfig::default() });
    }
}

fn work_on_after_a_wrap(config: OwnerConfig) {
    let Joined { mut owner, mut peer, .. } = join(config);
    let mut burst = PacketBurst::default();
    for round in 0..3000_u64 {
        let frames: Vec<_> = (0..32).map(|n| frame(round * 32 + n, 60)).collect();
        let slices = || frames.iter().map(Vec::as_slice);
        assert_eq!(owner.tx_burst(0, slices()), Ok(32));
        burst.clear();
        assert_eq!(peer.rx_burst(0, &mut burst, 64), Ok(32));
        assert!(burst.frames().eq(slices()));
        assert_eq!(peer.tx_burst(0, burst.frames()), Ok(32));
        burst.clear();
        assert_eq!(owner.rx_burst(0, &mut burst, 64), Ok(32));
        assert!(burst.frames().eq(slices()));
    }
}

#[test]
fn queue_pairs_are_apart() {
    let Joined { mut owner, mut peer, .. } = join(OwnerConfig { pairs: 3, ..OwnerConfig::default() });
    assert_eq!((owner.pairs(), peer.pairs()), (3, 3));
    let mut burst = PacketBurst::default();
    for pair in 0..3_u16 {
        owner.tx_burst(pair, [frame(u64::from(pair), 100).as_slice()]).unwrap();
    }
    for pair in [2_u16, 0, 1] {
        burst.clear();
        assert_eq!(peer.rx_burst(pair, &mut burst, 8), Ok(1));
        assert_eq!(burst.packet(0).unwrap().frame, frame(u64::from(pair), 100));
    }
    assert_eq!(peer.rx_burst(3, &mut burst, 8), Ok(0));
    assert_eq!(peer.tx_burst(u16::MAX, [[0_u8; 60].as_slice()]), Ok(0));
}

#[test]
fn a_frame_that_no_buffer_can_take_is_dropped_and_counted() {
    let config = OwnerConfig { buffer_len: 128, mergeable: false, ..OwnerConfig::default() };
    let Joined { mut owner, mut peer, .. } = join(config);
    let (long, short) = (frame(1, 65), frame(2, 64));
    assert_eq!(peer.tx_burst(0, [long.as_slice(), &short]), Ok(2));
    let mut burst = PacketBurst::default();
    assert_eq!(owner.rx_burst(0, &mut burst, 8), Ok(1));
    assert_eq!(burst.packet(0).unwrap().frame, short);
    assert_eq!(burst.packet(0).unwrap().header.num_buffers, 1);
    assert_eq!((peer.counters().tx_drops, peer.counters().tx_packets), (1, 1));
    // Mergeable buffers: longer than the whole ring.
    let config = OwnerConfig { buffer_len: 128, ring_size: 4, ..OwnerConfig::default() };
    let Joined { mut owner, mut peer, .. } = join(config);
    let (long, fits, endless) = (frame(1, 293), frame(2, 292), vec![0; MAX_FRAME + 1]);
    assert_eq!(peer.tx_burst(0, [long.as_slice(), &fits, &endless, &fits]), Ok(3));
    burst.clear();
    assert_eq!(owner.rx_burst(0, &mut burst, 1), Ok(1));
    assert_eq!(burst.packet(0).unwrap().frame, fits);
    assert_eq!(burst.packet(0).unwrap().header.num_buffers, 4);
    assert_eq!(peer.counters().tx_drops, 2);
    assert_eq!(owner.tx_burst(0, [long.as_slice(), &endless]), Ok(2));
    assert_eq!(owner.counters().tx_drops, 2);
}

#[test]
fn what_is_longer_than_any_frame_is_no_packet_however_many_buffers_it_takes() {
    for mergeable in [false, true] {
        let config = OwnerConfig { buffer_len: 1 << 17, ring_size: 4, mergeable, ..OwnerConfig::default() };
        let Joined { mut owner, mut peer, views, layout, .. } = join(config);
        let longest = frame(1, MAX_FRAME);
        assert_eq!(peer.tx_burst(0, [longest.as_slice(), &longest]), Ok(2));
        // The device says that there is a byte more in the first.
        let used = layout.vrings()[0].places.used;
        assert_eq!(views.owner.load_u32(used + 8), Ok((HEADER_LEN + MAX_FRAME) as u32));
        views.owner.store_u32(used + 8, (HEADER_LEN + MAX_FRAME + 1) as u32).unwrap();
        let mut burst = PacketBurst::default();
        assert_eq!(owner.rx_burst(0, &mut burst, 8), Ok(1), "mergeable: {mergeable}");
        assert_eq!(burst.packet(0).unwrap().frame, longest);
        assert_eq!((owner.counters().rx_packets, owner.counters().rx_drops), (1, 1));
    }
}

#[test]
fn frames_wait_when_the_other_side_is_slow() {
    let Joined { mut owner, mut peer, .. } = join(OwnerConfig { ring_size: 8, ..OwnerConfig::default() });
    let frames: Vec<_> = (0..20).map(|n| frame(n, 60)).collect();
    let slices = || frames.iter().map(Vec::as_slice);
    assert_eq!(owner.tx_burst(0, slices()), Ok(8));
    assert_eq!(owner.tx_burst(0, slices()), Ok(0));
    assert_eq!(owner.reap_transmitted(0), Ok(8));
    let mut burst = PacketBurst::default();
    assert_eq!(peer.rx_burst(0, &mut burst, 5), Ok(5));
    assert_eq!(owner.reap_transmitted(0), Ok(3));
    assert_eq!(owner.tx_burst(0, slices()), Ok(5));
    assert_eq!(peer.tx_burst(0, slices()), Ok(8));
    assert_eq!(peer.tx_burst(0, slices()), Ok(0));
    assert_eq!(owner.rx_burst(0, &mut burst, 5), Ok(5));
    assert_eq!(peer.tx_burst(0, slices()), Ok(5));
}

/// More than half of the buffers are free, so nothing is reaped early, but not enough.
#[test]
fn a_long_frame_waits_for_completions_and_not_for_ever() {
    let config = OwnerConfig { ring_size: 16, buffer_len: 128, ..OwnerConfig::default() };
    let Joined { mut owner, mut peer, .. } = join(config);
    let (short, long) = (frame(1, 52), frame(2, 15 * 64 + 1));
    let mut burst = PacketBurst::default();
    assert_eq!(owner.tx_burst(0, [short.as_slice(), &long]), Ok(1));
    assert_eq!(peer.rx_burst(0, &mut burst, 8), Ok(1));
    assert_eq!(owner.tx_burst(0, [long.as_slice()]), Ok(1));
    assert_eq!(peer.rx_burst(0, &mut burst, 8), Ok(1));
    assert_eq!(burst.packet(1).unwrap().frame, long);
}

#[test]
fn the_owner_is_called_for_transmitted_packets_too() {
    let config = OwnerConfig { event_idx: false, ..OwnerConfig::default() };
    let Joined { mut owner, mut peer, .. } = join(config);
    assert!(owner.needs_kick(0), "the receive buffers were posted");
    let mut burst = PacketBurst::default();
    owner.tx_burst(0, [frame(1, 60).as_slice()]).unwrap();
    assert!(owner.needs_kick(1) && !owner.needs_kick(1));
    assert!(!peer.needs_call(1));
    peer.rx_burst(0, &mut burst, 8).unwrap();
    assert!(peer.needs_call(1) && !peer.needs_call(1));
    owner.set_calls(1, false).unwrap();
    owner.tx_burst(0, [frame(1, 60).as_slice()]).unwrap();
    peer.rx_burst(0, &mut burst, 8).unwrap();
    assert!(!peer.needs_call(1));
    peer.tx_burst(0, [frame(1, 60).as_slice()]).unwrap();
    assert!(peer.needs_call(0));
    assert_eq!(peer.set_kicks(1, false), Ok(false));
    owner.tx_burst(0, [frame(1, 60).as_slice()]).unwrap();
    assert!(!owner.needs_kick(1));
    assert_eq!(peer.set_kicks(1, true), Ok(true), "a packet is waiting");
}

#[test]
fn links_that_are_no_network_card_in_use_give_no_port() {
    let joined = join(OwnerConfig::default());
    let good =
        LinkWriter::new(joined.snapshot.features, vec![joined.views.mapping()], joined.layout.infos(IOVA));
    let port = |writer: &LinkWriter| {
        writer.write(&joined.views.window);
        let page = link_page(&joined.views.window);
        let snapshot = page.snapshot().unwrap();
        PeerPort::new(&joined.views.window, &page, &snapshot)
    };
    assert!(port(&good).is_ok());
    let down = LinkWriter { status: abi::LINK_S_OWNER, ..good.clone() };
    assert_eq!(port(&down).unwrap_err(), PortError::NotUp);
    let block = LinkWriter { owner_device: 2, ..good.clone() };
    assert_eq!(port(&block).unwrap_err(), PortError::OtherKind { device: 2, wanted: "a network card" });
    let legacy = LinkWriter { features: 1 << 15, ..good.clone() };
    assert_eq!(port(&legacy).unwrap_err(), PortError::Legacy { features: 1 << 15 });
    // VIRTIO_F_NOTIFICATION_DATA, VIRTIO_F_RING_RESET; VIRTIO_NET_F_GUEST_UFO, HOST_UFO, GUEST_USO4,
    // GUEST_USO6, HOST_USO.
    for bit in [38, 40, 10, 14, 54, 55, 56] {
        let unknown = LinkWriter { features: good.features | 1 << bit, ..good.clone() };
        assert_eq!(port(&unknown).unwrap_err(), PortError::Unknown { features: 1 << bit });
    }
    // VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX, VIRTIO_F_ACCESS_PLATFORM,
    // VIRTIO_F_RING_PACKED, VIRTIO_F_IN_ORDER; VIRTIO_NET_F_CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6,
    // GUEST_ECN, HOST_TSO4, HOST_TSO6, HOST_ECN.
    for bit in [28, 29, 33, 34, 35, 0, 1, 7, 8, 9, 11, 12, 13] {
        let known = LinkWriter { features: 1 << 32 | 1 << bit, ..good.clone() };
        assert!(port(&known).is_ok());
    }

    // One vring that cannot be, one that is not enabled: the others work.
    let mut vrings = good.vrings.clone();
    vrings[0] = VringInfo { size: 100, ..vrings[0] };
    vrings.push(VringInfo { enabled: false, ..vrings[0] });
    let mut peer = port(&LinkWriter { vrings, ..good }).unwrap();
    let fault = peer.tx_burst(0, [[0_u8; 60].as_slice()]).unwrap_err();
    assert_eq!((fault.kind, fault.vring), (FaultKind::Geometry, 0));
    assert_eq!(peer.faults().collect::<Vec<_>>(), [fault]);
    assert_eq!(peer.rx_burst(0, &mut PacketBurst::default(), 8), Ok(0));
    assert_eq!([0, 1, 2, 3].map(|vring| peer.is_enabled(vring)), [true, true, false, false]);
}

/// A peer's port on rings written by hand; both vrings are the same ring.
fn hand_port(ring: &HandRing) -> PeerPort {
    let vrings = vec![ring.places.info(IOVA); 2];
    LinkWriter::new(1 << 32 | 1 << 28, ring.mappings.clone(), vrings).write(&ring.views.window);
    let page = link_page(&ring.views.window);
    PeerPort::new(&ring.views.window, &page, &page.snapshot().unwrap()).unwrap()
}

#[test]
fn a_chain_that_is_no_packet_faults_its_vring() {
    for (len, rest) in [(11, 0), (65_563, 0), (65_000, 563), (u32::MAX, 0)] {
        let ring = HandRing::new(8);
        let next = u16::from(rest > 0);
        ring.descriptor(0, 0x1_0000, len, next, 1);
        ring.descriptor(1, 0x1_0000, rest, 0, 0);
        ring.offer(0);
        let mut burst = PacketBurst::default();
        let fault = hand_port(&ring).rx_burst(0, &mut burst, 8).unwrap_err();
        let kind = if len == u32::MAX { FaultKind::Unmapped } else { FaultKind::Length };
        assert_eq!((fault.kind, fault.vring), (kind, 1));
        assert!(burst.is_empty());
    }
    // A receive buffer too short for a header.
    let ring = HandRing::new(8);
    ring.descriptor(0, 0x1_0000, 11, WRITE, 0);
    ring.offer(0);
    let mut port = hand_port(&ring);
    let fault = port.tx_burst(0, [[0_u8; 60].as_slice()]).unwrap_err();
    assert_eq!((fault.kind, fault.vring), (FaultKind::Length, 0));
    assert_eq!(port.tx_burst(0, [[0_u8; 60].as_slice()]), Err(fault));
}

#[test]
fn header_and_frame_may_be_split_anywhere() {
    let whole: Vec<u8> = [[0_u8; 12].as_slice(), &frame(5, 50)].concat();
    for cut in 1..whole.len() as u32 {
        let ring = HandRing::new(8);
        ring.views.owner.write(0x1_0000, &whole[..cut as usize]).unwrap();
        ring.views.owner.write(0x1_8000, &whole[cut as usize..]).unwrap();
        for write in [0, WRITE] {
            ring.descriptor(0, 0x1_0000, cut, 1 | write, 1);
            ring.descriptor(1, 0x1_8000, 62 - cut, write, 0);
            ring.offer(0);
            let mut port = hand_port(&ring);
            if write == 0 {
                let mut burst = PacketBurst::default();
                assert_eq!(port.rx_burst(0, &mut burst, 8), Ok(1));
                assert_eq!(burst.packet(0).unwrap().frame, frame(5, 50));
                ring.views.owner.store_u16(ring.places.used + 2, 0).unwrap();
            } else {
                assert_eq!(port.tx_burst(0, [frame(6, 50).as_slice()]), Ok(1));
                let mut seen = [0; 62];
                ring.views.owner.read(0x1_0000, &mut seen[..cut as usize]).unwrap();
                ring.views.owner.read(0x1_8000, &mut seen[cut as usize..]).unwrap();
                assert_eq!(seen[12..], frame(6, 50));
                assert_eq!(seen[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
                assert_eq!(ring.used_element(0), (0, 62));
            }
        }
    }
}

/// A device that lies to the owner about lengths and buffer counts.
#[test]
fn an_owner_drops_packets_that_are_not_whole() {
    let Joined { mut owner, views, layout, .. } = join(OwnerConfig::default());
    let at = layout.vrings()[0];
    let lies = [(11_u32, 1_u16), (100, 0), (100, 9), (1548, u16::MAX)];
    for ((len, count), slot) in lies.into_iter().zip(0_u64..) {
        views.owner.store_u16(at.buffers + 1600 * slot + 52 + 10, count).unwrap();
        views.owner.store_u32(at.places.used + 4 + 8 * slot, slot as u32).unwrap();
        views.owner.store_u32(at.places.used + 8 + 8 * slot, len).unwrap();
    }
    views.owner.store_u16_release(at.places.used + 2, 4).unwrap();
    let mut burst = PacketBurst::default();
    assert_eq!(owner.rx_burst(0, &mut burst, 1), Ok(0));
    assert_eq!(owner.rx_burst(0, &mut burst, 8), Ok(0));
    assert_eq!(owner.counters().rx_packets, 0);
    assert!(owner.counters().rx_drops >= 3);
    // It goes on.
    views.owner.store_u16(at.buffers + 1600 * 4 + 52 + 10, 1).unwrap();
    views.owner.store_u32(at.places.used + 4 + 8 * 4, 4).unwrap();
    views.owner.store_u32(at.places.used + 8 + 8 * 4, 72).unwrap();
    views.owner.store_u16_release(at.places.used + 2, 5).unwrap();
    assert_eq!(owner.rx_burst(0, &mut burst, 8), Ok(1));
}

#[test]
fn a_port_does_not_fit_a_memory_that_is_too_small() {
    let Joined { views, layout, .. } = join(OwnerConfig::default());
    let half = views.owner.part(0, views.owner.len() / 2).unwrap();
    assert!(OwnerPort::new(&half, &layout, 0).is_err());
    let places = layout.vrings()[0].places;
    let mut ring = DriverRing::new(0, &places, &half, 0, None).unwrap();
    assert_eq!(ring.add(&[Buffer::readable(0, 1)], 0), Ok(()));
}
