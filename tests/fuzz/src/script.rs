//! What a front-end does, by the fuzzer's choice: messages that are half right, bytes that are
//! none, descriptors of any kind, answers on the back-end channel, and ends at any moment. On the
//! other side of the link there may be an honest front-end, so that there is something to break.
//!
//! Asserted besides: the broker closes what it is done with; nobody is connected afterwards, and as
//! many descriptors and threads are left as there were; the honest peer's VMM is asked for
//! nothing that cannot be.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use vhost_pci_device::abi;
use vhost_pci_switch::config::{LinkConfig, OneWay, WiringPolicy};
use vhost_pci_switch::kind;
use vhost_pci_switch::link::Side;
use vhost_pci_switch::link::report::LinkReport;

use crate::broker::{Running, WINDOW, config};
use crate::commands::Commands;
use crate::front::{
    CHANNEL, FEATURES, Front, HEADER, Manner, NEED_REPLY, OWNER_PROTOCOL, PEER_PROTOCOL, PLATFORM, Pool,
    STRICT_WIRING, longs, message, request as r, settle, words,
};
use crate::input::Input;
use crate::messages::{Owner, REQUESTS, memory, natural, negotiate, open_channel, owner_up, peer_up, start};

/// Far longer than the broker may take to end a session whose front-end is gone.
const PATIENCE: Duration = Duration::from_secs(3);
/// Steps of one input at most.
const STEPS: usize = 150;
/// Which of the pool's eventfds `start` gives virtqueue 0 for its notifications.
const CONTROL_KICK: usize = 1;
/// VHOST_USER_BACKEND_SHMEM_MAP and VHOST_USER_BACKEND_SHMEM_UNMAP.
const SHMEM_MAP: u32 = 9;
const SHMEM_UNMAP: u32 = 10;

/// Runs one input, whose front-end is this side's.
///
/// # Panics
/// When something does not hold.
pub fn run(bytes: &[u8], side: Side) {
    let mut input = Input::new(bytes);
    let choices = input.byte();
    let link = LinkConfig {
        one_way: if choices & 1 == 0 { OneWay::Refuse } else { OneWay::Widen },
        wiring: if choices & 2 == 0 { WiringPolicy::Direct } else { WiringPolicy::Relay },
        device: match choices >> 2 & 3 {
            0 => kind::net::device(1, false),
            1 => kind::net::device(3, false),
            2 => kind::net::device(1, true),
            _ => kind::block::device(1 << 20, 2, false),
        },
        ..config()
    };
    let running = Running::start(link);
    let mut script = Script::new(&running, side, usize::from(choices >> 4));
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        script.step(&mut input);
    }
    script.end();
}

struct Script<'a> {
    running: &'a Running,
    side: Side,
    /// The fuzzer's front-end.
    main: Front,
    /// The honest one.
    other: Option<Front>,
    /// What the honest peer's VMM has mapped: offset and length.
    mapped: Vec<(u64, u64)>,
    /// The control ring, as the peer's driver has it.
    commands: Option<Commands>,
    reconnects: u8,
}

impl<'a> Script<'a> {
    fn new(running: &'a Running, side: Side, kind: usize) -> Self {
        let main = Front::new(running.connect(side));
        let mut script =
            Self { running, side, main, other: None, mapped: Vec::new(), commands: None, reconnects: 0 };
        script.other_comes(kind);
        script
    }

    /// One of five kinds of honest front-ends, or none.
    fn other_comes(&mut self, kind: usize) {
        if kind % 8 < 3 || self.other.is_some() {
            return;
        }
        let side = if self.side == Side::Owner { Side::Peer } else { Side::Owner };
        let mut front = Front::new(self.running.connect(side));
        match (side, kind % 8) {
            (Side::Peer, 3..=5) => peer_up(&mut front, 0),
            (Side::Peer, _) => peer_up(&mut front, STRICT_WIRING),
            (Side::Owner, 3 | 4) => owner_up(&mut front, Owner::Plain),
            (Side::Owner, 5) => owner_up(&mut front, Owner::Asked),
            (Side::Owner, _) => owner_up(&mut front, Owner::Pushes),
        }
        self.mapped.clear();
        self.other = Some(front);
        self.serve();
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 16 {
            0..=5 => self.message(input),
            6 => {
                let bytes = input.bytes(255);
                self.main.send(bytes, &[]);
            }
            7 => self.channel(input),
            8 => self.serve(),
            9 => {
                let manner = input.pick(&[Manner::Refuses, Manner::IsSilent]);
                settle(&mut [&mut self.main], manner);
            }
            10 | 11 => self.macro_step(input),
            12 => match input.byte() {
                eventfd @ 0..0x60 => signal(eventfd.into()),
                _ => self.command(input),
            },
            13 => match input.byte() {
                kind @ 0..128 => self.other_comes(usize::from(kind)),
                _ => drop(self.other.take()),
            },
            14 if self.reconnects < 4 => {
                self.reconnects += 1;
                let fresh = Front::new(self.running.connect(self.side));
                // Before the old one is gone, or after that.
                if input.coin() {
                    drop(std::mem::replace(&mut self.main, fresh));
                } else {
                    drop(fresh);
                }
            }
            _ => self.stop(),
        }
    }

    /// What the peer's driver asks for on the control ring, if it has one.
    fn command(&mut self, input: &mut Input<'_>) {
        if let Some(commands) = &mut self.commands {
            for _ in 0..=input.below(3) {
                commands.put(input);
            }
            signal(CONTROL_KICK);
            self.serve();
        }
    }

    /// Both sides do what is asked of them.
    fn serve(&mut self) {
        let end = Instant::now() + Duration::from_millis(5);
        let mut quiet = 0;
        while quiet < 3 && Instant::now() < end {
            quiet = if self.serve_once() { 0 } else { quiet + 1 };
            thread::yield_now();
        }
    }

    fn serve_once(&mut self) -> bool {
        let (mapped, commands) = (&mut self.mapped, &mut self.commands);
        let mut busy =
            self.main.serve(Manner::Agrees, &mut |message, fd| note_control(commands, message, fd));
        busy |= !(self.main.closed || self.main.is_read());
        if let Some(other) = &mut self.other {
            busy |= other.serve(Manner::Agrees, &mut |message, fd| {
                note_control(commands, message, fd);
                check_request(mapped, message, fd);
            });
            busy |= !(other.closed || other.is_read());
        }
        busy
    }

    fn stop(&mut self) {
        for index in 0..2 {
            self.main.send(&message(r::GET_VRING_BASE, 0, &words(&[index, 0])), &[]);
        }
        self.serve();
    }

    /// Several messages that are right.
    fn macro_step(&mut self, input: &mut Input<'_>) {
        match (self.side, input.byte() % 8) {
            (Side::Owner, 0) => owner_up(&mut self.main, Owner::Plain),
            (Side::Owner, 1) => owner_up(&mut self.main, Owner::Asked),
            (Side::Owner, 2) => owner_up(&mut self.main, Owner::Pushes),
            (Side::Peer, 0 | 1) => peer_up(&mut self.main, 0),
            (Side::Peer, 2) => peer_up(&mut self.main, STRICT_WIRING),
            (Side::Owner, 3) => negotiate(&mut self.main, OWNER_PROTOCOL | CHANNEL, FEATURES | PLATFORM),
            (Side::Peer, 3) => negotiate(&mut self.main, PEER_PROTOCOL, FEATURES),
            (_, 4) => open_channel(&mut self.main),
            (_, 5) => start(&mut self.main, 2),
            (_, 6) => memory(&mut self.main),
            _ => self.stop(),
        }
        self.serve();
    }

    fn channel(&mut self, input: &mut Input<'_>) {
        match input.byte() % 8 {
            0 => self.main.close_channel(),
            1 => self.main.say(input.bytes(64)),
            choice => {
                let request = if choice == 2 { input.double() } else { u32::from(input.byte() % 12) };
                let flags = if choice == 3 { input.double() } else { 5 };
                self.main.say(&message(request, flags, &longs(&[u64::from(input.byte() % 3)])));
            }
        }
    }

    /// One message, more or less.
    fn message(&mut self, input: &mut Input<'_>) {
        let number = match input.byte() {
            known @ 0..0xf0 => REQUESTS[usize::from(known) % REQUESTS.len()],
            0xf0..0xf8 => u32::from(input.byte()),
            _ => input.double(),
        };
        if number == r::SET_BACKEND_REQ_FD && input.byte() < 0xe0 {
            return open_channel(&mut self.main);
        }
        let choices = input.byte();
        let flags = match choices & 3 {
            0 => 0,
            1 | 2 => NEED_REPLY,
            _ => u32::from(input.byte()),
        };
        let (mut payload, mut fds) = natural(number, input);
        if choices & 0x0c == 0x0c {
            payload = input.bytes(255).to_vec();
        }
        if choices & 0x30 == 0x30 {
            let pool = Pool::of_process();
            let count = [0, 1, 2, 3, 8, 9, 32, 40][usize::from(choices >> 6) * 2 + usize::from(input.coin())];
            let mut any = || {
                let kinds: Vec<_> = pool.memory.iter().chain(&pool.eventfds).chain(&pool.others).collect();
                kinds[usize::from(input.byte()) % kinds.len()].as_fd()
            };
            fds = (0..count).map(|_| any()).collect();
        }
        let mut bytes = message(number, flags, &payload);
        match choices >> 6 {
            // A length that is none, and a message in two pieces.
            3 if choices & 0x30 != 0x30 => {
                let wrong = input.double().to_ne_bytes();
                bytes[8..HEADER].copy_from_slice(&wrong);
                self.main.send(&bytes, &fds);
            }
            2 if choices & 0x30 != 0x30 => {
                let (first, rest) = bytes.split_at(usize::from(input.byte()) % bytes.len());
                self.main.send(first, &fds);
                self.main.send(rest, &[]);
            }
            _ => self.main.send(&bytes, &fds),
        }
    }

    /// Everybody leaves. The broker has to notice.
    fn end(&mut self) {
        self.main.half_close();
        let end = Instant::now() + PATIENCE;
        while !self.main.closed {
            self.serve_once();
            assert!(Instant::now() < end, "the broker keeps the session open");
            thread::yield_now();
        }
        if let Some(mut other) = self.other.take() {
            other.half_close();
            while !other.closed {
                other.serve(Manner::Agrees, &mut |_, _| {});
                assert!(Instant::now() < end, "the broker keeps the other session open");
                thread::yield_now();
            }
        }
        // Their threads tell the link, in their own time.
        let is_gone = |report: &LinkReport| report.owner.state == "absent" && report.peer.state == "absent";
        while !is_gone(&self.running.report()) {
            assert!(Instant::now() < end, "somebody is connected who has left");
            thread::yield_now();
        }
    }
}

fn signal(eventfd: usize) {
    let eventfds = &Pool::of_process().eventfds;
    let _ = nix::unistd::write(&eventfds[eventfd % eventfds.len()], &1_u64.to_ne_bytes());
}

/// Finds the control area among what is to be mapped.
fn note_control(commands: &mut Option<Commands>, message: &[u8], fd: Option<&OwnedFd>) {
    let Some((header, payload)) = message.split_at_checked(HEADER) else { return };
    let is_map = header[..4] == SHMEM_MAP.to_ne_bytes();
    if let (true, Some(fields), Some(fd)) = (is_map, payload.get(8..24), fd)
        && fields == longs(&[abi::CONTROL_OFFSET; 2])
    {
        *commands = Commands::over(fd);
    }
}

/// What the peer's VMM is asked for can be done: it maps what is in the file, beside all else that
/// is mapped, and unmaps what was mapped.
fn check_request(mapped: &mut Vec<(u64, u64)>, message: &[u8], fd: Option<&OwnedFd>) {
    let Some((header, payload)) = message.split_at_checked(HEADER) else { return };
    let number = u32::from_ne_bytes(header[..4].try_into().expect("4 bytes"));
    let long = |at: usize| u64::from_ne_bytes(payload[8 * at..8 * at + 8].try_into().expect("8 bytes"));
    if !matches!(number, SHMEM_MAP | SHMEM_UNMAP) {
        return;
    }
    let (file_offset, offset, len) = (long(1), long(2), long(3));
    assert!(len > 0 && (file_offset | offset | len).is_multiple_of(4096), "{payload:?}");
    assert!(offset.checked_add(len).is_some_and(|end| end <= 2 * WINDOW), "{payload:?}");
    match number {
        SHMEM_MAP => {
            let file = File::from(fd.expect("a map has a file").try_clone().expect("a descriptor"));
            let file_len = file.metadata().expect("a file").len();
            assert!(
                file_offset.checked_add(len).is_some_and(|end| end <= file_len),
                "{payload:?} of {file_len}"
            );
            let apart =
                |(other, other_len): &(u64, u64)| offset >= other + other_len || *other >= offset + len;
            assert!(mapped.iter().all(apart), "{offset:#x} {len:#x} is mapped over {mapped:x?}");
            mapped.push((offset, len));
        }
        _ => {
            let at = mapped.iter().position(|one| *one == (offset, len));
            mapped.remove(at.unwrap_or_else(|| panic!("{offset:#x} {len:#x} is unmapped of {mapped:x?}")));
        }
    }
}
