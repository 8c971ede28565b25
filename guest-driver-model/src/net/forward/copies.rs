//! Copies of packets that are lent: out of the buffers that one owner transmitted, straight into those
//! that others posted. One copy for each owner that is to have the packet.
//!
//! Owns: nothing. Unlike a [`Lane`](super::Lane) nothing waits for room: what an owner has none for now is not
//! for it, so that nobody waits for one who is slow. The loan goes back to its owner when all have their copies.
//!
//! What cannot be copied in place is [received](receive_lent) and left to [`send_copies`], from private memory: for an owner with an
//! IOMMU behind which a buffer can be stored to only, where mappings change while packets are copied, and
//! where the receiver does not accept what the header leaves to it.

use super::{Destination, End, Placed};
use crate::net::burst::PacketBurst;
use crate::net::header::{HEADER_LEN, NetHeader};
use crate::net::lent::LentBurst;
use crate::net::offload::Judged;
use crate::net::peer::PeerQueue;
use crate::net::segment::{cut, is_long};
use crate::ring::{Fault, OnMiss};

/// A packet of a burst that an owner is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pick {
    /// Its position.
    pub at: usize,
    /// A private copy of its header, which the other owner wrote; all zero where it has nothing to say.
    pub header: NetHeader,
}

/// What became of the packets that an owner was to have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// The first so many are done with: the owner has them, or they are counted below.
    pub done: usize,
    /// Packets that it has: more than were picked if some were cut.
    pub packets: usize,
    /// Their bytes, without headers.
    pub bytes: u64,
    /// Picks for which it had no room now.
    pub full: usize,
    /// Picks that no buffer of it could ever take, or whose header cannot be theirs.
    pub refused: usize,
    /// Picks for which it has no vring that can be used, or whose link has changed.
    pub gone: usize,
    /// Its vring turned out to be broken on the way.
    pub broken: bool,
}

/// Copies what is picked, in its order, of a burst that `from` has lent into the next receive buffers of
/// `to`. What is not done with then is to be [sent from private memory](send_copies).
///
/// The owner may want a call afterwards: see [`PeerQueue::needs_call`].
///
/// # Errors
/// If `to`'s vring is broken: nothing was done.
pub fn copy_lent(
    burst: &LentBurst,
    picks: &[Pick],
    from: &mut PeerQueue,
    to: End<'_>,
) -> Result<Copied, Fault> {
    let gone = Copied { done: picks.len(), gone: picks.len(), ..Copied::default() };
    let Some(mut target) = to.queue.target(to.exchange)? else { return Ok(gone) };
    let room = target.room(picks.len())?;
    if room == 0 && !target.has_more() {
        return Ok(Copied { done: picks.len(), full: picks.len(), ..Copied::default() });
    }
    if target.transmitter.posted.is_outside() {
        return Ok(Copied::default());
    }
    target.prefetch(picks.len());
    let (copied, pushed) = target.copy(burst, picks);
    if from.is_in_place(burst) && target.reach.tables.is_unchanged() {
        target.complete(&super::Forwarded {
            packets: copied.packets,
            bytes: copied.bytes,
            dropped: copied.refused,
            ..super::Forwarded::default()
        });
        return Ok(copied);
    }
    // Copied while mappings of either may have been going.
    target.take_back(pushed);
    let is_static = |on_miss| on_miss == OnMiss::Fault;
    match is_static(from.miss_policy()) && is_static(target.live.ring.miss_policy()) {
        // Of owners without an IOMMU: a link has changed.
        true => Ok(gone),
        false => Ok(Copied::default()),
    }
}

impl Destination<'_> {
    /// Copies until something is to be done otherwise, and pushes so many buffers, which are not flushed yet.
    #[inline]
    fn copy(&mut self, burst: &LentBurst, picks: &[Pick]) -> (Copied, usize) {
        let (mut copied, mut pushed) = (Copied::default(), 0);
        for pick in picks {
            let Some((window, chain)) = burst.chain(pick.at) else { break };
            // It is at least a header, or it would not have been lent.
            let len = chain.len as usize;
            let header = match pick.header.is_plain() {
                true => NetHeader::default(),
                false => match self.judge(pick.header, len) {
                    Judged::Pass(header) => header,
                    Judged::Complete(_) | Judged::Cut => break,
                    Judged::Invalid => {
                        copied.refused += 1;
                        copied.done += 1;
                        continue;
                    }
                },
            };
            match self.place(window, &chain, len, header) {
                Ok(Placed::In(buffers)) => {
                    pushed += buffers;
                    copied.packets += 1;
                    copied.bytes += (len - HEADER_LEN) as u64;
                }
                Ok(Placed::Never) => copied.refused += 1,
                // There are more buffers, which the window does not show.
                Ok(Placed::NotYet) if self.has_more() => break,
                Ok(Placed::NotYet) => copied.full += 1,
                // Its ring is dead by now.
                Err(_) => {
                    copied.gone += picks.len() - copied.done;
                    copied.done = picks.len();
                    copied.broken = true;
                    break;
                }
            }
            copied.done += 1;
        }
        (copied, pushed)
    }
}

/// So often it is tried again to receive what was there before.
const TRIES: usize = 4;

/// Receives the next `count` packets, which `from` had lent, into private memory, which is cleared first: for
/// [`send_copies`]. All of them, though mappings change meanwhile; those that cannot be had now stay with their
/// owner. Returns how many came.
///
/// # Errors
/// If `from`'s vring is broken: nothing was done.
#[cold]
pub fn receive_lent(burst: &mut PacketBurst, from: End<'_>, count: usize) -> Result<usize, Fault> {
    burst.clear();
    let mut tries = TRIES;
    while burst.len() < count && tries > 0 {
        match from.queue.rx_burst_by(from.exchange, burst, count - burst.len()) {
            Ok(0) => tries -= 1,
            Ok(_) => {}
            Err(fault) if burst.is_empty() => return Err(fault),
            // It shows again with the next burst.
            Err(_) => break,
        }
    }
    Ok(burst.len())
}

/// Sends what is picked of packets in private memory into the next receive buffers of `to`. `pieces` is
/// for packets that it wants cut. All is done with then.
///
/// # Errors
/// If `to`'s vring is broken: nothing was done.
#[cold]
pub fn send_copies(
    burst: &PacketBurst,
    picks: &[Pick],
    to: End<'_>,
    pieces: &mut PacketBurst,
) -> Result<Copied, Fault> {
    let before = to.queue.counters();
    let offloads = to.queue.offloads();
    let mut copied = Copied::default();
    for pick in picks {
        let sent = match burst.packet(pick.at) {
            None => {
                copied.gone += 1;
                Ok(true)
            }
            Some(packet) if is_long(&packet, offloads) => {
                cut(packet, pieces);
                match pieces.is_empty() {
                    // It is no TCP: refused like all else that the owner does not accept.
                    true => to.queue.tx_burst_by(to.exchange, [packet]).map(|sent| sent == 1),
                    false => {
                        to.queue.tx_burst_by(to.exchange, pieces.iter()).map(|sent| sent == pieces.len())
                    }
                }
            }
            Some(packet) => to.queue.tx_burst_by(to.exchange, [packet]).map(|sent| sent == 1),
        };
        match sent {
            Ok(true) => {}
            Ok(false) => copied.full += 1,
            Err(fault) if copied.done == 0 => return Err(fault),
            Err(_) => {
                copied.gone += picks.len() - copied.done;
                copied.broken = true;
                break;
            }
        }
        copied.done += 1;
    }
    let after = to.queue.counters();
    copied.done = picks.len();
    copied.packets = (after.tx_packets - before.tx_packets) as usize;
    copied.bytes = after.tx_bytes - before.tx_bytes;
    copied.refused = (after.tx_drops - before.tx_drops) as usize;
    Ok(copied)
}
