//! Is a descriptor that a front-end sent of the kind that the message needs?
//!
//! Asked of the kernel before anything else is done with the descriptor, since a
//! file system in user space, a pipe or a terminal could stall whoever reads it, or only
//! asks for its length.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::socket::{SockType, UnixAddr, getsockname, getsockopt, sockopt};

use crate::link::Fault;
use crate::link::descriptor::{Eventfd, MemoryFile};

/// File systems whose pages can back memory that is shared: their magic numbers
/// (statfs(2)). A file of another kind could stall its reader for as long as its
/// server likes.
const MEMORY_FILE_SYSTEMS: [(i64, &str); 2] = [(0x0102_1994, "tmpfs"), (HUGETLBFS, "hugetlbfs")];
const HUGETLBFS: i64 = 0x9584_58f6;

/// The seal against new writable mappings (fcntl(2)); the nix crate has no name for it.
const F_SEAL_FUTURE_WRITE: i32 = 0x10;

/// Takes a descriptor as memory; gives it with its file's length in bytes.
///
/// # Errors
/// When it is no regular file of a memory file system.
pub fn memory_file(file: File) -> Result<(MemoryFile, u64), Fault> {
    memory_file_for(file, "a memory region")
}

/// The same, of memory that is for something else.
///
/// # Errors
/// As [`memory_file`].
pub fn memory_file_for(file: File, what: &str) -> Result<(MemoryFile, u64), Fault> {
    let fault = |reason: String| Fault::Descriptor(format!("the descriptor of {what} {reason}"));
    let no_memory = || {
        fault(
            "is no memfd, shared-memory or hugetlbfs file: give the VMM memory of that kind, \
             as QEMU's memory-backend-memfd with share=on"
                .into(),
        )
    };
    // Files of tmpfs and hugetlbfs have seals, and no other file has. The kernel knows that of itself;
    // for what comes below it asks the file's server, where it has one.
    let seals = fcntl(&file, FcntlArg::F_GET_SEALS).map_err(|_| no_memory())?;
    let metadata = file.metadata().map_err(|error| fault(format!("cannot be examined: {error}")))?;
    let statfs =
        nix::sys::statfs::fstatfs(&file).map_err(|error| fault(format!("cannot be examined: {error}")))?;
    let system = statfs.filesystem_type().0;
    if !metadata.is_file() || !MEMORY_FILE_SYSTEMS.iter().any(|(magic, _)| *magic == system) {
        return Err(no_memory());
    }
    // The peer's VMM has to map it for reading and writing: a descriptor that does not
    // allow that would let the peer be blamed.
    let flags =
        fcntl(&file, FcntlArg::F_GETFL).map_err(|error| fault(format!("cannot be examined: {error}")))?;
    if flags & OFlag::O_ACCMODE.bits() != OFlag::O_RDWR.bits() {
        return Err(fault("is not open for reading and writing".into()));
    }
    if seals & (SealFlag::F_SEAL_WRITE.bits() | F_SEAL_FUTURE_WRITE) != 0 {
        return Err(fault("is sealed against writing".into()));
    }
    let memory = MemoryFile::new(OwnedFd::from(file), metadata.dev(), metadata.ino());
    let memory = match seals & SealFlag::F_SEAL_SHRINK.bits() {
        0 => memory.with_no_seal(),
        _ => memory,
    };
    // Of hugetlbfs the block is the huge page; tmpfs takes what comes.
    let memory = match system == HUGETLBFS {
        true => memory.with_page_size(u64::try_from(statfs.block_size()).unwrap_or(0)),
        false => memory,
    };
    Ok((memory, metadata.len()))
}

/// Takes a descriptor as an eventfd, and makes it one on which no write blocks.
///
/// # Errors
/// When it is anything else, or the host does not tell.
pub fn eventfd(file: File) -> Result<Eventfd, Fault> {
    let fd = OwnedFd::from(file);
    // The kernel's own word on what a descriptor is.
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).map_err(|error| {
        Fault::Host(format!("the broker cannot tell whether a descriptor is an eventfd: {error}"))
    })?;
    if !info.lines().any(|line| line.starts_with("eventfd-count:")) {
        return Err(Fault::Descriptor("a kick, call or error descriptor is no eventfd".into()));
    }
    set_nonblocking(&fd)
        .map_err(|error| Fault::Descriptor(format!("an eventfd cannot be made non-blocking: {error}")))?;
    let number = info.lines().find_map(|line| line.strip_prefix("eventfd-id:")?.trim().parse().ok());
    Ok(Eventfd::new(fd).with_number(number))
}

/// Takes a descriptor as the stream for requests to the front-end. Others may not
/// wake their reader when they are shut down.
///
/// # Errors
/// When it is no Unix stream socket.
pub fn channel(fd: OwnedFd) -> Result<UnixStream, Fault> {
    let unix = getsockname::<UnixAddr>(fd.as_raw_fd()).is_ok();
    if !unix || getsockopt(&fd, sockopt::SockType) != Ok(SockType::Stream) {
        return Err(Fault::Descriptor("the back-end channel is no Unix stream socket".into()));
    }
    Ok(UnixStream::from(fd))
}

fn set_nonblocking(fd: &impl AsFd) -> nix::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
    if !flags.contains(OFlag::O_NONBLOCK) {
        fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write;

    use nix::sys::eventfd::EventFd;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    fn file(fd: impl Into<OwnedFd>) -> File {
        File::from(fd.into())
    }

    #[test]
    fn a_memfd_is_memory_and_its_length_is_known() {
        let mut memfd = file(memfd_create(c"m", MFdFlags::MFD_CLOEXEC).unwrap());
        memfd.write_all(&[0; 8192]).unwrap();
        let again = memfd.try_clone().unwrap();
        let (memory, len) = memory_file(memfd).unwrap();
        assert_eq!(len, 8192);
        assert_eq!(memory_file(again).unwrap().0, memory);
    }

    #[test]
    fn memory_that_is_sealed_against_writing_is_refused() {
        for seal in [SealFlag::F_SEAL_WRITE.bits(), F_SEAL_FUTURE_WRITE] {
            let memfd = file(memfd_create(c"m", MFdFlags::MFD_ALLOW_SEALING).unwrap());
            fcntl(&memfd, FcntlArg::F_ADD_SEALS(SealFlag::from_bits_retain(seal))).unwrap();
            assert!(memory_file(memfd).unwrap_err().to_string().contains("sealed"));
        }
    }

    #[test]
    fn pipes_sockets_and_disk_files_are_no_memory() {
        let (pipe, _) = nix::unistd::pipe().unwrap();
        assert!(memory_file(file(pipe)).is_err());
        assert!(memory_file(File::open("/proc/self/maps").unwrap()).is_err());
        assert!(memory_file(File::open("/dev/null").unwrap()).is_err());
    }

    #[test]
    fn only_an_eventfd_is_an_eventfd_and_it_never_blocks() {
        let fd = eventfd(file(EventFd::new().unwrap())).unwrap();
        let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL).unwrap());
        assert!(flags.contains(OFlag::O_NONBLOCK));
        let (pipe, _) = nix::unistd::pipe().unwrap();
        assert!(eventfd(file(pipe)).is_err());
        assert!(eventfd(File::open("/dev/null").unwrap()).is_err());
    }
}
