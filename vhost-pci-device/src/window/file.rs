//! Which files may be shown: memory files, as far as they reach.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{fcntl_get_seals, fstat, fstatfs};

/// `TMPFS_MAGIC`: tmpfs, /dev/shm and memfds.
const TMPFS: i64 = 0x0102_1994;
/// `HUGETLBFS_MAGIC`: hugetlbfs, and memfds in huge pages.
const HUGETLBFS: i64 = 0x9584_58f6;

/// Why a file is not shown.
#[derive(Debug, thiserror::Error)]
pub enum FileRefusal {
    /// Its file system could make a vCPU wait.
    #[error("the file is no memory file (memfd, tmpfs, hugetlbfs)")]
    NotMemory,
    /// A vCPU that reaches beyond the end of a file never comes out of the hypervisor.
    #[error("the file ends at {file_len:#x}, before {end:#x}")]
    TooShort {
        /// Length of the file, bytes.
        file_len: u64,
        /// Where the range ends in it.
        end: u64,
    },
    /// Huge pages are shown whole; mmap would round the length up, over what is next.
    #[error("the range is not one of the file's pages of {0:#x} bytes")]
    Unaligned(u64),
    /// The file cannot be looked at.
    #[error("the file cannot be examined: {0}")]
    Stat(#[from] io::Error),
}

/// Checks that `len` bytes of the file from `file_offset` on can be shown at `offset` of a range
/// that is aligned to large pages.
///
/// The owner of the file can shorten it later unless it is sealed: that is the file's owner's
/// harm to its own link, and the reason why a VMM gives its vCPU threads a signal that
/// ends `KVM_RUN`.
///
/// # Errors
/// As said.
pub fn check(file: BorrowedFd<'_>, file_offset: u64, offset: u64, len: u64) -> Result<(), FileRefusal> {
    // All memory files have seals and nothing else has any. The kernel itself answers this; the
    // others may be asked of a file's server, which can take its time.
    fcntl_get_seals(file).map_err(|_| FileRefusal::NotMemory)?;
    let kind = fstatfs(file).map_err(io::Error::from)?.f_type;
    if kind != TMPFS && kind != HUGETLBFS {
        return Err(FileRefusal::NotMemory);
    }
    let stat = fstat(file).map_err(io::Error::from)?;
    let file_len = u64::try_from(stat.st_size).unwrap_or(0);
    let end = file_offset.saturating_add(len);
    if end > file_len {
        return Err(FileRefusal::TooShort { file_len, end });
    }
    let page = u64::try_from(stat.st_blksize).unwrap_or(0).max(1);
    let whole = [file_offset, offset, len].into_iter().all(|value| value.is_multiple_of(page));
    if kind == HUGETLBFS && !whole {
        return Err(FileRefusal::Unaligned(page));
    }
    Ok(())
}
