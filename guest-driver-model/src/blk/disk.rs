//! Where a disk's bytes are: a file, or a device of the peer's kernel.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};

use super::request::{ID_LEN, Limits};

/// A disk. Whatever is given to it lies in it.
pub trait Disk {
    /// What there is to be served.
    fn limits(&self) -> Limits;

    /// Its name, as far as there is one; the rest is zero.
    fn id(&self) -> [u8; ID_LEN];

    /// Fills `into` with what is there.
    ///
    /// # Errors
    /// If the disk fails.
    fn read_at(&mut self, at: u64, into: &mut [u8]) -> io::Result<()>;

    /// Puts all of `from` there.
    ///
    /// # Errors
    /// If the disk fails. Some of it may be there.
    fn write_at(&mut self, at: u64, from: &[u8]) -> io::Result<()>;

    /// Returns when all that was written would outlive the machine.
    ///
    /// # Errors
    /// If the disk fails.
    fn flush(&mut self) -> io::Result<()>;
}

/// A file or a block device, which nobody else serves.
#[derive(Debug)]
pub struct FileDisk {
    /// Locked: two who serve the same disk spoil it.
    file: Flock<File>,
    limits: Limits,
    id: [u8; ID_LEN],
}

impl FileDisk {
    /// Opens it; `id` names it, as far as there is room.
    ///
    /// # Errors
    /// If it is not there, is not to be read or written, or is served already (`WouldBlock`).
    pub fn open(path: &Path, read_only: bool, id: &str) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(!read_only).open(path)?;
        // The length of a device is where its end is.
        let len = file.seek(SeekFrom::End(0))?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error)?;
        let mut name = [0; ID_LEN];
        name.iter_mut().zip(id.bytes()).for_each(|(to, from)| *to = from);
        Ok(Self { file, limits: Limits { len, read_only }, id: name })
    }
}

impl Disk for FileDisk {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn id(&self) -> [u8; ID_LEN] {
        self.id
    }

    fn read_at(&mut self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, at)
    }

    fn write_at(&mut self, at: u64, from: &[u8]) -> io::Result<()> {
        self.file.write_all_at(from, at)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_disk_is_served_once_and_does_not_grow() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let mut disk = FileDisk::open(file.path(), false, "a name of more than 20 bytes").unwrap();
        assert_eq!(disk.limits(), Limits { len: 4096, read_only: false });
        assert_eq!(&disk.id(), b"a name of more than ");
        let error = FileDisk::open(file.path(), true, "").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        disk.write_at(1024, &[7; 512]).unwrap();
        disk.flush().unwrap();
        let mut bytes = [0; 1024];
        disk.read_at(512, &mut bytes).unwrap();
        assert_eq!((bytes[..512].to_vec(), bytes[512..].to_vec()), (vec![0; 512], vec![7; 512]));
        // A file that was cut meanwhile fails, and yields nothing.
        file.as_file().set_len(1024).unwrap();
        assert!(disk.read_at(512, &mut bytes).is_err());
        drop(disk);
        let mut disk = FileDisk::open(file.path(), true, "").unwrap();
        assert!(disk.write_at(0, &[1; 512]).is_err());
    }
}
