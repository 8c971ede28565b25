//! Packets from one owner to several: each has each once, whole and in order, out of the first one's buffers
//! with one copy; and who has no room goes without, and holds up nobody.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::cell::Cell;
use std::rc::Rc;

use allocation_counter::measure;
use guest_driver_model::control::{Exchange, Nobody, Outcome, Request};
use guest_driver_model::net::forward::End;
use guest_driver_model::net::{
    Copied, LentBurst, NetHeader, OwnerConfig, OwnerPort, Packet, PacketBurst, PeerPort, PeerQueue, Pick,
    copy_lent, receive_lent, send_copies,
};
use net_support::device::{Apart, Mode, PAGE, apart};
use net_support::{IOVA, Joined, LinkWriter, frame, join};
use proptest::collection::vec;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};

/// An owner with its peer's port, with an IOMMU or without.
enum Side {
    Open(Box<Joined>),
    Apart(Box<Apart>),
}

impl Side {
    fn new(config: OwnerConfig, mode: Option<Mode>, to_copy: u64) -> Self {
        let rule = move |request: &Request| match request {
            Request::Map { iova, .. } if (iova / PAGE) % 4 < to_copy => Outcome::Copy,
            _ => Outcome::Done,
        };
        match mode {
            None => Self::Open(Box::new(join(config))),
            Some(mode) => Self::Apart(Box::new(apart(config, mode, Box::new(rule)))),
        }
    }

    fn owner(&mut self) -> &mut OwnerPort {
        match self {
            Self::Open(side) => &mut side.owner,
            Self::Apart(side) => &mut side.owner,
        }
    }

    fn end<'a>(&'a mut self, nobody: &'a mut Nobody) -> End<'a> {
        match self {
            Self::Open(side) => End { queue: first(&mut side.peer), exchange: nobody },
            Self::Apart(side) => End { queue: first(&mut side.peer), exchange: &mut side.device },
        }
    }

    fn take(&mut self) -> Vec<Vec<u8>> {
        let mut burst = PacketBurst::default();
        while self.owner().rx_burst(0, &mut burst, 64).unwrap() > 0 {}
        burst.frames().map(<[u8]>::to_vec).collect()
    }
}

fn first(port: &mut PeerPort) -> &mut PeerQueue {
    port.queue(0).unwrap()
}

#[derive(Default)]
struct Burst {
    lent: LentBurst,
    private: PacketBurst,
    pieces: PacketBurst,
    picks: Vec<Pick>,
}

impl Burst {
    /// What a bridge does with a burst that all others are to have.
    fn pass(&mut self, from: &mut Side, to: &mut [Side], headers: bool) -> Vec<Copied> {
        let (mut nobody, mut other) = (Nobody, Nobody);
        let end = from.end(&mut nobody);
        let lent = end.queue.rx_lend_by(end.exchange, &mut self.lent, 64).unwrap();
        self.private.clear();
        let mut is_private = lent == 0 && self.lent.needs_copy();
        if is_private {
            end.queue.rx_burst_by(end.exchange, &mut self.private, 64).unwrap();
        }
        self.picks.clear();
        let pick = |(at, header)| Pick { at, header: if headers { header } else { NetHeader::default() } };
        match is_private {
            true => self.picks.extend(self.private.iter().map(|packet| packet.header).enumerate().map(pick)),
            false => self.picks.extend(self.lent.iter().map(|packet| packet.header()).enumerate().map(pick)),
        }
        let mut all = Vec::with_capacity(0);
        for side in to {
            let mut copied = Copied::default();
            let end = from.end(&mut nobody);
            if !is_private {
                copied = copy_lent(&self.lent, &self.picks, end.queue, side.end(&mut other)).unwrap();
                if copied.done < self.picks.len() {
                    receive_lent(&mut self.private, end, self.picks.len()).unwrap();
                    is_private = true;
                }
            }
            if copied.done < self.picks.len() {
                let left = &self.picks[copied.done..];
                let sent = send_copies(&self.private, left, side.end(&mut other), &mut self.pieces).unwrap();
                copied.packets += sent.packets;
                copied.full += sent.full;
                copied.refused += sent.refused;
            }
            copied.done = self.picks.len();
            if headers {
                all.push(copied);
            }
        }
        if !is_private {
            let end = from.end(&mut nobody);
            end.queue.rx_return(&mut self.lent).unwrap();
        }
        all
    }
}

fn mode() -> impl Strategy<Value = Option<Mode>> {
    prop_oneof![Just(None), Just(Some(Mode::Copy)), Just(Some(Mode::Map))]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn each_owner_has_each_packet_once_whole_and_in_order(
        modes in (mode(), mode(), mode()),
        buffers in (prop_oneof![Just(128_u32), Just(2048)], prop_oneof![Just(128_u32), Just(2048)]),
        packed in (any::<bool>(), any::<bool>(), any::<bool>()),
        indirect in any::<bool>(),
        to_copy in 0_u64..4,
        rounds in vec(vec(14_usize..1600, 0..8), 1..30),
    ) {
        let config = |packed, buffer_len| OwnerConfig { ring_size: 256, packed, buffer_len, indirect, ..OwnerConfig::default() };
        let mut from = Side::new(config(packed.0, 2048), modes.0, to_copy);
        let mut to = [
            Side::new(config(packed.1, buffers.0), modes.1, to_copy),
            Side::new(config(packed.2, buffers.1), modes.2, to_copy),
        ];
        let (mut burst, mut seed) = (Burst::default(), 0);
        for lens in rounds {
            let frames: Vec<_> = lens.iter().map(|len| { seed += 1; frame(seed, *len) }).collect();
            let mut sent = 0;
            let mut came = [Vec::new(), Vec::new()];
            for _ in 0..20 {
                sent += from.owner().tx_burst(0, frames.iter().skip(sent).map(Vec::as_slice)).unwrap();
                for copied in burst.pass(&mut from, &mut to, true) {
                    assert_eq!((copied.full, copied.refused, copied.gone), (0, 0, 0));
                }
                for (side, came) in to.iter_mut().zip(&mut came) {
                    came.extend(side.take());
                }
                if came.iter().all(|came| came.len() >= frames.len()) {
                    break;
                }
            }
            assert_eq!(&came[0], &frames);
            assert_eq!(&came[1], &frames);
            from.owner().reap_transmitted(0).unwrap();
        }
    }
}

/// The one without room goes without, and is told of; the other has all.
#[test]
fn an_owner_without_room_holds_up_nobody() {
    let config = OwnerConfig { ring_size: 256, ..OwnerConfig::default() };
    let mut from = Side::new(config, None, 0);
    let small = OwnerConfig { ring_size: 16, ..config };
    let mut to = [Side::new(small, None, 0), Side::new(config, None, 0)];
    let mut burst = Burst::default();
    let frames: Vec<_> = (0..50).map(|seed| frame(seed, 60)).collect();
    assert_eq!(from.owner().tx_burst(0, frames.iter().map(Vec::as_slice)), Ok(50));
    let copied = burst.pass(&mut from, &mut to, true);
    assert_eq!((copied[0].packets, copied[0].full), (16, 34));
    assert_eq!((copied[1].packets, copied[1].full, copied[1].bytes), (50, 0, 50 * 60));
    assert_eq!(to[0].take(), frames[..16]);
    assert_eq!(to[1].take(), frames);
    assert_eq!(from.owner().reap_transmitted(0), Ok(0));
    // And it goes on when there is room.
    assert_eq!(from.owner().tx_burst(0, [frames[49].as_slice()]), Ok(1));
    burst.pass(&mut from, &mut to, true);
    assert_eq!(to[0].take(), frames[49..]);
}

/// What one accepts another one does not: each gets it as it can take it.
#[test]
fn each_owner_gets_a_packet_as_its_driver_accepts_it() {
    let config = OwnerConfig { ring_size: 256, offloads: true, ..OwnerConfig::default() };
    let plain = OwnerConfig { offloads: false, ..config };
    for order in [[config, plain], [plain, config]] {
        let mut from = Side::new(config, None, 0);
        let mut to = order.map(|config| Side::new(config, None, 0));
        let mut burst = Burst::default();
        let header = NetHeader { flags: 1, csum_start: 34, csum_offset: 16, ..NetHeader::default() };
        let bytes = frame(1, 80);
        let packets = [(NetHeader::default(), 60), (header, 80), (NetHeader::default(), 70)];
        let packets = packets.map(|(header, len)| Packet { header, frame: &bytes[..len] });
        assert_eq!(from.owner().tx_burst(0, packets), Ok(3));
        let copied = burst.pass(&mut from, &mut to, true);
        for (side, (config, copied)) in to.iter_mut().zip(order.iter().zip(copied)) {
            let mut received = PacketBurst::default();
            assert_eq!(side.owner().rx_burst(0, &mut received, 64), Ok(3));
            assert_eq!((copied.packets, copied.refused), (3, 0));
            let checked = received.packet(1).unwrap();
            assert_eq!(checked.header.flags, u8::from(config.offloads));
            assert_eq!(checked.frame[..50], bytes[..50]);
            assert_eq!(checked.frame[50..52] == bytes[50..52], config.offloads);
            assert_eq!(received.packet(2).unwrap().frame, &bytes[..70]);
        }
        assert_eq!(from.owner().reap_transmitted(0), Ok(0));
    }
}

/// What an owner says of a packet and cannot be true costs it the packet.
#[test]
fn a_header_that_cannot_be_the_packets_is_refused_and_the_others_go_on() {
    let config = OwnerConfig { offloads: true, ..OwnerConfig::default() };
    let Joined { mut owner, mut peer, .. } = join(config);
    let mut to = Side::new(config, None, 0);
    let frames: Vec<_> = (0..3).map(|seed| frame(seed, 80)).collect();
    assert_eq!(owner.tx_burst(0, frames.iter().map(Vec::as_slice)), Ok(3));
    let mut lent = LentBurst::default();
    assert_eq!(first(&mut peer).rx_lend(&mut lent, 8), Ok(3));
    let bad = NetHeader { flags: 1, csum_start: 79, csum_offset: 16, ..NetHeader::default() };
    let picks = [NetHeader::default(), bad, NetHeader::default()];
    let picks: Vec<_> = picks.into_iter().enumerate().map(|(at, header)| Pick { at, header }).collect();
    let copied = copy_lent(&lent, &picks, first(&mut peer), to.end(&mut Nobody)).unwrap();
    assert_eq!((copied.done, copied.packets, copied.refused), (3, 2, 1));
    assert_eq!(to.take(), [frames[0].clone(), frames[2].clone()]);
}

/// The owner's link changes between the loan and the copies: nobody gets what may be somebody else's by now.
#[test]
fn what_was_lent_by_a_link_that_is_gone_is_not_copied() {
    let config = OwnerConfig::default();
    let Joined { views, layout, mut owner, mut peer, .. } = join(config);
    let Joined { owner: mut sink, peer: mut other, .. } = join(config);
    let mut lent = LentBurst::default();
    assert_eq!(owner.tx_burst(0, [frame(1, 60).as_slice()]), Ok(1));
    assert_eq!(first(&mut peer).rx_lend(&mut lent, 8), Ok(1));
    let link = LinkWriter::new(config.features(), vec![views.mapping()], layout.infos(IOVA));
    LinkWriter { generation: 4, table_generation: 4, ..link }.write(&views.window);
    let picks = [Pick { at: 0, header: NetHeader::default() }];
    let mut nobody = Nobody;
    let to = End { queue: first(&mut other), exchange: &mut nobody };
    let copied = copy_lent(&lent, &picks, first(&mut peer), to).unwrap();
    assert_eq!(copied, Copied { done: 1, gone: 1, ..Copied::default() });
    assert_eq!(sink.rx_burst(0, &mut PacketBurst::default(), 8), Ok(0));
    // Its next packet goes into the buffers that were popped for this one.
    assert_eq!(other.tx_burst(0, [frame(2, 60).as_slice()]), Ok(1));
    let mut burst = PacketBurst::default();
    assert_eq!(sink.rx_burst(0, &mut burst, 8), Ok(1));
    assert_eq!(burst.packet(0).unwrap().frame, frame(2, 60));
}

/// Mappings of an owner with an IOMMU come and go all the time: then its packets go by private memory, once.
#[test]
fn a_mapping_that_goes_while_packets_are_copied_costs_none() {
    let config = OwnerConfig { ring_size: 64, ..OwnerConfig::default() };
    let frames: Vec<_> = (0..4).map(|seed| frame(seed, 300)).collect();
    let mut from = apart(config, Mode::Map, Box::new(|_| Outcome::Done));
    let mut sides = [Side::new(config, None, 0), Side::new(config, None, 0)];
    let (mut lent, mut private, mut pieces) = Default::default();
    from.owner.tx_burst(0, frames.iter().map(Vec::as_slice)).unwrap();
    let lend = |from: &mut Apart, lent: &mut LentBurst| {
        from.peer.queue(0).unwrap().rx_lend_by(&mut from.device, lent, 8).unwrap()
    };
    assert_eq!(lend(&mut from, &mut lent), 4);
    let picks: Vec<_> = (0..4).map(|at| Pick { at, header: NetHeader::default() }).collect();
    let (mut one, mut two) = (Nobody, Nobody);
    let [first_side, second_side] = &mut sides;
    let copied = copy_lent(&lent, &picks, first(&mut from.peer), first_side.end(&mut one)).unwrap();
    assert_eq!((copied.done, copied.packets), (4, 4));
    from.device.write_table();
    let copied = copy_lent(&lent, &picks, first(&mut from.peer), second_side.end(&mut two)).unwrap();
    assert_eq!(copied, Copied::default(), "nobody can tell whether it was there");
    let queue = from.peer.queue(0).unwrap();
    assert_eq!(queue.rx_burst_by(&mut from.device as &mut dyn Exchange, &mut private, 4), Ok(4));
    let copied = send_copies(&private, &picks, second_side.end(&mut two), &mut pieces).unwrap();
    assert_eq!((copied.done, copied.packets), (4, 4));
    assert_eq!((first_side.take(), second_side.take()), (frames.clone(), frames));
    assert_eq!(from.owner.reap_transmitted(0), Ok(0));
}

/// What is received for one owner after another one has it in place comes in pieces: it is all received, and nothing of
/// it comes again.
#[test]
fn packets_that_are_received_in_pieces_go_to_each_owner_once() {
    let config = OwnerConfig { ring_size: 64, ..OwnerConfig::default() };
    let frames: Vec<_> = (0..10).map(|seed| frame(seed, 300)).collect();
    let (is_shown, mut fetched) = (Rc::new(Cell::new(true)), 0);
    let shown = is_shown.clone();
    let mut from = apart(
        config,
        Mode::Map,
        Box::new(move |request| match request {
            Request::Map { .. } if shown.get() => Outcome::Done,
            Request::Map { .. } => Outcome::Copy,
            // One in five is not answered in time.
            _ => {
                fetched += 1;
                if fetched % 5 == 0 { Outcome::Later } else { Outcome::Done }
            }
        }),
    );
    let rings: Vec<_> = from.device.table.keys().copied().collect();
    let [mut one, mut two] = [Side::new(config, None, 0), Side::new(config, None, 0)];
    let (mut lent, mut private, mut pieces) = Default::default();
    from.owner.tx_burst(0, frames.iter().map(Vec::as_slice)).unwrap();
    assert_eq!(first(&mut from.peer).rx_lend_by(&mut from.device, &mut lent, 64), Ok(10));
    let picks: Vec<_> = (0..10).map(|at| Pick { at, header: NetHeader::default() }).collect();
    let copied = copy_lent(&lent, &picks, first(&mut from.peer), one.end(&mut Nobody)).unwrap();
    assert_eq!((copied.done, copied.packets), (10, 10));
    // Its buffers can be copied only from now on.
    is_shown.set(false);
    from.device.hide_all_but(|page| rings.contains(&page));
    let copied = copy_lent(&lent, &picks, first(&mut from.peer), two.end(&mut Nobody)).unwrap();
    assert_eq!(copied, Copied::default());
    let end = End { queue: first(&mut from.peer), exchange: &mut from.device };
    assert_eq!(receive_lent(&mut private, end, 10), Ok(10));
    let copied = send_copies(&private, &picks, two.end(&mut Nobody), &mut pieces).unwrap();
    assert_eq!((copied.done, copied.packets), (10, 10));
    assert_eq!((one.take(), two.take()), (frames.clone(), frames));
    assert_eq!(from.owner.reap_transmitted(0), Ok(0));
    assert_eq!(first(&mut from.peer).rx_lend_by(&mut from.device, &mut lent, 64), Ok(0));
}

#[test]
fn nothing_is_allocated_for_packets_that_go_to_two_others() {
    for (packed, buffer_len) in [(false, 2048), (true, 2048), (false, 256)] {
        let config = OwnerConfig { packed, buffer_len, ..OwnerConfig::default() };
        let mut from = Side::new(config, None, 0);
        let mut to = [Side::new(config, None, 0), Side::new(config, None, 0)];
        let (mut burst, mut received) = (Burst::default(), PacketBurst::with_capacity(32, 2048));
        let frames = [[7_u8; 1514]; 32];
        let frames: [&[u8]; 32] = std::array::from_fn(|at| &frames[at][..64 + at * 46]);
        let mut pass = |bursts: usize| {
            for _ in 0..bursts {
                let sent = from.owner().tx_burst(0, frames).unwrap();
                burst.pass(&mut from, &mut to, false);
                for side in &mut to {
                    let mut came = 0;
                    while came < sent {
                        received.clear();
                        came += side.owner().rx_burst(0, &mut received, 32).unwrap();
                    }
                }
            }
        };
        pass(100);
        let allocated = measure(|| pass(3000));
        assert_eq!((allocated.count_total, allocated.bytes_total), (0, 0));
    }
}
