//! Writes cpio archives in the "newc" format, which Linux unpacks as its first file system. Several
//! archives may follow one another in one file: that is how a guest gets files of its own.

use std::collections::BTreeSet;
use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
/// Each header, with its name, and each content ends on a multiple of this.
const ALIGN: usize = 4;

/// One archive. Directories above a file are made where they are missing.
pub struct Archive<W> {
    out: W,
    inode: u32,
    directories: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    /// `out` must stand at a multiple of four bytes.
    pub fn new(out: W) -> Self {
        Self { out, inode: 0, directories: BTreeSet::new() }
    }

    /// `path` is the path in the guest; `mode` its permission bits.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        for (end, _) in path.match_indices('/') {
            if self.directories.insert(path[..end].to_owned()) {
                self.entry(&path[..end], DIRECTORY | 0o755, &[])?;
            }
        }
        self.entry(path, REGULAR | (mode & 0o7777), content)
    }

    /// Writes the end of the archive.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        self.inode += 1;
        let links = 1;
        let (uid, gid, mtime) = (0, 0, 0);
        let (major, minor, device_major, device_minor, checksum) = (0, 0, 0, 0, 0);
        let mut header = b"070701".to_vec();
        for field in [
            self.inode,
            mode,
            uid,
            gid,
            links,
            mtime,
            size,
            major,
            minor,
            device_major,
            device_minor,
            name_size,
            checksum,
        ] {
            write!(header, "{field:08x}")?;
        }
        header.extend_from_slice(name.as_bytes());
        header.push(0);
        self.padded(&header)?;
        self.padded(content)
    }

    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        let padding = bytes.len().next_multiple_of(ALIGN) - bytes.len();
        self.out.write_all(&[0; ALIGN][..padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_aligned_and_parents_come_first_and_once() -> io::Result<()> {
        let mut archive = Archive::new(Vec::new());
        archive.file("/bin/tool/a", 0o755, b"12345")?;
        archive.file("/bin/tool/b", 0o644, b"")?;
        let bytes = archive.finish()?;
        assert_eq!(bytes.len() % ALIGN, 0);
        let (mut at, mut names) = (0, Vec::new());
        while at < bytes.len() {
            let field = |index: usize| {
                let from = at + 6 + 8 * index;
                let text = std::str::from_utf8(&bytes[from..from + 8]).map_err(io::Error::other)?;
                usize::from_str_radix(text, 16).map_err(io::Error::other)
            };
            assert_eq!(&bytes[at..at + 6], b"070701");
            let (mode, size, name_size) = (field(1)?, field(6)?, field(11)?);
            names.push((
                String::from_utf8_lossy(&bytes[at + 110..at + 109 + name_size]).into_owned(),
                mode,
                size,
            ));
            at += (110 + name_size).next_multiple_of(ALIGN) + size.next_multiple_of(ALIGN);
        }
        let expected = [
            ("bin", 0o040_755, 0),
            ("bin/tool", 0o040_755, 0),
            ("bin/tool/a", 0o100_755, 5),
            ("bin/tool/b", 0o100_644, 0),
            ("TRAILER!!!", 0, 0),
        ];
        assert_eq!(names, expected.map(|(name, mode, size)| (name.to_owned(), mode, size)));
        Ok(())
    }
}
