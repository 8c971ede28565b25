//! Packets from one owner to another with one copy: out of the buffers that owner A transmitted,
//! straight into the buffers that owner B posted.
//!
//! Owns: what one direction holds between two bursts. A burst is all or nothing: nothing of it
//! is completed, on either side, before every byte is known to have been there to be read and to be
//! written. What B has no room for stays with A, so that nothing is lost and the order is kept.
//!
//! Where either owner has an IOMMU behind which a buffer can be copied only, or a mapping goes while
//! packets are copied, the burst is received into private memory and transmitted from there: two
//! copies, and counted as two.
//!
//! The header before a packet is made anew. What A's left to its receiver is left to B, if both
//! owners' drivers accepted that. If B's did not, the burst is received into private memory, too,
//! and there the checksum is completed, or the packet cut: one at a time, since A says into how many
//! pieces. The bytes of frames are moved, and not looked at otherwise.

use vhost_pci_device::abi::FaultKind;

mod copies;

pub use copies::{Copied, Pick, copy_lent, receive_lent, send_copies};

use super::Counters;
use super::burst::PacketBurst;
use super::header::{HEADER_LEN, NetHeader};
use super::offload::Judged;
use super::peer::{MAX_BURST, PeerQueue};
use super::receive::packet_len;
use super::segment::{cut, is_long};
use super::transmit::Transmitter;
use super::vring::LiveVring;
use crate::control::{Exchange, Nobody};
use crate::reach::Reach;
use crate::ring::{Chain, ChainBurst, Direction, Fault, OnMiss, Place, Segment};
use crate::shm::{SharedMemory, ShmError};

/// What a burst came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forwarded {
    /// Packets taken from A: forwarded, or dropped, or held in the lane.
    pub taken: usize,
    /// Their bytes, without headers.
    pub taken_bytes: u64,
    /// Packets that B has.
    pub packets: usize,
    /// Their bytes, without headers.
    pub bytes: u64,
    /// Packets that no buffer of B could ever take, or whose header cannot be their own.
    pub dropped: usize,
    /// Bytes of frames that were copied, each time that they were.
    pub copied_bytes: u64,
}

impl Forwarded {
    /// Whether anything moved.
    pub fn is_nothing(&self) -> bool {
        self.taken + self.packets + self.dropped == 0
    }
}

/// Whose vring is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForwardFault {
    /// The owner's that transmits.
    #[error("the transmitting owner's {0}")]
    From(Fault),
    /// The owner's that receives.
    #[error("the receiving owner's {0}")]
    To(Fault),
}

/// What one direction needs from one burst to the next.
#[derive(Clone, Debug)]
pub struct Lane {
    /// Chains of A, for the time of a burst.
    chains: ChainBurst,
    /// What was taken in private, and how many of them are done with.
    held: PacketBurst,
    sent: usize,
    /// The next one, if it is cut, and how many of its pieces are done with.
    pieces: PacketBurst,
    sent_pieces: usize,
    /// The last burst ended for want of B's buffers, or of B's queue.
    blocked: bool,
}

impl Default for Lane {
    fn default() -> Self {
        Self {
            chains: ChainBurst::with_capacity(MAX_BURST),
            held: PacketBurst::default(),
            sent: 0,
            pieces: PacketBurst::default(),
            sent_pieces: 0,
            blocked: false,
        }
    }
}

impl Lane {
    /// Packets that were taken from A and that B does not have yet, or not all of: 0 unless an IOMMU
    /// demands copies, or B accepts less than A.
    pub fn held(&self) -> usize {
        self.held.len().saturating_sub(self.sent)
    }

    /// Whether the last burst ended because B has no room, or no vring that can be used: until it
    /// posts buffers, or its link changes, nothing moves, whatever A transmits.
    pub fn waits_for_room(&self) -> bool {
        self.blocked
    }

    /// Drops what is held. Returns how many packets that was.
    pub fn clear(&mut self) -> usize {
        let held = self.held();
        self.held.clear();
        self.pieces.clear();
        (self.sent, self.sent_pieces) = (0, 0);
        self.blocked = false;
        held
    }
}

/// A queue, with whom it asks for what the window does not show.
pub struct End<'a> {
    /// The queue.
    pub queue: &'a mut PeerQueue,
    /// Its device.
    pub exchange: &'a mut dyn Exchange,
}

/// What a burst takes from: the owner's transmit queue.
pub(super) struct Origin<'a> {
    pub(super) live: &'a mut LiveVring,
    pub(super) reach: Reach<'a>,
    /// For the time of the burst.
    pub(super) chains: &'a mut ChainBurst,
    pub(super) counters: &'a mut Counters,
}

/// Where it goes: the owner's receive queue.
pub(super) struct Destination<'a> {
    pub(super) live: &'a mut LiveVring,
    pub(super) transmitter: &'a mut Transmitter,
    pub(super) reach: Reach<'a>,
    pub(super) counters: &'a mut Counters,
}

/// As [`forward_burst_by`], where no device can be asked: enough for owners without an IOMMU.
///
/// # Errors
/// As there.
#[inline]
pub fn forward_burst(
    from: &mut PeerQueue,
    to: &mut PeerQueue,
    lane: &mut Lane,
    budget: usize,
) -> Result<Forwarded, ForwardFault> {
    let (mut nobody, mut no_other) = (Nobody, Nobody);
    let from = End { queue: from, exchange: &mut nobody };
    let to = End { queue: to, exchange: &mut no_other };
    forward_burst_by(lane, from, to, budget)
}

/// Forwards up to `budget` (and [`MAX_BURST`]) packets that one owner transmitted to another owner.
/// Nothing where either vring is not enabled, or its link has changed. `lane` belongs to this
/// direction of these two queues.
///
/// Both owners may want a call afterwards: see [`PeerQueue::needs_call`].
///
/// # Errors
/// Whose vring is broken; the packets stay where they are.
#[inline]
pub fn forward_burst_by(
    lane: &mut Lane,
    mut from: End<'_>,
    mut to: End<'_>,
    budget: usize,
) -> Result<Forwarded, ForwardFault> {
    if lane.held() == 0 {
        let nothing = Ok(Forwarded::default());
        // Where there is nothing to take, nobody waits for room.
        lane.blocked = false;
        let Some(source) = from.queue.source(from.exchange).map_err(ForwardFault::From)? else {
            return nothing;
        };
        // Where nothing can be put, what A transmits is not waited for: it would be found again at once.
        lane.blocked = true;
        let Some(target) = to.queue.target(to.exchange).map_err(ForwardFault::To)? else {
            return nothing;
        };
        if let Some(forwarded) = in_place(lane, source, target, budget.min(MAX_BURST))? {
            return Ok(forwarded);
        }
    }
    in_private(lane, &mut from, &mut to, budget)
}

/// By way of private memory.
#[cold]
fn in_private(
    lane: &mut Lane,
    from: &mut End<'_>,
    to: &mut End<'_>,
    budget: usize,
) -> Result<Forwarded, ForwardFault> {
    let mut forwarded = Forwarded::default();
    if lane.held() == 0 {
        lane.clear();
        let received = from.queue.rx_burst_by(from.exchange, &mut lane.held, budget);
        forwarded.taken = received.map_err(ForwardFault::From)?;
        forwarded.taken_bytes = lane.held.frames().map(|frame| frame.len() as u64).sum();
        forwarded.copied_bytes = forwarded.taken_bytes;
    }
    if lane.held() > 0 {
        let before = to.queue.counters();
        let sent = send_held(lane, to, &mut forwarded);
        let after = to.queue.counters();
        forwarded.packets = (after.tx_packets - before.tx_packets) as usize;
        forwarded.bytes = after.tx_bytes - before.tx_bytes;
        forwarded.dropped = (after.tx_drops - before.tx_drops) as usize;
        forwarded.copied_bytes += forwarded.bytes;
        match sent {
            // What was done is told of first; the fault shows again with the next burst.
            Err(fault) if forwarded.is_nothing() => return Err(ForwardFault::To(fault)),
            _ => {}
        }
    }
    lane.blocked = lane.held() > 0;
    Ok(forwarded)
}

/// Transmits what is held until B has no room: what goes as it is in one go, and each other packet in
/// its pieces.
fn send_held(lane: &mut Lane, to: &mut End<'_>, forwarded: &mut Forwarded) -> Result<(), Fault> {
    let offloads = to.queue.offloads();
    while let Some(next) = lane.held.packet(lane.sent) {
        if lane.pieces.is_empty() && is_long(&next, offloads) {
            cut(next, &mut lane.pieces);
            lane.sent_pieces = 0;
            forwarded.copied_bytes += lane.pieces.frames().map(|frame| frame.len() as u64).sum::<u64>();
        }
        if !lane.pieces.is_empty() {
            let left = lane.pieces.iter().skip(lane.sent_pieces);
            lane.sent_pieces += to.queue.tx_burst_by(to.exchange, left)?;
            if lane.sent_pieces < lane.pieces.len() {
                return Ok(());
            }
            lane.pieces.clear();
            lane.sent += 1;
            continue;
        }
        // The next one, if it cannot be cut, is refused like all else that B does not accept.
        let left = lane.held.iter().skip(lane.sent + 1);
        let count = 1 + left.take_while(|packet| !is_long(packet, offloads)).count();
        let done = to.queue.tx_burst_by(to.exchange, lane.held.iter().skip(lane.sent).take(count))?;
        lane.sent += done;
        if done < count {
            return Ok(());
        }
    }
    Ok(())
}

/// Whose vring broke in a burst.
enum Side {
    From,
    To,
}

/// From window to window. `None` if that cannot be, and nothing was done.
#[inline]
fn in_place(
    lane: &mut Lane,
    mut from: Origin<'_>,
    mut to: Destination<'_>,
    budget: usize,
) -> Result<Option<Forwarded>, ForwardFault> {
    let nothing = Ok(Some(Forwarded::default()));
    // B's room first: as long as it has none, A's chains are not looked at.
    let room = to.room(budget).map_err(ForwardFault::To)?;
    lane.blocked = room == 0;
    if room == 0 {
        return nothing;
    }
    if to.transmitter.posted.is_outside() {
        return Ok(None);
    }
    let chains = &mut lane.chains;
    let popped = from.pop(chains, room.min(budget)).map_err(ForwardFault::From)?;
    if popped == 0 {
        return nothing;
    }
    if chains.is_outside() {
        from.live.ring.put_back(popped);
        return Ok(None);
    }
    // What is copied, and where to, is with the owners' processors: all lines are on their way before
    // the first is waited for.
    chains.prefetch(HEADER_LEN, from.reach.window);
    to.prefetch(popped);
    let mut done = Forwarded::default();
    let (mut pushed, mut broken, mut is_other) = (0, None, false);
    for chain in chains.iter() {
        let Some(len) = packet_len(&chain) else {
            broken = Some(Side::From);
            break;
        };
        let mut header = NetHeader::default();
        if from.live.kind.headers {
            match from.header(&chain).map(|header| to.judge(header, len)) {
                Some(Judged::Pass(judged)) => header = judged,
                Some(Judged::Complete(_) | Judged::Cut) => {
                    is_other = true;
                    break;
                }
                Some(Judged::Invalid) => {
                    done.dropped += 1;
                    done.taken += 1;
                    continue;
                }
                // All is in the window, or the chain would not have been popped.
                None => {
                    broken = Some(Side::From);
                    break;
                }
            }
        }
        match to.place(from.reach.window, &chain, len, header) {
            Ok(Placed::In(buffers)) => {
                pushed += buffers;
                done.packets += 1;
                done.bytes += (len - HEADER_LEN) as u64;
            }
            Ok(Placed::Never) => done.dropped += 1,
            Ok(Placed::NotYet) => {
                lane.blocked = true;
                break;
            }
            // Its ring is dead by now.
            Err(_) => {
                broken = Some(Side::To);
                break;
            }
        }
        done.taken += 1;
    }
    // Copied while mappings of either may have been going.
    if !from.reach.tables.is_unchanged() || !to.reach.tables.is_unchanged() {
        from.live.ring.put_back(popped);
        to.take_back(pushed);
        // Of owners without an IOMMU: a link has changed.
        return if from.is_static() && to.is_static() { nothing } else { Ok(None) };
    }
    done.copied_bytes = done.bytes;
    to.complete(&done);
    done.taken_bytes = from.complete(chains, popped, done.taken);
    match broken {
        // The packets before it come first; the fault shows again with the next burst.
        _ if done.taken > 0 => Ok(Some(done)),
        Some(Side::From) => {
            let len = chains.chain(0).map_or(0, |chain| chain.len);
            Err(ForwardFault::From(from.live.ring.fail(FaultKind::Length, len)))
        }
        Some(Side::To) => to.live.ring.fault().map_or(nothing, |fault| Err(ForwardFault::To(fault))),
        // It is to be another packet for B.
        None if is_other => Ok(None),
        // More of B's buffers are needed than are in the window, or than are popped at once.
        None if lane.blocked && to.has_more() => Ok(None),
        None => nothing,
    }
}

impl Origin<'_> {
    fn is_static(&self) -> bool {
        self.live.ring.miss_policy() == OnMiss::Fault
    }

    #[inline]
    fn pop(&mut self, chains: &mut ChainBurst, budget: usize) -> Result<usize, Fault> {
        chains.clear();
        match self.is_static() {
            true => self.live.ring.pop_burst(budget, Direction::DeviceReads, chains),
            false => self.reach.pop(self.live, 1, budget, Direction::DeviceReads, chains),
        }
    }

    /// The header that the owner wrote before a packet. One look: the owner can change it.
    #[inline]
    fn header(&self, chain: &Chain<'_>) -> Option<NetHeader> {
        let mut bytes = [0; HEADER_LEN];
        let mut room = bytes.as_mut_slice();
        for segment in chain.segments {
            let (now, later) = room.split_at_mut(room.len().min(segment.len as usize));
            let Place::Window(from) = segment.place else { return None };
            self.reach.window.read(from, now).ok()?;
            room = later;
            if room.is_empty() {
                break;
            }
        }
        Some(NetHeader::from_bytes(&bytes).of_driver())
    }

    /// Gives the first `taken` of the popped chains back to the owner, as done with. Returns the bytes
    /// of their frames.
    #[inline]
    fn complete(&mut self, chains: &ChainBurst, popped: usize, taken: usize) -> u64 {
        let ring = &mut self.live.ring;
        let mut bytes = 0;
        for chain in chains.iter().take(taken) {
            ring.push_used(chain.head, 0);
            bytes += chain.len - HEADER_LEN as u64;
        }
        ring.flush_used();
        ring.put_back(popped - taken);
        self.counters.rx_packets += taken as u64;
        self.counters.rx_bytes += bytes;
        bytes
    }
}

/// What became of a packet.
enum Placed {
    /// It is in so many buffers of B.
    In(usize),
    /// It would not fit if all of B's buffers were free.
    Never,
    /// Not enough buffers are posted, or popped.
    NotYet,
}

/// The header before a packet that takes so many buffers (5.1.6.4.1).
#[inline]
fn header_of(header: NetHeader, buffers: u16) -> [u8; HEADER_LEN] {
    // The first is known when this is compiled.
    match header.is_plain() {
        true => NetHeader { num_buffers: buffers, ..NetHeader::default() }.to_bytes(),
        false => NetHeader { num_buffers: buffers, ..header }.to_bytes(),
    }
}

impl Destination<'_> {
    fn is_static(&self) -> bool {
        self.live.ring.miss_policy() == OnMiss::Fault
    }

    /// Buffers that are popped, and not used yet: up to `wanted`, or more.
    #[inline]
    fn room(&mut self, wanted: usize) -> Result<usize, Fault> {
        // A dead ring takes nothing more, even where good chains were popped ahead.
        if let Some(fault) = self.live.ring.fault() {
            return Err(fault);
        }
        let left = self.transmitter.posted.len() - self.transmitter.cursor;
        if left < wanted {
            match self.is_static() {
                true => drop(self.transmitter.capacity(&mut self.live.ring, wanted - 1)?),
                false => drop(self.transmitter.pop_more(self.live, &mut self.reach, left)?),
            }
        }
        Ok(self.transmitter.posted.len() - self.transmitter.cursor)
    }

    /// Asks the processor for the headers and the first lines of the next buffers.
    #[inline]
    fn prefetch(&self, count: usize) {
        let Transmitter { posted, cursor, .. } = &*self.transmitter;
        // Without a look at how long each is, as in `prefetch_write`: there are many at once.
        for chain in posted.iter().skip(*cursor).take(count) {
            if let Some(Segment { place: Place::Window(offset), .. }) = chain.segments.first() {
                self.reach.window.prefetch_write(*offset);
                self.reach.window.prefetch_write(offset + HEADER_LEN as u64);
            }
        }
    }

    /// Whether the owner has posted buffers that are not popped.
    fn has_more(&mut self) -> bool {
        !self.is_static() && self.live.ring.poll_avail().is_ok_and(|more| more > 0)
    }

    /// What is to become of a packet, `len` bytes with its header, which is this.
    fn judge(&self, header: NetHeader, len: usize) -> Judged {
        self.transmitter.offloads.judge(header, len - HEADER_LEN)
    }

    /// Copies a packet of A, `len` bytes with its header, into the next buffers, and pushes them. Its
    /// header is to be this, but for the number of buffers.
    #[inline]
    fn place(
        &mut self,
        window: &SharedMemory,
        packet: &Chain<'_>,
        len: usize,
        header: NetHeader,
    ) -> Result<Placed, Fault> {
        let Self { live, transmitter, reach, .. } = self;
        let buffer = transmitter.posted.chain(transmitter.cursor);
        if let [Segment { place: Place::Window(from), .. }] = packet.segments
            && let Some(Chain {
                head, segments: [Segment { place: Place::Window(to), len: room, .. }], ..
            }) = buffer
            && *room as usize >= len
        {
            let (skip, frame) = (HEADER_LEN as u64, (len - HEADER_LEN) as u64);
            let copied = reach
                .window
                .write_array(*to, &header_of(header, 1))
                .and_then(|()| window.copy_to(from + skip, reach.window, to + skip, frame));
            copied.map_err(|_| live.ring.fail(FaultKind::Unmapped, *to))?;
            live.ring.push_used(head, len as u32);
            transmitter.cursor += 1;
            return Ok(Placed::In(1));
        }
        self.place_in_pieces(window, packet, len, header)
    }

    fn place_in_pieces(
        &mut self,
        window: &SharedMemory,
        packet: &Chain<'_>,
        len: usize,
        header: NetHeader,
    ) -> Result<Placed, Fault> {
        let is_static = self.is_static();
        let Self { live, transmitter, reach, .. } = self;
        let (mut room, mut taken) = (0, 0);
        while taken == 0 || (transmitter.mergeable && room < len as u64) {
            let capacity = match is_static {
                true => transmitter.capacity(&mut live.ring, taken)?,
                // The device may take mappings away when it is asked for more.
                false => transmitter.posted.chain(transmitter.cursor + taken).map(|chain| chain.len),
            };
            let Some(capacity) = capacity else {
                let all_posted = taken >= usize::from(live.ring.size());
                return Ok(if all_posted { Placed::Never } else { Placed::NotYet });
            };
            if capacity < HEADER_LEN as u64 {
                return Err(live.ring.fail(FaultKind::Length, capacity));
            }
            room += capacity;
            taken += 1;
        }
        if room < len as u64 {
            return Ok(Placed::Never);
        }
        // `taken` is at most the ring's size.
        let header = header_of(header, taken as u16);
        let mut source =
            Source { header: &header, window, segments: packet.segments, skip: HEADER_LEN as u64 };
        for _ in 0..taken {
            let Some(chain) = transmitter.posted.chain(transmitter.cursor) else { break };
            let mut written = 0;
            for segment in chain.segments {
                // All is in the window, or the burst would be received and transmitted.
                let Place::Window(to) = segment.place else { break };
                written += source
                    .fill(reach.window, to, segment.len)
                    .map_err(|_| live.ring.fail(FaultKind::Unmapped, segment.iova))?;
            }
            live.ring.push_used(chain.head, written);
            transmitter.cursor += 1;
        }
        Ok(Placed::In(taken))
    }

    /// Puts everything back that was popped, `pushed` chains too, which nobody was shown.
    #[cold]
    fn take_back(&mut self, pushed: usize) {
        self.live.ring.take_back_used();
        self.live.ring.put_back(pushed);
        self.transmitter.put_back(&mut self.live.ring);
    }

    #[inline]
    fn complete(&mut self, done: &Forwarded) {
        self.live.ring.flush_used();
        self.counters.tx_packets += done.packets as u64;
        self.counters.tx_bytes += done.bytes;
        self.counters.tx_drops += done.dropped as u64;
    }
}

/// What is left to copy of a packet.
struct Source<'a> {
    header: &'a [u8],
    window: &'a SharedMemory,
    segments: &'a [Segment],
    /// Bytes of the first segment that are done with; may be more than it has.
    skip: u64,
}

impl Source<'_> {
    /// Fills `room` bytes at `to` as far as possible. Returns the bytes written.
    fn fill(&mut self, target: &SharedMemory, to: u64, room: u32) -> Result<u32, ShmError> {
        let (now, later) = self.header.split_at(self.header.len().min(room as usize));
        target.write(to, now)?;
        self.header = later;
        let (mut written, room) = (now.len() as u64, u64::from(room));
        while written < room
            && let Some((first, rest)) = self.segments.split_first()
        {
            let left = u64::from(first.len).saturating_sub(self.skip);
            if left == 0 {
                self.skip -= u64::from(first.len);
                self.segments = rest;
                continue;
            }
            // All is in the window, as above.
            let Place::Window(from) = first.place else { break };
            let len = left.min(room - written);
            self.window.copy_to(from + self.skip, target, to + written, len)?;
            self.skip += len;
            written += len;
        }
        Ok(written as u32)
    }
}
