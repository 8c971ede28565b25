//! What a broker may say to the device: requests of any content on the back-end channel, and a handshake in
//! which nothing has to be right.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::write;
use vhost_pci_device::{Device, Options};
use vhost_pci_fuzz::front::{Pool, words};
use vhost_pci_fuzz::input::Input;

use crate::guest;
use crate::support::broker::{NOTIFY, ON, SHMEM_MAP, SHMEM_UNMAP, WIRE, ask, longs, message, send};
use crate::support::vmm::FakeVmm;
use crate::support::{Bench, PAGE, VRINGS, config_bytes_of};
use crate::window::{PAGES, Shown, files};

/// A broker's doings on the back-end channel.
#[derive(Default)]
pub struct Hostile {
    /// What was sent is no row of whole requests that were answered: who has mapped what nobody knows.
    pub is_out_of_step: bool,
}

impl Hostile {
    /// A request, and whether it was done; `None` if there is no answer.
    fn ask(&mut self, bench: &Bench, code: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Option<bool> {
        let channel = bench.broker.try_channel()?;
        if self.is_out_of_step {
            // The device may have closed it.
            let _ = try_send(&channel, &message(code, 9, payload), fds);
            return None;
        }
        let answer = ask(&channel, code, payload, fds).ok();
        self.is_out_of_step = answer.is_none();
        answer
    }

    /// SHMEM_MAP of something.
    pub fn map(&mut self, bench: &Bench, shown: &mut Shown, input: &mut Input<'_>) {
        let choice = input.byte();
        let [offset, len] = range(shown, input);
        let file_offset = match choice & 0xc0 {
            0xc0 => input.field(0),
            _ => input.below(PAGES) * PAGE,
        };
        let is_writable = (1 << 16..shown.len() / 2).contains(&offset);
        let flags = match choice & 0x30 {
            0x30 => input.field(0),
            _ => u64::from(is_writable),
        };
        let shmid = if choice & 0x0f == 0x0f { u64::from(input.byte()) } else { 0 };
        let (file, fds) = descriptors(choice, input);
        let payload = longs(&[shmid, file_offset, offset, len, flags]);
        if self.ask(bench, SHMEM_MAP, &payload, &fds) == Some(true) {
            shown.mapped(shmid, file, [file_offset, offset, len, flags]);
        }
    }

    /// SHMEM_MAP as an honest broker would ask for it. Whether it was done.
    pub fn map_page(&mut self, bench: &Bench, shown: &mut Shown, offset: u64) -> bool {
        let payload = longs(&[0, 0, offset, PAGE, 1]);
        let done = self.ask(bench, SHMEM_MAP, &payload, &[files()[0].as_fd()]) == Some(true);
        if done {
            shown.mapped(0, 0, [0, offset, PAGE, 1]);
        }
        done
    }

    /// SHMEM_UNMAP, mostly of what is mapped.
    pub fn unmap(&mut self, bench: &Bench, shown: &mut Shown, input: &mut Input<'_>) {
        let choice = input.byte();
        let known = shown.some_part(usize::from(choice & 0x3f)).filter(|_| choice & 0xc0 != 0xc0);
        let [offset, len] = known.map_or_else(|| range(shown, input), |(offset, len)| [offset, len]);
        if self.ask(bench, SHMEM_UNMAP, &longs(&[0, 0, offset, len, 0]), &[]) == Some(true) {
            shown.unmapped(offset, len);
        }
    }

    /// WIRE.
    pub fn wire(&mut self, bench: &Bench, input: &mut Input<'_>) {
        let choice = input.byte();
        let queue = if choice < 0xe0 { u32::from(choice) % 4 } else { input.double() };
        let flags = if choice < 0xf0 { u32::from(choice) >> 2 & (ON | NOTIFY) } else { input.double() };
        let pool = Pool::of_process();
        let eventfd = pool.eventfds[input.below(6) as usize].as_fd();
        let fds = match input.byte() {
            0..0xd0 if flags & ON == 0 => Vec::new(),
            0..0xd0 => vec![eventfd],
            number @ 0xd0..0xe8 => vec![pool.others[usize::from(number) % pool.others.len()].as_fd()],
            _ => vec![eventfd; 2],
        };
        self.ask(bench, WIRE, &words(&[queue, flags]), &fds);
    }

    /// Anything.
    pub fn say(&mut self, bench: &Bench, shown: &mut Shown, input: &mut Input<'_>) {
        let Some(channel) = bench.broker.try_channel() else { return };
        self.is_out_of_step = true;
        let choice = input.byte();
        let code = [SHMEM_MAP, SHMEM_UNMAP, WIRE, input.byte().into()][usize::from(choice & 3)];
        let flags = if choice & 4 == 0 { 1 } else { input.byte().into() };
        let [offset, len] = range(shown, input);
        let payload = match choice >> 3 & 3 {
            0 => input.bytes(255).to_vec(),
            1 => vec![choice; 8],
            _ => longs(&[0, 0, offset, len, u64::from(choice & 1)]),
        };
        let mut bytes = message(code, flags, &payload);
        if choice & 0x20 != 0 {
            bytes.truncate(usize::from(input.byte()));
        }
        if choice & 0x40 != 0 {
            let at = 8 % bytes.len().max(1);
            bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= input.byte());
        }
        let (_, fds) = descriptors(choice, input);
        let _ = try_send(&channel, &bytes, &fds);
        if choice & 0x80 != 0 {
            let _ = channel.shutdown(Shutdown::Both);
        }
    }

    /// Makes an eventfd of the device's full, and lets who writes it wait.
    pub fn fill(&mut self, bench: &Bench, choice: u8) {
        let snapshot = bench.guest.device.snapshot();
        if choice & 4 == 0 || !snapshot.live || !snapshot.connected || self.is_out_of_step {
            return;
        }
        let Some(kick) = bench.broker.try_kick_descriptor(u32::from(choice & 1)) else { return };
        let _ = fcntl_setfl(&kick, OFlags::NONBLOCK);
        let _ = write(&kick, &(u64::MAX - 1).to_ne_bytes());
        let flags = if choice & 2 == 0 { OFlags::empty() } else { OFlags::NONBLOCK };
        let _ = fcntl_setfl(&kick, flags);
    }
}

fn try_send(channel: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    // A device that does not read, since it waits for the rest of something, is not waited for.
    channel.set_nonblocking(true)?;
    send(channel, bytes, fds)
}

/// Offset and length, mostly of few pages that can be.
fn range(shown: &Shown, input: &mut Input<'_>) -> [u64; 2] {
    let choice = input.byte();
    let half = shown.len() / 2;
    let base = [1 << 16, half, 0, 1 << 20][usize::from(choice & 3)];
    let offset = match choice & 0x30 {
        0x30 => input.field(base),
        _ => base + input.below(32) * PAGE,
    };
    let len = match choice & 0xc0 {
        0xc0 => input.field(half),
        _ => PAGE * (1 + input.below(8)),
    };
    [offset, len]
}

/// What comes along: the number of a marked file and the file; or something else.
fn descriptors(choice: u8, input: &mut Input<'_>) -> (usize, Vec<BorrowedFd<'static>>) {
    let pool = Pool::of_process();
    let number = input.byte();
    let file = usize::from(number & 1);
    match choice & 0x0e {
        0x0e if number < 0x20 => (usize::MAX, Vec::new()),
        0x0e if number < 0x80 => (usize::MAX, vec![files()[file].as_fd(); 2 + usize::from(number % 7)]),
        0x0c => (usize::MAX, vec![pool.others[usize::from(number) % pool.others.len()].as_fd()]),
        _ => (file, vec![files()[file].as_fd()]),
    }
}

/// A device whose broker has said all that it ever says before it was asked.
pub fn no_broker(input: &mut Input<'_>, choice: u8) {
    let mut scripts: Vec<Vec<u8>> = (0..=choice & 1).map(|_| handshake(input)).collect();
    let kept = Arc::new(Mutex::new(Vec::new()));
    let ends = kept.clone();
    let connect = move || {
        let script = scripts.pop().ok_or(io::ErrorKind::ConnectionRefused)?;
        let (front, mut back) = UnixStream::pair()?;
        back.set_write_timeout(Some(Duration::from_millis(1)))?;
        let _ = back.write_all(&script);
        back.shutdown(Shutdown::Write)?;
        ends.lock().expect("no panic is survived").push(back);
        Ok(front)
    };
    let vmm = FakeVmm::new();
    let Ok(device) = Device::new(connect, vmm.clone(), Options { requester_id: 0x18 }) else { return };
    for _ in 0..20 {
        if input.is_empty() {
            break;
        }
        guest::access(&device, input.byte(), input);
    }
    drop(device);
    assert_eq!((vmm.registered(), vmm.traps().len(), vmm.slots().len()), ((0, 0), 0, 0));
}

/// All answers of a handshake, as far as they are right.
fn handshake(input: &mut Input<'_>) -> Vec<u8> {
    let wrong = input.byte();
    let mut long = |index: u8, value: u64| {
        let value = if wrong == index { value ^ 1 << input.below(64) } else { value };
        value.to_ne_bytes().to_vec()
    };
    let features = long(1, 1 << 30 | 1 << 32 | 1 << 33);
    let protocol = long(2, 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 15 | 1 << 22 | 1 << 60 | 1 << 61);
    let queues = long(3, u64::from(VRINGS) + 1);
    let acks = [long(4, 0), long(5, 0)];
    let mut region_len = 16 << 20;
    let mut config_len = region_len;
    if wrong & 0xc0 == 0x40 {
        region_len = [input.field(4 << 20), 4 << 20 << input.below(34)][usize::from(wrong & 1)];
        config_len = if wrong & 2 == 0 { region_len } else { input.field(region_len) };
    }
    let space = config_bytes_of(config_len);
    let mut config = [&words(&[0, space.len() as u32, 0])[..], &space].concat();
    if wrong & 0xc0 == 0x80 {
        let at = usize::from(input.byte()) % config.len();
        config[at] = input.byte();
    }
    let mut regions = vec![0; 8 + 256 * 8];
    regions[..4].copy_from_slice(&1_u32.to_ne_bytes());
    regions[8..16].copy_from_slice(&region_len.to_ne_bytes());
    let [owner, channel] = acks;
    let answers = [
        (1, features),
        (15, protocol.clone()),
        (15, protocol),
        (17, queues),
        (3, owner),
        (24, config),
        (44, regions),
        (21, channel),
    ];
    let mut bytes: Vec<u8> = answers.iter().flat_map(|(code, payload)| message(*code, 5, payload)).collect();
    if wrong & 0xc0 == 0xc0 {
        for _ in 0..=input.below(3) {
            let at = usize::from(input.word()) % bytes.len();
            bytes[at] = input.byte();
        }
        if wrong & 1 != 0 {
            bytes.truncate(usize::from(input.word()));
        }
    }
    bytes.extend(input.bytes(16));
    bytes
}
