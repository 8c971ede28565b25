//! Copies between parts of an owner's memory and a command's buffer in the control
//! area: what FETCH and STORE do (`docs/vhost-pci-device.md`, 9.4). By `pread` and
//! `pwrite`: the broker maps none of the owner's memory, and a file that got shorter
//! is an error, not a signal.

use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::uio::{pread, pwrite};
use vhost_pci_device::abi;
use vm_memory::GuestMemoryMmap;

use super::control_ring::ControlRing;
use crate::link::iommu::demand::Task;
use crate::link::iommu::iotlb::Piece;
use crate::link::message::CommandId;

/// Copies all pieces, in order; `false` if one cannot be.
pub fn copy(ring: &ControlRing, area: &GuestMemoryMmap, id: CommandId, task: Task, pieces: &[Piece]) -> bool {
    let mut buffer = Vec::new();
    let mut done = 0;
    pieces.iter().all(|piece| {
        // Commands are no longer than this: the link has checked it.
        buffer.resize((piece.len as usize).min(abi::MAX_COPY as usize), 0);
        let from = done;
        done += piece.len;
        match task {
            Task::Fetch => read(piece, &mut buffer) && ring.write(area, id, from, &buffer),
            Task::Store => ring.read(area, id, from, &mut buffer) && write(piece, &buffer),
            Task::Map => false,
        }
    })
}

fn read(piece: &Piece, bytes: &mut [u8]) -> bool {
    let mut done = 0;
    while done < bytes.len() {
        let Ok(offset) = i64::try_from(piece.offset + done as u64) else { return false };
        match pread(piece.file.as_fd(), &mut bytes[done..], offset) {
            Ok(0) => return false,
            Ok(count) => done += count,
            Err(nix::Error::EINTR) => {}
            Err(_) => return false,
        }
    }
    true
}

fn write(piece: &Piece, bytes: &[u8]) -> bool {
    // A file that got shorter must not grow again by this.
    let end = piece.offset + bytes.len() as u64;
    // Nor one that its owner's VMM has set to append: pwrite(2) would, wherever it is told to
    // write.
    let flags = fcntl(piece.file.as_fd(), FcntlArg::F_GETFL).unwrap_or(0);
    if flags & OFlag::O_APPEND.bits() != 0 {
        return false;
    }
    if nix::sys::stat::fstat(piece.file.as_fd()).map_or(0, |stat| stat.st_size as u64) < end {
        return false;
    }
    let mut done = 0;
    while done < bytes.len() {
        let Ok(offset) = i64::try_from(piece.offset + done as u64) else { return false };
        match pwrite(piece.file.as_fd(), &bytes[done..], offset) {
            Ok(0) => return false,
            Ok(count) => done += count,
            Err(nix::Error::EINTR) => {}
            Err(_) => return false,
        }
    }
    true
}
