//! Descriptors that front-ends send: shared by reference inside the broker, closed
//! when the last user lets go. Nothing here reads, writes or maps one.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// A file that backs a front-end's memory. Two are equal when they are the same
/// file, however often it was sent.
#[derive(Clone)]
pub struct MemoryFile {
    fd: Arc<OwnedFd>,
    device: u64,
    inode: u64,
    page_size: u64,
    can_shrink: bool,
    sender: i32,
    is_foreign: bool,
}

impl MemoryFile {
    /// Wraps a descriptor whose file `fstat` gave these numbers for.
    pub fn new(fd: OwnedFd, device: u64, inode: u64) -> Self {
        Self {
            fd: Arc::new(fd),
            device,
            inode,
            page_size: iommu::PAGE_SIZE,
            can_shrink: false,
            sender: 0,
            is_foreign: false,
        }
    }

    /// The same, of a file that is not sealed against being shortened.
    pub fn with_no_seal(self) -> Self {
        Self { can_shrink: true, ..self }
    }

    /// The same, that this process sent.
    pub fn sent_by(self, process: i32) -> Self {
        Self { sender: process, ..self }
    }

    /// The process that sent it; 0 if the kernel does not say.
    pub fn sender(&self) -> i32 {
        self.sender
    }

    /// The same, which its sender has from the broker, in a window: it is another VM's.
    pub fn foreign(self) -> Self {
        Self { is_foreign: true, ..self }
    }

    /// Whether it is another VM's.
    pub fn is_foreign(&self) -> bool {
        self.is_foreign
    }

    /// Whether the file can be shortened while it is mapped.
    pub fn can_shrink(&self) -> bool {
        self.can_shrink
    }

    /// The same, of a file whose pages are larger: no smaller piece of it can be mapped.
    pub fn with_page_size(self, page_size: u64) -> Self {
        Self { page_size: page_size.max(iommu::PAGE_SIZE), ..self }
    }

    /// Bytes of one page of the file.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// The device and inode numbers that identify the file.
    pub fn identity(&self) -> (u64, u64) {
        (self.device, self.inode)
    }
}

impl PartialEq for MemoryFile {
    fn eq(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }
}

impl Eq for MemoryFile {}

impl AsFd for MemoryFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for MemoryFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryFile({}:{})", self.device, self.inode)
    }
}

/// An eventfd that a front-end sent: a kick, a call or an error. Two are equal when they are
/// the same eventfd, however often it was sent; without the kernel's number for it, when they
/// came with the same message.
#[derive(Clone)]
pub struct Eventfd {
    fd: Arc<OwnedFd>,
    number: Option<u64>,
}

impl Eventfd {
    /// Wraps a descriptor that was checked to be an eventfd.
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd: Arc::new(fd), number: None }
    }

    /// The same, with the number that the kernel gives it (`eventfd-id`, proc_pid_fdinfo(5)).
    pub fn with_number(self, number: Option<u64>) -> Self {
        Self { number, ..self }
    }
}

impl PartialEq for Eventfd {
    fn eq(&self, other: &Self) -> bool {
        match (self.number, other.number) {
            // Both are open, so no number was given away anew.
            (Some(one), Some(other)) => one == other,
            _ => Arc::ptr_eq(&self.fd, &other.fd),
        }
    }
}

impl Eq for Eventfd {}

impl AsFd for Eventfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for Eventfd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Eventfd({})", self.fd.as_raw_fd())
    }
}
