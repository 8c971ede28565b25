//! A vhost-user front-end that sends what it likes, over one end of a socket pair. Numbers are
//! those of the specification; nothing is taken from the library that the broker uses.

use std::fs::File;
use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::sys;

/// Front-end virtual address of guest address 0.
pub const FRONTEND: u64 = 0x7f00_0000_0000;
/// Length of the memory files, bytes.
pub const MEMORY: u64 = 4 << 20;
/// Length of a header, bytes.
pub const HEADER: usize = 12;
const VERSION: u32 = 1;
const REPLY: u32 = 4;
/// Header flag: an answer is wanted.
pub const NEED_REPLY: u32 = 8;

/// VHOST_USER_BACKEND_IOTLB_MSG.
const BACKEND_IOTLB: u32 = 1;

/// VHOST_USER_* numbers.
pub mod request {
    #![allow(missing_docs)]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const IOTLB_MSG: u32 = 22;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const GET_SHMEM_CONFIG: u32 = 44;
    pub const IOMMU_PUSH: u32 = 0x5650_0001;
}

/// VIRTIO_F_VERSION_1 and the bit of vhost-user.
pub const FEATURES: u64 = 1 << 32 | 1 << 30;
/// VIRTIO_F_ACCESS_PLATFORM.
pub const PLATFORM: u64 = 1 << 33;
/// VHOST_F_LOG_ALL.
pub const LOG_ALL: u64 = 1 << 26;
/// MQ, LOG_SHMFD, REPLY_ACK, CONFIGURE_MEM_SLOTS.
pub const OWNER_PROTOCOL: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 15;
/// BACKEND_REQ; the project's own push of IOMMU mappings.
pub const CHANNEL: u64 = 1 << 5;
/// See `docs/vhost-user-extensions.md`.
pub const PUSH: u64 = 1 << 62;
/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG, CONFIGURE_MEM_SLOTS, SHMEM.
pub const PEER_PROTOCOL: u64 = 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 15 | 1 << 22;
/// SHMEM_STRICT and WIRING of the same document.
pub const STRICT_WIRING: u64 = 1 << 61 | 1 << 60;

/// A message's bytes.
pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = words(&[request, flags | VERSION, payload.len() as u32]);
    bytes.extend(payload);
    bytes
}

/// 32-bit fields.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// 64-bit fields.
pub fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

/// Descriptors that are sent. They are made once for all inputs; who receives one has a
/// descriptor of its own of the same thing.
#[derive(Debug)]
pub struct Pool {
    /// Of a kind that can be mapped; the last one can be shortened.
    pub memory: [OwnedFd; 3],
    /// Eventfds, which nobody waits for.
    pub eventfds: [OwnedFd; 6],
    /// What is neither, or is not as it has to be.
    pub others: Vec<OwnedFd>,
}

impl Pool {
    /// Those of the process.
    pub fn of_process() -> &'static Self {
        static POOL: OnceLock<Pool> = OnceLock::new();
        POOL.get_or_init(|| {
            let memfd = |len, seal| {
                let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
                let file = File::from(memfd_create(c"ram", flags).expect("a memfd"));
                file.set_len(len).expect("memory");
                fcntl(&file, FcntlArg::F_ADD_SEALS(seal)).expect("a memfd that takes seals");
                OwnedFd::from(file)
            };
            let (shrink, none) = (SealFlag::F_SEAL_SHRINK, SealFlag::empty());
            let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
            let eventfd = || OwnedFd::from(EventFd::from_flags(flags).expect("an eventfd"));
            let (pipe, _) = nix::unistd::pipe().expect("a pipe");
            let (datagrams, _) = std::os::unix::net::UnixDatagram::pair().expect("sockets");
            let open = |path| OwnedFd::from(File::open(path).expect("a file"));
            Self {
                memory: [memfd(MEMORY, shrink), memfd(MEMORY, shrink), memfd(MEMORY / 2, none)],
                eventfds: std::array::from_fn(|_| eventfd()),
                others: vec![
                    memfd(0, shrink),
                    pipe,
                    datagrams.into(),
                    open("/dev/null"),
                    open("/proc/self/maps"),
                    open("/"),
                ],
            }
        })
    }
}

/// A front-end's connection and the back-end channels that it has given away.
#[derive(Debug)]
pub struct Front {
    stream: UnixStream,
    channels: Vec<UnixStream>,
    /// The broker has closed the connection.
    pub closed: bool,
}

/// How a request that comes on a back-end channel is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// It is answered: done.
    Agrees,
    /// It is answered: not done.
    Refuses,
    /// It is read, and that is all.
    IsSilent,
}

impl Front {
    /// Over this connection.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, channels: Vec::new(), closed: false }
    }

    /// Sends bytes with descriptors. What the broker does not take at once is lost, and with it
    /// the sense of what follows.
    pub fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        send(&self.stream, bytes, fds);
    }

    /// Makes a channel; gives the broker's end, to be sent.
    pub fn open_channel(&mut self) -> OwnedFd {
        let (mine, theirs) = UnixStream::pair().expect("descriptors");
        self.channels.push(mine);
        theirs.into()
    }

    /// Channels so far.
    pub fn channels(&self) -> &[UnixStream] {
        &self.channels
    }

    /// Sends bytes on the newest channel, if there is one.
    pub fn say(&self, bytes: &[u8]) {
        if let Some(channel) = self.channels.last() {
            send(channel, bytes, &[]);
        }
    }

    /// Closes the newest channel.
    pub fn close_channel(&mut self) {
        drop(self.channels.pop());
    }

    /// Sends nothing more.
    pub fn half_close(&self) {
        drop(self.stream.shutdown(Shutdown::Write));
    }

    /// Reads whatever has come, and answers on the channels. Whether anything has come.
    pub fn serve(&mut self, manner: Manner, seen: &mut dyn FnMut(&[u8], Option<&OwnedFd>)) -> bool {
        let mut any = false;
        let mut bytes = [0; 4096];
        while let Some((len, _)) = receive(&self.stream, &mut bytes) {
            if len == 0 {
                self.closed = true;
                break;
            }
            any = true;
        }
        for channel in &self.channels {
            // A request at a time: the broker sends none in pieces, and none longer.
            let mut header = [0; HEADER];
            while let Some((HEADER, fds)) = receive(channel, &mut header) {
                any = true;
                let field = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| header[4 * at + byte]));
                let mut payload = [0; 64];
                let len = (field(2) as usize).min(payload.len());
                let _ = receive(channel, &mut payload[..len]);
                seen(&[header.as_slice(), &payload[..len]].concat(), fds.first());
                // A miss: the address is its own translation.
                if field(0) == BACKEND_IOTLB && len == 32 && manner == Manner::Agrees {
                    let page = u64::from_ne_bytes(payload[..8].try_into().expect("8 bytes"));
                    let update = longs(&[page, 4096, FRONTEND.wrapping_add(page), 2 << 8 | 3]);
                    send(&self.stream, &message(request::IOTLB_MSG, 0, &update), &[]);
                }
                if field(1) & NEED_REPLY != 0 && manner != Manner::IsSilent {
                    let result = u64::from(manner == Manner::Refuses);
                    send(channel, &message(field(0), REPLY, &longs(&[result])), &[]);
                }
            }
        }
        any
    }

    /// Whether the broker has read all that was sent to it.
    pub fn is_read(&self) -> bool {
        sys::all_is_read(self.stream.as_fd())
            && self.channels.iter().all(|channel| sys::all_is_read(channel.as_fd()))
    }
}

/// Serves both front-ends until the broker has read what it was sent and has nothing to say, or for
/// a moment.
pub fn settle(fronts: &mut [&mut Front], manner: Manner) {
    let end = Instant::now() + Duration::from_millis(5);
    let mut quiet = 0;
    while quiet < 3 && Instant::now() < end {
        let mut busy = false;
        for front in fronts.iter_mut() {
            busy |= front.serve(manner, &mut |_, _| {}) | !front.is_read();
        }
        quiet = if busy { 0 } else { quiet + 1 };
        thread::yield_now();
    }
}

fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(40))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let _ = sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, flags);
}

/// What has come, if anything; 0 bytes at the end.
fn receive(stream: &UnixStream, bytes: &mut [u8]) -> Option<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    match recvmsg(stream, &mut [IoSliceMut::new(bytes)], &mut ancillary, flags) {
        Ok(message) => {
            let fds = ancillary.drain().filter_map(|part| match part {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            });
            Some((message.bytes, fds.flatten().collect()))
        }
        Err(error) => {
            let kind = std::io::Error::from(error).kind();
            // A connection that was reset is at its end.
            (kind != ErrorKind::WouldBlock && kind != ErrorKind::Interrupted).then(|| (0, Vec::new()))
        }
    }
}
