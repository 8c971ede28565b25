//! A front-end that writes its own bytes. Numbers are those of the vhost-user
//! specification; nothing is taken from the library that the broker uses.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_ENABLE: u32 = 18;
pub const SET_BACKEND_REQ_FD: u32 = 21;
pub const IOTLB_MSG: u32 = 22;
pub const GET_CONFIG: u32 = 24;
pub const SET_CONFIG: u32 = 25;
pub const RESET_DEVICE: u32 = 34;
pub const GET_MAX_MEM_SLOTS: u32 = 36;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;
pub const GET_SHMEM_CONFIG: u32 = 44;

pub const VERSION: u32 = 1;
pub const REPLY: u32 = 4;
pub const NEED_REPLY: u32 = 8;

pub const PROTOCOL_FEATURES: u64 = 1 << 30;
pub const VERSION_1: u64 = 1 << 32;
/// MQ, REPLY_ACK, CONFIGURE_MEM_SLOTS.
pub const OWNER_PROTOCOL: u64 = 1 | 1 << 3 | 1 << 15;
pub const LOG_SHMFD: u64 = 1 << 1;
/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG, CONFIGURE_MEM_SLOTS, SHMEM.
pub const PEER_PROTOCOL: u64 = 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 15 | 1 << 22;

pub const FRONTEND: u64 = 0x7f00_0000_0000;
pub const MEMORY: u64 = 4 << 20;
/// Far more than anything takes: a test that needs it fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// A message's bytes.
pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header(request, flags, u32::try_from(payload.len()).unwrap());
    bytes.extend(payload);
    bytes
}

pub fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

/// A payload of SET_MEM_TABLE: guest address, length, front-end address, offset.
pub fn table(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut bytes = words(&[u32::try_from(regions.len()).unwrap(), 0]);
    for region in regions {
        bytes.extend(longs(region));
    }
    bytes
}

pub fn region() -> [u64; 4] {
    [0, MEMORY, FRONTEND, 0]
}

pub fn memfd() -> OwnedFd {
    let file = unsealed_memfd();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    file
}

/// Memory that can be shortened.
pub fn unsealed_memfd() -> OwnedFd {
    let fd = memfd_create(c"ram", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let file = File::from(fd);
    file.set_len(MEMORY).unwrap();
    file.into()
}

pub fn eventfd() -> OwnedFd {
    let fd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
    fd.as_fd().try_clone_to_owned().unwrap()
}

pub struct Raw {
    pub stream: UnixStream,
}

impl Raw {
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream }
    }

    /// Sends bytes as they are. A broker that has closed already is no surprise here.
    pub fn send(&self, bytes: &[u8], fds: &[OwnedFd]) {
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let _ = self.stream.send_with_fds(&[bytes], &fds);
    }

    pub fn ask(&self, request: u32, payload: &[u8], fds: &[OwnedFd]) {
        self.send(&message(request, VERSION, payload), fds);
    }

    /// Asks what has an answer of its own.
    pub fn question(&mut self, request: u32, payload: &[u8]) -> Vec<u8> {
        self.ask(request, payload, &[]);
        self.answer(request)
    }

    /// Asks with NEED_REPLY; whether the answer is "done".
    pub fn done(&mut self, request: u32, payload: &[u8], fds: &[OwnedFd]) -> bool {
        self.send(&message(request, VERSION | NEED_REPLY, payload), fds);
        self.answer(request) == longs(&[0])
    }

    /// Takes the answer that a request has of its own.
    pub fn answered(&mut self, request: u32) {
        self.answer(request);
    }

    fn answer(&mut self, request: u32) -> Vec<u8> {
        let mut header = [0; 12];
        self.stream.read_exact(&mut header).unwrap();
        let word = |index: usize| u32::from_ne_bytes(header[4 * index..4 * index + 4].try_into().unwrap());
        assert_eq!((word(0), word(1)), (request, VERSION | REPLY));
        let mut payload = vec![0; word(2) as usize];
        self.stream.read_exact(&mut payload).unwrap();
        payload
    }

    pub fn half_close(&self) {
        drop(self.stream.shutdown(Shutdown::Write));
    }

    /// Waits until the broker has closed; gives what it still sent.
    pub fn closed(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        let mut piece = [0; 4096];
        loop {
            match self.stream.read(&mut piece) {
                Ok(0) => return rest,
                Ok(len) => rest.extend(&piece[..len]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return rest,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => panic!("the broker keeps the session open: {error}"),
            }
        }
    }

    pub fn negotiate(&mut self, protocol: u64) {
        self.negotiate_with(protocol, VERSION_1 | PROTOCOL_FEATURES);
    }

    pub fn negotiate_with(&mut self, protocol: u64, features: u64) {
        self.question(GET_FEATURES, &[]);
        self.question(GET_PROTOCOL_FEATURES, &[]);
        self.ask(SET_PROTOCOL_FEATURES, &longs(&[protocol]), &[]);
        self.ask(SET_OWNER, &[], &[]);
        assert!(self.done(SET_FEATURES, &longs(&[features]), &[]));
    }

    /// Memory and both vrings, up to the kicks.
    pub fn set_up(&mut self) {
        assert!(self.done(SET_MEM_TABLE, &table(&[region()]), &[memfd()]));
        for index in 0..2u32 {
            let page = FRONTEND + 0x1000 * u64::from(index);
            let mut addr = words(&[index, 0]);
            addr.extend(longs(&[page, page + 0x600, page + 0x400, 0]));
            assert!(self.done(SET_VRING_NUM, &words(&[index, 64]), &[]));
            assert!(self.done(SET_VRING_BASE, &words(&[index, 0]), &[]));
            assert!(self.done(SET_VRING_ADDR, &addr, &[]));
            assert!(self.done(SET_VRING_CALL, &longs(&[index.into()]), &[eventfd()]));
        }
    }

    pub fn start(&mut self) {
        for index in 0..2u32 {
            assert!(self.done(SET_VRING_KICK, &longs(&[index.into()]), &[eventfd()]));
            assert!(self.done(SET_VRING_ENABLE, &words(&[index, 1]), &[]));
        }
    }

    /// An owner's whole start.
    pub fn owner(socket: &Path) -> Self {
        let mut owner = Self::connect(socket);
        owner.negotiate(OWNER_PROTOCOL);
        owner.set_up();
        owner.start();
        owner
    }

    /// Stops both vrings; each is answered.
    pub fn owner_stops(&mut self) {
        for index in 0..2 {
            assert_eq!(self.question(GET_VRING_BASE, &words(&[index, 0])).len(), 8);
        }
    }

    /// A peer's whole start. Its VMM says yes to every change of its window, and keeps what it is
    /// to map.
    pub fn peer(socket: &Path) -> (Self, JoinHandle<Vec<Option<File>>>) {
        let mut peer = Self::connect(socket);
        peer.negotiate(PEER_PROTOCOL);
        let (mine, theirs) = UnixStream::pair().unwrap();
        assert!(peer.done(SET_BACKEND_REQ_FD, &[], &[theirs.into()]));
        let window = thread::spawn(move || agree(mine));
        assert_eq!(peer.question(GET_SHMEM_CONFIG, &[]).len(), 8 + 8 * 256);
        for index in 0..3u32 {
            assert!(peer.done(SET_VRING_CALL, &longs(&[index.into()]), &[eventfd()]));
            assert!(peer.done(SET_VRING_KICK, &longs(&[index.into()]), &[eventfd()]));
            assert!(peer.done(SET_VRING_ENABLE, &words(&[index, 1]), &[]));
        }
        (peer, window)
    }
}

/// Answers every SHMEM_MAP and SHMEM_UNMAP with "done"; gives the files that came with them.
fn agree(mut channel: UnixStream) -> Vec<Option<File>> {
    let mut files = Vec::new();
    loop {
        let mut bytes = [0; 12 + 40];
        let Ok((len, file)) = channel.recv_with_fd(&mut bytes) else {
            return files;
        };
        if len < bytes.len() && channel.read_exact(&mut bytes[len..]).is_err() {
            return files;
        }
        files.push(file);
        let request = u32::from_ne_bytes(bytes[..4].try_into().unwrap());
        let answer = message(request, VERSION | REPLY, &longs(&[0]));
        if channel.send_with_fds(&[answer.as_slice()], &[]).is_err() {
            return files;
        }
    }
}
