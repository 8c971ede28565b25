//! Packets lent in place: they are the owner's until they are returned, each buffer is completed
//! once, and nothing that a reader does or forgets loses one.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use guest_driver_model::control::{Outcome, Request};
use guest_driver_model::link::Access;
use guest_driver_model::net::{LentBurst, OwnerConfig, OwnerPort, PacketBurst, PeerPort};
use net_support::device::{Apart, Mode, PAGE, apart, willing};
use net_support::{HandRing, IOVA, Joined, LinkWriter, frame, join, link_page};
use vhost_pci_device::abi::FaultKind;

fn frames(count: u64, len: usize) -> Vec<Vec<u8>> {
    (0..count).map(|seed| frame(seed, len)).collect()
}

fn send(owner: &mut OwnerPort, frames: &[Vec<u8>]) {
    assert_eq!(owner.tx_burst(0, frames.iter().map(Vec::as_slice)), Ok(frames.len()));
}

/// All bytes of all packets.
fn read(burst: &LentBurst) -> Vec<Vec<u8>> {
    let whole = |packet: guest_driver_model::net::LentPacket<'_>| {
        let mut bytes = vec![0; packet.len()];
        assert_eq!(packet.read(0, &mut bytes), bytes.len());
        bytes
    };
    burst.iter().map(whole).collect()
}

#[test]
fn lent_packets_are_completed_when_they_are_returned_and_not_before() {
    for (indirect, packed) in [(false, false), (true, false), (false, true), (true, true)] {
        let config = OwnerConfig { buffer_len: 128, indirect, packed, ..OwnerConfig::default() };
        let Joined { mut owner, mut peer, .. } = join(config);
        let sent: Vec<_> = (0..20).map(|n| frame(n, 20 + 40 * n as usize)).collect();
        send(&mut owner, &sent);
        let mut burst = LentBurst::with_capacity(32);
        assert_eq!(peer.rx_lend(0, &mut burst, 32), Ok(20));
        assert_eq!(read(&burst), sent);
        assert!(peer.is_in_place(&burst) && !burst.needs_copy());
        assert_eq!(owner.reap_transmitted(0), Ok(20));
        assert_eq!(peer.counters().rx_packets, 0);
        assert_eq!(peer.rx_return(&mut burst), Ok(20));
        assert_eq!(owner.reap_transmitted(0), Ok(0));
        assert_eq!(peer.counters().rx_packets, 20);
        assert_eq!(peer.counters().rx_bytes, owner.counters().tx_bytes);
        // Once.
        assert_eq!(peer.rx_return(&mut burst), Ok(0));
        assert!(burst.is_empty() && burst.packet(0).is_none() && !peer.is_in_place(&burst));
        assert_eq!(peer.rx_lend(0, &mut burst, 32), Ok(0));
    }
}

#[test]
fn a_reader_gets_as_much_of_a_packet_as_there_is() {
    let config = OwnerConfig { buffer_len: 128, ..OwnerConfig::default() };
    let Joined { mut owner, mut peer, .. } = join(config);
    let sent = [frame(1, 64), frame(2, 63), frame(3, 700), Vec::new()];
    send(&mut owner, &sent);
    let mut burst = LentBurst::default();
    assert_eq!(peer.rx_lend(0, &mut burst, 32), Ok(4));
    let packet = |at| burst.packet(at).unwrap();
    assert_eq!(packet(0).head::<64>(), sent[0][..]);
    let padded = packet(1).head::<64>();
    assert_eq!((&padded[..63], padded[63]), (&sent[1][..], 0));
    assert_eq!(packet(2).head::<500>(), sent[2][..500]);
    assert_eq!(packet(3).head::<4>(), [0; 4]);
    assert!(packet(3).is_empty());
    assert_eq!(packet(0).header(), guest_driver_model::net::NetHeader::default());
    for (at, len) in [(0, 700), (1, 699), (115, 3), (116, 1), (600, 200), (699, 9), (700, 1), (usize::MAX, 4)]
    {
        let mut bytes = vec![0xee; len];
        let read = packet(2).read(at, &mut bytes);
        let expected = sent[2].get(at..).unwrap_or_default();
        assert_eq!(read, len.min(expected.len()));
        assert_eq!(bytes[..read], expected[..read]);
        assert!(bytes[read..].iter().all(|byte| *byte == 0xee));
    }
    assert!(burst.packet(4).is_none());
}

#[test]
fn what_is_not_returned_is_lent_again_and_completed_once() {
    what_is_not_returned_is_lent_again(OwnerConfig { ring_size: 16, ..OwnerConfig::default() });
    let config = OwnerConfig { packed: true, in_order: true, ..OwnerConfig::default() };
    what_is_not_returned_is_lent_again(OwnerConfig { ring_size: 16, ..config });
}

fn what_is_not_returned_is_lent_again(config: OwnerConfig) {
    let Joined { mut owner, mut peer, .. } = join(config);
    for round in 0..50 {
        let sent: Vec<_> = (0..8).map(|n| frame(round * 8 + n, 60)).collect();
        send(&mut owner, &sent);
        // Dropped.
        let mut first = LentBurst::default();
        assert_eq!(peer.rx_lend(0, &mut first, 5), Ok(5));
        drop(first);
        // Forgotten.
        let mut second = LentBurst::default();
        assert_eq!(peer.rx_lend(0, &mut second, 6), Ok(6));
        assert_eq!(read(&second), sent[..6]);
        // And asked for again.
        let mut third = LentBurst::default();
        assert_eq!(peer.rx_lend(0, &mut third, 3), Ok(3));
        assert_eq!(peer.rx_lend(0, &mut third, 7), Ok(7));
        assert_eq!(read(&third), sent[..7]);
        assert!(!peer.is_in_place(&second) && peer.is_in_place(&third));
        assert_eq!(peer.rx_return(&mut second), Ok(0), "it has them no more");
        assert_eq!(second.len(), 6, "and can still be looked at");
        assert_eq!(owner.reap_transmitted(0), Ok(8));
        assert_eq!(peer.rx_return(&mut third), Ok(7));
        assert_eq!(peer.rx_return(&mut second), Ok(0));
        assert_eq!(owner.reap_transmitted(0), Ok(1));
        // Lent, and then received.
        assert_eq!(peer.rx_lend(0, &mut third, 8), Ok(1));
        let mut copied = PacketBurst::default();
        assert_eq!(peer.rx_burst(0, &mut copied, 8), Ok(1));
        assert_eq!(copied.packet(0).unwrap().frame, sent[7]);
        assert_eq!(peer.rx_return(&mut third), Ok(0));
        assert_eq!(owner.reap_transmitted(0), Ok(0));
    }
    assert_eq!(peer.counters().rx_packets, 400);
}

#[test]
fn who_has_not_returned_a_burst_is_told_not_to_sleep() {
    for packed in [false, true] {
        let Joined { mut owner, mut peer, .. } = join(OwnerConfig { packed, ..OwnerConfig::default() });
        send(&mut owner, &frames(3, 60));
        let mut burst = LentBurst::default();
        assert_eq!(peer.rx_lend(0, &mut burst, 32), Ok(3));
        assert_eq!(peer.set_kicks(1, true), Ok(true), "three are to be had");
        assert_eq!((peer.set_kicks(0, true), peer.set_kicks(1, false)), (Ok(true), Ok(false)));
        drop(burst);
        assert_eq!(peer.set_kicks(1, true), Ok(true), "as before");
        let mut burst = LentBurst::default();
        assert_eq!(peer.rx_lend(0, &mut burst, 32), Ok(3));
        assert_eq!(peer.set_kicks(1, true), Ok(true));
        assert_eq!(peer.rx_return(&mut burst), Ok(3), "to ask takes nothing from who has it");
        assert_eq!(peer.set_kicks(1, true), Ok(false));
    }
}

#[test]
fn a_burst_goes_back_only_to_the_port_and_pair_that_lent_it() {
    let Joined { mut owner, mut peer, views, snapshot, .. } =
        join(OwnerConfig { pairs: 2, ..OwnerConfig::default() });
    let other = &mut join(OwnerConfig::default());
    send(&mut owner, &frames(3, 60));
    send(&mut other.owner, &frames(4, 60));
    assert_eq!(owner.tx_burst(1, [frame(9, 60).as_slice()]), Ok(1));
    let (mut burst, mut theirs, mut second) = Default::default();
    assert_eq!(peer.rx_lend(0, &mut burst, 32), Ok(3));
    assert_eq!(other.peer.rx_lend(0, &mut theirs, 32), Ok(4));
    assert_eq!(other.peer.rx_return(&mut burst), Ok(0));
    assert_eq!((burst.len(), other.owner.reap_transmitted(0)), (3, Ok(4)));
    // Two pairs of a port lend at once.
    assert_eq!(peer.rx_lend(1, &mut second, 32), Ok(1));
    assert_eq!(peer.rx_return(&mut second), Ok(1));
    assert_eq!((owner.reap_transmitted(0), owner.reap_transmitted(1)), (Ok(3), Ok(0)));
    // A burst that is lent into by another port has its packets, and no others.
    assert_eq!(other.peer.rx_lend(0, &mut burst, 32), Ok(4));
    assert_eq!(peer.rx_return(&mut burst), Ok(0));
    assert_eq!(read(&burst), frames(4, 60));
    assert_eq!(other.peer.rx_return(&mut theirs), Ok(0), "they were lent again");
    assert_eq!(other.peer.rx_return(&mut burst), Ok(4));
    // A port of the same link, made anew: the ring is where it was.
    assert_eq!(peer.rx_lend(0, &mut burst, 2), Ok(2));
    let page = link_page(&views.window);
    let mut heir = PeerPort::new(&views.window, &page, &snapshot).unwrap();
    assert_eq!(heir.rx_return(&mut burst), Ok(0));
    assert_eq!(heir.rx_lend(0, &mut second, 32), Ok(3));
    assert_eq!(heir.rx_return(&mut second), Ok(3));
}

#[test]
fn to_return_a_burst_of_a_link_that_has_changed_touches_no_ring() {
    let Joined { mut owner, mut peer, views, layout, snapshot } = join(OwnerConfig::default());
    send(&mut owner, &frames(3, 60));
    let mut burst = LentBurst::default();
    assert_eq!(peer.rx_lend(0, &mut burst, 32), Ok(3));
    let mut link = LinkWriter::new(snapshot.features, vec![views.mapping()], layout.infos(IOVA));
    (link.generation, link.table_generation) = (4, 4);
    link.write(&views.window);
    assert!(!peer.is_in_place(&burst));
    assert_eq!(peer.rx_return(&mut burst), Ok(0));
    assert!(burst.is_empty());
    assert_eq!(owner.reap_transmitted(0), Ok(3));
    assert_eq!(peer.rx_lend(0, &mut burst, 32), Ok(0));
}

#[test]
fn what_is_no_packet_is_not_lent() {
    let ring = HandRing::new(8);
    ring.descriptor(0, 0x1_0000, 72, 0, 0);
    ring.descriptor(1, 0x1_1000, 11, 0, 0);
    ring.avail_slot(0, 0);
    ring.avail_slot(1, 1);
    ring.avail_index(2);
    let vrings = vec![ring.places.info(IOVA); 2];
    LinkWriter::new(1 << 32 | 1 << 28, ring.mappings.clone(), vrings).write(&ring.views.window);
    let page = link_page(&ring.views.window);
    let mut port = PeerPort::new(&ring.views.window, &page, &page.snapshot().unwrap()).unwrap();
    let mut burst = LentBurst::default();
    assert_eq!(port.rx_lend(0, &mut burst, 8), Ok(1));
    assert_eq!(burst.packet(0).unwrap().len(), 60);
    // The owner rewrites the descriptor that was read; and the packet, between two reads.
    ring.descriptor(0, 0x1_0000, u32::MAX, 0, 0);
    ring.views.owner.write(0x1_000c, &frame(1, 60)).unwrap();
    assert_eq!(burst.packet(0).unwrap().head::<60>(), frame(1, 60)[..]);
    ring.views.owner.write(0x1_000c, &frame(2, 60)).unwrap();
    assert_eq!(burst.packet(0).unwrap().head::<60>(), frame(2, 60)[..]);
    assert_eq!(port.rx_return(&mut burst), Ok(1));
    assert_eq!(ring.used_element(0), (0, 0));
    let fault = port.rx_lend(0, &mut burst, 8).unwrap_err();
    assert_eq!((fault.kind, fault.value, ring.used_index()), (FaultKind::Length, 11, 1));
    assert!(burst.is_empty());
}

#[test]
fn behind_an_iommu_it_is_mapped_or_the_burst_ends_for_a_copy() {
    let config = OwnerConfig { ring_size: 64, ..OwnerConfig::default() };
    let Apart { mut owner, mut peer, mut device, .. } = apart(config, Mode::Map, willing());
    let sent = frames(10, 1000);
    send(&mut owner, &sent);
    let mut burst = LentBurst::default();
    assert_eq!(peer.rx_lend_by(&mut device, 0, &mut burst, 64), Ok(10));
    assert!(peer.demand().maps > 0 && peer.demand().fetched == 0);
    assert!(peer.is_in_place(&burst) && read(&burst) == sent);
    // A mapping goes: what was read meanwhile may be zeros.
    device.writer.table_generation += 2;
    device.writer.write(&device.window);
    assert!(!peer.is_in_place(&burst));
    assert_eq!(peer.rx_lend_by(&mut device, 0, &mut burst, 64), Ok(10));
    assert!(peer.is_in_place(&burst) && read(&burst) == sent);
    assert_eq!(peer.rx_return(&mut burst), Ok(10));
    assert_eq!(owner.reap_transmitted(0), Ok(0));

    let Apart { mut owner, mut peer, mut device, layout, .. } = apart(config, Mode::Copy, willing());
    send(&mut owner, &sent);
    // The first packets' pages are in the window, the others are to be copied.
    let buffers = layout.vrings()[1].buffers;
    device.show(buffers, PAGE, Access::READ);
    assert_eq!(device.log.len(), 0);
    let lent = peer.rx_lend_by(&mut device, 0, &mut burst, 64).unwrap();
    assert!((1..10).contains(&lent) && burst.needs_copy());
    assert_eq!(read(&burst), sent[..lent]);
    assert_eq!(peer.rx_return(&mut burst), Ok(lent));
    assert_eq!(peer.rx_lend_by(&mut device, 0, &mut burst, 64), Ok(0));
    assert!(burst.needs_copy());
    let mut copied = PacketBurst::default();
    assert_eq!(peer.rx_burst_by(&mut device, 0, &mut copied, 64), Ok(10 - lent));
    assert!(copied.frames().eq(sent[lent..].iter().map(Vec::as_slice)));
    assert_eq!(peer.rx_lend_by(&mut device, 0, &mut burst, 64), Ok(0));
    assert!(!burst.needs_copy());
    assert_eq!(owner.reap_transmitted(0), Ok(0));

    // Without an answer nothing is lent, and nothing is lost.
    let rule = Box::new(|_: &Request| Outcome::Later);
    let Apart { mut owner, mut peer, mut device, .. } = apart(config, Mode::Map, rule);
    send(&mut owner, &sent);
    assert_eq!(peer.rx_lend_by(&mut device, 0, &mut burst, 64), Ok(0));
    assert!(peer.pause().is_some() && peer.faults().count() == 0);
}
