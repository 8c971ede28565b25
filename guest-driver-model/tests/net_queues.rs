//! The queues of a port are independent of each other: a thread each, and all that passes is
//! whole, in order, and counted by the queue that it passed through.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::mem::{align_of, forget};
use std::thread;

use guest_driver_model::net::{
    Counters, LentBurst, OwnerConfig, OwnerPort, OwnerQueue, PacketBurst, PeerPort, PeerQueue, receive_vring,
    transmit_vring,
};
use net_support::{Done, Joined, frame, join};

/// Each way and pair.
const PACKETS: u64 = 4000;
const BURST: usize = 32;

/// Bytes that name the pair, the number and the length.
fn nth(pair: u16, number: u64) -> Vec<u8> {
    frame(number << 16 | u64::from(pair), 14 + (number * 37 % 700) as usize)
}

/// Sends the pair's frames, and compares each one that comes back.
fn send_and_compare(queue: &mut OwnerQueue, done: &Done) {
    // Only a failure ends the others before they are through.
    let failed = done.at_end();
    let pair = queue.pair();
    let mut burst = PacketBurst::default();
    let (mut sent, mut back) = (0, 0);
    while back < PACKETS && !done.is_raised() {
        let frames: Vec<_> = (sent..PACKETS).take(BURST).map(|number| nth(pair, number)).collect();
        sent += queue.tx_burst(frames.iter().map(Vec::as_slice)).unwrap() as u64;
        burst.clear();
        if queue.rx_burst(&mut burst, BURST).unwrap() == 0 {
            thread::yield_now();
        }
        for packet in burst.frames() {
            assert_eq!(packet, nth(pair, back), "packet {back} of pair {pair}");
            back += 1;
        }
    }
    forget(failed);
}

/// Compares what comes, and sends it back: from a copy of its own, or from the owner's buffers.
fn echo(queue: &mut PeerQueue, in_place: bool, done: &Done) {
    let failed = done.at_end();
    let (mut burst, mut lent) = (PacketBurst::default(), LentBurst::default());
    let mut echoed = 0;
    while echoed < PACKETS && !done.is_raised() {
        let frames: Vec<Vec<u8>> = if in_place {
            queue.rx_lend(&mut lent, BURST).unwrap();
            let read = lent.iter().map(|packet| {
                let mut bytes = vec![0; packet.len()];
                packet.read(0, &mut bytes);
                bytes
            });
            let frames = read.collect();
            queue.rx_return(&mut lent).unwrap();
            frames
        } else {
            burst.clear();
            queue.rx_burst(&mut burst, BURST).unwrap();
            burst.frames().map(<[u8]>::to_vec).collect()
        };
        for packet in &frames {
            assert_eq!(*packet, nth(queue.pair(), echoed), "packet {echoed} of pair {}", queue.pair());
            echoed += 1;
        }
        let mut at = 0;
        while at < frames.len() && !done.is_raised() {
            let now = queue.tx_burst(frames[at..].iter().map(Vec::as_slice)).unwrap();
            at += now;
            if now == 0 {
                thread::yield_now();
            }
        }
    }
    forget(failed);
}

#[test]
fn a_thread_a_queue_moves_all_packets_of_its_pair_in_order() {
    for packed in [false, true] {
        let config = OwnerConfig { pairs: 3, ring_size: 64, packed, ..OwnerConfig::default() };
        let Joined { mut owner, mut peer, .. } = join(config);
        let done = Done::default();
        thread::scope(|scope| {
            for (owner, peer) in owner.queues_mut().iter_mut().zip(peer.queues_mut()) {
                assert_eq!(owner.pair(), peer.pair());
                let done = &done;
                let in_place = peer.pair() == 1;
                scope.spawn(move || send_and_compare(owner, done));
                scope.spawn(move || echo(peer, in_place, done));
            }
        });
        // Each counts what it moved, and the ports the sum.
        let bytes: Vec<u64> =
            (0..3).map(|pair| (0..PACKETS).map(|number| nth(pair, number).len() as u64).sum()).collect();
        let sum: u64 = bytes.iter().sum();
        let counters = |packets, bytes| Counters {
            rx_packets: packets,
            rx_bytes: bytes,
            tx_packets: packets,
            tx_bytes: bytes,
            ..Counters::default()
        };
        assert_eq!((owner.counters(), peer.counters()), (counters(3 * PACKETS, sum), owner.counters()));
        for (pair, bytes) in bytes.into_iter().enumerate() {
            let expected = counters(PACKETS, bytes);
            assert_eq!(owner.queues_mut()[pair].counters(), expected, "pair {pair}");
            assert_eq!(peer.queues_mut()[pair].counters(), expected, "pair {pair}");
        }
    }
}

#[test]
fn queues_can_go_to_other_threads_and_lie_on_cache_lines_of_their_own() {
    fn goes<T: Send + 'static>() {}
    goes::<PeerQueue>();
    goes::<OwnerQueue>();
    // Two lines, as processors fetch them.
    assert!(align_of::<PeerQueue>() >= 128 && align_of::<OwnerQueue>() >= 128);
    let Joined { owner, peer, .. } = join(OwnerConfig { pairs: 2, ..OwnerConfig::default() });
    let pairs = |pairs: [u16; 2]| pairs.to_vec();
    assert_eq!(owner.into_queues().iter().map(OwnerQueue::pair).collect::<Vec<_>>(), pairs([0, 1]));
    assert_eq!(peer.into_queues().iter().map(PeerQueue::pair).collect::<Vec<_>>(), pairs([0, 1]));
}

fn two_pairs() -> (OwnerPort, PeerPort) {
    let Joined { owner, peer, .. } = join(OwnerConfig { pairs: 2, ..OwnerConfig::default() });
    (owner, peer)
}

#[test]
fn a_queue_answers_for_its_own_vrings_only() {
    let (mut owner, mut peer) = two_pairs();
    let packet = frame(1, 60);
    for pair in 0..2 {
        owner.tx_burst(pair, [packet.as_slice()]).unwrap();
        peer.tx_burst(pair, [packet.as_slice()]).unwrap();
        peer.rx_burst(pair, &mut PacketBurst::default(), 8).unwrap();
    }
    let [first, second] = peer.queues_mut() else { unreachable!() };
    for vring in [receive_vring(1), transmit_vring(1)] {
        assert!(second.is_enabled(vring) && !first.is_enabled(vring));
        assert_eq!(first.set_kicks(vring, true), Ok(false));
        assert!(!first.needs_call(vring), "vring {vring} is the second's");
        assert!(second.needs_call(vring), "and its call is still wanted");
    }
    let [first, second] = owner.queues_mut() else { unreachable!() };
    assert!(!first.needs_kick(transmit_vring(1)));
    assert_eq!(first.set_calls(receive_vring(1), true), Ok(false));
    assert!(second.needs_kick(transmit_vring(1)));
    assert_eq!(second.set_calls(receive_vring(1), true), Ok(true));
}

#[test]
fn what_one_queue_has_lent_no_other_takes_back() {
    let (mut owner, mut peer) = two_pairs();
    for pair in 0..2 {
        owner.tx_burst(pair, [frame(1, 60).as_slice(), &frame(2, 60)]).unwrap();
    }
    let [first, second] = peer.queues_mut() else { unreachable!() };
    let (mut of_first, mut of_second) = (LentBurst::default(), LentBurst::default());
    assert_eq!((first.rx_lend(&mut of_first, 8), second.rx_lend(&mut of_second, 1)), (Ok(2), Ok(1)));
    assert!(first.is_in_place(&of_first) && !first.is_in_place(&of_second));
    assert_eq!((first.rx_return(&mut of_second), second.rx_return(&mut of_first)), (Ok(0), Ok(0)));
    assert_eq!((first.rx_return(&mut of_first), second.rx_return(&mut of_second)), (Ok(2), Ok(1)));
    assert_eq!((owner.reap_transmitted(0), owner.reap_transmitted(1)), (Ok(0), Ok(1)));
}

#[test]
fn a_broken_vring_is_the_fault_of_one_queue_and_the_others_go_on() {
    let Joined { views, layout, mut owner, mut peer, .. } =
        join(OwnerConfig { pairs: 2, ..OwnerConfig::default() });
    // More available than there are descriptors, in the first pair's transmit queue.
    let avail = layout.vrings()[1].places.avail;
    views.owner.store_u16_release(avail + 2, 40_000).unwrap();
    owner.tx_burst(1, [frame(1, 60).as_slice()]).unwrap();
    let mut burst = PacketBurst::default();
    let [first, second] = peer.queues_mut() else { unreachable!() };
    let fault = first.rx_burst(&mut burst, 8).unwrap_err();
    assert_eq!(second.rx_burst(&mut burst, 8), Ok(1));
    assert_eq!((first.faults().collect(), second.faults().collect()), (vec![fault], vec![]));
    assert_eq!((peer.faults().collect::<Vec<_>>(), fault.vring), (vec![fault], transmit_vring(0)));
}
