//! Placing frames into the owner's posted receive buffers (virtio 1.3, 5.1.6.4).
//!
//! Owns: the chains that were popped ahead, in order. A chain leaves it only when it
//! is completed with a packet, so a packet that does not fit costs no buffer. Where the
//! owner has an IOMMU, `store` goes on from here.

use vhost_pci_device::abi::FaultKind;

use super::Counters;
use super::burst::Packet;
use super::header::{HEADER_LEN, MAX_FRAME, NetHeader};
use super::offload::{Judged, Offloads, complete};
use crate::ring::{Chain, ChainBurst, DeviceRing, Direction, Fault, Place, Segment};
use crate::shm::{SharedMemory, ShmError};

/// How many chains are popped ahead at once.
pub(super) const POP: usize = 64;

/// So many packets before it is written, a buffer's cache lines are asked for: the owner has them.
const AHEAD: usize = 8;
/// The same for frames that are longer than `SHORT`, bytes: not too many lines at once.
const LONG_AHEAD: usize = 2;
const SHORT: usize = 256;

/// What became of a frame.
enum Placed {
    /// It is in the owner's buffers.
    Sent,
    /// It would not fit if all of the owner's buffers were free.
    Never,
    /// Not enough buffers are posted now.
    NotYet,
}

/// Transmits on one queue.
#[derive(Debug)]
pub(super) struct Transmitter {
    pub(super) mergeable: bool,
    /// What the owner's driver accepts.
    pub(super) offloads: Offloads,
    pub(super) posted: ChainBurst,
    /// The first of `posted` that is not completed.
    pub(super) cursor: usize,
    /// For frames that need another checksum, one at a time.
    whole: Vec<u8>,
}

impl Transmitter {
    pub(super) fn new(mergeable: bool, offloads: Offloads) -> Self {
        let posted = ChainBurst::with_capacity(POP);
        Self { mergeable, offloads, posted, cursor: 0, whole: Vec::new() }
    }

    /// Puts the chains that were popped ahead back into the ring.
    pub(super) fn put_back(&mut self, ring: &mut DeviceRing) {
        ring.put_back(self.posted.len() - self.cursor);
        self.posted.clear();
        self.cursor = 0;
    }

    /// Sends packets until one has to wait. Returns how many are done with.
    #[inline]
    pub(super) fn send<'a>(
        &mut self,
        ring: &mut DeviceRing,
        window: &SharedMemory,
        packets: impl IntoIterator<Item: Into<Packet<'a>>>,
        counters: &mut Counters,
    ) -> Result<usize, Fault> {
        // A dead ring takes nothing more, even where good chains were popped ahead.
        if let Some(fault) = ring.fault() {
            return Err(fault);
        }
        let mut done = 0;
        for packet in packets {
            let packet = packet.into();
            match self.place(ring, window, packet) {
                Ok(Placed::Sent) => {
                    counters.tx_packets += 1;
                    counters.tx_bytes += packet.frame.len() as u64;
                }
                Ok(Placed::Never) => counters.tx_drops += 1,
                Ok(Placed::NotYet) => break,
                Err(fault) if done == 0 => return Err(fault),
                Err(_) => break,
            }
            done += 1;
        }
        Ok(done)
    }

    #[inline]
    fn place(
        &mut self,
        ring: &mut DeviceRing,
        window: &SharedMemory,
        packet: Packet<'_>,
    ) -> Result<Placed, Fault> {
        match packet.header.is_plain() {
            true => self.place_as(ring, window, NetHeader::default(), packet.frame),
            false => self.place_judged(ring, window, packet),
        }
    }

    /// The same for a packet whose header has something to say.
    #[inline(never)]
    fn place_judged(
        &mut self,
        ring: &mut DeviceRing,
        window: &SharedMemory,
        packet: Packet<'_>,
    ) -> Result<Placed, Fault> {
        self.judged(packet, |transmitter, packet| match packet {
            Some(Packet { header, frame }) => transmitter.place_as(ring, window, header, frame),
            None => Ok(Placed::Never),
        })
    }

    /// Has `place` place a packet as the owner's driver accepts it; `None` if it accepts it in no way.
    pub(super) fn judged<R>(
        &mut self,
        packet: Packet<'_>,
        place: impl FnOnce(&mut Self, Option<Packet<'_>>) -> R,
    ) -> R {
        match self.offloads.judge(packet.header, packet.frame.len()) {
            Judged::Pass(header) => place(self, Some(Packet { header, ..packet })),
            Judged::Complete(header) => {
                let mut whole = std::mem::take(&mut self.whole);
                complete(&header, packet.frame, &mut whole);
                let placed = place(self, Some(whole.as_slice().into()));
                self.whole = whole;
                placed
            }
            Judged::Cut | Judged::Invalid => place(self, None),
        }
    }

    /// Places a frame with this header, but for the number of buffers. Inlined where the header is
    /// known when this is compiled.
    #[inline(always)]
    fn place_as(
        &mut self,
        ring: &mut DeviceRing,
        window: &SharedMemory,
        header: NetHeader,
        frame: &[u8],
    ) -> Result<Placed, Fault> {
        let len = HEADER_LEN + frame.len();
        let ahead = if frame.len() <= SHORT { AHEAD } else { LONG_AHEAD };
        self.posted.prefetch_write(self.cursor + ahead, (HEADER_LEN, frame.len()), window);
        // Nearly all frames: into the next chain, which is one buffer.
        if let Some(Chain { head, segments: [Segment { place: Place::Window(at), len: room, .. }], .. }) =
            self.posted.chain(self.cursor)
            && *room as usize >= len
            && frame.len() <= MAX_FRAME
        {
            let header = NetHeader { num_buffers: 1, ..header }.to_bytes();
            window
                .write_array(*at, &header)
                .and_then(|()| window.write(at + HEADER_LEN as u64, frame))
                .map_err(|_| ring.fail(FaultKind::Unmapped, *at))?;
            ring.push_used(head, len as u32);
            self.cursor += 1;
            return Ok(Placed::Sent);
        }
        self.place_in_pieces(ring, window, header, frame)
    }

    fn place_in_pieces(
        &mut self,
        ring: &mut DeviceRing,
        window: &SharedMemory,
        header: NetHeader,
        frame: &[u8],
    ) -> Result<Placed, Fault> {
        if frame.len() > MAX_FRAME {
            return Ok(Placed::Never);
        }
        let len = HEADER_LEN + frame.len();
        // How many chains the packet takes.
        let mut room = 0_u64;
        let mut taken = 0_usize;
        while taken == 0 || (self.mergeable && room < len as u64) {
            let Some(capacity) = self.capacity(ring, taken)? else {
                let all_posted = taken >= usize::from(ring.size());
                return Ok(if all_posted { Placed::Never } else { Placed::NotYet });
            };
            if capacity < HEADER_LEN as u64 {
                return Err(ring.fail(FaultKind::Length, capacity));
            }
            room += capacity;
            taken += 1;
        }
        if room < len as u64 {
            return Ok(Placed::Never);
        }
        // 5.1.6.4.1: 1 without VIRTIO_NET_F_MRG_RXBUF. `taken` is at most the ring's size.
        let header = NetHeader { num_buffers: taken as u16, ..header };
        self.fill(ring, window, &header.to_bytes(), frame, taken)
            .map_err(|_| ring.fail(FaultKind::Unmapped, len as u64))?;
        self.cursor += taken;
        Ok(Placed::Sent)
    }

    /// Room in the chain `ahead` of the cursor, bytes; `None` if the owner has not
    /// posted it.
    #[inline]
    pub(super) fn capacity(&mut self, ring: &mut DeviceRing, ahead: usize) -> Result<Option<u64>, Fault> {
        if let Some(chain) = self.posted.chain(self.cursor + ahead) {
            return Ok(Some(chain.len));
        }
        // Completed chains go before new ones come, so that this stays small. In the
        // common case all are completed, and nothing moves.
        if self.cursor == self.posted.len() {
            self.posted.clear();
        } else {
            self.posted.discard(self.cursor);
        }
        self.cursor = 0;
        ring.pop_burst(POP, Direction::DeviceWrites, &mut self.posted)?;
        Ok(self.posted.chain(self.cursor + ahead).map(|chain| chain.len))
    }

    /// Copies header and frame into the next `taken` chains, which have the room, and
    /// completes them.
    #[inline]
    fn fill(
        &self,
        ring: &mut DeviceRing,
        window: &SharedMemory,
        header: &[u8; HEADER_LEN],
        frame: &[u8],
        taken: usize,
    ) -> Result<(), ShmError> {
        let mut source = Source { header, frame };
        for at in self.cursor..self.cursor + taken {
            let Some(chain) = self.posted.chain(at) else { break };
            let mut written = 0;
            for segment in chain.segments {
                if source.is_empty() {
                    break;
                }
                // All is in the window, or the chain would not have been popped.
                let Place::Window(offset) = segment.place else { continue };
                written += source.fill(window, offset, segment)?;
            }
            ring.push_used(chain.head, written);
        }
        Ok(())
    }
}

/// What is left to copy of a packet.
pub(super) struct Source<'a> {
    pub(super) header: &'a [u8],
    pub(super) frame: &'a [u8],
}

impl Source<'_> {
    pub(super) fn len(&self) -> usize {
        self.header.len() + self.frame.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.header.is_empty() && self.frame.is_empty()
    }

    /// Fills one segment, which is at `offset` of the window, as far as possible. Returns the
    /// bytes written.
    #[inline]
    pub(super) fn fill(
        &mut self,
        window: &SharedMemory,
        offset: u64,
        segment: &Segment,
    ) -> Result<u32, ShmError> {
        let room = segment.len as usize;
        let mut written = 0;
        for part in [&mut self.header, &mut self.frame] {
            let (now, later) = part.split_at(part.len().min(room - written));
            if !now.is_empty() {
                window.write(offset + written as u64, now)?;
            }
            written += now.len();
            *part = later;
        }
        Ok(written as u32)
    }
}
