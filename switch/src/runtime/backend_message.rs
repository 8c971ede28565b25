//! The messages of a back-end channel, as bytes (vhost-user: Back-end message types):
//! SHMEM_MAP and SHMEM_UNMAP for a peer's VMM, IOTLB_MSG for an owner's. The vhost
//! crate's `Backend` waits for the answer to each before it sends the next, and has
//! no IOTLB_MSG.

use std::os::fd::AsFd;

use iommu::{Access, Iova, PAGE_SIZE};
use vhost::vhost_user::message::{BackendReq, VhostUserMMap, VhostUserMMapFlags};
use vhost_pci_device::abi;
use vm_memory::ByteValued;

use super::areas::Source;
use crate::link::Side;
use crate::link::descriptor::Eventfd;
use crate::link::message::IotlbMessage;
use crate::link::wiring::WireRequest;

/// Length of a header, bytes.
pub const HEADER_LEN: usize = 12;
/// Length of a reply's payload, bytes.
pub const REPLY_LEN: usize = 8;
/// A header's flags: protocol version 1.
pub const FLAG_VERSION: u32 = 0x1;
/// A reply.
pub const FLAG_REPLY: u32 = 0x4;
/// A reply is wanted.
pub const FLAG_NEED_REPLY: u32 = 0x8;
/// VHOST_USER_BACKEND_IOTLB_MSG.
const IOTLB_MSG: u32 = 1;
/// Length of `struct vhost_iotlb_msg`, bytes.
const IOTLB_LEN: usize = 32;

/// VHOST_USER_BACKEND_WIRE (`docs/vhost-user-extensions.md`), and its flags.
const WIRE: u32 = 0x5650_0101;
const WIRE_F_NOTIFY: u32 = 1 << 0;
const WIRE_F_WIRE: u32 = 1 << 1;

/// A descriptor that goes with a message.
#[derive(Debug)]
pub enum Descriptor {
    /// SHMEM_MAP's.
    File(Source),
    /// WIRE's.
    Eventfd(Eventfd),
}

/// A message with the descriptor that goes with it.
#[derive(Debug)]
pub struct Message {
    /// Header and payload.
    pub bytes: Vec<u8>,
    /// What goes with it.
    pub descriptor: Option<Descriptor>,
    /// What it asks for, for errors.
    pub what: String,
    /// Whether the VMM answers it.
    pub has_answer: bool,
}

fn header(request: u32, flags: u32, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + len);
    for field in [request, FLAG_VERSION | flags, len as u32] {
        bytes.extend(field.to_ne_bytes());
    }
    bytes
}

/// Asks for `len` bytes of the file, from `file_offset` on, at `offset` of the window.
pub fn map(offset: u64, len: u64, file: Source, file_offset: u64, writable: bool) -> Message {
    let flags = if writable { VhostUserMMapFlags::WRITABLE.bits() } else { 0 };
    let what = format!("map {len:#x} bytes at window offset {offset:#x}");
    shmem(BackendReq::SHMEM_MAP, request(offset, len, file_offset, flags), Some(file), what)
}

/// Asks to unmap exactly what was mapped at `offset`.
pub fn unmap(offset: u64, len: u64) -> Message {
    let what = format!("unmap {len:#x} bytes at window offset {offset:#x}");
    shmem(BackendReq::SHMEM_UNMAP, request(offset, len, 0, 0), None, what)
}

fn request(offset: u64, len: u64, file_offset: u64, flags: u64) -> VhostUserMMap {
    VhostUserMMap {
        shmid: abi::SHMID_WINDOW,
        padding: [0; 7],
        fd_offset: file_offset,
        shm_offset: offset,
        len,
        flags,
    }
}

fn shmem(code: BackendReq, request: VhostUserMMap, file: Option<Source>, what: String) -> Message {
    let payload = request.as_slice();
    let mut bytes = header(code as u32, FLAG_NEED_REPLY, payload.len());
    bytes.extend(payload);
    Message { bytes, descriptor: file.map(Descriptor::File), what, has_answer: true }
}

/// Asks to wire an end of a vring's notifications, or to take back what was wired.
pub fn wire(request: WireRequest) -> Message {
    let (queue, WireRequest { end, eventfd }) = (request.queue(), request);
    let (notify, name) = match end.from {
        Side::Owner => (0, "interrupt"),
        Side::Peer => (WIRE_F_NOTIFY, "notification"),
    };
    let wire = if eventfd.is_some() { WIRE_F_WIRE } else { 0 };
    let mut bytes = header(WIRE, FLAG_NEED_REPLY, 8);
    for field in [u32::from(queue), notify | wire] {
        bytes.extend(field.to_ne_bytes());
    }
    let action = if eventfd.is_some() { "wire" } else { "take back" };
    let what = format!("{action} the {name} of virtqueue {queue}");
    Message { bytes, descriptor: eventfd.map(Descriptor::Eventfd), what, has_answer: true }
}

/// Tells of a translation that is missing.
pub fn miss(page: Iova, access: Access) -> Message {
    iotlb(IotlbMessage::MISS, page, access, true)
}

/// Tells of a translation that does not allow an access.
pub fn access_fail(page: Iova, access: Access) -> Message {
    iotlb(IotlbMessage::ACCESS_FAIL, page, access, false)
}

fn iotlb(kind: u8, page: Iova, access: Access, has_answer: bool) -> Message {
    let mut bytes = header(IOTLB_MSG, if has_answer { FLAG_NEED_REPLY } else { 0 }, IOTLB_LEN);
    for field in [page.raw(), PAGE_SIZE, 0] {
        bytes.extend(field.to_ne_bytes());
    }
    bytes.extend([access.bits() as u8, kind, 0, 0, 0, 0, 0, 0]);
    Message { bytes, descriptor: None, what: format!("translate {page}"), has_answer }
}

/// Which request this is the header of a reply to; `None` if it is of none.
pub fn replied(header: &[u8; HEADER_LEN]) -> Option<u32> {
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let is_reply = word(4) & FLAG_REPLY != 0 && word(8) as usize == REPLY_LEN;
    is_reply.then(|| word(0))
}

/// Whether the payload of a reply says that it was done.
pub fn is_done(payload: [u8; REPLY_LEN]) -> bool {
    payload == [0; REPLY_LEN]
}

/// The bytes by which the broker says that a request of a front-end is done, or not
/// (vhost-user: REPLY_ACK).
pub fn acknowledgement(request: u32, done: bool) -> [u8; HEADER_LEN + REPLY_LEN] {
    let mut bytes = [0; HEADER_LEN + REPLY_LEN];
    bytes[0..4].copy_from_slice(&request.to_ne_bytes());
    bytes[4..8].copy_from_slice(&(FLAG_VERSION | FLAG_REPLY).to_ne_bytes());
    bytes[8..12].copy_from_slice(&(REPLY_LEN as u32).to_ne_bytes());
    bytes[12..20].copy_from_slice(&u64::from(!done).to_ne_bytes());
    bytes
}

impl Message {
    /// The number of its request.
    pub fn code(&self) -> u32 {
        self.bytes.first_chunk().map_or(0, |code| u32::from_ne_bytes(*code))
    }

    /// The descriptor that goes with it.
    pub fn descriptor(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.descriptor.as_ref().map(|descriptor| match descriptor {
            Descriptor::File(source) => source.as_fd(),
            Descriptor::Eventfd(eventfd) => eventfd.as_fd(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::link::wiring::End;

    #[test]
    fn a_miss_has_the_layout_of_vhost_iotlb_msg() {
        let message = miss(Iova::new(0x1234_5000), Access::Write);
        let mut expected = vec![1, 0, 0, 0, 9, 0, 0, 0, 32, 0, 0, 0, 0x00, 0x50, 0x34, 0x12, 0, 0, 0, 0];
        expected.extend([0, 0x10, 0, 0, 0, 0, 0, 0]);
        expected.extend([0; 8]);
        expected.extend([2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(message.bytes, expected);
    }

    #[test]
    fn an_unmap_has_the_layout_of_the_specification() {
        let message = unmap(0x20_0000, 0x1000);
        // shmid and padding, fd offset, shm offset, len, flags: 64 bits each.
        let expected: Vec<u8> =
            [0, 0, 0x20_0000, 0x1000, 0].into_iter().flat_map(|field: u64| field.to_ne_bytes()).collect();
        assert_eq!(message.bytes[HEADER_LEN..], expected);
        assert_eq!(
            message.bytes[..HEADER_LEN],
            [BackendReq::SHMEM_UNMAP as u8, 0, 0, 0, 9, 0, 0, 0, 40, 0, 0, 0]
        );
    }

    #[test]
    fn a_wire_has_the_layout_of_the_extension() {
        let end = End { vring: 4, from: Side::Peer };
        let message = wire(WireRequest { end, eventfd: None });
        let expected = [0x5650_0101_u32, 9, 8, 5, 1].map(u32::to_ne_bytes).concat();
        assert_eq!((message.bytes.clone(), message.descriptor().is_none()), (expected, true));
        let end = End { from: Side::Owner, ..end };
        let eventfd = nix::sys::eventfd::EventFd::from_value(0).unwrap();
        let message = wire(WireRequest { end, eventfd: Some(Eventfd::new(eventfd.into())) });
        assert_eq!((message.bytes[16], message.descriptor().is_some()), (2, true));
    }

    #[test]
    fn a_reply_is_told_from_other_messages() {
        let header = |bytes: [u8; 20]| *bytes.first_chunk::<HEADER_LEN>().unwrap();
        let payload = |done| is_done(*acknowledgement(7, done).last_chunk::<REPLY_LEN>().unwrap());
        assert_eq!((payload(true), payload(false)), (true, false));
        let reply = header(acknowledgement(7, true));
        assert_eq!(replied(&reply), Some(7));
        for (at, value) in [(4, 1), (8, 0), (8, 16), (9, 1)] {
            let mut other = reply;
            other[at] = value;
            assert_eq!(replied(&other), None, "{other:?}");
        }
    }
}
