//! The port as a program uses it for one round: bursts in, bursts out, with calls to
//! the owner where they are wanted and faults noted.

use vhost_pci_device::abi::queue_of_vring;

use super::ProgramError;
use super::live::Live;
use super::peer_loop::PeerProgram;
use super::session::{Session, Turn};
use crate::control::ControlExchange;
use crate::net::forward::{End, ForwardFault, forward_burst_by};
use crate::net::{
    Copied, Counters, Forwarded, Lane, LentBurst, Offloads, Packet, PacketBurst, PeerPort, PeerQueue, Pick,
    copy_lent, receive_lent, receive_vring, send_copies, transmit_vring,
};
use crate::ring::Fault;
use crate::transport::Transport;

/// Packets moved at a time.
pub const BURST: usize = 64;

/// What became of frames that were offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// The first so many are done with: sent or dropped.
    pub done: usize,
    /// So many of them were dropped: no buffer of the owner could ever take them, or its driver does not
    /// accept what their headers ask.
    pub dropped: usize,
    /// Bytes of those that were sent.
    pub bytes: u64,
}

impl Sent {
    /// What has passed between two looks at a queue's counters.
    pub(super) fn between(before: Counters, after: Counters, done: usize) -> Self {
        Self {
            done,
            dropped: (after.tx_drops - before.tx_drops) as usize,
            bytes: after.tx_bytes - before.tx_bytes,
        }
    }
}

/// Pairs of a port whose receive queue the owner's driver uses: the first ones.
pub(super) fn receiving_pairs(port: &PeerPort) -> u16 {
    (0..port.pairs()).take_while(|pair| port.is_enabled(receive_vring(*pair))).count() as u16
}

impl Live {
    /// The vrings that a program sleeps for.
    pub(super) fn waited_for(&self, program: &dyn PeerProgram) -> Vec<u16> {
        let of_pair = |pair| {
            let packets = program.takes_packets(pair).then_some(transmit_vring(pair));
            let buffers = program.waits_for_buffers(pair).then_some(receive_vring(pair));
            packets.into_iter().chain(buffers)
        };
        (0..self.port.pairs()).flat_map(of_pair).collect()
    }
}

/// What a session on a network card's link does for who moves packets.
impl Session<'_> {
    /// Queue pairs: 0 while there is no link.
    pub(super) fn pairs(&self) -> u16 {
        self.live().map_or(0, |live| live.port.pairs())
    }

    /// Pairs by which the owner receives: 0 while there is no link.
    pub(super) fn receiving_pairs(&self) -> u16 {
        self.live().map_or(0, |live| receiving_pairs(&live.port))
    }

    /// Follows the link, and lets the program move packets. Returns how many.
    pub(super) fn round(&mut self, program: &mut dyn PeerProgram) -> Result<usize, ProgramError> {
        let Some(mut wire) = self.wire(|| program.link_lost())? else { return Ok(0) };
        let moved = program.poll(&mut wire);
        let faulted = wire.is_faulted();
        drop(wire);
        if faulted {
            self.report_faults();
        }
        Ok(moved)
    }

    /// [`Session::turn`], for packets.
    pub(super) fn wire(&mut self, lost: impl FnOnce()) -> Result<Option<Wire<'_>>, ProgramError> {
        let turn = self.turn(lost)?;
        Ok(turn.map(|Turn { port, transport, exchange }| Wire::new(port, transport, exchange)))
    }

    /// Sleeps until the owner kicks, the link changes, or the program has input.
    pub(super) fn sleep(&mut self, program: &dyn PeerProgram) {
        self.sleep_for(|live| live.waited_for(program), program.input(), program.patience());
    }
}

/// A port and the doorbells that belong to it, for one round. The owner is called when it is
/// dropped: to know whether it wants to be takes a full memory barrier, which would keep an answer
/// waiting for the stores before it.
pub struct Wire<'a> {
    port: &'a mut PeerPort,
    transport: &'a dyn Transport,
    exchange: Option<ControlExchange<'a>>,
    faulted: bool,
    /// The vrings on which something was completed in this round, a bit each.
    completed: u128,
}

impl Drop for Wire<'_> {
    fn drop(&mut self) {
        while self.completed != 0 {
            let vring = self.completed.trailing_zeros() as u16;
            self.completed &= self.completed - 1;
            self.call(vring);
        }
    }
}

impl<'a> Wire<'a> {
    /// For one round. `exchange` is for what the mapping table does not show.
    pub fn new(
        port: &'a mut PeerPort,
        transport: &'a dyn Transport,
        exchange: Option<ControlExchange<'a>>,
    ) -> Self {
        Self { port, transport, exchange, faulted: false, completed: 0 }
    }

    /// Queue pairs.
    pub fn pairs(&self) -> u16 {
        self.port.pairs()
    }

    /// How often a buffer was searched for in the mapping table: see [`PeerPort::searches`].
    pub fn searches(&self) -> u64 {
        self.port.searches()
    }

    /// Whether a vring turned out to be broken in this round, or was before.
    pub fn is_faulted(&self) -> bool {
        self.faulted
    }

    /// Receives up to [`BURST`] packets of a pair into `burst`, which is cleared first.
    /// Returns how many; none from a broken vring.
    pub fn receive(&mut self, pair: u16, burst: &mut PacketBurst) -> usize {
        burst.clear();
        let received = self.port.rx_burst_by(&mut self.exchange, pair, burst, BURST);
        self.has_received(pair, received)
    }

    /// The same, of so many packets that were lent: all of them, if they can be had now.
    pub fn receive_lent(&mut self, pair: u16, burst: &mut PacketBurst, count: usize) -> usize {
        let Some(queue) = self.port.queue(pair) else { return 0 };
        let received = receive_lent(burst, End { queue, exchange: &mut self.exchange }, count);
        self.has_received(pair, received)
    }

    fn has_received(&mut self, pair: u16, received: Result<usize, Fault>) -> usize {
        match received {
            Ok(0) => 0,
            Ok(received) => {
                self.has_completed(transmit_vring(pair));
                received
            }
            Err(_) => {
                self.faulted = true;
                0
            }
        }
    }

    /// Lends up to [`BURST`] packets of a pair, which stay where they lie until
    /// [`Self::give_back`]. Returns how many; none from a broken vring.
    pub fn lend(&mut self, pair: u16, burst: &mut LentBurst) -> usize {
        let lent = self.port.rx_lend_by(&mut self.exchange, pair, burst, BURST);
        self.faulted |= lent.is_err();
        lent.unwrap_or(0)
    }

    /// Gives back what was lent of a pair. Returns how many packets that were; none of a broken
    /// vring.
    pub fn give_back(&mut self, pair: u16, burst: &mut LentBurst) -> usize {
        let returned = self.port.rx_return(burst);
        self.faulted |= returned.is_err();
        if matches!(returned, Ok(1..)) {
            self.has_completed(transmit_vring(pair));
        }
        returned.unwrap_or(0)
    }

    /// Whether the headers of what is received by a pair have something to say.
    pub fn has_headers(&mut self, pair: u16) -> bool {
        self.port.queue(pair).is_some_and(PeerQueue::has_headers)
    }

    /// Whether what was read of a burst that is lent is what its owner transmitted: see
    /// [`PeerPort::is_in_place`].
    pub fn is_in_place(&mut self, burst: &LentBurst) -> bool {
        self.port.is_in_place(burst)
    }

    /// Copies packets that a pair has lent to a pair of another owner, as far as they can be copied in place:
    /// the others are to be [sent](Self::send_copies).
    pub fn copy(
        &mut self,
        (pair, burst): (u16, &LentBurst),
        picks: &[Pick],
        other: &mut Wire<'_>,
        other_pair: u16,
    ) -> Copied {
        let gone = Copied { done: picks.len(), gone: picks.len(), ..Copied::default() };
        let (Some(from), Some(to)) = (self.port.queue(pair), other.port.queue(other_pair)) else {
            return gone;
        };
        let copied = copy_lent(burst, picks, from, End { queue: to, exchange: &mut other.exchange });
        other.has_copied(other_pair, copied.ok(), gone)
    }

    /// Sends packets from private memory to a pair. All of what is picked is done with then. `pieces` is
    /// for those that are to be cut.
    pub fn send_copies(
        &mut self,
        pair: u16,
        burst: &PacketBurst,
        picks: &[Pick],
        pieces: &mut PacketBurst,
    ) -> Copied {
        let gone = Copied { done: picks.len(), gone: picks.len(), ..Copied::default() };
        let Some(to) = self.port.queue(pair) else { return gone };
        let copied = send_copies(burst, picks, End { queue: to, exchange: &mut self.exchange }, pieces);
        self.has_copied(pair, copied.ok(), gone)
    }

    /// Notes what was copied; nothing was if the vring is broken.
    fn has_copied(&mut self, pair: u16, copied: Option<Copied>, gone: Copied) -> Copied {
        self.faulted |= copied.is_none_or(|copied| copied.broken);
        let copied = copied.unwrap_or(gone);
        if copied.packets > 0 {
            self.has_completed(receive_vring(pair));
        }
        copied
    }

    /// What the owner's driver accepts in the headers of what it receives.
    pub fn offloads(&self) -> Offloads {
        self.port.offloads()
    }

    /// Sends packets, or frames alone, to a pair. Says how many are done with; none of a broken vring.
    pub fn transmit<'frame>(
        &mut self,
        pair: u16,
        packets: impl IntoIterator<Item: Into<Packet<'frame>>>,
    ) -> Sent {
        let Some(queue) = self.port.queue(pair) else { return Sent::default() };
        let before = queue.counters();
        match queue.tx_burst_by(&mut self.exchange, packets) {
            Ok(0) => Sent::default(),
            Ok(done) => {
                let sent = Sent::between(before, queue.counters(), done);
                self.has_completed(receive_vring(pair));
                sent
            }
            Err(_) => {
                self.faulted = true;
                Sent::default()
            }
        }
    }

    /// Pairs whose receive queue the owner's driver uses: the first ones.
    pub fn receiving_pairs(&self) -> u16 {
        receiving_pairs(self.port)
    }

    /// Forwards up to [`BURST`] packets of a pair to a pair of another owner. Says what that came to;
    /// nothing where a vring is broken.
    pub fn forward(
        &mut self,
        pair: u16,
        other: &mut Wire<'_>,
        other_pair: u16,
        lane: &mut Lane,
    ) -> Forwarded {
        let (Some(from), Some(to)) = (self.port.queue(pair), other.port.queue(other_pair)) else {
            return Forwarded::default();
        };
        let from = End { queue: from, exchange: &mut self.exchange };
        let to = End { queue: to, exchange: &mut other.exchange };
        match forward_burst_by(lane, from, to, BURST) {
            Ok(forwarded) => {
                if forwarded.taken > 0 {
                    self.has_completed(transmit_vring(pair));
                }
                if forwarded.packets > 0 {
                    other.has_completed(receive_vring(other_pair));
                }
                forwarded
            }
            Err(fault) => {
                let broken = match fault {
                    ForwardFault::From(_) => &mut self.faulted,
                    ForwardFault::To(_) => &mut other.faulted,
                };
                *broken = true;
                Forwarded::default()
            }
        }
    }

    #[inline]
    fn has_completed(&mut self, vring: u16) {
        match 1_u128.checked_shl(vring.into()) {
            Some(bit) => self.completed |= bit,
            None => self.call(vring),
        }
    }

    fn call(&mut self, vring: u16) {
        if self.port.needs_call(vring) {
            self.transport.doorbell(queue_of_vring(vring));
        }
    }
}
