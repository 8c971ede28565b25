//! Headers that leave a checksum or segments to the receiver: they pass as they are where that was
//! accepted, what was not is made good or dropped, and what cannot be true goes nowhere.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::time::Duration;

use guest_driver_model::control::{Nobody, Outcome};
use guest_driver_model::net::forward::{End, forward_burst, forward_burst_by};
use guest_driver_model::net::{
    HEADER_LEN, Lane, LentBurst, NetHeader, OwnerConfig, OwnerPort, Packet, PacketBurst, PeerPort, PeerQueue,
};
use net_support::device::{Mode, apart};
use net_support::{Joined, LinkWriter, frame, join, link_page};
use proptest::collection::vec;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};

const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO6: u64 = 1 << 8;

fn first(port: &mut PeerPort) -> &mut PeerQueue {
    port.queue(0).unwrap()
}

/// A header that a frame of this length can have.
fn header(kind: u8, len: usize, seed: u16) -> NetHeader {
    let (needs_csum, csum_offset) = (1, 16);
    let hdr_len = seed % (len as u16).max(1);
    match kind {
        1 if len >= 36 => NetHeader {
            flags: needs_csum,
            csum_start: 34,
            csum_offset: seed % (len as u16 - 35),
            hdr_len,
            ..NetHeader::default()
        },
        2 | 3 if len >= 54 => NetHeader {
            flags: needs_csum,
            gso_type: if kind == 2 { 1 } else { 0x81 },
            hdr_len,
            gso_size: 1 + seed,
            csum_start: 34,
            csum_offset,
            num_buffers: 0,
        },
        4 if len >= 74 => NetHeader {
            flags: needs_csum,
            gso_type: 4,
            hdr_len,
            gso_size: 1448,
            csum_start: 54,
            csum_offset,
            num_buffers: 0,
        },
        _ => NetHeader::default(),
    }
}

type Owned = (NetHeader, Vec<u8>);

fn packets(owned: &[Owned]) -> impl Iterator<Item = Packet<'_>> {
    owned.iter().map(|(header, frame)| Packet { header: *header, frame })
}

/// What was received, with no number of buffers.
fn received(burst: &PacketBurst) -> Vec<Owned> {
    let without = |packet: Packet<'_>| (NetHeader { num_buffers: 0, ..packet.header }, packet.frame.to_vec());
    burst.iter().map(without).collect()
}

fn take(owner: &mut OwnerPort) -> Vec<Owned> {
    let mut burst = PacketBurst::default();
    while owner.rx_burst(0, &mut burst, 64).unwrap() > 0 {}
    received(&burst)
}

/// Until so many are done with: what the device was asked for comes by and by.
fn all(count: usize, mut some: impl FnMut(usize) -> usize) {
    let (mut done, mut tries) = (0, 0);
    while done < count {
        match some(done) {
            0 => std::thread::sleep(Duration::from_millis(1)),
            now => done += now,
        }
        tries += 1;
        assert!(tries < 1000, "{done} of {count}");
    }
}

fn config() -> impl Strategy<Value = OwnerConfig> {
    (prop_oneof![Just(128_u32), Just(192), Just(2048)], any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(buffer_len, indirect, packed, in_order)| OwnerConfig {
            ring_size: 256,
            buffer_len,
            indirect,
            packed,
            in_order,
            offloads: true,
            ..OwnerConfig::default()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn headers_pass_unchanged_both_ways_and_on_to_another_owner(
        configs in (config(), config()),
        mode in prop_oneof![Just(None), Just(Some(Mode::Copy)), Just(Some(Mode::Map))],
        rounds in vec(vec((0_u8..5, prop_oneof![0_usize..200, 0_usize..3000], 0_u16..3000), 1..8), 1..40),
    ) {
        let Joined { mut owner, peer: mut from, .. } = join(configs.0);
        let Joined { owner: mut sink, peer: mut to, .. } = join(configs.1);
        let mut behind = mode.map(|mode| apart(configs.1, mode, Box::new(|_| Outcome::Done)));
        let mut lane = Lane::default();
        for round in rounds {
            let sent: Vec<Owned> =
                round.into_iter().map(|(kind, len, seed)| (header(kind, len, seed), frame(seed.into(), len))).collect();
            let count = sent.len();
            // To the peer.
            let mut burst = PacketBurst::default();
            assert_eq!(owner.tx_burst(0, packets(&sent)), Ok(count));
            assert_eq!(from.rx_burst(0, &mut burst, 64), Ok(count));
            assert_eq!(received(&burst), sent);
            // From the peer, as it came.
            assert_eq!(from.tx_burst(0, burst.iter()), Ok(count));
            assert_eq!(take(&mut owner), sent);
            // By the peer to another owner.
            assert_eq!(owner.tx_burst(0, packets(&sent)), Ok(count));
            let done = forward_burst(first(&mut from), first(&mut to), &mut lane, 64).unwrap();
            assert_eq!((done.packets, done.dropped, done.copied_bytes), (count, 0, done.bytes));
            assert_eq!(take(&mut sink), sent);
            // To, from and by way of owners with an IOMMU.
            let Some(behind) = &mut behind else { continue };
            all(count, |done| first(&mut behind.peer).tx_burst_by(&mut behind.device, packets(&sent).skip(done)).unwrap());
            assert_eq!(take(&mut behind.owner), sent);
            assert_eq!(behind.owner.tx_burst(0, packets(&sent)), Ok(count));
            burst.clear();
            all(count, |_| first(&mut behind.peer).rx_burst_by(&mut behind.device, &mut burst, 64).unwrap());
            assert_eq!(received(&burst), sent);
            assert_eq!(behind.owner.tx_burst(0, packets(&sent)), Ok(count));
            all(count, |_| {
                let end = End { queue: first(&mut behind.peer), exchange: &mut behind.device };
                let to = End { queue: first(&mut to), exchange: &mut Nobody };
                forward_burst_by(&mut lane, end, to, 64).unwrap().packets
            });
            assert_eq!(take(&mut sink), sent);
        }
        assert_eq!((to.counters().tx_drops, owner.counters().tx_drops), (0, 0));
    }
}

/// A TCP segment of `payload` bytes over IPv4, whose checksum is to be completed.
fn tcp(payload: usize) -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend([8, 0, 0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0, 80, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    frame.extend((0..payload).map(|at| at as u8));
    let pseudo = ones(&[10, 0, 0, 1, 10, 0, 0, 2]) as u64 + 6 + payload as u64 + 20;
    frame[50..52].copy_from_slice(&(pseudo as u16).to_be_bytes());
    frame
}

/// The ones' complement sum.
fn ones(bytes: &[u8]) -> u16 {
    let sum = bytes
        .chunks(2)
        .fold(0_u32, |sum, word| sum + u32::from(word[0]) * 256 + u32::from(*word.get(1).unwrap_or(&0)));
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum + (sum >> 16)) as u16
}

/// Whether the checksum of a TCP segment is whole.
fn is_whole(frame: &[u8]) -> bool {
    let mut bytes = frame[26..34].to_vec();
    bytes.extend(6_u16.to_be_bytes());
    bytes.extend((frame.len() as u16 - 34).to_be_bytes());
    bytes.extend(&frame[34..]);
    ones(&bytes) == 0xffff
}

const CSUM: NetHeader = NetHeader {
    flags: 1,
    gso_type: 0,
    hdr_len: 0,
    gso_size: 0,
    csum_start: 34,
    csum_offset: 16,
    num_buffers: 0,
};
const LONG: NetHeader = NetHeader { gso_type: 1, hdr_len: 54, gso_size: 1000, ..CSUM };

#[test]
fn what_a_driver_did_not_accept_is_made_good_or_dropped() {
    let (short, long) = (tcp(100), tcp(2500));
    let sent = [(NetHeader::default(), frame(1, 60)), (CSUM, short.clone()), (LONG, long), (CSUM, tcp(101))];
    let Joined { mut owner, mut peer, .. } = join(OwnerConfig::default());
    assert_eq!(peer.tx_burst(0, packets(&sent)), Ok(4));
    assert_eq!((peer.counters().tx_packets, peer.counters().tx_drops), (3, 1));
    let got = take(&mut owner);
    assert!(got.iter().all(|(header, _)| *header == NetHeader::default()));
    assert_eq!(got[0].1, sent[0].1);
    assert!(!is_whole(&short) && is_whole(&got[1].1) && is_whole(&got[2].1));
    // So it is the other way.
    assert_eq!(owner.tx_burst(0, packets(&sent)), Ok(4));
    let mut burst = PacketBurst::default();
    assert_eq!(peer.rx_burst(0, &mut burst, 64), Ok(3));
    assert_eq!(received(&burst), got);
    assert_eq!(owner.counters().tx_drops, 1);
}

#[test]
fn each_offload_counts_by_itself_and_a_segmentation_only_with_the_checksum() {
    let long = tcp(2500);
    let six = NetHeader { gso_type: 4, csum_start: 54, ..LONG };
    let checked = NetHeader { flags: 2, ..NetHeader::default() };
    // Features, header, whether it passes as it is.
    for (features, header, passes) in [
        (GUEST_CSUM, CSUM, Some(true)),
        (GUEST_CSUM, LONG, None),
        (GUEST_CSUM, checked, Some(true)),
        (0, checked, Some(false)),
        (GUEST_CSUM | GUEST_TSO6, six, Some(true)),
        (GUEST_CSUM | GUEST_TSO6, LONG, None),
        (GUEST_CSUM | GUEST_TSO6, NetHeader { gso_type: 0x84, ..six }, None),
        (GUEST_TSO6, six, None),
        (GUEST_TSO6, CSUM, Some(false)),
    ] {
        // The owner's port shows all that it gets.
        let config = OwnerConfig::default();
        let Joined { mut owner, views, layout, .. } = join(OwnerConfig { offloads: true, ..config });
        let infos = layout.infos(net_support::IOVA);
        LinkWriter::new(config.features() | features, vec![views.mapping()], infos).write(&views.window);
        let page = link_page(&views.window);
        let mut peer = PeerPort::new(&views.window, &page, &page.snapshot().unwrap()).unwrap();
        assert_eq!(peer.tx_burst(0, [Packet { header, frame: &long }]), Ok(1));
        let got = take(&mut owner).pop().map(|(got, _)| got);
        let expected = passes.map(|passes| if passes { header } else { NetHeader::default() });
        assert_eq!(got, expected, "{features:#x} {header:?}");
        assert_eq!(peer.counters().tx_drops, u64::from(passes.is_none()));
    }
}

#[test]
fn an_owner_that_accepts_less_gets_from_another_what_it_accepts() {
    let accepts = OwnerConfig { offloads: true, ..OwnerConfig::default() };
    let Joined { mut owner, peer: mut from, .. } = join(accepts);
    let Joined { owner: mut sink, peer: mut to, .. } = join(OwnerConfig::default());
    let sent = [(NetHeader::default(), frame(1, 60)), (CSUM, tcp(100)), (LONG, tcp(2500)), (CSUM, tcp(101))];
    assert_eq!(owner.tx_burst(0, packets(&sent)), Ok(4));
    let mut lane = Lane::default();
    let mut sum = (0, 0);
    for _ in 0..4 {
        let done = forward_burst(first(&mut from), first(&mut to), &mut lane, 64).unwrap();
        sum = (sum.0 + done.taken, sum.1 + done.packets);
    }
    assert_eq!((sum, lane.held()), ((4, 6), 0));
    let got = take(&mut sink);
    assert!(got.iter().all(|(header, _)| *header == NetHeader::default()));
    assert_eq!(got[0].1, sent[0].1);
    assert!(got[1..].iter().all(|(_, frame)| is_whole(frame)));
    assert_eq!(got.iter().map(|(_, frame)| frame.len()).collect::<Vec<_>>(), [60, 154, 1054, 1054, 554, 155]);
    let payload: Vec<u8> = got[2..5].iter().flat_map(|(_, frame)| frame[54..].to_vec()).collect();
    assert_eq!(payload, sent[2].1[54..]);
}

/// 5.1.6.2.2: a device ignores flags of a driver that are none of a driver's.
#[test]
fn flags_that_a_driver_has_no_right_to_go_no_further_by_any_way() {
    let accepts = OwnerConfig { offloads: true, ..OwnerConfig::default() };
    let Joined { mut owner, peer: mut from, views, layout, .. } = join(accepts);
    let Joined { owner: mut sink, peer: mut to, .. } = join(accepts);
    let short = tcp(100);
    for header in [CSUM, NetHeader::default()] {
        for way in 0..3_u64 {
            assert_eq!(owner.tx_burst(0, [Packet { header, frame: &short }]), Ok(1));
            // NEEDS_CSUM stays what it is; DATA_VALID and all others are a device's.
            for slot in 0..u64::from(accepts.ring_size) {
                let at = layout.vrings()[1].buffers + slot * u64::from(accepts.buffer_len);
                let flags = 0xfe | header.flags;
                views
                    .owner
                    .write(at + 64 - HEADER_LEN as u64, &NetHeader { flags, ..header }.to_bytes())
                    .unwrap();
            }
            match way {
                0 => {
                    let mut burst = PacketBurst::default();
                    assert_eq!(from.rx_burst(0, &mut burst, 64), Ok(1));
                    assert_eq!(burst.packet(0).unwrap().header, header);
                }
                1 => {
                    let mut burst = LentBurst::default();
                    assert_eq!(from.rx_lend(0, &mut burst, 64), Ok(1));
                    assert_eq!(burst.packet(0).unwrap().header(), header);
                    assert_eq!(from.rx_return(&mut burst), Ok(1));
                }
                _ => {
                    let done = forward_burst(first(&mut from), first(&mut to), &mut Lane::default(), 64);
                    assert_eq!(done.unwrap().packets, 1);
                    assert_eq!(take(&mut sink), [(header, short.clone())]);
                }
            }
        }
    }
}

/// Without offloads a header says nothing, whatever is in it, but how many buffers there are.
#[test]
fn a_device_that_leaves_what_its_driver_did_not_accept_is_not_believed() {
    let said = NetHeader { num_buffers: 1, ..LONG };
    for (mergeable, offloads) in [(false, false), (true, false), (true, true)] {
        let config = OwnerConfig { mergeable, offloads, ..OwnerConfig::default() };
        let Joined { mut owner, mut peer, views, layout, .. } = join(config);
        assert_eq!(peer.tx_burst(0, [tcp(100).as_slice()]), Ok(1));
        let at = layout.vrings()[0].buffers + 64 - HEADER_LEN as u64;
        views.owner.write(at, &said.to_bytes()).unwrap();
        let mut burst = PacketBurst::default();
        assert_eq!(owner.rx_burst(0, &mut burst, 64), Ok(1));
        let expected = if offloads { said } else { NetHeader { num_buffers: 1, ..NetHeader::default() } };
        assert_eq!(burst.packet(0).unwrap().header, expected);
    }
}

/// The owner says into how many pieces a packet is to be cut: it is not to have memory for it.
#[test]
fn packets_are_cut_one_after_the_other_as_there_is_room_for_their_pieces() {
    let accepts = OwnerConfig { ring_size: 64, buffer_len: 2048, offloads: true, ..OwnerConfig::default() };
    let Joined { mut owner, peer: mut from, .. } = join(accepts);
    let Joined { owner: mut sink, peer: mut to, .. } =
        join(OwnerConfig { ring_size: 16, ..OwnerConfig::default() });
    let tiny = NetHeader { gso_size: 48, ..LONG };
    // 21 pieces each; one that cannot be cut; one that needs not be.
    let mut cannot = tcp(1000);
    cannot[14] = 0x46;
    let sent = [(tiny, tcp(1000)), (tiny, tcp(1001)), (tiny, cannot), (CSUM, tcp(7)), (tiny, tcp(1002))];
    assert_eq!(owner.tx_burst(0, packets(&sent)), Ok(5));
    let (mut lane, mut got, mut sum) = (Lane::default(), Vec::new(), (0, 0, 0, 0));
    for round in 0..10 {
        let done = forward_burst(first(&mut from), first(&mut to), &mut lane, 64).unwrap();
        sum = (sum.0 + done.taken, sum.1 + done.packets, sum.2 + done.dropped, sum.3 + done.copied_bytes);
        // Packets that wait, and not their pieces.
        assert!(lane.held() <= 5, "round {round}: {}", lane.held());
        assert_eq!(lane.waits_for_room(), lane.held() > 0);
        got.extend(take(&mut sink));
    }
    assert_eq!((sum.0, sum.1, sum.2, lane.held()), (5, 64, 1, 0));
    let lens = |frames: &[Owned]| frames.iter().map(|(_, frame)| frame.len() as u64).sum::<u64>();
    let cut = lens(&got) - sent[3].1.len() as u64;
    assert_eq!(sum.3, lens(&sent) + cut + lens(&got), "taken, cut, and sent");
    assert!(got.iter().all(|(header, frame)| header.is_plain() && is_whole(frame)));
    let payload: Vec<u8> = got.iter().flat_map(|(_, frame)| frame[54..].to_vec()).collect();
    let expected = [0, 1, 3, 4].iter().flat_map(|at: &usize| sent[*at].1[54..].to_vec());
    assert!(payload.into_iter().eq(expected));
}

#[test]
fn a_hostile_header_goes_nowhere() {
    let accepts = OwnerConfig { offloads: true, ..OwnerConfig::default() };
    let long = tcp(500);
    for hostile in [
        NetHeader { csum_start: u16::MAX, ..CSUM },
        NetHeader { csum_offset: u16::MAX, ..CSUM },
        NetHeader { csum_start: 553, csum_offset: 0, ..CSUM },
        NetHeader { csum_start: 3, ..CSUM },
        NetHeader { gso_size: 0, ..LONG },
        NetHeader { hdr_len: 555, ..LONG },
        NetHeader { csum_offset: 6, ..LONG },
        NetHeader { gso_type: 3, ..LONG },
        NetHeader { gso_type: 5, ..LONG },
        NetHeader { gso_type: 0x80, ..LONG },
        NetHeader { flags: 0, ..LONG },
    ] {
        let Joined { mut owner, peer: mut from, views, layout, .. } = join(accepts);
        let Joined { owner: mut sink, peer: mut to, .. } = join(accepts);
        // The first packet's header is in the first buffer.
        assert_eq!(
            owner.tx_burst(0, [Packet { header: LONG, frame: &long }, Packet { header: CSUM, frame: &long }]),
            Ok(2)
        );
        let at = layout.vrings()[1].buffers + 64 - HEADER_LEN as u64;
        views.owner.write(at, &hostile.to_bytes()).unwrap();
        let done = forward_burst(first(&mut from), first(&mut to), &mut Lane::default(), 64).unwrap();
        assert_eq!((done.taken, done.packets, done.dropped), (2, 1, 1), "{hostile:?}");
        assert_eq!(take(&mut sink), [(CSUM, long.clone())]);
        // Nor does the port send one that it is given.
        assert_eq!(from.tx_burst(0, [Packet { header: hostile, frame: &long }]), Ok(1));
        assert_eq!((take(&mut owner), from.counters().tx_drops), (vec![], 1));
    }
}
