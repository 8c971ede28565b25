//! The owner's port: the driver half of a network card's queues, with rings and
//! buffers in the owner's own memory.
//!
//! Owns: one [`DriverRing`] for each vring, the pools of buffers, and the copying
//! between them and private memory. Plays what an owner's guest would run; the device
//! on the other side is as little trusted as a peer is.

use super::burst::PacketBurst;
use super::header::{HEADER_LEN, MAX_FRAME};
use super::layout::{HEADER_AT, HEADROOM, OwnerConfig, OwnerLayout, VringLayout};
use super::{Counters, receive_vring, transmit_vring};
use crate::ring::{AddError, Buffer, Completion, DriverFault, DriverRing};
use crate::shm::{SharedMemory, ShmError};

/// How the buffers of one vring become reachable for the device: what a kernel's DMA
/// API does for a driver.
pub trait BufferMapping {
    /// Whether it does anything.
    const ACTIVE: bool;

    /// A buffer is about to be made available. Returns it as the ring's descriptor
    /// names it (the ring adds its `iova_base`), or `None` if the device cannot reach
    /// it: then it is not made available.
    fn map(&mut self, buffer: u16, piece: Buffer) -> Option<Buffer>;

    /// The device has given the buffer back. It is looked at, and used again, only
    /// when this has returned.
    fn unmap(&mut self, buffer: u16);
}

/// Buffers that the device always reaches, where the ring expects them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fixed;

impl BufferMapping for Fixed {
    const ACTIVE: bool = false;

    #[inline]
    fn map(&mut self, _: u16, piece: Buffer) -> Option<Buffer> {
        Some(piece)
    }

    #[inline]
    fn unmap(&mut self, _: u16) {}
}

/// The owner's port on its network card.
#[derive(Debug)]
pub struct OwnerPort<M = Fixed> {
    pairs: Vec<Pair<M>>,
    counters: Counters,
}

#[derive(Debug)]
struct Pair<M> {
    receive: Receiver<M>,
    transmit: Transmitter<M>,
}

impl OwnerPort {
    /// Makes fresh rings in `memory` and posts all receive buffers. Addresses given to
    /// the device are `iova_base` + offset in the memory.
    pub fn new(memory: &SharedMemory, layout: &OwnerLayout, iova_base: u64) -> Result<Self, ShmError> {
        Self::with_mapping(memory, layout, |_| (iova_base, Fixed))
    }
}

impl<M: BufferMapping> OwnerPort<M> {
    /// As [`OwnerPort::new`], with an `iova_base` and a way to map buffers for each
    /// vring.
    pub fn with_mapping(
        memory: &SharedMemory,
        layout: &OwnerLayout,
        mut vring_mapping: impl FnMut(u16) -> (u64, M),
    ) -> Result<Self, ShmError> {
        let config = layout.config();
        let mut pair = |(pair, both): (usize, &[VringLayout])| {
            let [receive, transmit] = both else { return None };
            let mut ring = |vring: u16, at: &VringLayout| {
                let (iova_base, mapping) = vring_mapping(vring);
                let features = config.ring_features();
                DriverRing::with_features(vring, &at.places, memory, iova_base, at.tables, features)
                    .map(|ring| (ring, mapping))
            };
            // A layout has at most 2^14 pairs.
            let pair = pair as u16;
            Some(ring(receive_vring(pair), receive).and_then(|receive_ring| {
                Ok(Pair {
                    receive: Receiver::new(receive_ring, memory, receive.buffers, config)?,
                    transmit: Transmitter::new(
                        ring(transmit_vring(pair), transmit)?,
                        memory,
                        transmit.buffers,
                        layout.max_frame(),
                        config,
                    )?,
                })
            }))
        };
        let pairs = layout.vrings().chunks(2).enumerate().filter_map(&mut pair).collect::<Result<_, _>>()?;
        Ok(Self { pairs, counters: Counters::default() })
    }

    /// Queue pairs.
    pub fn pairs(&self) -> u16 {
        self.pairs.len() as u16
    }

    /// What has passed since the port was made.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Transmits frames. Returns how many of them are done with: queued, or dropped
    /// for being too long. The others are the caller's to offer again.
    ///
    /// The device may want a kick afterwards: see [`Self::needs_kick`].
    #[inline]
    pub fn tx_burst<'a>(
        &mut self,
        pair: u16,
        frames: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<usize, DriverFault> {
        match self.pairs.get_mut(usize::from(pair)) {
            Some(pair) => pair.transmit.send(frames, &mut self.counters),
            None => Ok(0),
        }
    }

    /// Receives up to `budget` packets, appends them to `burst` and posts their
    /// buffers again. Returns how many.
    ///
    /// The device may want a kick afterwards: see [`Self::needs_kick`].
    #[inline]
    pub fn rx_burst(
        &mut self,
        pair: u16,
        burst: &mut PacketBurst,
        budget: usize,
    ) -> Result<usize, DriverFault> {
        match self.pairs.get_mut(usize::from(pair)) {
            Some(pair) => pair.receive.receive(burst, budget, &mut self.counters),
            None => Ok(0),
        }
    }

    /// Takes back the buffers of transmitted packets. `tx_burst` does so by itself when
    /// they run short; this is for who was called for them. Returns how many packets
    /// are still with the device.
    pub fn reap_transmitted(&mut self, pair: u16) -> Result<u16, DriverFault> {
        match self.pairs.get_mut(usize::from(pair)) {
            Some(pair) => {
                pair.transmit.reap()?;
                Ok(pair.transmit.ring.in_flight())
            }
            None => Ok(0),
        }
    }

    #[inline]
    fn ring(&mut self, vring: u16) -> Option<&mut DriverRing> {
        let pair = self.pairs.get_mut(usize::from(vring / 2))?;
        Some(if vring.is_multiple_of(2) { &mut pair.receive.ring } else { &mut pair.transmit.ring })
    }

    /// Whether the device wants a kick for what was published on the vring since this
    /// was last asked. To be asked after each burst, and once after [`Self::new`].
    #[inline]
    pub fn needs_kick(&mut self, vring: u16) -> bool {
        self.ring(vring).is_some_and(DriverRing::needs_kick)
    }

    /// Asks the device for calls of the vring, or not to call. Returns whether
    /// completions are waiting already: who gets `true` must not sleep. To be asked for
    /// before each sleep.
    pub fn set_calls(&mut self, vring: u16, enabled: bool) -> Result<bool, DriverFault> {
        self.ring(vring).map_or(Ok(false), |ring| ring.set_calls(enabled))
    }

    /// Asks the device to call when most of what is being transmitted on a pair is done, for
    /// who waits for room: one call, if VIRTIO_F_EVENT_IDX was negotiated, however many
    /// bursts that takes. Returns whether it is done already.
    pub fn set_calls_for_room(&mut self, pair: u16) -> Result<bool, DriverFault> {
        let Some(pair) = self.pairs.get_mut(usize::from(pair)) else {
            return Ok(false);
        };
        let ring = &mut pair.transmit.ring;
        // As many as Linux waits for (virtqueue_enable_cb_delayed).
        let most = ring.in_flight() / 4 * 3;
        ring.set_calls_after(most)
    }
}

/// The receive queue: each buffer is posted by itself and its number is its token.
#[derive(Debug)]
struct Receiver<M> {
    ring: DriverRing,
    mapping: M,
    memory: SharedMemory,
    buffers: u64,
    buffer_len: u32,
    mergeable: bool,
    completions: Vec<Completion>,
}

impl<M: BufferMapping> Receiver<M> {
    fn new(
        (ring, mapping): (DriverRing, M),
        memory: &SharedMemory,
        buffers: u64,
        config: &OwnerConfig,
    ) -> Result<Self, ShmError> {
        let size = ring.size();
        let mut receiver = Self {
            ring,
            mapping,
            memory: memory.part(0, memory.len())?,
            buffers,
            buffer_len: config.buffer_len,
            mergeable: config.mergeable,
            completions: Vec::with_capacity(usize::from(size)),
        };
        for buffer in 0..u64::from(size) {
            receiver.post(buffer);
        }
        receiver.ring.publish();
        Ok(receiver)
    }

    /// Where the header of a packet in the buffer is, or its first byte.
    #[inline]
    fn place(&self, buffer: u64) -> u64 {
        self.buffers + buffer * u64::from(self.buffer_len) + HEADER_AT as u64
    }

    #[inline]
    fn post(&mut self, buffer: u64) {
        let piece = Buffer::writable(self.place(buffer), self.buffer_len - HEADER_AT as u32);
        // A buffer's number is below the ring's size. One that cannot be mapped is not
        // posted again: the device has one buffer less.
        let Some(piece) = self.mapping.map(buffer as u16, piece) else { return };
        let added = self.ring.add_one(piece, buffer);
        debug_assert!(added.is_ok(), "there are as many buffers as descriptors");
    }

    /// Takes back buffers, which the device then does not reach any more.
    #[inline]
    fn reap(&mut self, budget: usize) -> Result<(), DriverFault> {
        let before = self.completions.len();
        self.ring.reap(budget, &mut self.completions)?;
        if M::ACTIVE {
            for completion in self.completions.iter().skip(before) {
                self.mapping.unmap(completion.token as u16);
            }
        }
        Ok(())
    }

    #[inline]
    fn receive(
        &mut self,
        burst: &mut PacketBurst,
        budget: usize,
        counters: &mut Counters,
    ) -> Result<usize, DriverFault> {
        self.completions.clear();
        self.reap(budget)?;
        let mut received = 0;
        let mut at = 0;
        while at < self.completions.len() {
            let (taken, len) = self.copy_packet(at, burst);
            match len {
                Some(len) => {
                    burst.finish(len, true);
                    received += 1;
                    counters.rx_bytes += (len - HEADER_LEN) as u64;
                }
                None => counters.rx_drops += 1,
            }
            at += taken;
        }
        for at in 0..self.completions.len() {
            if let Some(completion) = self.completions.get(at) {
                self.post(completion.token);
            }
        }
        self.ring.publish();
        counters.rx_packets += received as u64;
        Ok(received)
    }

    /// Copies the packet whose first buffer is completion number `at`. Returns how many
    /// buffers it took (at least 1), and its length with header if it is whole.
    #[inline]
    fn copy_packet(&mut self, at: usize, burst: &mut PacketBurst) -> (usize, Option<usize>) {
        let Some(mut filled) = self.copy_buffer(at, burst, 0).filter(|len| *len >= HEADER_LEN) else {
            return (1, None);
        };
        if !self.mergeable {
            return (1, Some(filled).filter(|len| *len <= HEADER_LEN + MAX_FRAME));
        }
        // From the private copy: the header in the buffer may have changed meanwhile.
        let count = burst.pending_header().map_or(0, |header| usize::from(header.num_buffers));
        let have = self.completions.len() - at;
        if count > have {
            // 5.1.6.4: all buffers of a packet are in the used ring together, so what
            // the budget cut off is there. A fault is found again by the next call.
            let _ = self.reap(count - have);
        }
        if count == 0 || count > self.completions.len() - at {
            return (count.clamp(1, self.completions.len() - at), None);
        }
        for more in 1..count {
            let len = self.copy_buffer(at + more, burst, filled);
            match len.map(|len| filled + len).filter(|total| *total <= HEADER_LEN + MAX_FRAME) {
                Some(total) => filled = total,
                None => return (count, None),
            }
        }
        (count, Some(filled))
    }

    /// Copies one buffer behind the `filled` bytes of its packet. Returns its length.
    #[inline]
    fn copy_buffer(&self, at: usize, burst: &mut PacketBurst, filled: usize) -> Option<usize> {
        let completion = self.completions.get(at)?;
        let len = completion.len as usize;
        self.memory.read(self.place(completion.token), burst.room(filled, len)).ok()?;
        Some(len)
    }
}

/// So many packets before it is written, a buffer's cache line is asked for: the peer has it.
/// (In steady state buffers come in the order of their numbers.)
const AHEAD: u16 = 16;

/// The transmit queue and its free buffers, first in first out.
#[derive(Debug)]
struct Transmitter<M> {
    ring: DriverRing,
    mapping: M,
    memory: SharedMemory,
    buffers: u64,
    max_frame: usize,
    /// Bytes of a frame that one buffer takes.
    room: usize,
    /// The ring's size less 1.
    mask: u16,
    config: OwnerConfig,
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
    fn new(
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
            memory: memory.part(0, memory.len())?,
            buffers,
            max_frame,
            room: config.room(),
            mask: size - 1,
            config: *config,
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
    fn send<'a>(
        &mut self,
        frames: impl IntoIterator<Item = &'a [u8]>,
        counters: &mut Counters,
    ) -> Result<usize, DriverFault> {
        // Early enough to never wait for the device, late enough to look at its cache
        // line once for many bursts.
        if self.free <= self.ring.size() / 2 {
            self.reap()?;
        }
        let mut done = 0;
        for frame in frames {
            if frame.len() > self.max_frame {
                counters.tx_drops += 1;
                done += 1;
                continue;
            }
            let queued = match self.queue(frame) {
                // A long frame may not fit although more than half is free.
                Err(AddError::Full) => {
                    self.reap()?;
                    self.queue(frame)
                }
                queued => queued,
            };
            match queued {
                Ok(()) => {}
                Err(AddError::Full) => break,
                // A piece is never empty: a layout has no such buffers.
                Err(AddError::Invalid) => {
                    debug_assert!(false, "a frame of {} bytes has no description", frame.len());
                    break;
                }
            }
            counters.tx_packets += 1;
            counters.tx_bytes += frame.len() as u64;
            done += 1;
        }
        self.ring.publish();
        Ok(done)
    }

    /// Copies one frame into free buffers and adds them to the ring.
    #[inline]
    fn queue(&mut self, frame: &[u8]) -> Result<(), AddError> {
        if M::ACTIVE || frame.len() > self.room {
            return self.queue_pieces(frame);
        }
        if self.free == 0 {
            return Err(AddError::Full);
        }
        let buffer = self.first;
        if self.free > AHEAD {
            let ahead = buffer.wrapping_add(AHEAD) & self.mask;
            self.memory.prefetch_write(self.place(ahead) + HEADROOM as u64);
        }
        let start = self.place(buffer);
        self.put_header(buffer, start, [0; HEADER_LEN])?;
        self.memory.write(start + HEADROOM as u64, frame).map_err(outside)?;
        let piece = Buffer::readable(start + HEADER_AT as u64, (HEADER_LEN + frame.len()) as u32);
        self.ring.add_one(piece, token(buffer, buffer, 1))?;
        self.first = self.after(buffer);
        self.free -= 1;
        Ok(())
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
    fn queue_pieces(&mut self, frame: &[u8]) -> Result<(), AddError> {
        let count = self.config.pieces(frame.len());
        if count > usize::from(self.free) {
            return Err(AddError::Full);
        }
        let mut last = self.first;
        let start = self.place(last);
        self.put_header(last, start, [0; HEADER_LEN])?;
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
    fn reap(&mut self) -> Result<(), DriverFault> {
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
