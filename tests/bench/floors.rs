//! What the hardware allows: copies by one processor, and a bare ring between two.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::contender::{Contender, Count, Kind, Running};
use crate::host::{RECEIVER, SENDER, pin_this_thread};
use crate::sys::{self, Ask};

/// Messages sent and received at a time.
const BATCH: usize = 32;
/// Slots of the ring and of the working set that is copied: as many as our owner's ring has.
const SLOTS: usize = 512;
/// Sizes that are copied whatever is asked for.
const MEMCPY_SIZES: [usize; 5] = [64, 256, 1500, 9000, 65_536];
/// Bytes of a buffer of our owner's.
const BUFFER: usize = 2048;

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const END: u8 = 2;

/// A copy out of as many buffers as a ring has into those of a burst, by one processor.
pub struct Memcpy;

/// A bare ring, single producer and single consumer: slots of whole cache lines, into which the one side
/// copies and out of which the other side does.
pub struct Spsc {
    name: &'static str,
    about: &'static str,
    ask: Ask,
}

/// All that are measured.
pub const RINGS: [Spsc; 2] = [
    Spsc {
        name: "SPSC ring",
        about: "two threads, 512 slots of whole cache lines, batches of 32, a copy into it and a copy out of it",
        ask: Ask::Never,
    },
    Spsc {
        name: "SPSC ring, lines asked for",
        about: "the same, and the producer asks for the lines that it will write 16 lines, or a slot, before",
        ask: Ask::Ahead(16),
    },
];

/// Whether a contender of this name is a bare ring of packets.
pub fn is_ring(name: &str) -> bool {
    RINGS.iter().any(|ring| ring.name == name)
}

impl Contender for Memcpy {
    fn name(&self) -> &'static str {
        "memcpy"
    }

    fn about(&self) -> &'static str {
        "one processor copies out of 512 buffers into 64, all in its own caches if they fit"
    }

    fn kind(&self) -> Kind {
        Kind::Floor
    }

    fn sizes(&self, asked: &[usize]) -> Vec<usize> {
        let mut sizes = [asked, &MEMCPY_SIZES].concat();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }

    fn start(&self, size: usize) -> Result<Box<dyn Running>> {
        let mut threads = Threads::default();
        threads.spawn(
            RECEIVER,
            move || {
                let stride = size.next_multiple_of(64).max(BUFFER);
                let (from, mut to) = (vec![1_u8; SLOTS * stride], vec![0_u8; 2 * BATCH * stride]);
                let mut next = 0;
                move || {
                    for _ in 0..BATCH {
                        let source = next % SLOTS * stride;
                        let target = next % (2 * BATCH) * stride;
                        to[target..target + size].copy_from_slice(black_box(&from[source..source + size]));
                        next += 1;
                    }
                    black_box(&to);
                    BATCH
                }
            },
            size,
        );
        Ok(Box::new(threads))
    }
}

impl Contender for Spsc {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn kind(&self) -> Kind {
        Kind::Floor
    }

    fn start(&self, size: usize) -> Result<Box<dyn Running>> {
        let (mut producer, mut consumer) = sys::ring(SLOTS, size, self.ask);
        let receive = move || {
            let mut into = vec![0; BATCH * size];
            move || {
                let count = consumer.receive(&mut into);
                black_box(&into);
                count
            }
        };
        let send = move || {
            let from = vec![1; BATCH * size];
            move || {
                producer.send(black_box(&from));
                0
            }
        };
        Ok(Box::new(Threads::pair(receive, send, size)))
    }
}

/// The same ring with messages of one cache line, each copied by two instructions where the processor
/// has them.
pub struct SpscLines;

impl Contender for SpscLines {
    fn name(&self) -> &'static str {
        "SPSC ring of lines"
    }

    fn about(&self) -> &'static str {
        "the same for messages of one cache line only, copied by AVX-512 loads and stores without a call"
    }

    fn kind(&self) -> Kind {
        Kind::Floor
    }

    fn sizes(&self, asked: &[usize]) -> Vec<usize> {
        asked.iter().copied().filter(|size| *size == sys::LINE).collect()
    }

    fn start(&self, size: usize) -> Result<Box<dyn Running>> {
        let (mut producer, mut consumer) = sys::ring(SLOTS, size, Ask::Never);
        let copy = sys::LineCopy::new().context("this processor has no AVX-512")?;
        let receive = move || {
            let mut into = vec![[0; sys::LINE]; BATCH];
            move || {
                let count = consumer.receive_lines(&mut into, copy);
                black_box(&into);
                count
            }
        };
        let send = move || {
            let from = vec![[1; sys::LINE]; BATCH];
            move || {
                producer.send_lines(black_box(&from), copy);
                0
            }
        };
        Ok(Box::new(Threads::pair(receive, send, size)))
    }
}

/// On a line of its own each: one is written by a thread all the time.
#[derive(Default)]
#[repr(align(128))]
struct Aligned<T>(T);

#[derive(Default)]
struct State {
    order: Aligned<AtomicU8>,
    moved: Aligned<AtomicU64>,
}

/// Threads of this process that move something until they are told to end.
#[derive(Default)]
struct Threads {
    state: Arc<State>,
    threads: Vec<thread::JoinHandle<()>>,
    size: usize,
}

impl Threads {
    /// One that receives and one that sends, each on its processor.
    fn pair<Receive: FnMut() -> usize, Sends: FnMut() -> usize>(
        receive: impl FnOnce() -> Receive + Send + 'static,
        send: impl FnOnce() -> Sends + Send + 'static,
        size: usize,
    ) -> Self {
        let mut threads = Self::default();
        threads.spawn(RECEIVER, receive, size);
        threads.spawn(SENDER, send, size);
        threads
    }

    /// A thread on a processor. What `make` makes there is called over and over and says how many
    /// messages have arrived.
    fn spawn<Work: FnMut() -> usize>(
        &mut self,
        processor: usize,
        make: impl FnOnce() -> Work + Send + 'static,
        size: usize,
    ) {
        self.size = size;
        let state = Arc::clone(&self.state);
        self.threads.push(thread::spawn(move || {
            if pin_this_thread(processor).is_err() {
                return;
            }
            let (mut work, mut sum) = (make(), 0);
            loop {
                // Relaxed, as below: the orders and the count publish nothing but themselves.
                match state.order.0.load(Ordering::Relaxed) {
                    RUN => {
                        let moved = work();
                        if moved > 0 {
                            sum += moved as u64;
                            state.moved.0.store(sum, Ordering::Relaxed);
                        }
                    }
                    PAUSE => thread::sleep(Duration::from_millis(1)),
                    _ => return,
                }
            }
        }));
    }
}

impl Running for Threads {
    fn pids(&self) -> Vec<u32> {
        Vec::new()
    }

    fn pause(&mut self) -> Result<()> {
        self.state.order.0.store(PAUSE, Ordering::Relaxed);
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        self.state.order.0.store(RUN, Ordering::Relaxed);
        Ok(())
    }

    fn received(&mut self) -> Result<Count> {
        let packets = self.state.moved.0.load(Ordering::Relaxed);
        Ok(Count { at: Instant::now(), packets, bytes: packets * self.size as u64 })
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.state.order.0.store(END, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It fails only if the thread has panicked, which has been printed.
            let _ = thread.join();
        }
    }
}
