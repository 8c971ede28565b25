//! An owner's two cards, of which each transmits what the other received: whole, in order, and the
//! buffers come back.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use guest_driver_model::link::VringInfo;
use guest_driver_model::net::crossover::{Crossed, Crossover, CrossoverError};
use guest_driver_model::net::{OwnerConfig, PacketBurst, PeerPort};
use net_support::{IOVA, LinkWriter, TwoViews, frame, link_page, pass};
use proptest::collection::vec;
use proptest::prelude::{Just, ProptestConfig, any, prop_oneof, proptest};

/// One memory, and a window with all of it for each of the two peers.
struct Both {
    views: TwoViews,
    crossover: Crossover,
    peers: [PeerPort; 2],
}

fn both(config: OwnerConfig) -> Both {
    let views = TwoViews::new(16 << 20);
    let crossover = Crossover::new(&views.owner, config, IOVA).unwrap();
    join_both(views, crossover, config)
}

fn join_both(views: TwoViews, crossover: Crossover, config: OwnerConfig) -> Both {
    let peers = [0, 1].map(|card| {
        let infos: Vec<VringInfo> =
            crossover.places(card).unwrap().iter().map(|places| places.info(IOVA)).collect();
        LinkWriter::new(config.features(), vec![views.mapping()], infos).write(&views.window);
        let page = link_page(&views.window);
        PeerPort::new(&views.window, &page, &page.snapshot().unwrap()).unwrap()
    });
    Both { views, crossover, peers }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn frames_cross_whole_in_order_and_once_either_way(
        size_log in 2_u32..8,
        buffer_len in prop_oneof![Just(128_u32), Just(192), Just(2048)],
        mergeable in any::<bool>(),
        event_idx in any::<bool>(),
        packed in any::<bool>(),
        in_order in any::<bool>(),
        way in 0_usize..2,
        lens in vec(prop_oneof![0_usize..200, 0_usize..2000, 0_usize..9000], 1..200),
        bursts in vec((0_usize..40, 1_usize..40), 1..10),
        budget in 1_usize..40,
    ) {
        let config = OwnerConfig { ring_size: 1 << size_log, buffer_len, mergeable, event_idx, packed, in_order, ..OwnerConfig::default() };
        let Both { mut crossover, peers: [one, other], .. } = both(config);
        let (mut from, mut to) = if way == 0 { (one, other) } else { (other, one) };
        let most = (buffer_len as usize - 64) * if mergeable { 1 << size_log } else { 1 };
        let frames: Vec<_> = lens.iter().zip(0..).map(|(len, seed)| frame(seed, *len.min(&most))).collect();
        let bursts: Vec<_> = bursts.into_iter().chain([(8, 8)]).collect();
        let mut packets = 0;
        pass(
            &frames,
            &bursts,
            |frames| from.tx_burst(0, frames.iter().copied()).unwrap(),
            |burst, back| {
                let crossed = crossover.pass(way, budget).unwrap();
                assert_eq!(crossed.dropped, 0);
                packets += crossed.packets;
                to.rx_burst(0, burst, back).unwrap()
            },
        );
        assert_eq!(packets, frames.len());
        assert_eq!((from.faults().count(), to.faults().count(), from.counters().tx_drops), (0, 0, 0));
        // All buffers are posted again, and can be filled again.
        crossover.pass(way, budget).unwrap();
        assert_eq!(crossover.in_flight(), 0);
        let short = vec![frame(1, 60); 1 << size_log];
        assert_eq!(from.tx_burst(0, short.iter().map(Vec::as_slice)), Ok(1 << size_log));
    }
}

#[test]
fn a_header_is_not_passed_on_and_a_packet_that_is_none_is_dropped() {
    let Both { views, mut crossover, peers: [mut one, mut other] } =
        both(OwnerConfig { ring_size: 8, ..OwnerConfig::default() });
    let places = *crossover.places(0).unwrap();
    assert_eq!(one.tx_burst(0, [frame(1, 60).as_slice(), &frame(2, 60), &frame(3, 60)]), Ok(3));
    // The device lies: offloads, a number of buffers, a length.
    let buffer = |slot: u64| {
        let head = views.owner.load_u32(places[0].used + 4 + 8 * slot).unwrap();
        views.owner.load_u64(places[0].desc + 16 * u64::from(head)).unwrap() - IOVA
    };
    views.owner.write(buffer(0), &[1, 3, 9, 9, 9, 9, 9, 9, 9, 9]).unwrap();
    views.owner.store_u16(buffer(1) + 10, 77).unwrap();
    views.owner.store_u32(places[0].used + 4 + 8 * 2 + 4, 11).unwrap();
    assert_eq!(crossover.pass(0, 8), Ok(Crossed { packets: 1, bytes: 60, dropped: 1, returned: 0 }));
    let mut burst = PacketBurst::default();
    assert_eq!(other.rx_burst(0, &mut burst, 8), Ok(1));
    let packet = burst.packet(0).unwrap();
    assert_eq!((packet.frame, packet.header), (&frame(1, 60)[..], Default::default()));
    // It goes on, with all buffers.
    assert_eq!(crossover.pass(0, 8).unwrap().returned, 1);
    for seed in 0..40 {
        burst.clear();
        let frames: Vec<_> = (0..8).map(|n| frame(seed * 8 + n, 100)).collect();
        assert_eq!(one.tx_burst(0, frames.iter().map(Vec::as_slice)), Ok(8));
        assert_eq!(crossover.pass(0, 8).unwrap().packets, 8);
        assert_eq!(crossover.in_flight(), 8);
        assert_eq!(other.rx_burst(0, &mut burst, 8), Ok(8));
        assert!(burst.frames().eq(frames.iter().map(Vec::as_slice)));
        assert_eq!(crossover.pass(0, 8).unwrap().returned, 8);
    }
    assert_eq!(crossover.pass(2, 8), Ok(Crossed::default()));
}

#[test]
fn cards_with_offloads_are_refused() {
    let config = OwnerConfig { ring_size: 8, offloads: true, ..OwnerConfig::default() };
    let refused = Crossover::new(&TwoViews::new(1 << 20).owner, config, IOVA);
    assert_eq!(refused.err(), Some(CrossoverError::Offloads));
}

#[test]
fn injected_packets_go_round_for_as_long_as_they_are_sent_back() {
    let views = TwoViews::new(16 << 20);
    let config = OwnerConfig { ring_size: 16, buffer_len: 192, ..OwnerConfig::default() };
    let expected: Vec<_> = (0..8).map(|n| frame(n, 128)).collect();
    let slices: Vec<_> = expected.iter().map(Vec::as_slice).collect();
    // More than half a ring, or longer than a buffer: none is left out.
    let cards = |packets: &[&[u8]]| Crossover::with_packets(&views.owner, config, IOVA, packets);
    let error = cards(&[slices[0]; 9]).unwrap_err();
    assert_eq!(error, CrossoverError::Packets { packets: 9, room: 8 });
    assert_eq!(cards(&[&frame(0, 129)]).unwrap_err(), CrossoverError::Length { len: 129, room: 128 });
    let crossover = cards(&slices).unwrap();
    let Both { mut crossover, mut peers, .. } = join_both(views, crossover, config);
    let mut burst = PacketBurst::default();
    let mut copy = Vec::new();
    assert!(!crossover.last_packet(0, &mut copy));
    for _ in 0..100 {
        // Out by one card, in by the other: and out by the first again.
        for card in [1, 0] {
            let [from, to] = &mut peers;
            burst.clear();
            assert_eq!(from.rx_burst(0, &mut burst, 8), Ok(8));
            assert!(burst.frames().eq(expected.iter().map(Vec::as_slice)));
            assert_eq!(to.tx_burst(0, burst.frames()), Ok(8));
            assert_eq!(crossover.pass(card, 64).unwrap().packets, 8);
            assert!(crossover.last_packet(card, &mut copy) && copy == expected[7]);
            assert_eq!(crossover.pass(1 - card, 64).unwrap().packets, 0);
            assert_eq!(crossover.in_flight(), 16);
            peers.swap(0, 1);
        }
    }
}

#[test]
fn who_sleeps_is_called_for_packets_and_for_buffers_that_run_short() {
    let Both { mut crossover, peers: [mut one, mut other], .. } =
        both(OwnerConfig { ring_size: 16, ..OwnerConfig::default() });
    let frames: Vec<_> = (0..16).map(|n| frame(n, 60)).collect();
    let send = |peer: &mut PeerPort, count| {
        assert_eq!(peer.tx_burst(0, frames.iter().take(count).map(Vec::as_slice)), Ok(count));
    };
    assert_eq!(crossover.set_calls(true), Ok(false));
    send(&mut one, 1);
    assert!(one.needs_call(0) && !other.needs_call(0));
    assert_eq!(crossover.set_calls(true), Ok(true), "a packet is waiting");
    crossover.pass(0, 64).unwrap();
    assert!(crossover.needs_kick(1, 1));
    // A few buffers away: nobody is called when they are back.
    assert_eq!(crossover.set_calls(true), Ok(false));
    let mut burst = PacketBurst::default();
    assert_eq!(other.rx_burst(0, &mut burst, 64), Ok(1));
    assert!(!other.needs_call(1));
    // All of them: called once.
    crossover.pass(0, 64).unwrap();
    send(&mut one, 16);
    crossover.pass(0, 64).unwrap();
    assert_eq!(crossover.set_calls(true), Ok(false));
    assert_eq!(other.rx_burst(0, &mut burst, 8), Ok(8));
    assert!(!other.needs_call(1));
    assert_eq!(other.rx_burst(0, &mut burst, 8), Ok(8));
    assert!(other.needs_call(1));
}
