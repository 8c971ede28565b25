//! `disk-check`: writes blocks of a file at random places, several at a time, and looks whether they are
//! what they should be: while it writes, and again after whatever came in between.
//!
//! Each block says which it is and which write it is of; a checksum covers the rest. All follows from a
//! seed: who knows how many writes each thread made knows what is in each block.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use nix::fcntl::OFlag;
use serde::Serialize;

use super::ProgramError;
use super::run::stop_on_signals;
use super::stop::Stop;

/// Bytes of a block.
const BLOCK: usize = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"VPblock1");
/// Writes between two looks at an earlier block, and between two flushes, of a thread.
const LOOK: u64 = 8;
const FLUSH: u64 = 32;
/// Writes between two lines about the progress.
const LINE: u64 = 100;

/// What `disk-check` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct DiskCheckArgs {
    /// The file; it is made if it is not there
    #[arg(long, value_name = "PATH")]
    pub file: PathBuf,
    /// Its blocks of 4096 bytes
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..=1 << 32))]
    pub blocks: u64,
    /// Blocks written at the same time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=64))]
    pub threads: u64,
    /// What decides which blocks are written
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Writes of each thread; otherwise until SIGTERM
    #[arg(long)]
    pub writes: Option<u64>,
    /// Write nothing: look whether the file is what it was after so many writes of each thread
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', conflicts_with = "writes")]
    pub verify: Option<Vec<u64>>,
}

/// A block, aligned as a file that is reached past the kernel's cache wants it.
#[repr(C, align(4096))]
struct Block([u8; BLOCK]);

impl Block {
    fn zeroed() -> Self {
        Self([0; BLOCK])
    }

    /// Makes it block number `number` of the `write`-th write.
    fn fill(&mut self, number: u64, write: u64, seed: u64) {
        let (words, _) = self.0.as_chunks_mut::<8>();
        let mut fill = seed ^ number << 32 ^ write;
        for (at, word) in words.iter_mut().enumerate() {
            fill = fill.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            *word = match at {
                0 => MAGIC,
                1 => number,
                2 => write,
                3 => seed,
                _ => fill,
            }
            .to_le_bytes();
        }
        let sum = crc32fast::hash(&self.0[..BLOCK - 8]);
        self.0[BLOCK - 8..].copy_from_slice(&u64::from(sum).to_le_bytes());
    }

    /// The write that it is of, 0 if it was never written; or what is wrong with it.
    fn judge(&self, number: u64, seed: u64) -> Result<u64, String> {
        if self.0.iter().all(|byte| *byte == 0) {
            return Ok(0);
        }
        let (words, _) = self.0.as_chunks::<8>();
        let word = |at: usize| words.get(at).map_or(0, |word| u64::from_le_bytes(*word));
        let sum = crc32fast::hash(&self.0[..BLOCK - 8]);
        match () {
            () if word(0) != MAGIC || word(BLOCK / 8 - 1) != u64::from(sum) => Err("it is torn".into()),
            () if word(1) != number => Err(format!("it is block {}", word(1))),
            () if word(3) != seed => Err(format!("it is of seed {}", word(3))),
            () => Ok(word(2)),
        }
    }
}

/// What came of it.
#[derive(Debug, Default, Serialize)]
struct Report {
    /// Of each thread.
    writes: Vec<u64>,
    reads: u64,
    flushes: u64,
    /// Blocks that are not what they should be.
    wrong: u64,
}

/// Runs `disk-check`.
///
/// # Errors
/// If the file fails, or has a wrong block.
pub fn run(args: &DiskCheckArgs) -> Result<(), ProgramError> {
    let stop = stop_on_signals()?;
    let fails = |what| move |source| ProgramError::System { what, source };
    let direct = OFlag::O_DIRECT.bits();
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(args.verify.is_none()).truncate(false).custom_flags(direct);
    let file = options.open(&args.file).map_err(fails("the file"))?;
    let report = match &args.verify {
        Some(writes) => verify(args, &file, writes),
        None => write(args, &file, &stop),
    };
    let report = report.map_err(fails("the file"))?;
    super::say(&serde_json::to_string(&report).unwrap_or_default());
    match report.wrong {
        0 => Ok(()),
        wrong => Err(ProgramError::WrongBlocks { path: display(&args.file), wrong }),
    }
}

fn display(path: &Path) -> String {
    path.display().to_string()
}

/// The blocks that a thread writes, one after the other: all of them are its own.
fn places(args: &DiskCheckArgs, thread: u64) -> impl Iterator<Item = u64> {
    let own = args.blocks.saturating_sub(thread).div_ceil(args.threads).max(1);
    let mut random = fastrand::Rng::with_seed(args.seed ^ thread << 32);
    let threads = args.threads;
    std::iter::repeat_with(move || random.u64(..own) * threads + thread)
}

fn write(args: &DiskCheckArgs, file: &File, stop: &Stop) -> io::Result<Report> {
    file.set_len(args.blocks * BLOCK as u64)?;
    let written = AtomicU64::new(0);
    let finished = AtomicU64::new(0);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..args.threads)
            .map(|thread| {
                let (written, finished) = (&written, &finished);
                scope.spawn(move || {
                    let result = write_by(args, thread, file, stop, written);
                    finished.fetch_add(1, Ordering::Relaxed);
                    result
                })
            })
            .collect();
        let mut said = 0;
        while finished.load(Ordering::Relaxed) < args.threads {
            thread::sleep(Duration::from_millis(10));
            let now = written.load(Ordering::Relaxed);
            if now >= said + LINE {
                said = now;
                super::say(&format!("{{\"written\":{now}}}"));
            }
        }
        let mut sum = Report::default();
        for thread in threads {
            let report = thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))?;
            sum.writes.extend(report.writes);
            sum.reads += report.reads;
            sum.flushes += report.flushes;
            sum.wrong += report.wrong;
        }
        file.sync_all()?;
        Ok(sum)
    })
}

fn write_by(
    args: &DiskCheckArgs,
    thread: u64,
    file: &File,
    stop: &Stop,
    written: &AtomicU64,
) -> io::Result<Report> {
    let mut last = vec![0_u64; (args.blocks / args.threads + 1) as usize];
    let mut block = Block::zeroed();
    let mut report = Report::default();
    let mut count = 0;
    let mut look = fastrand::Rng::with_seed(args.seed ^ !thread);
    for number in places(args, thread) {
        if args.writes.map_or(stop.is_requested(), |writes| count >= writes) {
            break;
        }
        count += 1;
        block.fill(number, count, args.seed);
        file.write_all_at(&block.0, number * BLOCK as u64)?;
        if let Some(last) = last.get_mut((number / args.threads) as usize) {
            *last = count;
        }
        written.fetch_add(1, Ordering::Relaxed);
        if count % LOOK == 0 {
            let own = args.blocks.saturating_sub(thread).div_ceil(args.threads).max(1);
            let at = look.u64(..own);
            report.reads += 1;
            let expected = last.get(at as usize).copied().unwrap_or_default();
            report.wrong += u64::from(!is_right(args, file, at * args.threads + thread, expected)?);
        }
        if count % FLUSH == 0 {
            report.flushes += 1;
            file.sync_data()?;
        }
    }
    report.writes.push(count);
    Ok(report)
}

/// Whether a block is of this write; says what is wrong.
fn is_right(args: &DiskCheckArgs, file: &File, number: u64, expected: u64) -> io::Result<bool> {
    let mut block = Block::zeroed();
    file.read_exact_at(&mut block.0, number * BLOCK as u64)?;
    let wrong = match block.judge(number, args.seed) {
        Ok(write) if write == expected => return Ok(true),
        Ok(write) => format!("it is of write {write}, and write {expected} was made"),
        Err(reason) => reason,
    };
    tracing::error!("block {number}: {wrong}");
    Ok(false)
}

fn verify(args: &DiskCheckArgs, file: &File, writes: &[u64]) -> io::Result<Report> {
    let mut expected = vec![0_u64; args.blocks as usize];
    for (thread, writes) in (0..).zip(writes) {
        for (write, number) in (1..=*writes).zip(places(args, thread)) {
            if let Some(expected) = expected.get_mut(number as usize) {
                *expected = write;
            }
        }
    }
    let mut report = Report { writes: writes.to_vec(), ..Report::default() };
    for (number, expected) in (0..).zip(expected) {
        report.reads += 1;
        report.wrong += u64::from(!is_right(args, file, number, expected)?);
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn args(path: &Path) -> DiskCheckArgs {
        DiskCheckArgs {
            file: path.to_owned(),
            blocks: 61,
            threads: 3,
            seed: 5,
            writes: Some(200),
            verify: None,
        }
    }

    #[test]
    fn a_block_that_is_lost_torn_or_elsewhere_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let args = args(file.path());
        let file = file.as_file();
        let report = write(&args, file, &Stop::default()).unwrap();
        assert_eq!((report.writes.as_slice(), report.wrong), (&[200; 3][..], 0));
        let wrong = || verify(&args, file, &report.writes).unwrap().wrong;
        assert_eq!(wrong(), 0);
        assert!(verify(&args, file, &[200, 200, 199]).unwrap().wrong <= 1);
        let mut good = [0; BLOCK];
        file.read_exact_at(&mut good, 7 * BLOCK as u64).unwrap();
        let mut other = [0; BLOCK];
        file.read_exact_at(&mut other, 8 * BLOCK as u64).unwrap();
        let mut torn = good;
        torn[512..1024].fill(0);
        for bad in [torn, other, [0; BLOCK]] {
            file.write_all_at(&bad, 7 * BLOCK as u64).unwrap();
            assert_eq!(wrong(), 1);
        }
        file.write_all_at(&good, 7 * BLOCK as u64).unwrap();
        assert_eq!(wrong(), 0);
    }
}
