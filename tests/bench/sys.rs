//! The least that a ring between two processors can be: one producer, one consumer, an index each
//! on a line of its own, and slots that are whole cache lines. The only `unsafe` of this program.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes.
pub const LINE: usize = 64;

/// An index, and the neighbouring line, which some processors fetch with it.
#[derive(Default)]
#[repr(align(128))]
struct Index(AtomicU64);

#[expect(dead_code, reason = "reached by `Ring::slot` as bytes")]
#[repr(align(64))]
struct Line(UnsafeCell<[u8; LINE]>);

struct Ring {
    /// Messages ever produced, and ever consumed.
    head: Index,
    tail: Index,
    lines: Box<[Line]>,
    len: usize,
    /// Lines of a slot.
    stride: usize,
    /// Slots; a power of two.
    count: u64,
}

// SAFETY: a slot is touched by one side at a time: by the consumer from when `head` has passed it,
// by the producer from when `tail` has. There is one `Producer` and one `Consumer` of a ring, as
// only `ring` makes them and neither can be cloned.
unsafe impl Sync for Ring {}

impl Ring {
    /// Where a message is.
    fn slot(&self, at: u64) -> *mut u8 {
        let index = (at & (self.count - 1)) as usize * self.stride;
        // In bounds: `ring` has made `count` slots of `stride` lines each. The pointer is derived
        // from the whole slice, so it may go on to the slot's other lines.
        self.lines.as_ptr().wrapping_add(index).cast_mut().cast()
    }

    /// Copies a message.
    ///
    /// # Safety
    /// `from` can be read and `to` be written for `self.len` bytes, which do not overlap, and
    /// nobody else touches them meanwhile.
    #[inline]
    unsafe fn copy(&self, from: *const u8, to: *mut u8) {
        // SAFETY: the caller's.
        unsafe {
            if self.len == LINE {
                // A length that the compiler knows is a copy without a call.
                std::ptr::copy_nonoverlapping(from, to, LINE);
            } else {
                std::ptr::copy_nonoverlapping(from, to, self.len);
            }
        }
    }

    /// Asks the processor for the lines of a slot, which is about to be written.
    #[inline]
    fn prefetch_write(&self, at: u64) {
        #[cfg(target_arch = "x86_64")]
        for line in 0..self.stride {
            let line = self.slot(at).wrapping_add(line * LINE);
            // By name, as the intrinsic may become a prefetch for reading.
            // SAFETY: it changes no memory and does not fault.
            unsafe {
                std::arch::asm!("prefetchw [{line}]", line = in(reg) line, options(nostack, preserves_flags, readonly));
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = at;
    }
}

/// How the producer gets the lines that it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// When it writes them.
    Never,
    /// So many lines before, in whole slots.
    Ahead(usize),
}

/// The sending end.
pub struct Producer {
    ring: Arc<Ring>,
    head: u64,
    /// As last seen.
    tail: u64,
    /// Slots between the one that is written and the one whose lines are asked for, if they are.
    ahead: Option<u64>,
}

/// The receiving end.
pub struct Consumer {
    ring: Arc<Ring>,
    tail: u64,
    /// As last seen.
    head: u64,
}

/// A ring of so many slots, brought up to a power of two, for messages of so many bytes.
pub fn ring(slots: usize, len: usize, ask: Ask) -> (Producer, Consumer) {
    let (count, stride) = (slots.next_power_of_two(), len.div_ceil(LINE).max(1));
    let lines = (0..count * stride).map(|_| Line(UnsafeCell::new([0; LINE]))).collect();
    let ring = Arc::new(Ring {
        head: Index::default(),
        tail: Index::default(),
        lines,
        len,
        stride,
        count: count as u64,
    });
    let ahead = match ask {
        Ask::Never => None,
        Ask::Ahead(lines) => Some((lines / stride).max(1) as u64),
    };
    (Producer { ring: Arc::clone(&ring), head: 0, tail: 0, ahead }, Consumer { ring, tail: 0, head: 0 })
}

impl Producer {
    /// Sends as many of the messages, which lie one behind the other, as there is room for.
    pub fn send(&mut self, messages: &[u8]) -> usize {
        let wanted = (messages.len() / self.ring.len) as u64;
        if self.ring.count - (self.head - self.tail) < wanted {
            // Acquire: pairs with the store of `tail` in `receive`.
            self.tail = self.ring.tail.0.load(Ordering::Acquire);
        }
        let count = wanted.min(self.ring.count - (self.head - self.tail));
        for (message, at) in messages.chunks_exact(self.ring.len).zip(self.head..self.head + count) {
            if let Some(ahead) = self.ahead {
                self.ring.prefetch_write(at + ahead);
            }
            // SAFETY: `message` has `len` bytes, and so has the slot, which `tail` has passed.
            unsafe { self.ring.copy(message.as_ptr(), self.ring.slot(at)) };
        }
        self.head += count;
        if count > 0 {
            // Release: pairs with the load of `head` in `receive`.
            self.ring.head.0.store(self.head, Ordering::Release);
        }
        count as usize
    }
}

impl Consumer {
    /// Copies out as many messages as there are and room is for.
    pub fn receive(&mut self, into: &mut [u8]) -> usize {
        if self.head == self.tail {
            // Acquire: pairs with the store of `head` in `send`.
            self.head = self.ring.head.0.load(Ordering::Acquire);
        }
        let count = (self.head - self.tail).min((into.len() / self.ring.len) as u64);
        for (message, at) in into.chunks_exact_mut(self.ring.len).zip(self.tail..self.tail + count) {
            // SAFETY: `message` has `len` bytes, and so has the slot, which `head` has passed.
            unsafe { self.ring.copy(self.ring.slot(at), message.as_mut_ptr()) };
        }
        self.tail += count;
        if count > 0 {
            // Release: pairs with the load of `tail` in `send`.
            self.ring.tail.0.store(self.tail, Ordering::Release);
        }
        count as usize
    }
}

/// The processor copies a line by one load and one store.
#[derive(Clone, Copy)]
pub struct LineCopy(());

impl LineCopy {
    /// If it does.
    pub fn new() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        let has = std::is_x86_feature_detected!("avx512f");
        #[cfg(not(target_arch = "x86_64"))]
        let has = false;
        has.then_some(Self(()))
    }
}

impl Producer {
    /// As [`Self::send`], of a ring of lines.
    pub fn send_lines(&mut self, messages: &[[u8; LINE]], _: LineCopy) -> usize {
        assert_eq!(self.ring.len, LINE);
        #[cfg(target_arch = "x86_64")]
        {
            // SAFETY: `LineCopy` says that the processor has AVX-512.
            unsafe { self.send_lines_avx512(messages) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        self.send(messages.as_flattened())
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    fn send_lines_avx512(&mut self, messages: &[[u8; LINE]]) -> usize {
        use std::arch::x86_64::{_mm512_loadu_si512, _mm512_store_si512};
        let wanted = messages.len() as u64;
        if self.ring.count - (self.head - self.tail) < wanted {
            // Acquire: pairs with the store of `tail` in `receive_lines`.
            self.tail = self.ring.tail.0.load(Ordering::Acquire);
        }
        let count = wanted.min(self.ring.count - (self.head - self.tail));
        for (message, at) in messages.iter().zip(self.head..self.head + count) {
            // SAFETY: `message` is a line, and so is the slot, which is aligned to its length and
            // which `tail` has passed.
            unsafe {
                _mm512_store_si512(self.ring.slot(at).cast(), _mm512_loadu_si512(message.as_ptr().cast()))
            };
        }
        self.head += count;
        if count > 0 {
            // Release: pairs with the load of `head` in `receive_lines`.
            self.ring.head.0.store(self.head, Ordering::Release);
        }
        count as usize
    }
}

impl Consumer {
    /// As [`Self::receive`], of a ring of lines.
    pub fn receive_lines(&mut self, into: &mut [[u8; LINE]], _: LineCopy) -> usize {
        assert_eq!(self.ring.len, LINE);
        #[cfg(target_arch = "x86_64")]
        {
            // SAFETY: `LineCopy` says that the processor has AVX-512.
            unsafe { self.receive_lines_avx512(into) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        self.receive(into.as_flattened_mut())
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    fn receive_lines_avx512(&mut self, into: &mut [[u8; LINE]]) -> usize {
        use std::arch::x86_64::{_mm512_load_si512, _mm512_storeu_si512};
        if self.head == self.tail {
            // Acquire: pairs with the store of `head` in `send_lines`.
            self.head = self.ring.head.0.load(Ordering::Acquire);
        }
        let count = (self.head - self.tail).min(into.len() as u64);
        for (message, at) in into.iter_mut().zip(self.tail..self.tail + count) {
            // SAFETY: `message` is a line, and so is the slot, which is aligned to its length and
            // which `head` has passed.
            unsafe {
                _mm512_storeu_si512(message.as_mut_ptr().cast(), _mm512_load_si512(self.ring.slot(at).cast()))
            };
        }
        self.tail += count;
        if count > 0 {
            // Release: pairs with the load of `tail` in `send_lines`.
            self.ring.tail.0.store(self.tail, Ordering::Release);
        }
        count as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_whole_and_in_order() {
        for (len, ask) in
            [(64, Ask::Never), (100, Ask::Ahead(16)), (1500, Ask::Never), (1500, Ask::Ahead(16))]
        {
            let (mut producer, mut consumer) = ring(8, len, ask);
            let sender = std::thread::spawn(move || {
                let mut next = 0_u32;
                while next < 10_000 {
                    let burst: Vec<u8> = (next..next + 4)
                        .flat_map(|number| [number as u8, (number >> 8) as u8].repeat(len / 2))
                        .collect();
                    next += producer.send(&burst) as u32;
                }
                next
            });
            let (mut expected, mut into) = (0_u32, vec![0; 3 * len]);
            while expected < 10_000 {
                let count = consumer.receive(&mut into);
                for message in into.chunks_exact(len).take(count) {
                    let whole = [expected as u8, (expected >> 8) as u8].repeat(len / 2);
                    assert_eq!(message, whole, "message {expected} of {len} bytes");
                    expected += 1;
                }
                std::thread::yield_now();
            }
            assert!(sender.join().is_ok_and(|sent| sent >= expected));
        }
    }

    #[test]
    fn lines_arrive_whole_and_in_order() {
        let Some(copy) = LineCopy::new() else { return };
        let (mut producer, mut consumer) = ring(8, LINE, Ask::Never);
        let (mut sent, mut received, mut into) = (0_u8, 0_u8, [[0; LINE]; 5]);
        for _ in 0..1000 {
            let lines: [_; 3] = std::array::from_fn(|at| [sent.wrapping_add(at as u8); LINE]);
            sent = sent.wrapping_add(producer.send_lines(&lines, copy) as u8);
            let count = consumer.receive_lines(&mut into, copy);
            for line in &into[..count] {
                assert_eq!(*line, [received; LINE]);
                received = received.wrapping_add(1);
            }
        }
        assert!(received == sent && received != 0);
    }
}
