//! A capture file of packets whose every byte a sink can check.

use std::fs::{self, File};
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
/// Length of the file's header, and of each packet's, bytes.
const FILE_HEADER: usize = 24;
const PACKET_HEADER: usize = 16;

/// Length of a file of `count` packets of `len` bytes.
pub fn file_len(count: u64, len: usize) -> u64 {
    FILE_HEADER as u64 + count * (PACKET_HEADER + len) as u64
}

/// How many packets, from the first on, are the same in both files, and whether that is all of
/// them.
pub fn compare(one: &Path, other: &Path) -> Result<(u64, bool)> {
    let [one, other] = [one, other].map(|path| fs::read(path).with_context(|| path.display().to_string()));
    let (one, other) = (one?, other?);
    let mut packets = [&one, &other].map(|file| Packets(file.get(FILE_HEADER..).unwrap_or_default()));
    let mut same = 0;
    loop {
        match packets.each_mut().map(Packets::next) {
            [None, None] => return Ok((same, true)),
            [one, other] if one != other => return Ok((same, false)),
            _ => same += 1,
        }
    }
}

/// The packets of a capture file behind its header. One that is cut off is none.
struct Packets<'f>(&'f [u8]);

impl<'f> Iterator for Packets<'f> {
    type Item = &'f [u8];

    fn next(&mut self) -> Option<&'f [u8]> {
        let (header, rest) = self.0.split_at_checked(PACKET_HEADER)?;
        let len = u32::from_ne_bytes(header.get(8..12)?.try_into().ok()?);
        let (packet, rest) = rest.split_at_checked(len as usize)?;
        self.0 = rest;
        Some(packet)
    }
}

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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn files_are_compared_packet_by_packet() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
        write(&one, 5, 100).unwrap();
        write(&other, 3, 100).unwrap();
        assert_eq!(fs::metadata(&one).unwrap().len(), file_len(5, 100));
        assert_eq!(compare(&one, &one).unwrap(), (5, true));
        assert_eq!(compare(&one, &other).unwrap(), (3, false));
        let mut bytes = fs::read(&one).unwrap();
        bytes[FILE_HEADER + 2 * (PACKET_HEADER + 100) + PACKET_HEADER + 99] ^= 1;
        fs::write(&other, bytes).unwrap();
        assert_eq!(compare(&one, &other).unwrap(), (2, false));
    }
}
