//! One page of address space in which a file's page comes and goes, without anything
//! around it: what any VMM does when a window changes. The only `unsafe` of this example.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes.
pub const PAGE: usize = 4096;

/// The page.
#[derive(Debug)]
pub struct Slot {
    base: NonNull<libc::c_void>,
    file: OwnedFd,
}

// SAFETY: an address range of the process, not of a thread; the kernel serialises changes of it.
unsafe impl Send for Slot {}
// SAFETY: as above; the page is touched by atomics alone.
unsafe impl Sync for Slot {}

impl Slot {
    /// A place for the first page of `file`, which must be a page long. Empty: it reads as
    /// zero.
    ///
    /// # Errors
    /// What mmap answers.
    pub fn new(file: OwnedFd) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, ACCESS, flags, -1, 0) };
        match NonNull::new(base).filter(|_| base != libc::MAP_FAILED) {
            Some(base) => Ok(Self { base, file }),
            None => Err(io::Error::last_os_error()),
        }
    }

    /// Puts the file there.
    ///
    /// # Errors
    /// What mmap answers.
    pub fn show(&self) -> io::Result<()> {
        self.show_file(&self.file)
    }

    /// Puts the first page of another file there.
    ///
    /// # Errors
    /// What mmap answers.
    pub fn show_file(&self, file: &impl AsRawFd) -> io::Result<()> {
        self.replace(libc::MAP_SHARED, file.as_raw_fd())
    }

    /// Takes it away.
    ///
    /// # Errors
    /// What mmap answers.
    pub fn hide(&self) -> io::Result<()> {
        self.replace(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    fn replace(&self, flags: i32, file: i32) -> io::Result<()> {
        // SAFETY: the range is the page that `new` mapped, which stays mapped until the process
        // ends: MAP_FIXED replaces only that, and nobody holds a reference that the change
        // would invalidate.
        let at = unsafe { libc::mmap(self.base.as_ptr(), PAGE, ACCESS, flags | libc::MAP_FIXED, file, 0) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Reads and writes the page.
    pub fn touch(&self) {
        // SAFETY: mapped for the process's life, for reading and writing, aligned; another
        // process's accesses are atomics, too.
        let word = unsafe { AtomicU64::from_ptr(self.base.as_ptr().cast()) };
        // Relaxed: only the access counts.
        word.store(word.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }
}

const ACCESS: i32 = libc::PROT_READ | libc::PROT_WRITE;
