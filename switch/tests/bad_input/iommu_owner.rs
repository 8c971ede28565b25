//! An owner's front-end with an IOMMU, byte by byte, and the peer's driver: it writes its
//! commands into the control area that the broker shares with its VMM.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vhost_pci_device::abi;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::raw::{
    FRONTEND, GET_FEATURES, GET_SHMEM_CONFIG, IOTLB_MSG, OWNER_PROTOCOL, PEER_PROTOCOL, PROTOCOL_FEATURES,
    REPLY, Raw, SET_BACKEND_REQ_FD, SET_MEM_TABLE, SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_CALL,
    SET_VRING_ENABLE, SET_VRING_KICK, SET_VRING_NUM, VERSION, VERSION_1, eventfd, longs, message, region,
    table, words,
};

pub const IOMMU_PUSH: u32 = 0x5650_0001;
pub const BACKEND_REQ: u64 = 1 << 5;
pub const PUSH: u64 = 1 << 62;
pub const ACCESS_PLATFORM: u64 = 1 << 33;
/// Where the vrings are in IOVAs; behind them are the first pages of the memory.
pub const RINGS: u64 = 0xffff_0000;
/// Where buffers are, and what is behind them.
pub const BUFFERS: u64 = 0x10_0000_0000;
pub const BEHIND: u64 = FRONTEND + 0x10_0000;
pub const PAGE: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(30);

/// `struct vhost_iotlb_msg`.
pub fn iotlb(iova: u64, size: u64, user: u64, perm: u8, kind: u8) -> Vec<u8> {
    let mut bytes = longs(&[iova, size, user]);
    bytes.extend([perm, kind, 0, 0, 0, 0, 0, 0]);
    bytes
}

pub fn update(iova: u64, size: u64, user: u64) -> Vec<u8> {
    iotlb(iova, size, user, 3, 2)
}

pub fn invalidate(iova: u64, size: u64) -> Vec<u8> {
    iotlb(iova, size, 0, 0, 3)
}

/// A payload of IOMMU_PUSH.
pub fn push(flags: u32, entries: &[(u64, u64, u64, u8)]) -> Vec<u8> {
    let mut bytes = words(&[u32::try_from(entries.len()).unwrap(), flags]);
    for (iova, size, user, perm) in entries {
        bytes.extend(longs(&[*iova, *size, *user]));
        bytes.extend([*perm, 0, 0, 0, 0, 0, 0, 0]);
    }
    bytes
}

/// An owner up to its memory table; with it, the end of the back-end channel on which it
/// is asked.
pub fn owner(socket: &Path, protocol: u64, memory: OwnedFd) -> (Raw, UnixStream) {
    let mut raw = Raw::connect(socket);
    raw.negotiate_with(OWNER_PROTOCOL | protocol, VERSION_1 | PROTOCOL_FEATURES | ACCESS_PLATFORM);
    let (mine, theirs) = UnixStream::pair().unwrap();
    mine.set_read_timeout(Some(PATIENCE)).unwrap();
    if protocol & BACKEND_REQ != 0 {
        assert!(raw.done(SET_BACKEND_REQ_FD, &[], &[theirs.into()]));
    }
    assert!(raw.done(SET_MEM_TABLE, &table(&[region()]), &[memory]));
    (raw, mine)
}

impl Raw {
    /// Starts both vrings, each in a page of its own.
    pub fn start_at_iovas(&mut self) {
        for index in 0..2u32 {
            let page = RINGS + PAGE * u64::from(index);
            let mut addr = words(&[index, 0]);
            addr.extend(longs(&[page, page + 0x600, page + 0x400, 0]));
            assert!(self.done(SET_VRING_NUM, &words(&[index, 64]), &[]));
            assert!(self.done(SET_VRING_BASE, &words(&[index, 0]), &[]));
            assert!(self.done(SET_VRING_ADDR, &addr, &[]));
            assert!(self.done(SET_VRING_CALL, &longs(&[index.into()]), &[eventfd()]));
            assert!(self.done(SET_VRING_KICK, &longs(&[index.into()]), &[eventfd()]));
            assert!(self.done(SET_VRING_ENABLE, &words(&[index, 1]), &[]));
        }
    }

    /// Answers misses for the pages of the vrings, until both are known.
    pub fn tells_rings(&mut self, channel: &mut UnixStream) {
        for _ in 0..4 {
            let (iova, _) = next_miss(channel);
            assert!(self.done(IOTLB_MSG, &update(iova, PAGE, FRONTEND + (iova - RINGS)), &[]));
            answer(channel, &longs(&[0]));
        }
    }

    /// An owner that answers for its vrings and is up as far as it can be.
    pub fn asked_owner(socket: &Path, memory: OwnedFd) -> (Self, UnixStream) {
        let (mut raw, mut channel) = owner(socket, BACKEND_REQ, memory);
        raw.start_at_iovas();
        raw.tells_rings(&mut channel);
        (raw, channel)
    }

    /// An owner that pushes its vrings' memory before it starts them.
    pub fn pushing_owner(socket: &Path, memory: OwnedFd) -> Self {
        let (mut raw, _) = owner(socket, PUSH, memory);
        assert!(raw.done(IOMMU_PUSH, &push(0, &[(RINGS, 2 * PAGE, FRONTEND, 3)]), &[]));
        raw.start_at_iovas();
        raw
    }
}

/// The next miss: its page and permission.
pub fn next_miss(channel: &mut UnixStream) -> (u64, u8) {
    let mut bytes = [0; 12 + 32];
    channel.read_exact(&mut bytes).unwrap();
    assert_eq!(u32::from_ne_bytes(bytes[..4].try_into().unwrap()), 1);
    assert_eq!(bytes[37], 1, "a miss");
    (u64::from_ne_bytes(bytes[12..20].try_into().unwrap()), bytes[36])
}

/// Answers the miss that was read last, with these bytes.
pub fn answer(channel: &UnixStream, payload: &[u8]) {
    let _ = channel.send_with_fds(&[message(1, VERSION | REPLY, payload).as_slice()], &[]);
}

/// The peer's driver and its VMM.
pub struct Peer {
    raw: Raw,
    window: JoinHandle<()>,
    link: Area,
    control: Area,
    doorbell: File,
    avail: u16,
    attached: u64,
}

impl Peer {
    pub fn start(socket: &Path) -> Self {
        let mut raw = Raw::connect(socket);
        raw.negotiate(PEER_PROTOCOL);
        let (mine, theirs) = UnixStream::pair().unwrap();
        assert!(raw.done(SET_BACKEND_REQ_FD, &[], &[theirs.into()]));
        let (areas, mapped) = channel();
        let window = thread::spawn(move || agree(mine, &areas));
        raw.question(GET_SHMEM_CONFIG, &[]);
        let kicks: Vec<OwnedFd> = (0..3).map(|_| eventfd()).collect();
        for index in 0..3u32 {
            let kick = kicks[index as usize].try_clone().unwrap();
            assert!(raw.done(SET_VRING_CALL, &longs(&[index.into()]), &[eventfd()]));
            assert!(raw.done(SET_VRING_KICK, &longs(&[index.into()]), &[kick]));
            assert!(raw.done(SET_VRING_ENABLE, &words(&[index, 1]), &[]));
        }
        let doorbell = File::from(kicks[0].try_clone().unwrap());
        let link = area(&mapped, abi::LINK_OFFSET);
        let control = area(&mapped, abi::CONTROL_OFFSET);
        Self { raw, window, link, control, doorbell, avail: 0, attached: 0 }
    }

    /// A command, with so much room behind the response or so many bytes behind the
    /// request. Gives the slot in which it is.
    pub fn gives(&mut self, command: u16, iova: u64, len: u32) -> u16 {
        self.gives_with_room(command, iova, len.into(), len)
    }

    /// The same, with other room than the command says.
    pub fn gives_with_room(&mut self, command: u16, iova: u64, len: u64, room: u32) -> u16 {
        let mut bytes = [0; 8];
        self.link.read_exact_at(&mut bytes, 8).unwrap();
        let generation = u64::from_le_bytes(bytes);
        if self.attached != generation {
            self.attached = generation;
            let slot = self.put(abi::CTRL_ATTACH, generation, 0, 0);
            self.status(slot);
        }
        self.put(command, iova, len, room)
    }

    fn put(&mut self, command: u16, iova: u64, len: u64, room: u32) -> u16 {
        let slot = self.avail % 32;
        let request_at = abi::CONTROL_BUFFERS + u64::from(slot) * 4096;
        let request = abi::ControlRequest {
            command: command.into(),
            value: iova.into(),
            len: len.into(),
            flags: 3.into(),
            ..Default::default()
        };
        let store = if command == abi::CTRL_STORE { room } else { 0 };
        let fetch = if command == abi::CTRL_FETCH { room } else { 0 };
        self.control.write_all_at(zerocopy::IntoBytes::as_bytes(&request), request_at).unwrap();
        self.control.write_all_at(&vec![0xab; store as usize], request_at + 32).unwrap();
        self.control.write_all_at(&u32::MAX.to_le_bytes(), request_at + 2048).unwrap();
        let descriptors = [(request_at, 32 + store, 1u16), (request_at + 2048, 8 + fetch, 2)];
        for (index, (at, len, flags)) in (2 * slot..).zip(descriptors) {
            let mut bytes = (abi::CONTROL_OFFSET + at).to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend((index + 1).to_le_bytes());
            self.control.write_all_at(&bytes, abi::CONTROL_DESC + 16 * u64::from(index)).unwrap();
        }
        let entry = abi::CONTROL_AVAIL + 4 + 2 * u64::from(self.avail % abi::CONTROL_RING_SIZE);
        self.control.write_all_at(&(2 * slot).to_le_bytes(), entry).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.control.write_all_at(&self.avail.to_le_bytes(), abi::CONTROL_AVAIL + 2).unwrap();
        std::io::Write::write_all(&mut &self.doorbell, &1u64.to_ne_bytes()).unwrap();
        slot
    }

    /// The status of the command in this slot.
    pub fn status(&self, slot: u16) -> u32 {
        let end = Instant::now() + PATIENCE;
        loop {
            let mut bytes = [0; 4];
            let at = abi::CONTROL_BUFFERS + u64::from(slot) * 4096 + 2048;
            self.control.read_exact_at(&mut bytes, at).unwrap();
            let status = u32::from_le_bytes(bytes);
            if status != u32::MAX {
                return status;
            }
            assert!(Instant::now() < end, "no answer");
            thread::sleep(Duration::from_micros(200));
        }
    }

    pub fn does(&mut self, command: u16, iova: u64, len: u32) -> u32 {
        let slot = self.gives(command, iova, len);
        self.status(slot)
    }

    /// Its VMM is served.
    pub fn answers(&mut self) {
        assert_eq!(self.raw.question(GET_FEATURES, &[]).len(), 8);
    }

    pub fn leaves(self) {
        drop(self.raw);
        self.window.join().unwrap();
    }
}

/// A part of a file that is mapped into the window.
pub struct Area {
    /// Where in the window.
    offset: u64,
    file: File,
    /// Where in the file.
    start: u64,
}

impl Area {
    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> std::io::Result<()> {
        self.file.read_exact_at(bytes, self.start + at)
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> std::io::Result<()> {
        self.file.write_all_at(bytes, self.start + at)
    }
}

fn area(mapped: &Receiver<Area>, wanted: u64) -> Area {
    loop {
        let area = mapped.recv_timeout(PATIENCE).unwrap();
        if area.offset == wanted {
            return area;
        }
    }
}

/// Answers every change of the window with "done"; passes on what is mapped.
fn agree(mut channel: UnixStream, areas: &std::sync::mpsc::Sender<Area>) {
    loop {
        let mut bytes = [0; 12 + 40];
        let Ok((len, file)) = channel.recv_with_fd(&mut bytes) else { return };
        if len == 0 || len < bytes.len() && channel.read_exact(&mut bytes[len..]).is_err() {
            return;
        }
        let [start, offset] = [20, 28].map(|at| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap()));
        if let Some(file) = file {
            let _ = areas.send(Area { offset, file, start });
        }
        let request = u32::from_ne_bytes(bytes[..4].try_into().unwrap());
        if channel.send_with_fds(&[message(request, VERSION | REPLY, &longs(&[0])).as_slice()], &[]).is_err()
        {
            return;
        }
    }
}

/// Bytes of memory that the process has.
pub fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * PAGE
}
