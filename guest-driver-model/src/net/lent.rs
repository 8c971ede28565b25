//! Packets *in place*: they stay in the buffers of the owner that transmitted them, and a
//! reader gets private copies of just the bytes it asks for.
//!
//! Owns: what is known of a loan on either side. Never gives out a slice or a reference into
//! shared memory, and completes nothing before the reader says that it is done.
//!
//! | | [`PacketBurst`](super::PacketBurst) (*copy*) | [`LentBurst`] (*in place*) |
//! |---|---|---|
//! | where the bytes are | in this program's memory | in the owner's |
//! | who can change them | nobody else | the owner, at any moment, between two reads, too |
//! | its buffers are completed | by `rx_burst` itself | by `rx_return` |
//! | what costs | every byte, once | the bytes that are looked at |
//!
//! A packet is lent until it is returned: what is not, because its burst was dropped or
//! forgotten, is lent again by the pair's next `rx_lend` (or received by its next `rx_burst`).
//! So each buffer is completed once, and none is lost. The burst that had it before then
//! returns nothing any more; it can still be read, as all memory of the owner can.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use vhost_pci_device::abi::FaultKind;

use super::header::{HEADER_LEN, NetHeader};
use super::receive::packet_len;
use super::vring::LiveVring;
use crate::reach::Reach;
use crate::ring::{Chain, ChainBurst, Direction, Fault, OnMiss, Place, Segment};
use crate::shm::SharedMemory;

/// Numbers for vrings, no two of which in a process are the same.
static LENDERS: AtomicU64 = AtomicU64::new(0);

/// Whose loan it is, and which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ticket {
    lender: u64,
    loan: u64,
}

/// The vring's side of its loans.
#[derive(Debug)]
pub(super) struct Lender {
    /// Of the loan that is out, or of the last one.
    ticket: Ticket,
    /// Chains that are out: the last ones popped.
    out: usize,
}

impl Lender {
    pub(super) fn new() -> Self {
        // Relaxed: only that it is another number each time counts.
        let lender = LENDERS.fetch_add(1, Ordering::Relaxed);
        Self { ticket: Ticket { lender, loan: 0 }, out: 0 }
    }

    /// How many chains are out. None is from now on: they are the caller's to put back, or to
    /// complete. The burst that has them returns nothing any more.
    #[inline]
    pub(super) fn end(&mut self) -> usize {
        std::mem::take(&mut self.out)
    }

    /// Whether chains are out.
    pub(super) fn is_out(&self) -> bool {
        self.out > 0
    }

    fn begin(&mut self, chains: usize) -> Ticket {
        self.ticket.loan += 1;
        self.out = chains;
        self.ticket
    }
}

/// What a burst holds.
#[derive(Debug)]
struct Loan {
    ticket: Ticket,
    pair: u16,
    table_generation: u64,
}

/// A burst of packets that still lie in the buffers of their owner. Meant to be lent, returned
/// and lent again: it stops allocating once it has seen the largest burst.
///
/// **The owner can change the bytes at any moment.** Two reads of the same byte may differ:
/// read what decides something once, and decide by the copy. There is one burst of a pair at a
/// time, and it is not `Clone`.
///
/// The window that it was lent of last stays mapped while there is the burst.
#[derive(Default)]
pub struct LentBurst {
    /// While there is something to return.
    loan: Option<Loan>,
    /// The window in which the packets are, and the vring that it is of.
    window: Option<(u64, SharedMemory)>,
    chains: ChainBurst,
    /// The packet behind the last one is not in the window.
    needs_copy: bool,
}

impl fmt::Debug for LentBurst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LentBurst").field("packets", &self.len()).field("loan", &self.loan).finish()
    }
}

impl LentBurst {
    /// Room for `packets` packets without an allocation.
    pub fn with_capacity(packets: usize) -> Self {
        Self { chains: ChainBurst::with_capacity(packets), ..Self::default() }
    }

    /// How many packets are lent.
    #[inline]
    pub fn len(&self) -> usize {
        self.chains.len()
    }

    /// Whether nothing is lent.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// Whether the burst ended because the next packet cannot be lent: a part of it is not in the
    /// window, and is not to be mapped (the owner has an IOMMU, and the peer's VMM no way to
    /// enforce it). `rx_burst_by` receives it.
    #[inline]
    pub fn needs_copy(&self) -> bool {
        self.needs_copy
    }

    /// The packet at a position, in the order of arrival.
    #[inline]
    pub fn packet(&self, at: usize) -> Option<LentPacket<'_>> {
        let (_, window) = self.window.as_ref()?;
        let Chain { len, segments, .. } = self.chains.chain(at)?;
        // Each is at least a header, and at most a header and `MAX_FRAME`, or it is not lent.
        Some(LentPacket { window, segments, len: (len as usize).saturating_sub(HEADER_LEN) })
    }

    /// The packet's chain, and the window in which it is.
    #[inline]
    pub(super) fn chain(&self, at: usize) -> Option<(&SharedMemory, Chain<'_>)> {
        let (_, window) = self.window.as_ref()?;
        Some((window, self.chains.chain(at)?))
    }

    /// All packets, in the order of arrival.
    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = LentPacket<'_>> {
        (0..self.len()).map_while(|at| self.packet(at))
    }

    /// The pair of the loan, if there is one.
    #[inline]
    pub(super) fn pair(&self) -> Option<u16> {
        self.loan.as_ref().map(|loan| loan.pair)
    }

    /// The table by which the packets were found, if they are this vring's.
    pub(super) fn table_generation(&self, lender: &Lender) -> Option<u64> {
        let loan = self.loan.as_ref().filter(|loan| lender.out > 0 && loan.ticket == lender.ticket)?;
        Some(loan.table_generation)
    }

    fn clear(&mut self) {
        self.loan = None;
        self.chains.clear();
        self.needs_copy = false;
    }
}

/// A packet that still lies in the buffers of its owner, **which can change it at any moment**.
#[derive(Clone, Copy)]
pub struct LentPacket<'burst> {
    window: &'burst SharedMemory,
    segments: &'burst [Segment],
    len: usize,
}

impl fmt::Debug for LentPacket<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LentPacket({} bytes)", self.len)
    }
}

impl LentPacket<'_> {
    /// Length of the Ethernet frame, bytes. It does not change: the descriptors were read once.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing behind the header.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A private copy of the header that comes with the packet, as the owner wrote it, but for flags
    /// that are no driver's to set: what it says is to be [checked](NetHeader::checked), and where no
    /// offload was accepted it says nothing.
    pub fn header(&self) -> NetHeader {
        let mut bytes = [0; HEADER_LEN];
        self.copy_out(0, &mut bytes);
        NetHeader::from_bytes(&bytes).of_driver()
    }

    /// A private copy of the first `N` bytes of the frame, zeros behind its end. Bytes may be other
    /// ones by the next read.
    #[inline(always)]
    pub fn head<const N: usize>(&self) -> [u8; N] {
        match self.segments.first() {
            Some(Segment { place: Place::Window(offset), len, .. }) if *len as usize >= HEADER_LEN + N => {
                // Of a length that the compiler knows. Translation only yields what is in the window.
                self.window.read_array(offset + HEADER_LEN as u64).unwrap_or([0; N])
            }
            _ => self.head_in_pieces(),
        }
    }

    fn head_in_pieces<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(0, &mut bytes);
        bytes
    }

    /// Makes `into` a private copy of the frame from byte `at` on, as far as the frame goes. Returns
    /// how many bytes that is. They may be other ones by the next read.
    pub fn read(&self, at: usize, into: &mut [u8]) -> usize {
        let len = into.len().min(self.len.saturating_sub(at));
        match into.get_mut(..len) {
            Some(into) if len > 0 => self.copy_out(HEADER_LEN + at, into),
            _ => 0,
        }
    }

    /// Copies what is `skip` bytes behind the start of the header. Returns how many bytes there were.
    fn copy_out(&self, mut skip: usize, into: &mut [u8]) -> usize {
        let mut filled = 0;
        for segment in self.segments {
            let len = segment.len as usize;
            let Some(left) = len.checked_sub(skip).filter(|left| *left > 0) else {
                skip -= len;
                continue;
            };
            let end = into.len().min(filled + left);
            let Some(room) = into.get_mut(filled..end).filter(|room| !room.is_empty()) else { break };
            // All is in the window, or the packet would not have been lent.
            let Place::Window(offset) = segment.place else { break };
            if self.window.read(offset + skip as u64, room).is_err() {
                break;
            }
            (filled, skip) = (end, 0);
        }
        filled
    }
}

/// Lends up to `budget` packets of a vring, whose last loan has ended.
#[inline]
pub(super) fn lend(
    live: &mut LiveVring,
    reach: &mut Reach<'_>,
    burst: &mut LentBurst,
    pair: u16,
    budget: usize,
) -> Result<usize, Fault> {
    burst.clear();
    let chains = &mut burst.chains;
    let popped = match live.ring.miss_policy() {
        OnMiss::Fault => live.ring.pop_burst(budget, Direction::DeviceReads, chains)?,
        OnMiss::Map | OnMiss::Copy => reach.pop(live, 1, budget, Direction::DeviceReads, chains)?,
    };
    let mut good = popped;
    if chains.is_outside() {
        let is_inside = |chain: &Chain<'_>| chain.segments.iter().all(|at| at.place != Place::Owner);
        good = chains.iter().take_while(is_inside).count();
        burst.needs_copy = good < popped;
    }
    let mut broken = None;
    if let Some(at) = chains.iter().take(good).position(|chain| packet_len(&chain).is_none()) {
        broken = chains.chain(at).map(|chain| chain.len);
        (good, burst.needs_copy) = (at, false);
    }
    chains.truncate(good);
    chains.prefetch(HEADER_LEN, reach.window);
    live.ring.put_back(popped - good);
    if good == 0 {
        return broken.map_or(Ok(0), |len| Err(live.ring.fail(FaultKind::Length, len)));
    }
    let ticket = live.kind.lender.begin(good);
    burst.loan = Some(Loan { ticket, pair, table_generation: reach.tables.table_generation() });
    if burst.window.as_ref().is_none_or(|(lender, _)| *lender != ticket.lender) {
        burst.window = Some((ticket.lender, reach.window.clone()));
    }
    Ok(good)
}

/// Takes all packets of the burst back, if they are what the vring has lent, and completes them if
/// the link is still the same. Returns how many packets and bytes were completed.
#[inline]
pub(super) fn take_back(live: &mut LiveVring, is_same_link: bool, burst: &mut LentBurst) -> (usize, u64) {
    if burst.table_generation(&live.kind.lender).is_none() {
        return (0, 0);
    }
    live.kind.lender.end();
    let mut bytes = 0;
    if is_same_link {
        for chain in burst.chains.iter() {
            live.ring.push_used(chain.head, 0);
            bytes += chain.len - HEADER_LEN as u64;
        }
        live.ring.flush_used();
    }
    let count = if is_same_link { burst.len() } else { 0 };
    burst.clear();
    (count, bytes)
}
