//! A capture file of packets whose every byte a sink can check.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use guest_driver_model::programs::pattern::Generator;

/// Packets made at a time.
const BURST: u64 = 64;
/// A packet is captured whole if it is no longer than this.
const SNAPLEN: u32 = 65_535;
/// LINKTYPE_ETHERNET.
const ETHERNET: u32 = 1;

/// Writes `count` packets of `len` bytes, in the host's byte order, as the format allows.
pub fn write(path: &Path, count: u64, len: usize) -> Result<()> {
    let file = File::create(path).with_context(|| path.display().to_string())?;
    let mut file = BufWriter::new(file);
    file.write_all(&0xa1b2_c3d4_u32.to_ne_bytes())?;
    for version in [2_u16, 4] {
        file.write_all(&version.to_ne_bytes())?;
    }
    // Time zone and precision, which nobody uses.
    for field in [0, 0, SNAPLEN, ETHERNET] {
        file.write_all(&field.to_ne_bytes())?;
    }
    let mut generator = Generator::new(len, 1, true);
    let len = u32::try_from(generator.frame_len())?;
    let mut frames = Vec::new();
    let mut written = 0;
    while written < count {
        generator.fill(&mut frames, (count - written).min(BURST) as usize);
        for frame in frames.chunks(generator.frame_len()) {
            // Seconds and microseconds, bytes captured, bytes there were.
            let (seconds, microseconds) = (written / 1_000_000, written % 1_000_000);
            for field in [u32::try_from(seconds)?, u32::try_from(microseconds)?, len, len] {
                file.write_all(&field.to_ne_bytes())?;
            }
            file.write_all(frame)?;
            written += 1;
        }
    }
    file.flush()?;
    Ok(())
}
