//! Virtio-blk requests over rings (virtio 1.3, 5.2): the device half, which serves a disk of the peer's
//! to the owner through the window.
//!
//! | module | what it holds |
//! |---|---|
//! | [`request`] | what a chain asks for: header, sizes, what is possible |
//! | [`disk`] | where the bytes are |
//! | [`port`] | the peer's port: the device half of the owner's vrings |
//! | `queue` | one vring: request by request, in order |
//! | `transfer` | a chain's bytes, between the window, or the device, and private memory |
//!
//! Each vring takes requests of any kind (5.2.2). They are carried out one after the other and completed in
//! that order (`docs/vhost-pci-device.md`, 8.2), so that the ring says where a successor goes on. What was
//! carried out and not completed is carried out once more: a read or a write twice is as one.
//!
//! What is written to the disk is a private copy, of which it was certain, when it was made, that the window
//! showed the owner's memory and not nothing.

pub mod disk;
pub mod port;
mod queue;
pub mod request;
mod transfer;

pub use disk::{Disk, FileDisk};
pub use port::BlkPort;
pub use request::SECTOR;

/// What has been served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Requests completed, whatever their status.
    pub requests: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Times that all that was written was brought to the disk, at the owner's wish.
    pub flushes: u64,
    /// Requests that the disk failed.
    pub failed: u64,
    /// Requests that make no sense, or are of no kind known here.
    pub refused: u64,
}

counts!(Counters { requests, read_bytes, written_bytes, flushes, failed, refused });
