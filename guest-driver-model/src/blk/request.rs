//! What a chain asks for (virtio 1.3, 5.2.6): a readable part, header and data to write, and a writable
//! part, data to read and the status. Where the descriptors are cut has no meaning.
//!
//! Everything here is private already; nothing is believed before it is checked.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

/// Bytes of a sector, in which the owner counts whatever its block size is (5.2.6).
pub const SECTOR: u64 = 512;
/// Bytes of the header: type, reserved, sector.
pub const HEADER_LEN: usize = 16;
/// Bytes of the status, which is the last of the chain.
pub const STATUS_LEN: u64 = 1;
/// Bytes of a disk's name.
pub const ID_LEN: usize = 20;
/// The most bytes that one request may read or write: more than a driver asks for that keeps to the
/// limits in the configuration space.
pub const MAX_DATA: u64 = 16 << 20;

/// How a request ended, as the owner is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// Not possible, or the disk failed.
    IoError = VIRTIO_BLK_S_IOERR as u8,
    /// Not known here.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What there is to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the disk.
    pub len: u64,
    /// Nothing is to be written.
    pub read_only: bool,
}

/// Bytes of the two parts of a chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// That the device reads.
    pub readable: u64,
    /// That it writes.
    pub writable: u64,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read so many bytes of the disk, from there on.
    Read {
        /// First byte; a multiple of [`SECTOR`].
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// Write so many.
    Write {
        /// First byte; a multiple of [`SECTOR`].
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// Bring to the disk what was written.
    Flush,
    /// Tell so many bytes of the disk's name.
    Id {
        /// At most [`ID_LEN`].
        len: usize,
    },
    /// Nothing, but tell why.
    Refuse(Status),
}

impl Request {
    /// What a chain with these parts asks of a disk. `header`: its first bytes, as many as there are up to
    /// [`HEADER_LEN`]. There is room for the status.
    pub fn decode(header: &[u8], parts: Parts, limits: Limits) -> Self {
        let Some((header, _)) = header.split_first_chunk::<HEADER_LEN>() else {
            return Self::Refuse(Status::IoError);
        };
        let [kind @ .., _, _, _, _, _, _, _, _, _, _, _, _] = *header;
        let [_, _, _, _, _, _, _, _, sector @ ..] = *header;
        let sector = u64::from_le_bytes(sector);
        let to_read = parts.writable.saturating_sub(STATUS_LEN);
        let to_write = parts.readable.saturating_sub(HEADER_LEN as u64);
        match u32::from_le_bytes(kind) {
            VIRTIO_BLK_T_IN => match place(sector, to_read, limits) {
                Some(at) => Self::Read { at, len: to_read },
                None => Self::Refuse(Status::IoError),
            },
            VIRTIO_BLK_T_OUT => match place(sector, to_write, limits).filter(|_| !limits.read_only) {
                Some(at) => Self::Write { at, len: to_write },
                None => Self::Refuse(Status::IoError),
            },
            VIRTIO_BLK_T_FLUSH => Self::Flush,
            VIRTIO_BLK_T_GET_ID => Self::Id { len: to_read.min(ID_LEN as u64) as usize },
            _ => Self::Refuse(Status::Unsupported),
        }
    }
}

/// Where so many bytes from a sector on are, if they are whole sectors of the disk, and not too many.
fn place(sector: u64, len: u64, limits: Limits) -> Option<u64> {
    let at = sector.checked_mul(SECTOR)?;
    let end = at.checked_add(len)?;
    (len.is_multiple_of(SECTOR) && len <= MAX_DATA && end <= limits.len).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits { len: 100 * SECTOR, read_only: false };

    fn header(kind: u32, sector: u64) -> [u8; HEADER_LEN] {
        let mut header = [0xff; HEADER_LEN];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    fn read(sector: u64, len: u64) -> Request {
        let parts = Parts { readable: 16, writable: len + 1 };
        Request::decode(&header(VIRTIO_BLK_T_IN, sector), parts, LIMITS)
    }

    fn write(sector: u64, len: u64, limits: Limits) -> Request {
        let parts = Parts { readable: 16 + len, writable: 1 };
        Request::decode(&header(VIRTIO_BLK_T_OUT, sector), parts, limits)
    }

    #[test]
    fn whole_sectors_of_the_disk_can_be_read_and_written_and_nothing_else() {
        let refused = Request::Refuse(Status::IoError);
        assert_eq!(read(99, 512), Request::Read { at: 99 * 512, len: 512 });
        assert_eq!(write(0, 100 * 512, LIMITS), Request::Write { at: 0, len: 100 * 512 });
        for (sector, len) in
            [(99, 1024), (100, 512), (0, 511), (0, 1), (u64::MAX, 512), (u64::MAX / 512, 512)]
        {
            assert_eq!((read(sector, len), write(sector, len, LIMITS)), (refused, refused), "{sector} {len}");
        }
        assert_eq!(write(0, 512, Limits { read_only: true, ..LIMITS }), refused);
        let large = Limits { len: 1 << 60, ..LIMITS };
        assert_eq!(write(0, MAX_DATA, large), Request::Write { at: 0, len: MAX_DATA });
        assert_eq!(write(0, MAX_DATA + SECTOR, large), refused);
    }

    #[test]
    fn a_torn_header_and_an_unknown_kind_are_told() {
        let parts = Parts { readable: 15, writable: 513 };
        assert_eq!(Request::decode(&[0; 15], parts, LIMITS), Request::Refuse(Status::IoError));
        let parts = Parts { readable: 16, writable: 513 };
        for kind in [2, 3, 5, 7, 11, 13, 1 << 31, u32::MAX] {
            let asked = Request::decode(&header(kind, 0), parts, LIMITS);
            assert_eq!(asked, Request::Refuse(Status::Unsupported), "{kind}");
        }
        for (writable, len) in [(1, 0), (8, 7), (21, 20), (1 << 40, 20)] {
            let parts = Parts { readable: 16, writable };
            assert_eq!(Request::decode(&header(VIRTIO_BLK_T_GET_ID, 7), parts, LIMITS), Request::Id { len });
        }
    }

    proptest! {
        #[test]
        fn whatever_is_asked_for_lies_in_the_disk(
            header in proptest::collection::vec(any::<u8>(), 0..20),
            kind in 0..6_u8,
            sector in prop_oneof![0..200_u64, any::<u64>()],
            sectors in prop_oneof![0..200_u64, any::<u64>()],
            (odd, len, read_only) in (0..3_u64, prop_oneof![0..100_000_u64, any::<u64>()], any::<bool>()),
        ) {
            let mut header = header;
            if header.len() >= HEADER_LEN {
                header[..4].copy_from_slice(&u32::from(kind).to_le_bytes());
                header[8..16].copy_from_slice(&sector.to_le_bytes());
            }
            let data = sectors.wrapping_mul(SECTOR).wrapping_add(odd);
            let parts = Parts { readable: data.wrapping_add(16), writable: data.wrapping_add(1) };
            match Request::decode(&header, parts, Limits { len, read_only }) {
                Request::Read { at, len: bytes } => prop_assert!(at + bytes <= len && bytes <= MAX_DATA),
                Request::Write { at, len: bytes } => {
                    prop_assert!(at + bytes <= len && bytes <= MAX_DATA && !read_only);
                }
                Request::Id { len } => prop_assert!(len <= ID_LEN),
                Request::Flush | Request::Refuse(_) => {}
            }
        }
    }
}
