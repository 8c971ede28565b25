//! The owner's transmit queue.
//!
//! Owns: its buffers, and which of them are free: those that the device has given back.

use super::BufferMapping;
use crate::net::Counters;
use crate::net::burst::Packet;
use crate::net::header::{HEADER_LEN, NetHeader};
use crate::net::layout::{HEADER_AT, HEADROOM, OwnerConfig};
use crate::net::offload::{Judged, Offloads, complete};
use crate::ring::{AddError, Buffer, Completion, DriverFault, DriverRing};
use crate::shm::{SharedMemory, ShmError};

/// So many packets before it is written, a buffer's cache line is asked for: the peer has it.
/// (In steady state buffers come in the order of their numbers.)
const AHEAD: u16 = 16;
/// The same for frames that are longer than `SHORT`, bytes.
const LONG_AHEAD: u16 = 2;
const SHORT: usize = 256;

/// The header of a packet that leaves nothing to the device (5.1.6.2).
const PLAIN: [u8; HEADER_LEN] = [0; HEADER_LEN];

/// The transmit queue and its free buffers, first in first out.
#[derive(Debug)]
pub(super) struct Transmitter<M> {
    pub(super) ring: DriverRing,
    mapping: M,
    memory: SharedMemory,
    buffers: u64,
    max_frame: usize,
    /// Bytes of a frame that one buffer takes.
    room: usize,
    /// The ring's size less 1.
    mask: u16,
    config: OwnerConfig,
    /// What the device accepts.
    offloads: Offloads,
    /// For frames that need another checksum, one at a time.
    whole: Vec<u8>,
    /// By buffer: the header that is in it.
    headers: Box<[[u8; HEADER_LEN]]>,
    /// The free list; the buffers of a packet in flight stay linked in it.
    next: Box<[u16]>,
    first: u16,
    last: u16,
    free: u16,
    pieces: Vec<Buffer>,
    completions: Vec<Completion>,
}

/// The buffers of a packet in flight, as its token: first, last, count.
#[inline]
fn token(first: u16, last: u16, count: u16) -> u64 {
    u64::from(first) | u64::from(last) << 16 | u64::from(count) << 32
}

/// A layout has no buffers that are not in the memory.
fn outside(_: ShmError) -> AddError {
    AddError::Invalid
}

impl<M: BufferMapping> Transmitter<M> {
    pub(super) fn new(
        (ring, mapping): (DriverRing, M),
        memory: &SharedMemory,
        buffers: u64,
        max_frame: usize,
        config: &OwnerConfig,
    ) -> Result<Self, ShmError> {
        let size = ring.size();
        Ok(Self {
            ring,
            mapping,
            memory: memory.clone(),
            buffers,
            max_frame,
            room: config.room(),
            mask: size - 1,
            config: *config,
            offloads: Offloads::from_owner(config.features()),
            whole: Vec::new(),
            // No packet has this header, so each buffer's first one is written.
            headers: vec![[u8::MAX; HEADER_LEN]; usize::from(size)].into(),
            next: (1..=size).collect(),
            first: 0,
            last: size - 1,
            free: size,
            pieces: Vec::new(),
            completions: Vec::with_capacity(usize::from(size)),
        })
    }

    #[inline]
    pub(super) fn send<'a>(
        &mut self,
        packets: impl IntoIterator<Item: Into<Packet<'a>>>,
        counters: &mut Counters,
    ) -> Result<usize, DriverFault> {
        // Early enough to never wait for the device, late enough to look at its cache
        // line once for many bursts.
        if self.free <= self.ring.size() / 2 {
            self.reap()?;
        }
        let mut done = 0;
        for packet in packets {
            let Packet { header, frame } = packet.into();
            let queued = match header.is_plain() {
                _ if frame.len() > self.max_frame => None,
                true => Some(self.offer(PLAIN, frame)?),
                false => self.offer_judged(header, frame)?,
            };
            match queued {
                Some(Ok(())) => {
                    counters.tx_packets += 1;
                    counters.tx_bytes += frame.len() as u64;
                }
                None => counters.tx_drops += 1,
                Some(Err(AddError::Full)) => break,
                // A piece is never empty: a layout has no such buffers.
                Some(Err(AddError::Invalid)) => {
                    debug_assert!(false, "a frame of {} bytes has no description", frame.len());
                    break;
                }
            }
            done += 1;
        }
        self.ring.publish();
        Ok(done)
    }

    /// Queues a frame; whether there was room for it. Inlined, as `queue` is, where the header is
    /// known when this is compiled.
    #[inline(always)]
    fn offer(&mut self, header: [u8; HEADER_LEN], frame: &[u8]) -> Result<Result<(), AddError>, DriverFault> {
        match self.queue(header, frame) {
            Err(AddError::Full) => self.offer_again(header, frame),
            queued => Ok(queued),
        }
    }

    /// A long frame may not fit although more than half is free.
    #[inline(never)]
    fn offer_again(
        &mut self,
        header: [u8; HEADER_LEN],
        frame: &[u8],
    ) -> Result<Result<(), AddError>, DriverFault> {
        self.reap()?;
        Ok(self.queue(header, frame))
    }

    /// The same with a header that has something to say; `None` if the device accepts it in no way.
    #[inline(never)]
    fn offer_judged(
        &mut self,
        header: NetHeader,
        frame: &[u8],
    ) -> Result<Option<Result<(), AddError>>, DriverFault> {
        match self.offloads.judge(header, frame.len()) {
            Judged::Pass(header) => self.offer(header.to_bytes(), frame).map(Some),
            Judged::Complete(header) => {
                let mut whole = std::mem::take(&mut self.whole);
                complete(&header, frame, &mut whole);
                let queued = self.offer(PLAIN, &whole).map(Some);
                self.whole = whole;
                queued
            }
            Judged::Cut | Judged::Invalid => Ok(None),
        }
    }

    /// Copies one frame into free buffers and adds them to the ring.
    #[inline(always)]
    fn queue(&mut self, header: [u8; HEADER_LEN], frame: &[u8]) -> Result<(), AddError> {
        if M::ACTIVE || frame.len() > self.room {
            return self.queue_pieces(header, frame);
        }
        if self.free == 0 {
            return Err(AddError::Full);
        }
        let buffer = self.first;
        self.prefetch(buffer, frame.len());
        let start = self.place(buffer);
        self.put_header(buffer, start, header)?;
        self.memory.write(start + HEADROOM as u64, frame).map_err(outside)?;
        let piece = Buffer::readable(start + HEADER_AT as u64, (HEADER_LEN + frame.len()) as u32);
        self.ring.add_one(piece, token(buffer, buffer, 1))?;
        self.first = self.after(buffer);
        self.free -= 1;
        Ok(())
    }

    /// Asks for the cache lines that are written a few packets from now, which the peer has: of
    /// short frames early, of long ones late, so that they are not too many at once.
    #[inline]
    fn prefetch(&self, buffer: u16, len: usize) {
        let ahead = if len <= SHORT { AHEAD } else { LONG_AHEAD };
        if self.free <= ahead {
            return;
        }
        let frame = self.place(buffer.wrapping_add(ahead) & self.mask) + HEADROOM as u64;
        for line in 0..len.min(self.room).div_ceil(64) as u64 {
            self.memory.prefetch_write(frame + 64 * line);
        }
    }

    /// Writes the header of the packet that starts in a buffer, unless it is there: a store
    /// that would change nothing would only take the cache line from the device's CPU.
    #[inline]
    fn put_header(&mut self, buffer: u16, start: u64, header: [u8; HEADER_LEN]) -> Result<(), AddError> {
        if let Some(shadow) = self.headers.get_mut(usize::from(buffer))
            && *shadow != header
        {
            *shadow = header;
            self.memory.write_array(start + HEADER_AT as u64, &header).map_err(outside)?;
        }
        Ok(())
    }

    /// The same for a frame that takes several buffers, or buffers that have to be mapped.
    fn queue_pieces(&mut self, header: [u8; HEADER_LEN], frame: &[u8]) -> Result<(), AddError> {
        let count = self.config.pieces(frame.len());
        if count > usize::from(self.free) {
            return Err(AddError::Full);
        }
        let mut last = self.first;
        let start = self.place(last);
        self.put_header(last, start, header)?;
        let (now, mut later) = frame.split_at(frame.len().min(self.room));
        self.memory.write(start + HEADROOM as u64, now).map_err(outside)?;
        self.pieces.clear();
        self.pieces.push(Buffer::readable(start + HEADER_AT as u64, (HEADER_LEN + now.len()) as u32));
        while !later.is_empty() {
            last = self.after(last);
            let now;
            (now, later) = later.split_at(later.len().min(self.room));
            let at = self.place(last) + HEADROOM as u64;
            self.memory.write(at, now).map_err(outside)?;
            self.pieces.push(Buffer::readable(at, now.len() as u32));
        }
        let count = count as u16;
        self.map(count)?;
        let added = self.ring.add(&self.pieces, token(self.first, last, count));
        if added.is_err() {
            self.unmap(self.first, count);
        }
        added?;
        self.first = self.after(last);
        self.free -= count;
        Ok(())
    }

    /// Makes the pieces, which are in the first `count` free buffers, reachable.
    #[inline]
    fn map(&mut self, count: u16) -> Result<(), AddError> {
        if !M::ACTIVE {
            return Ok(());
        }
        let mut buffer = self.first;
        for done in 0..count {
            let piece = self.pieces.get_mut(usize::from(done));
            let mapped = piece.and_then(|piece| {
                *piece = self.mapping.map(buffer, *piece)?;
                Some(())
            });
            if mapped.is_none() {
                self.unmap(self.first, done);
                return Err(AddError::Full);
            }
            buffer = self.after(buffer);
        }
        Ok(())
    }

    /// Makes `count` buffers from `first` on unreachable.
    #[inline]
    fn unmap(&mut self, first: u16, count: u16) {
        if !M::ACTIVE {
            return;
        }
        let mut buffer = first;
        for _ in 0..count {
            self.mapping.unmap(buffer);
            buffer = self.after(buffer);
        }
    }

    #[inline]
    fn place(&self, buffer: u16) -> u64 {
        self.buffers + u64::from(buffer) * u64::from(self.config.buffer_len)
    }

    #[inline]
    fn after(&self, buffer: u16) -> u16 {
        self.next.get(usize::from(buffer)).copied().unwrap_or(0)
    }

    #[inline]
    pub(super) fn reap(&mut self) -> Result<(), DriverFault> {
        self.completions.clear();
        self.ring.reap(usize::from(self.ring.size()), &mut self.completions)?;
        for at in 0..self.completions.len() {
            let Some(completion) = self.completions.get(at) else { break };
            let [first, last, count] = [0, 16, 32].map(|shift| (completion.token >> shift) as u16);
            // Along the links that they had when they were taken, before they change.
            self.unmap(first, count);
            if self.free == 0 {
                self.first = first;
            } else if let Some(link) = self.next.get_mut(usize::from(self.last)) {
                *link = first;
            }
            self.last = last;
            self.free += count;
        }
        Ok(())
    }
}
