//! The vhost-user messages by which a front-end speaks of its IOMMU, which the vhost
//! crate does not have: their bytes, and exchanging them on the main channel. What
//! they say is decided elsewhere.
//!
//! vhost-user is native-endian. `docs/vhost-user-extensions.md` specifies the push.

use std::io::{self, Read, Write};
use std::mem::offset_of;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Front-end request: what the back-end offers besides virtio features.
pub const VHOST_USER_GET_PROTOCOL_FEATURES: u32 = 15;
/// Front-end request: an [`IotlbMessage`].
pub const VHOST_USER_IOTLB_MSG: u32 = 22;
/// Front-end request: a [`PushHead`] and its entries (extension).
pub const VHOST_USER_IOMMU_PUSH: u32 = 0x5650_0001;
/// Back-end request: an [`IotlbMessage`].
pub const VHOST_USER_BACKEND_IOTLB_MSG: u32 = 1;
/// Protocol feature: the front-end pushes its IOMMU's mappings (extension).
pub const VHOST_USER_PROTOCOL_F_IOMMU_PUSH: u64 = 1 << 62;

/// Version 1, in [`Header::flags`].
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
/// The message is a reply.
const REPLY: u32 = 1 << 2;
/// The sender waits for a reply.
pub(super) const NEED_REPLY: u32 = 1 << 3;

/// Before each message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub request: u32,
    pub flags: u32,
    /// Bytes that follow.
    pub size: u32,
}
const _: () = assert!(size_of::<Header>() == 12);

/// The back-end lacks a translation.
pub const VHOST_IOTLB_MISS: u8 = 1;
/// Here it is.
pub const VHOST_IOTLB_UPDATE: u8 = 2;
/// It is no longer valid.
pub const VHOST_IOTLB_INVALIDATE: u8 = 3;
/// The translation did not allow what the device wanted to do.
pub const VHOST_IOTLB_ACCESS_FAIL: u8 = 4;

/// `struct vhost_iotlb_msg`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IotlbMessage {
    /// First address as the device names it.
    pub iova: u64,
    /// Length, bytes.
    pub size: u64,
    /// Where it is in the front-end's process.
    pub user_addr: u64,
    /// 1 to read, 2 to write, 3 both.
    pub perm: u8,
    /// `VHOST_IOTLB_*`.
    pub kind: u8,
    /// 0.
    pub reserved: [u8; 6],
}
const _: () = assert!(size_of::<IotlbMessage>() == 32 && offset_of!(IotlbMessage, kind) == 25);

/// Forget everything that is mapped, then look at the entries.
pub const IOMMU_PUSH_RESET: u32 = 1 << 0;
/// Entries of one message.
pub const IOMMU_PUSH_MAX: usize = 64;

/// What an IOMMU push begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PushHead {
    /// Entries that follow.
    pub count: u32,
    /// [`IOMMU_PUSH_RESET`].
    pub flags: u32,
}
const _: () = assert!(size_of::<PushHead>() == 8);

/// One change of the IOMMU's mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PushEntry {
    /// First address as the device names it.
    pub iova: u64,
    /// Length, bytes.
    pub size: u64,
    /// Where it is in the front-end's process.
    pub user_addr: u64,
    /// 0 to unmap; 1 to map for reading, 2 for writing, 3 for both.
    pub perm: u8,
    /// 0.
    pub reserved: [u8; 7],
}
const _: () = assert!(size_of::<PushEntry>() == 32 && offset_of!(PushEntry, perm) == 24);

/// Sends a request and waits for the `u64` with which it is answered. After an error
/// nobody knows what comes next on the channel, so it is shut down.
///
/// # Errors
/// What the socket answers, its time limit included; `InvalidData` for a reply to
/// something else.
pub(super) fn exchange(mut stream: &UnixStream, request: u32, body: &[u8]) -> io::Result<u64> {
    let result = (|| {
        // A GET has its reply without being told to.
        let flags = if request == VHOST_USER_GET_PROTOCOL_FEATURES { VERSION } else { VERSION | NEED_REPLY };
        // A body has 64 entries at most.
        let header = Header { request, flags, size: body.len() as u32 };
        stream.write_all(&[header.as_bytes(), body].concat())?;
        let mut reply = [0; size_of::<Header>() + size_of::<u64>()];
        stream.read_exact(&mut reply)?;
        let (header, value) = reply.split_at(size_of::<Header>());
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let header = Header::read_from_bytes(header).map_err(|_| invalid())?;
        let mask = VERSION_MASK | REPLY;
        if header.request != request || header.flags & mask != VERSION | REPLY || header.size != 8 {
            return Err(invalid());
        }
        u64::read_from_bytes(value).map_err(|_| invalid())
    })();
    result.inspect_err(|_| drop(stream.shutdown(Shutdown::Both)))
}

/// A request of the back-end's.
#[derive(Debug)]
pub(super) struct Asked {
    pub header: Header,
    /// If it is an IOTLB message.
    pub iotlb: Option<IotlbMessage>,
}

/// Reads a request from the back-end channel.
///
/// # Errors
/// What the socket answers; `InvalidData` for what is no request of version 1.
pub(super) fn receive(mut channel: &UnixStream) -> io::Result<Asked> {
    let mut bytes = [0; size_of::<Header>()];
    channel.read_exact(&mut bytes)?;
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let header = Header::read_from_bytes(&bytes).map_err(|_| invalid())?;
    // No request of a back-end's is longer.
    let mut body = [0; 4096];
    let body = body.get_mut(..header.size as usize).ok_or_else(invalid)?;
    channel.read_exact(body)?;
    if header.flags & (VERSION_MASK | REPLY) != VERSION {
        return Err(invalid());
    }
    let is_iotlb = header.request == VHOST_USER_BACKEND_IOTLB_MSG;
    let iotlb = if is_iotlb { IotlbMessage::read_from_bytes(body).ok() } else { None };
    Ok(Asked { header, iotlb })
}

/// Answers a request of the back-end's, if it waits for that.
///
/// # Errors
/// What the socket answers.
pub(super) fn answer(mut channel: &UnixStream, asked: &Header, value: u64) -> io::Result<()> {
    if asked.flags & NEED_REPLY == 0 {
        return Ok(());
    }
    let header = Header { request: asked.request, flags: VERSION | REPLY, size: 8 };
    channel.write_all(&[header.as_bytes(), value.as_bytes()].concat())
}
