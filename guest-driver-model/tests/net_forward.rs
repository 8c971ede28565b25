//! Packets from one owner to another: whole, in order, with one copy, and nothing lost whatever
//! either owner does.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::thread;

use guest_driver_model::control::{Outcome, Request};
use guest_driver_model::link::Access;
use guest_driver_model::net::forward::{End, forward_burst, forward_burst_by};
use guest_driver_model::net::{
    ForwardFault, Forwarded, Lane, LentBurst, OwnerConfig, OwnerPort, PacketBurst, PeerPort, PeerQueue,
};
use net_support::device::{Apart, Mode, PAGE, apart, willing};
use net_support::{Done, HandRing, IOVA, Joined, LinkWriter, WRITE, frame, join, link_page, pass};
use proptest::collection::vec;
use proptest::prelude::{Just, ProptestConfig, any, prop_oneof, proptest};
use vhost_pci_device::abi::FaultKind;

fn frames(count: u64, len: usize) -> Vec<Vec<u8>> {
    (0..count).map(|seed| frame(seed, len)).collect()
}

fn slices(frames: &[Vec<u8>]) -> impl Iterator<Item = &[u8]> {
    frames.iter().map(Vec::as_slice)
}

fn first(port: &mut PeerPort) -> &mut PeerQueue {
    port.queue(0).unwrap()
}

fn take(owner: &mut OwnerPort) -> Vec<Vec<u8>> {
    let mut burst = PacketBurst::default();
    while owner.rx_burst(0, &mut burst, 64).unwrap() > 0 {}
    burst.frames().map(<[u8]>::to_vec).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn frames_arrive_whole_in_order_and_once_with_one_copy(
        sizes in (4_u32..9, 4_u32..9),
        buffers in (prop_oneof![Just(128_u32), Just(192), Just(2048)], prop_oneof![Just(128_u32), Just(192), Just(2048)]),
        mergeable in any::<bool>(),
        indirect in any::<bool>(),
        packed in (any::<bool>(), any::<bool>()),
        in_order in (any::<bool>(), any::<bool>()),
        lens in vec(prop_oneof![0_usize..200, 0_usize..2000, 0_usize..9000], 1..200),
        bursts in vec((0_usize..40, 1_usize..40), 1..10),
        budget in 1_usize..80,
    ) {
        let config = OwnerConfig { ring_size: 1 << sizes.0, buffer_len: buffers.0, indirect, packed: packed.0, in_order: in_order.0, ..OwnerConfig::default() };
        let Joined { mut owner, peer: mut from, layout, .. } = join(config);
        let most = layout.max_frame();
        let config = OwnerConfig { ring_size: 1 << sizes.1, buffer_len: buffers.1, mergeable, packed: packed.1, in_order: in_order.1, ..OwnerConfig::default() };
        let Joined { owner: mut sink, peer: mut to, layout, .. } = join(config);
        let most = most.min(if mergeable { layout.max_frame() } else { buffers.1 as usize - 64 });
        let frames: Vec<_> = lens.iter().zip(0..).map(|(len, seed)| frame(seed, *len.min(&most))).collect();
        let bursts: Vec<_> = bursts.into_iter().chain([(8, 8)]).collect();
        let mut lane = Lane::default();
        let mut sum = Forwarded::default();
        pass(
            &frames,
            &bursts,
            |frames| owner.tx_burst(0, frames.iter().copied()).unwrap(),
            |burst, back| {
                let done = forward_burst(first(&mut from), first(&mut to), &mut lane, budget).unwrap();
                assert_eq!((done.taken, done.copied_bytes, lane.held()), (done.packets, done.bytes, 0));
                sum.packets += done.packets;
                sum.copied_bytes += done.copied_bytes;
                sink.rx_burst(0, burst, back).unwrap()
            },
        );
        let bytes: usize = frames.iter().map(Vec::len).sum();
        assert_eq!((sum.packets, sum.copied_bytes), (frames.len(), bytes as u64));
        assert_eq!((from.counters().rx_packets, from.counters().rx_bytes), (frames.len() as u64, bytes as u64));
        assert_eq!((to.counters().tx_packets, to.counters().tx_bytes), (frames.len() as u64, bytes as u64));
        assert_eq!((to.counters().tx_drops, sink.counters().rx_drops, owner.reap_transmitted(0)), (0, 0, Ok(0)));
    }

    /// Either owner may have an IOMMU, that shows any part of its memory.
    #[test]
    fn behind_iommus_nothing_is_lost_and_each_copy_counts(
        modes in (prop_oneof![Just(Mode::Copy), Just(Mode::Map)], prop_oneof![Just(Mode::Copy), Just(Mode::Map)]),
        mergeable in any::<bool>(),
        buffer_len in prop_oneof![Just(128_u32), Just(2048)],
        shown in vec((0_u64..100, 1_u64..8, 0_u32..4), 0..20),
        to_copy in 0_u64..3,
        patience in 300_u64..600,
        lens in vec(prop_oneof![0_usize..200, 0_usize..2000], 1..80),
        bursts in vec((0_usize..40, 1_usize..40), 1..6),
    ) {
        let rule = || -> Box<dyn FnMut(&Request) -> Outcome> {
            let mut asked = 0;
            Box::new(move |request| {
                asked += 1;
                match request {
                    _ if asked % patience == 0 => Outcome::Later,
                    Request::Map { iova, .. } if (iova / PAGE) % 4 < to_copy => Outcome::Copy,
                    _ => Outcome::Done,
                }
            })
        };
        let config = OwnerConfig { ring_size: 64, buffer_len, mergeable, ..OwnerConfig::default() };
        let mut a = apart(config, modes.0, rule());
        let mut b = apart(config, modes.1, rule());
        let pages = a.views.owner.len() / PAGE;
        for (page, count, access) in shown {
            for side in [&mut a, &mut b] {
                let access = Access::from_bits(access);
                side.device.show(page % pages * PAGE, count.min(pages - page % pages) * PAGE, access);
            }
        }
        let most = if mergeable { a.layout.max_frame() } else { buffer_len as usize - 64 };
        let frames: Vec<_> = lens.iter().zip(0..).map(|(len, seed)| frame(seed, *len.min(&most))).collect();
        let bursts: Vec<_> = bursts.into_iter().chain([(8, 8)]).collect();
        let mut lane = Lane::default();
        let mut copied = 0;
        pass(
            &frames,
            &bursts,
            |frames| a.owner.tx_burst(0, frames.iter().copied()).unwrap(),
            |burst, back| {
                let from = End { queue: first(&mut a.peer), exchange: &mut a.device };
                let to = End { queue: first(&mut b.peer), exchange: &mut b.device };
                let done = forward_burst_by(&mut lane, from, to, 32).unwrap();
                copied += done.copied_bytes;
                let received = b.owner.rx_burst(0, burst, back).unwrap();
                let pause = [a.peer.pause(), b.peer.pause()].into_iter().flatten().max();
                thread::sleep(pause.filter(|_| received + done.taken == 0).unwrap_or_default());
                received
            },
        );
        let bytes: usize = frames.iter().map(Vec::len).sum();
        assert!((bytes as u64..=2 * bytes as u64).contains(&copied), "{copied} of {bytes}");
        assert_eq!((a.peer.faults().count(), b.peer.faults().count(), a.owner.reap_transmitted(0)), (0, 0, Ok(0)));
    }
}

#[test]
fn what_the_other_owner_has_no_room_for_stays_where_it_is() {
    let Joined { mut owner, peer: mut from, .. } = join(OwnerConfig::default());
    let Joined { owner: mut sink, peer: mut to, .. } =
        join(OwnerConfig { ring_size: 8, ..OwnerConfig::default() });
    let sent = frames(20, 64);
    assert_eq!(owner.tx_burst(0, slices(&sent)), Ok(20));
    let mut lane = Lane::default();
    let mut burst =
        |from: &mut PeerPort, to: &mut PeerPort| forward_burst(first(from), first(to), &mut lane, 64);
    assert_eq!(burst(&mut from, &mut to).unwrap().packets, 8);
    assert_eq!(burst(&mut from, &mut to), Ok(Forwarded::default()));
    assert_eq!(owner.reap_transmitted(0), Ok(12));
    assert_eq!(take(&mut sink), sent[..8]);
    assert_eq!(burst(&mut from, &mut to).unwrap().packets, 8);
    // What is left can be had otherwise.
    let mut copied = PacketBurst::default();
    assert_eq!(from.rx_burst(0, &mut copied, 1), Ok(1));
    assert_eq!(copied.packet(0).unwrap().frame, sent[16]);
    // What is lent is forwarded all the same, once.
    let mut lent = LentBurst::default();
    assert_eq!(from.rx_lend(0, &mut lent, 64), Ok(3));
    assert_eq!(take(&mut sink), sent[8..16]);
    assert_eq!(burst(&mut from, &mut to).unwrap().packets, 3);
    assert_eq!(from.rx_return(&mut lent), Ok(0));
    assert_eq!(take(&mut sink), sent[17..]);
    assert_eq!(owner.reap_transmitted(0), Ok(0));
}

/// Otherwise who sleeps waits for the wrong owner: for one that has all it needs, and is found to have it
/// at once, or for none.
#[test]
fn a_lane_waits_for_room_while_there_is_none_and_not_when_there_is_nothing_to_move() {
    let config = OwnerConfig { ring_size: 8, ..OwnerConfig::default() };
    let port = |side: &Joined, enabled: bool| {
        let mut vrings = side.layout.infos(IOVA);
        vrings.iter_mut().for_each(|vring| vring.enabled = enabled);
        LinkWriter::new(side.snapshot.features, vec![side.views.mapping()], vrings).write(&side.views.window);
        let page = link_page(&side.views.window);
        PeerPort::new(&side.views.window, &page, &page.snapshot().unwrap()).unwrap()
    };
    let (mut a, b) = (join(config), join(config));
    let mut lane = Lane::default();
    let mut waits = |from: &mut PeerPort, to: &mut PeerPort| {
        let moved = forward_burst(first(from), first(to), &mut lane, 64).map_or(0, |done| done.taken);
        (moved, lane.waits_for_room())
    };
    let (mut from, mut to) = (port(&a, true), port(&b, true));
    let sent = frames(8, 60);
    assert_eq!((a.owner.tx_burst(0, slices(&sent)), waits(&mut from, &mut to)), (Ok(8), (8, false)));
    assert_eq!((a.owner.tx_burst(0, slices(&sent)), waits(&mut from, &mut to)), (Ok(8), (0, true)));
    // A's driver uses its queue no more; breaks it; is there again.
    assert_eq!(waits(&mut port(&a, false), &mut to), (0, false));
    assert_eq!(waits(&mut from, &mut to), (0, true));
    let broken = HandRing::new(8);
    broken.avail_index(100);
    assert_eq!(waits(&mut hand_port(&broken), &mut port(&join(config), true)), (0, false));
    // B's driver uses its queue no more; breaks it; is there again, with room.
    assert_eq!(waits(&mut from, &mut port(&b, false)), (0, true));
    let mut to = hand_port(&broken);
    assert_eq!([0; 2].map(|_| waits(&mut from, &mut to)), [(0, true); 2]);
    assert_eq!(waits(&mut from, &mut port(&join(config), true)), (8, false));
}

#[test]
fn what_the_other_owner_can_never_take_is_dropped_and_counted() {
    let Joined { mut owner, peer: mut from, .. } = join(OwnerConfig::default());
    let mut lane = Lane::default();
    let config = OwnerConfig { buffer_len: 128, mergeable: false, ..OwnerConfig::default() };
    let Joined { owner: mut sink, peer: mut to, .. } = join(config);
    let sent = [frame(1, 60), frame(2, 300), frame(3, 60)];
    assert_eq!(owner.tx_burst(0, slices(&sent)), Ok(3));
    let done = forward_burst(first(&mut from), first(&mut to), &mut lane, 64).unwrap();
    assert_eq!(
        done,
        Forwarded { taken: 3, taken_bytes: 420, packets: 2, bytes: 120, dropped: 1, copied_bytes: 120 }
    );
    assert_eq!(take(&mut sink), [sent[0].clone(), sent[2].clone()]);
    assert_eq!((to.counters().tx_drops, owner.reap_transmitted(0)), (1, Ok(0)));
    // Longer than all of its buffers together.
    let config = OwnerConfig { buffer_len: 128, ring_size: 4, ..OwnerConfig::default() };
    let Joined { owner: mut sink, peer: mut to, .. } = join(config);
    let sent = [frame(1, 2000), frame(2, 200)];
    assert_eq!(owner.tx_burst(0, slices(&sent)), Ok(2));
    let done = forward_burst(first(&mut from), first(&mut to), &mut lane, 64).unwrap();
    assert_eq!((done.dropped, done.packets, done.copied_bytes), (1, 1, 200));
    assert_eq!(take(&mut sink), [sent[1].clone()]);
}

#[test]
fn a_link_that_has_changed_gives_and_takes_nothing() {
    let Joined { mut owner, peer: mut from, .. } = join(OwnerConfig::default());
    let Joined { owner: mut sink, peer: mut to, views, snapshot, layout } = join(OwnerConfig::default());
    assert_eq!(owner.tx_burst(0, slices(&frames(5, 60))), Ok(5));
    let mut link = LinkWriter::new(snapshot.features, vec![views.mapping()], layout.infos(IOVA));
    (link.generation, link.table_generation) = (4, 4);
    link.write(&views.window);
    let mut lane = Lane::default();
    assert_eq!(forward_burst(first(&mut from), first(&mut to), &mut lane, 64), Ok(Forwarded::default()));
    assert!(take(&mut sink).is_empty());
    assert_eq!(owner.reap_transmitted(0), Ok(5));
    // By its next port everything goes on.
    let page = link_page(&views.window);
    let mut to = PeerPort::new(&views.window, &page, &page.snapshot().unwrap()).unwrap();
    assert_eq!(forward_burst(first(&mut from), first(&mut to), &mut lane, 64).unwrap().packets, 5);
    assert_eq!(take(&mut sink), frames(5, 60));
    assert!(from.queue(7).is_none());
}

/// A's mappings, or its link, change at the worst moment: when the burst has begun. (It is B's device
/// that does it, which is asked in the midst of it.)
#[test]
fn a_burst_during_which_mappings_change_is_rolled_back() {
    let config = OwnerConfig { ring_size: 64, ..OwnerConfig::default() };
    for (link_too, packed) in [(false, false), (true, false), (false, true), (true, true)] {
        let config = OwnerConfig { packed, ..config };
        let mut a = apart(config, Mode::Map, willing());
        let mut b = apart(config, Mode::Map, willing());
        a.device.show(0, a.views.owner.len(), Access::READ_WRITE);
        let (window, mut writer) = (a.device.window.clone(), a.device.writer.clone());
        b.device.before = Box::new(move |_, _| {
            writer.table_generation += 2;
            writer.generation += if link_too { 2 } else { 0 };
            writer.write(&window);
        });
        let sent = frames(40, 500);
        assert_eq!(a.owner.tx_burst(0, slices(&sent)), Ok(40));
        let mut lane = Lane::default();
        let mut burst = |a: &mut Apart, b: &mut Apart| {
            let from = End { queue: first(&mut a.peer), exchange: &mut a.device };
            let to = End { queue: first(&mut b.peer), exchange: &mut b.device };
            forward_burst_by(&mut lane, from, to, 8).unwrap()
        };
        let first = burst(&mut a, &mut b);
        if link_too {
            assert_eq!(first, Forwarded::default());
            assert!(take(&mut b.owner).is_empty());
            assert_eq!(a.owner.reap_transmitted(0), Ok(40));
            continue;
        }
        // By way of private memory.
        let both = Forwarded {
            taken: 8,
            taken_bytes: 4000,
            packets: 8,
            bytes: 4000,
            dropped: 0,
            copied_bytes: 8000,
        };
        assert_eq!(first, both);
        assert_eq!(take(&mut b.owner), sent[..8]);
        assert_eq!(burst(&mut a, &mut b), Forwarded { copied_bytes: 4000, ..both });
        assert_eq!(take(&mut b.owner), sent[8..16]);
        assert_eq!(a.owner.reap_transmitted(0), Ok(24));
    }
}

/// A peer's port on rings written by hand; both vrings are the same ring.
fn hand_port(ring: &HandRing) -> PeerPort {
    let vrings = vec![ring.places.info(IOVA); 2];
    LinkWriter::new(1 << 32 | 1 << 28, ring.mappings.clone(), vrings).write(&ring.views.window);
    let page = link_page(&ring.views.window);
    PeerPort::new(&ring.views.window, &page, &page.snapshot().unwrap()).unwrap()
}

#[test]
fn a_packet_may_be_in_pieces_on_either_side() {
    let whole: Vec<u8> = [[0xab_u8; 12].as_slice(), &frame(5, 50)].concat();
    for cut in 1..whole.len() as u32 {
        for other in [1, 11, 12, 13, 40, 61] {
            let (a, b) = (HandRing::new(8), HandRing::new(8));
            a.views.owner.write(0x1_0000, &whole[..cut as usize]).unwrap();
            a.views.owner.write(0x1_8000, &whole[cut as usize..]).unwrap();
            for (ring, cut, write) in [(&a, cut, 0), (&b, other, WRITE)] {
                ring.descriptor(0, 0x1_0000, cut, 1 | write, 1);
                ring.descriptor(1, 0x1_8000, 62 - cut, write, 0);
                ring.offer(0);
            }
            let (mut from, mut to) = (hand_port(&a), hand_port(&b));
            let done = forward_burst(first(&mut from), first(&mut to), &mut Lane::default(), 8).unwrap();
            assert_eq!((done.packets, done.copied_bytes), (1, 50));
            let mut seen = [0; 62];
            b.views.owner.read(0x1_0000, &mut seen[..other as usize]).unwrap();
            b.views.owner.read(0x1_8000, &mut seen[other as usize..]).unwrap();
            assert_eq!(seen[12..], frame(5, 50));
            // Made anew, whatever A has put there.
            assert_eq!(seen[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            assert_eq!((a.used_element(0), b.used_element(0)), ((0, 0), (0, 62)));
        }
    }
}

#[test]
fn either_owners_broken_ring_is_told_from_the_others() {
    // A's second packet is shorter than a header.
    let (a, b) = (HandRing::new(8), HandRing::new(8));
    for (ring, write) in [(&a, 0), (&b, WRITE)] {
        ring.descriptor(0, 0x1_0000, 72, write, 0);
        ring.descriptor(1, 0x1_1000, if write == 0 { 11 } else { 72 }, write, 0);
        ring.avail_slot(0, 0);
        ring.avail_slot(1, 1);
        ring.avail_index(2);
    }
    let (mut from, mut to) = (hand_port(&a), hand_port(&b));
    let mut lane = Lane::default();
    assert_eq!(forward_burst(first(&mut from), first(&mut to), &mut lane, 8).unwrap().packets, 1);
    let fault = forward_burst(first(&mut from), first(&mut to), &mut lane, 8).unwrap_err();
    assert!(
        matches!(fault, ForwardFault::From(fault) if fault.kind == FaultKind::Length && fault.value == 11)
    );
    assert_eq!((a.used_index(), b.used_index()), (1, 1));
    assert_eq!((from.faults().count(), to.faults().count()), (1, 0));

    // A's packets are good; a buffer of B's has no room for a header, or is nowhere.
    for (addr, len, kind) in [(0x1_0000, 11, FaultKind::Length), (1 << 40, 72, FaultKind::Unmapped)] {
        let Joined { mut owner, peer: mut from, .. } = join(OwnerConfig::default());
        assert_eq!(owner.tx_burst(0, slices(&frames(2, 60))), Ok(2));
        let b = HandRing::new(8);
        b.descriptor(0, addr, len, WRITE, 0);
        b.offer(0);
        let mut to = hand_port(&b);
        for _ in 0..2 {
            let fault = forward_burst(first(&mut from), first(&mut to), &mut lane, 8).unwrap_err();
            assert!(matches!(fault, ForwardFault::To(fault) if fault.kind == kind));
        }
        // A's stay with A, for whom else takes them.
        assert_eq!((b.used_index(), owner.reap_transmitted(0)), (0, Ok(2)));
        assert_eq!(from.rx_burst(0, &mut PacketBurst::default(), 8), Ok(2));
    }
}

/// An owner that rewrites its descriptors and headers all the time: what comes of it is a fault of
/// its own, and the other owner gets whole packets with a header of ours.
#[test]
fn an_owner_that_rewrites_everything_harms_itself_only() {
    for round in 0..20_u64 {
        let a = HandRing::new(64);
        let Joined { owner: mut sink, peer: mut to, .. } =
            join(OwnerConfig { ring_size: 64, ..OwnerConfig::default() });
        let done = Done::default();
        thread::scope(|scope| {
            let hostile = scope.spawn(|| {
                let mut state = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                let mut random = || {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state >> 20
                };
                let mut index = 0_u16;
                while !done.is_raised() {
                    let slot = random() as u16 % 64;
                    // Good ones for the most part, or the ring is dead at once.
                    let len = if random() % 64 == 0 { random() as u32 } else { 12 + random() as u32 % 1500 };
                    let flags = if random() % 16 == 0 { random() as u16 % 8 } else { 0 };
                    a.descriptor(slot, 0x1_0000 + random() % 0x1_0000, len, flags, random() as u16 % 64);
                    let header: [u8; 12] = std::array::from_fn(|_| random() as u8);
                    a.views.owner.write(0x1_0000 + random() % 0x1_0000, &header).unwrap();
                    a.avail_slot(index, slot);
                    if index.wrapping_sub(a.used_index()) < 64 {
                        index = index.wrapping_add(1);
                        a.avail_index(index);
                    }
                }
            });
            let _at_end = done.at_end();
            let mut from = hand_port(&a);
            let mut lane = Lane::default();
            let (mut forwarded, mut received) = (0, 0);
            let mut burst = PacketBurst::default();
            for _ in 0..20_000 {
                match forward_burst(first(&mut from), first(&mut to), &mut lane, 32) {
                    Ok(done) => forwarded += done.packets,
                    Err(fault) => {
                        assert!(matches!(fault, ForwardFault::From(_)), "{fault}");
                        break;
                    }
                }
                burst.clear();
                received += sink.rx_burst(0, &mut burst, 64).unwrap();
                for packet in burst.iter() {
                    assert_eq!(
                        (packet.header.flags, packet.header.gso_type, packet.header.hdr_len),
                        (0, 0, 0)
                    );
                }
                if hostile.is_finished() {
                    break;
                }
            }
            burst.clear();
            while sink.rx_burst(0, &mut burst, 64).unwrap() > 0 {}
            assert_eq!(forwarded, received + burst.len());
            assert_eq!((to.faults().count(), sink.counters().rx_drops), (0, 0));
        });
    }
}

#[test]
fn both_owners_are_called_and_pairs_are_apart() {
    let Joined { mut owner, peer: mut from, .. } = join(OwnerConfig { pairs: 2, ..OwnerConfig::default() });
    let Joined { owner: mut sink, peer: mut to, .. } =
        join(OwnerConfig { pairs: 2, ..OwnerConfig::default() });
    owner.set_calls(3, true).unwrap();
    sink.set_calls(0, true).unwrap();
    owner.tx_burst(1, [frame(1, 60).as_slice()]).unwrap();
    let mut lane = Lane::default();
    assert_eq!(forward_burst(from.queue(1).unwrap(), first(&mut to), &mut lane, 8).unwrap().packets, 1);
    assert_eq!([1, 3].map(|vring| from.needs_call(vring)), [false, true]);
    assert_eq!([0, 2].map(|vring| to.needs_call(vring)), [true, false]);
    assert_eq!(take(&mut sink), [frame(1, 60)]);
}
