//! The window's address range, and what it shows.
//!
//! Where nothing is mapped an aperture *rests*. A read-write aperture rests on a *bucket*: one
//! memfd that is mapped again and again, so that the number of the process's mappings stays
//! small, no address is ever without a page, and a hostile guest can fill no more host memory
//! than the bucket has. Nobody else ever has the bucket. A read-only aperture rests on private
//! zero pages that cannot be written. Granting and revoking is one `mmap(MAP_FIXED)` (a few
//! where a range crosses ends of the bucket), upon which no vCPU reaches what was there.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::param::page_size;

use super::file::{self, FileRefusal};
use super::layout::{Aperture, Apertures, Ranges, Refusal, Request};
use crate::sys::reservation::Reservation;

/// The shortest bucket, bytes.
const LEAST_BUCKET: u64 = 2 << 20;
/// The most times that a bucket is mapped.
const MOST_BUCKETS: u64 = 1024;

/// Length of a page, bytes: what the broker's ranges and the window's slots are multiples of.
const PAGE: usize = 4096;

/// A host with larger pages would map more than it was asked for, over what is beside it.
fn check_page(page: usize) -> io::Result<()> {
    if page == PAGE {
        return Ok(());
    }
    let reason = format!("the host has pages of {page} bytes, and the window needs pages of {PAGE}");
    Err(io::Error::new(io::ErrorKind::Unsupported, reason))
}

/// Why a change of the window was not made.
#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    /// It must not be.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The file must not be shown.
    #[error(transparent)]
    File(#[from] FileRefusal),
    /// The kernel cannot.
    #[error("mmap: {0}")]
    Host(io::Error),
}

/// A window.
#[derive(Debug)]
pub struct Window {
    reservation: Reservation,
    bucket: OwnedFd,
    bucket_len: u64,
    apertures: Apertures,
    ranges: Mutex<Ranges>,
}

impl Window {
    /// A window that is closed and at rest.
    ///
    /// # Errors
    /// What the system answers where it lacks address space or descriptors; `Unsupported` where
    /// its pages are not of 4096 bytes.
    pub fn new(apertures: Apertures) -> io::Result<Self> {
        check_page(page_size())?;
        let reservation = Reservation::new(apertures.region_len())?;
        let bucket_len = LEAST_BUCKET
            .max(apertures.region_len() / 2 / MOST_BUCKETS)
            .checked_next_power_of_two()
            .ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let bucket = memfd_create(c"vhost-pci-bucket", flags)?;
        ftruncate(&bucket, bucket_len)?;
        fcntl_add_seals(&bucket, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let ranges = Mutex::new(Ranges::new(apertures));
        let window = Self { reservation, bucket, bucket_len, apertures, ranges };
        for aperture in apertures.all() {
            window.rest(aperture, aperture.offset, aperture.len)?;
        }
        Ok(window)
    }

    /// Its apertures.
    pub fn apertures(&self) -> Apertures {
        self.apertures
    }

    /// Where an offset of it is in this process.
    pub fn address(&self, offset: u64) -> u64 {
        self.reservation.address() + offset
    }

    /// From now on ranges may be mapped.
    ///
    /// # Errors
    /// If something that was mapped before could not be taken out.
    pub fn open(&self) -> io::Result<()> {
        let mut ranges = self.ranges();
        self.empty(&mut ranges)?;
        ranges.set_open(true);
        Ok(())
    }

    /// Takes everything out. From the return on the guest reaches none of it, and nothing
    /// is mapped until the next [`open`](Self::open).
    pub fn close(&self) {
        let mut ranges = self.ranges();
        ranges.set_open(false);
        if let Err(error) = self.empty(&mut ranges) {
            tracing::error!(%error, "a part of the window cannot be taken back from the guest: stop the VM");
        }
    }

    /// Maps a range of a file. In effect for every vCPU when this returns.
    ///
    /// # Errors
    /// Then nothing has changed.
    pub fn map(&self, request: Request, file: BorrowedFd<'_>) -> Result<(), WindowError> {
        // Before the lock: it can take its time on a strange file.
        file::check(file, request.file_offset, request.offset, request.len)?;
        let mut ranges = self.ranges();
        let aperture = ranges.map(request)?;
        let Request { offset, len, file_offset, .. } = request;
        let shown = self.reservation.show(offset, len, file, file_offset, aperture.writable);
        shown.map_err(|error| {
            // Older kernels unmap what was there before they fail.
            match self.rest(aperture, offset, len) {
                Ok(()) => ranges.forget(offset),
                Err(error) => tracing::error!(%error, offset, len, "a part of the window is lost"),
            }
            WindowError::Host(error)
        })
    }

    /// Takes out exactly what was mapped. Out of every vCPU's reach when this returns, which a range
    /// that is not mapped is already: a reset may have been faster than the request.
    ///
    /// # Errors
    /// Then the range counts as mapped.
    pub fn unmap(&self, request: Request) -> Result<(), WindowError> {
        let mut ranges = self.ranges();
        if ranges.has(request)? {
            self.take_out(&mut ranges, request.offset, request.len).map_err(WindowError::Host)?;
        }
        Ok(())
    }

    fn ranges(&self) -> MutexGuard<'_, Ranges> {
        // Its methods leave it whole even if they panicked.
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn empty(&self, ranges: &mut Ranges) -> io::Result<()> {
        let mapped: Vec<_> = ranges.mapped().collect();
        let mut result = Ok(());
        for (offset, len) in mapped {
            if let Err(error) = self.take_out(ranges, offset, len) {
                result = Err(error);
            }
        }
        result
    }

    fn take_out(&self, ranges: &mut Ranges, offset: u64, len: u64) -> io::Result<()> {
        let inside = |a: &Aperture| (a.offset..a.offset + a.len).contains(&offset);
        let aperture = self.apertures.all().into_iter().find(inside).ok_or(io::ErrorKind::InvalidInput)?;
        self.rest(aperture, offset, len)?;
        ranges.forget(offset);
        Ok(())
    }

    /// Puts a range of an aperture at rest.
    fn rest(&self, aperture: Aperture, offset: u64, len: u64) -> io::Result<()> {
        if !aperture.writable {
            return self.reservation.show_zeros(offset, len, false);
        }
        // Where the process has no mapping to spare: this takes none, and is as good as the
        // bucket but for the host memory that the guest can fill.
        self.pour(offset, len).or_else(|_| self.reservation.show_zeros(offset, len, true))
    }

    /// Shows the bucket in a range, at offsets such that neighbouring ranges become one mapping.
    fn pour(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut at = offset;
        let end = offset + len;
        while at < end {
            let from = at % self.bucket_len;
            let len = (self.bucket_len - from).min(end - at);
            self.reservation.show(at, len, self.bucket.as_fd(), from, true)?;
            at += len;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_host_with_larger_pages_is_refused_with_their_length() {
        assert!(check_page(4096).is_ok());
        for page in [16 << 10, 64 << 10] {
            let error = check_page(page).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Unsupported);
            assert!(error.to_string().contains(&page.to_string()));
        }
    }
}
