//! The owner's receive queue.
//!
//! Owns: its buffers, which are with the device except while a packet is copied out of one.

use super::BufferMapping;
use crate::net::Counters;
use crate::net::burst::PacketBurst;
use crate::net::header::{HEADER_LEN, MAX_FRAME, NetHeader};
use crate::net::layout::{HEADER_AT, OwnerConfig};
use crate::ring::{Buffer, Completion, DriverFault, DriverRing};
use crate::shm::{SharedMemory, ShmError};

/// The receive queue: each buffer is posted by itself and its number is its token.
#[derive(Debug)]
pub(super) struct Receiver<M> {
    pub(super) ring: DriverRing,
    mapping: M,
    memory: SharedMemory,
    buffers: u64,
    buffer_len: u32,
    mergeable: bool,
    /// Offloads were negotiated.
    headers: bool,
    completions: Vec<Completion>,
}

impl<M: BufferMapping> Receiver<M> {
    pub(super) fn new(
        (ring, mapping): (DriverRing, M),
        memory: &SharedMemory,
        buffers: u64,
        config: &OwnerConfig,
    ) -> Result<Self, ShmError> {
        let size = ring.size();
        let mut receiver = Self {
            ring,
            mapping,
            memory: memory.clone(),
            buffers,
            buffer_len: config.buffer_len,
            mergeable: config.mergeable,
            headers: config.offloads,
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
    pub(super) fn receive(
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
                    let header = match self.headers {
                        true => burst.pending_header().unwrap_or_default(),
                        // It has nothing to say but what was seen.
                        false => NetHeader { num_buffers: taken as u16, ..NetHeader::default() },
                    };
                    burst.finish(len, header);
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
        // What is shorter than a header wraps.
        let is_possible = |len: &usize| len.wrapping_sub(HEADER_LEN) <= MAX_FRAME;
        let Some(mut filled) = self.copy_buffer(at, burst, 0).filter(is_possible) else {
            return (1, None);
        };
        if !self.mergeable {
            return (1, Some(filled));
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
            match len.map(|len| filled + len).filter(is_possible) {
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
