//! Receiving what the owner transmits: by copying it out of the window, and by having the
//! device fetch what the window does not show.
//!
//! Owns: nothing. A packet is whole, or its chain stays with the owner: it is put back and
//! taken again later.

use vhost_pci_device::abi::FaultKind;

use super::Counters;
use super::burst::PacketBurst;
use super::header::{HEADER_LEN, MAX_FRAME, NetHeader};
use super::vring::LiveVring;
use crate::control::{Job, Outcome, Request};
use crate::reach::Reach;
use crate::ring::{Chain, ChainBurst, Direction, Fault, OnMiss, Place, Segment};
use crate::shm::{SharedMemory, ShmError};

/// Receives up to `budget` packets and completes their chains. `chains` is for the time of
/// the call.
#[inline]
pub(super) fn receive(
    live: &mut LiveVring,
    reach: &mut Reach<'_>,
    chains: &mut ChainBurst,
    burst: &mut PacketBurst,
    budget: usize,
    counters: &mut Counters,
) -> Result<usize, Fault> {
    chains.clear();
    if live.ring.miss_policy() != OnMiss::Fault {
        return receive_reaching(live, reach, chains, burst, budget, counters);
    }
    let (ring, headers) = (&mut live.ring, live.kind.headers);
    let popped = ring.pop_burst(budget, Direction::DeviceReads, chains)?;
    chains.prefetch(HEADER_LEN, reach.window);
    let first = burst.len();
    let (mut received, mut bytes, mut broken) = (0, 0, None);
    for chain in chains.iter() {
        match copy_packet(reach.window, &chain, headers, burst) {
            Ok(len) => bytes += len,
            Err(why) => {
                broken = Some(why);
                break;
            }
        }
        ring.push_used(chain.head, 0);
        received += 1;
    }
    // Copied while the mappings may have been going: it may be zeros.
    if !reach.tables.is_unchanged() {
        burst.truncate(first);
        ring.take_back_used();
        ring.put_back(popped);
        return Ok(0);
    }
    ring.flush_used();
    count(counters, received, bytes);
    match broken.map(|(kind, value)| ring.fail(kind, value)) {
        Some(fault) if received == 0 => Err(fault),
        _ => Ok(received),
    }
}

/// What is wrong with a chain that is no packet.
type Broken = (FaultKind, u64);

/// Copies a packet as far as it is in the window. Returns the length of its frame.
/// `headers`: its header has something to say.
#[inline]
fn copy_packet(
    window: &SharedMemory,
    chain: &Chain<'_>,
    headers: bool,
    burst: &mut PacketBurst,
) -> Result<u64, Broken> {
    let len = packet_len(chain).ok_or((FaultKind::Length, chain.len))?;
    // Translation only yields what is in the window.
    let outside = |_| (FaultKind::Unmapped, chain.len);
    if let [Segment { place: Place::Window(offset), .. }] = *chain.segments {
        let header = match headers {
            true => NetHeader::from_bytes(&window.read_array(offset).map_err(outside)?).of_driver(),
            false => NetHeader::default(),
        };
        let frame = len - HEADER_LEN;
        burst.push(header, frame, |room| window.read(offset + HEADER_LEN as u64, room)).map_err(outside)?;
    } else {
        copy_out(window, chain, burst).map_err(outside)?;
        burst.finish(len, NetHeader::default());
        if headers {
            burst.read_header(burst.len() - 1);
        }
    }
    Ok((len - HEADER_LEN) as u64)
}

#[inline]
fn count(counters: &mut Counters, packets: usize, bytes: u64) {
    counters.rx_packets += packets as u64;
    counters.rx_bytes += bytes;
}

/// The same where the owner has an IOMMU.
fn receive_reaching(
    live: &mut LiveVring,
    reach: &mut Reach<'_>,
    chains: &mut ChainBurst,
    burst: &mut PacketBurst,
    budget: usize,
    counters: &mut Counters,
) -> Result<usize, Fault> {
    let popped = reach.pop(live, 1, budget, Direction::DeviceReads, chains)?;
    let first = burst.len();
    // What is in the window comes first: the device may take mappings away when it is
    // asked for the rest.
    let (mut whole, mut broken) = (0, None);
    for chain in chains.iter() {
        if let Err(why) = copy_packet(reach.window, &chain, live.kind.headers, burst) {
            broken = Some(why);
            break;
        }
        // Looked at for each packet: a table that changes all the time costs no more than
        // the packet that was being copied.
        if !reach.tables.is_unchanged() {
            whole += usize::from(reach.tables.is_one_change_later() && reach.tables.hold(&chain));
            break;
        }
        whole += 1;
    }
    if chains.is_outside() && whole > 0 {
        let (fetched, denied) = fetch(live, reach, chains, whole, burst, first);
        if fetched < whole {
            (whole, broken) = (fetched, denied);
        }
        // What was fetched for another link is not this one's.
        if !reach.tables.is_same_link() {
            (whole, broken) = (0, None);
        }
    }
    burst.truncate(first + whole);
    if chains.is_outside() && live.kind.headers {
        // What was fetched may be the header.
        let outside = |chain: &Chain<'_>| chain.segments.iter().any(|segment| segment.place == Place::Owner);
        for (at, _) in chains.iter().take(whole).enumerate().filter(|(_, chain)| outside(chain)) {
            burst.read_header(first + at);
        }
    }
    let ring = &mut live.ring;
    let mut bytes = 0;
    for chain in chains.iter().take(whole) {
        ring.push_used(chain.head, 0);
        bytes += chain.len - HEADER_LEN as u64;
    }
    ring.put_back(popped - whole);
    ring.flush_used();
    count(counters, whole, bytes);
    match broken.map(|(kind, value)| ring.fail(kind, value)) {
        Some(fault) if whole == 0 => Err(fault),
        _ => Ok(whole),
    }
}

/// Has the device fetch what is missing of the first `count` packets, which are in `burst`
/// from `first` on. How many of them are whole now, and whether the next one is not allowed.
fn fetch(
    live: &mut LiveVring,
    reach: &mut Reach<'_>,
    chains: &ChainBurst,
    count: usize,
    burst: &mut PacketBurst,
    first: usize,
) -> (usize, Option<Broken>) {
    let mut whole = count;
    let mut jobs = Vec::new();
    // By job: its packet, and where in there its bytes belong.
    let mut places = Vec::new();
    let asked_lately = live.backoff.left().is_some();
    if !asked_lately {
        reach.exchange.clear();
    }
    'chains: for (at, chain) in chains.iter().take(count).enumerate() {
        let mut filled = 0;
        for segment in chain.segments {
            if segment.place == Place::Owner {
                let room = if asked_lately { None } else { reach.exchange.reserve(segment.len) };
                let Some(data) = room else {
                    whole = at;
                    break 'chains;
                };
                jobs.push(Job::new(Request::Fetch { iova: segment.iova, len: segment.len }, data));
                places.push((at, filled, segment.len as usize));
            }
            filled += segment.len as usize;
        }
    }
    // Those of the packet that did not find room wait with it.
    let used = places.iter().take_while(|(at, ..)| *at < whole).count();
    jobs.truncate(used);
    reach.carry_out(&mut jobs);
    let mut broken = None;
    for (job, (at, from, len)) in jobs.iter().zip(places) {
        let copied = job.outcome == Outcome::Done
            && reach.window.read(job.data, burst.room_of(first + at, from, len)).is_ok();
        if !copied {
            whole = at;
            if let (Outcome::Denied, Request::Fetch { iova, .. }) = (job.outcome, job.request) {
                broken = Some((FaultKind::Unmapped, iova));
            }
            break;
        }
    }
    match whole {
        _ if asked_lately => {}
        0 if broken.is_none() => live.backoff.had_nothing(),
        _ => live.backoff.had_something(),
    }
    (whole, broken)
}

/// Length of header and frame, if the chain can be a packet.
#[inline]
pub(super) fn packet_len(chain: &Chain<'_>) -> Option<usize> {
    let len = usize::try_from(chain.len).ok()?;
    (HEADER_LEN..=HEADER_LEN + MAX_FRAME).contains(&len).then_some(len)
}

/// Copies header and frame out of shared memory, each byte once, as far as they are in the
/// window; leaves room for the rest.
#[inline]
fn copy_out(window: &SharedMemory, chain: &Chain<'_>, burst: &mut PacketBurst) -> Result<(), ShmError> {
    let mut filled = 0;
    for segment in chain.segments {
        let len = segment.len as usize;
        let room = burst.room(filled, len);
        if let Place::Window(offset) = segment.place {
            window.read(offset, room)?;
        }
        filled += len;
    }
    Ok(())
}
