//! The broker's end of the connection, as raw messages: answers a front-end, notes in which order
//! it was told what, and asks on the back-end channel whatever a test wants, sensible or not.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::{HALF, VRINGS, config_bytes_of, eventually};

// vhost-user: Front-end message types.
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
const GET_SHMEM_CONFIG: u32 = 44;
/// SET_MEM_TABLE, SET_VRING_ADDR, ADD_MEM_REG: about the guest's memory.
const MEMORY: [u32; 3] = [5, 9, 37];

pub const SHMEM_MAP: u32 = 9;
pub const SHMEM_UNMAP: u32 = 10;
pub const WIRE: u32 = 0x5650_0101;
pub const NOTIFY: u32 = 1;
pub const ON: u32 = 2;

/// What it offers, and whether it answers.
#[derive(Clone, Copy)]
pub struct Features {
    pub protocol: u64,
    pub window_len: u64,
    /// What its configuration says of that.
    pub config_window_len: u64,
    /// What it does when it is told of the end of a queue, before it answers.
    pub stop_pause: Duration,
}

impl Default for Features {
    fn default() -> Self {
        let standard = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 15 | 1 << 22;
        Self {
            protocol: standard | 1 << 60 | 1 << 61,
            window_len: 2 * HALF,
            config_window_len: 2 * HALF,
            stop_pause: Duration::ZERO,
        }
    }
}

#[derive(Default)]
struct State {
    main: Option<UnixStream>,
    channel: Option<UnixStream>,
    connections: usize,
    refusing: bool,
    /// Request and queue of what changes queues.
    told: Vec<(u32, u32)>,
    memory: usize,
    accepted: u64,
    features: u64,
    enabled: BTreeMap<u32, bool>,
    kicks: BTreeMap<u32, OwnedFd>,
    calls: BTreeMap<u32, OwnedFd>,
}

#[derive(Clone)]
pub struct Broker {
    features: Features,
    state: Arc<Mutex<State>>,
}

type Hook = Arc<dyn Fn(u32) + Send + Sync>;

impl Broker {
    pub fn new(features: Features) -> Self {
        Self { features, state: Arc::default() }
    }

    pub fn connector(&self) -> impl FnMut() -> io::Result<UnixStream> + Send + 'static {
        self.connector_with(Arc::new(|_| {}))
    }

    /// `hook` is called with each request before it is looked at.
    pub fn connector_with(&self, hook: Hook) -> impl FnMut() -> io::Result<UnixStream> + Send + 'static {
        let broker = self.clone();
        move || {
            if broker.state().refusing {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            let (front, back) = UnixStream::pair()?;
            broker.take(back, hook.clone())?;
            Ok(front)
        }
    }

    /// Serves a connection that a test has accepted.
    pub fn accept(&self, stream: UnixStream) -> io::Result<()> {
        self.take(stream, Arc::new(|_| {}))
    }

    fn take(&self, back: UnixStream, hook: Hook) -> io::Result<()> {
        let mut state = self.state();
        state.connections += 1;
        state.main = Some(back.try_clone()?);
        drop(state);
        let broker = self.clone();
        std::thread::spawn(move || broker.serve(back, &hook));
        Ok(())
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn connections(&self) -> usize {
        self.state().connections
    }

    pub fn accepted(&self) -> (u64, u64) {
        let state = self.state();
        (state.accepted, state.features)
    }

    /// Messages about the guest's memory, so far.
    pub fn memory_messages(&self) -> usize {
        self.state().memory
    }

    pub fn take_told(&self) -> Vec<(u32, u32)> {
        std::mem::take(&mut self.state().told)
    }

    pub fn wait_until_started(&self, queues: u16) {
        eventually("the start", || {
            let state = self.state();
            (0..u32::from(queues)).all(|queue| state.enabled.get(&queue) == Some(&true))
        });
    }

    pub fn wait_until_stopped(&self) {
        eventually("the stop", || {
            let state = self.state();
            let last = (GET_VRING_BASE, u32::from(VRINGS));
            state.enabled.values().all(|enabled| !enabled)
                && state.told.last().is_none_or(|told| *told == last)
        });
    }

    /// Signals a queue's interrupt.
    pub fn call(&self, queue: u32) {
        rustix::io::write(&self.state().calls[&queue], &1_u64.to_ne_bytes()).unwrap();
    }

    /// Takes the count of a queue's notifications.
    pub fn kicks(&self, queue: u32) -> u64 {
        take_count(self.state().kicks[&queue].as_fd())
    }

    /// Whether there was exactly one notification of a queue that is an exit, which comes soon.
    pub fn wait_for_kick(&self, queue: u32) {
        let mut kicks = 0;
        eventually("the notification", || {
            kicks += self.kicks(queue);
            kicks > 0
        });
        assert_eq!(kicks, 1);
    }

    /// A duplicate of the eventfd of a queue's notifications, with the flags that they share.
    pub fn kick_descriptor(&self, queue: u32) -> OwnedFd {
        self.try_kick_descriptor(queue).unwrap()
    }

    /// `None` if it was not sent.
    pub fn try_kick_descriptor(&self, queue: u32) -> Option<OwnedFd> {
        self.state().kicks.get(&queue).and_then(|kick| kick.try_clone().ok())
    }

    /// Ends the connection; and, if so told, takes no other.
    pub fn die(&self, refusing: bool) {
        let mut state = self.state();
        state.refusing = refusing;
        state.enabled.clear();
        state.channel = None;
        if let Some(main) = state.main.take() {
            let _ = main.shutdown(Shutdown::Both);
        }
    }

    pub fn come_back(&self) {
        self.state().refusing = false;
    }

    pub fn main(&self) -> UnixStream {
        self.state().main.as_ref().unwrap().try_clone().unwrap()
    }

    pub fn channel(&self) -> UnixStream {
        self.state().channel.as_ref().unwrap().try_clone().unwrap()
    }

    /// `None` while there is no connection.
    pub fn try_channel(&self) -> Option<UnixStream> {
        self.state().channel.as_ref().and_then(|channel| channel.try_clone().ok())
    }

    pub fn map(&self, offset: u64, len: u64, file: &OwnedFd, file_offset: u64, writable: bool) -> bool {
        let fields = [0, file_offset, offset, len, u64::from(writable)];
        ask(&self.channel(), SHMEM_MAP, &longs(&fields), &[file.as_fd()]).unwrap()
    }

    pub fn unmap(&self, offset: u64, len: u64) -> bool {
        ask(&self.channel(), SHMEM_UNMAP, &longs(&[0, 0, offset, len, 0]), &[]).unwrap()
    }

    pub fn wire(&self, queue: u32, flags: u32, fds: &[BorrowedFd<'_>]) -> bool {
        let payload: Vec<u8> = [queue, flags].into_iter().flat_map(u32::to_ne_bytes).collect();
        ask(&self.channel(), WIRE, &payload, fds).unwrap()
    }

    fn serve(&self, mut stream: UnixStream, hook: &Hook) {
        while let Ok((code, flags, payload, fds)) = receive(&mut stream) {
            hook(code);
            let answer = self.apply(code, &payload, fds);
            let answer = match answer {
                Some(answer) => answer,
                None if flags & 8 != 0 => 0_u64.to_ne_bytes().to_vec(),
                None => continue,
            };
            if stream.write_all(&message(code, 5, &answer)).is_err() {
                return;
            }
        }
    }

    fn apply(&self, code: u32, payload: &[u8], mut fds: Vec<OwnedFd>) -> Option<Vec<u8>> {
        let mut state = self.state();
        let word = |at: usize| u32::from_ne_bytes(payload[at..at + 4].try_into().unwrap());
        let number = |number: u64| Some(number.to_ne_bytes().to_vec());
        match code {
            GET_FEATURES => return number(1 << 30 | 1 << 32 | 1 << 33),
            SET_FEATURES => state.features = u64::from_ne_bytes(payload.try_into().unwrap()),
            GET_PROTOCOL_FEATURES => return number(self.features.protocol),
            SET_PROTOCOL_FEATURES => state.accepted = u64::from_ne_bytes(payload.try_into().unwrap()),
            GET_QUEUE_NUM => return number(u64::from(VRINGS) + 1),
            SET_BACKEND_REQ_FD => state.channel = fds.pop().map(UnixStream::from),
            GET_CONFIG => {
                return Some(
                    [&payload[..12], &config_bytes_of(self.features.config_window_len)[..]].concat(),
                );
            }
            GET_SHMEM_CONFIG => {
                let mut answer = vec![0; 8 + 256 * 8];
                answer[..4].copy_from_slice(&1_u32.to_ne_bytes());
                answer[8..16].copy_from_slice(&self.features.window_len.to_ne_bytes());
                return Some(answer);
            }
            SET_VRING_KICK => drop(state.kicks.insert(word(0) & 0xff, fds.pop().unwrap())),
            SET_VRING_CALL => drop(state.calls.insert(word(0) & 0xff, fds.pop().unwrap())),
            SET_VRING_ENABLE => {
                state.told.push((code, word(0)));
                state.enabled.insert(word(0), word(4) != 0);
            }
            GET_VRING_BASE => {
                drop(state);
                std::thread::sleep(self.features.stop_pause);
                self.state().told.push((code, word(0)));
                return Some(payload.to_vec());
            }
            code if MEMORY.contains(&code) => state.memory += 1,
            _ => {}
        }
        None
    }
}

/// Takes the count of an eventfd that does not block.
pub fn take_count(event: BorrowedFd<'_>) -> u64 {
    let mut bytes = [0; 8];
    match rustix::io::read(event, &mut bytes[..]) {
        Ok(_) => u64::from_ne_bytes(bytes),
        Err(_) => 0,
    }
}

pub fn longs(fields: &[u64]) -> Vec<u8> {
    fields.iter().flat_map(|field| field.to_ne_bytes()).collect()
}

pub fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [code, flags, payload.len() as u32] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(payload);
    bytes
}

/// Sends a request that wants an answer, and reads it: whether it was done.
pub fn ask(channel: &UnixStream, code: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<bool> {
    send(channel, &message(code, 9, payload), fds)?;
    answer(channel, code)
}

pub fn send(channel: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    let sent = sendmsg(channel, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    assert_eq!(sent, bytes.len());
    Ok(())
}

pub fn answer(mut channel: &UnixStream, code: u32) -> io::Result<bool> {
    let mut bytes = [0; 20];
    channel.read_exact(&mut bytes)?;
    assert_eq!(bytes[..12], message(code, 5, &[0; 8])[..12]);
    Ok(bytes[12..] == [0; 8])
}

type Received = (u32, u32, Vec<u8>, Vec<OwnedFd>);

fn receive(stream: &mut UnixStream) -> io::Result<Received> {
    let mut header = [0; 12];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got =
        recvmsg(&*stream, &mut [IoSliceMut::new(&mut header)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    if got.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let fds = ancillary
        .drain()
        .filter_map(|part| match part {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    stream.read_exact(&mut header[got.bytes..])?;
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let mut payload = vec![0; word(8) as usize];
    stream.read_exact(&mut payload)?;
    Ok((word(0), word(4), payload, fds))
}
