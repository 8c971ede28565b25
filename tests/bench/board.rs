//! A page in which our receiver's process says how far it is, so that it can be read at any moment
//! without asking: a question would cost the receiver more than the packets of a burst.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result};
use guest_driver_model::shm::SharedMemory;

/// Bytes.
const LEN: usize = 4096;
/// Where the numbers are: on one cache line.
const PACKETS: u64 = 0;
const BYTES: u64 = 8;
const SAMPLED: u64 = 16;
const CORRUPTED: u64 = 24;
const SEARCHES: u64 = 32;
const HEADERS: u64 = 40;

/// What is on it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Numbers {
    /// Packets received.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets of which every byte was looked at.
    pub sampled: u64,
    /// Packets of which the header was looked at, and nothing else.
    pub headers: u64,
    /// Packets with a wrong length, and those looked at with a wrong byte.
    pub corrupted: u64,
    /// Buffers that were searched for in the mapping table.
    pub searches: u64,
}

/// The page, in a file.
#[derive(Debug)]
pub struct Board(SharedMemory);

impl Board {
    /// A new one, all zero.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        file.set_len(LEN as u64)?;
        Self::open(path)
    }

    /// One that is there.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).open(path);
        let file = file.with_context(|| path.display().to_string())?;
        Ok(Self(SharedMemory::map(file.as_fd(), 0, LEN).context("mapping the counters")?))
    }

    /// Writes all of it: plain stores to one line, which nobody else reads but now and then.
    pub fn write(&self, numbers: &Numbers) {
        let Numbers { packets, bytes, sampled, headers, corrupted, searches } = *numbers;
        let numbers = [
            (SAMPLED, sampled),
            (HEADERS, headers),
            (CORRUPTED, corrupted),
            (SEARCHES, searches),
            (BYTES, bytes),
            (PACKETS, packets),
        ];
        for (at, number) in numbers {
            // The page is as long as `open` mapped it.
            let _ = self.0.store_u64_release(at, number);
        }
    }

    /// Reads it. A burst may be in some of the numbers and not yet in others.
    pub fn read(&self) -> Result<Numbers> {
        let number = |at| self.0.load_u64_acquire(at).context("reading the counters");
        Ok(Numbers {
            packets: number(PACKETS)?,
            bytes: number(BYTES)?,
            sampled: number(SAMPLED)?,
            headers: number(HEADERS)?,
            corrupted: number(CORRUPTED)?,
            searches: number(SEARCHES)?,
        })
    }
}
