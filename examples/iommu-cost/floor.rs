//! The floors: what the processes and the system calls of an operation cost when nothing
//! else is done.
//!
//! Three processes, as there are in a link: A stands for the owner's VMM, B for the
//! broker, C for the peer's VMM with its driver. Messages have 20 bytes and are read by blocking
//! reads, as vhost-user's are.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use guest_driver_model::shm::SharedMemory;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::child::{self, Child};
use crate::cpu;
use crate::sys::{PAGE, Slot};
use crate::user::User;

/// Bytes of a message: as of vhost-user's answers.
const MESSAGE: usize = 20;
/// How long C waits for B before it gives up.
const PATIENCE: Duration = Duration::from_secs(10);

/// What C is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// To answer.
    Nothing = 0,
    /// To map the page.
    Show = 1,
    /// To unmap it.
    Hide = 2,
    /// To have a thread use it.
    Use = 3,
    /// To have that thread rest.
    Rest = 4,
    /// To ring B's doorbell, have the page mapped by B's word, and see B's answer in shared
    /// memory: that time is answered.
    Ring = 5,
    /// B: to have C unmap the page, and when it has answered, to have it answer again.
    Twice = 6,
}

impl Ask {
    const ALL: [Self; 7] =
        [Self::Nothing, Self::Show, Self::Hide, Self::Use, Self::Rest, Self::Ring, Self::Twice];
}

/// B and C, as A sees them.
#[derive(Debug)]
pub struct Floor {
    middle: UnixStream,
    direct: UnixStream,
    _processes: [Child; 2],
}

impl Floor {
    /// Starts the processes.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn start() -> anyhow::Result<Self> {
        let (a_b, b_a) = UnixStream::pair()?;
        let (a_c, c_a) = UnixStream::pair()?;
        let (b_c, c_b) = UnixStream::pair()?;
        let (bell_c, c_bell) = UnixStream::pair()?;
        let doorbell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        let answer = one_page()?;
        let b = Child::start(&["middle"])?;
        let c = Child::start(&["end"])?;
        for stream in [b_a, b_c, bell_c] {
            b.give(&stream)?;
        }
        for stream in [c_a, c_b, c_bell] {
            c.give(&stream)?;
        }
        for process in [&b, &c] {
            process.give(&doorbell)?;
            process.give(&answer)?;
        }
        Ok(Self { middle: a_b, direct: a_c, _processes: [b, c] })
    }

    /// Asks C without B in between; the time that it takes, and what C answers.
    ///
    /// # Errors
    /// If C is gone.
    pub fn direct(&self, ask: Ask) -> anyhow::Result<(Duration, u64)> {
        exchange(&self.direct, ask)
    }

    /// Asks C through B.
    ///
    /// # Errors
    /// If B or C is gone.
    pub fn through_middle(&self, ask: Ask) -> anyhow::Result<Duration> {
        Ok(exchange(&self.middle, ask)?.0)
    }
}

fn one_page() -> anyhow::Result<OwnedFd> {
    let file = File::from(memfd_create(c"iommu-cost", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(PAGE as u64)?;
    Ok(file.into())
}

fn exchange(mut stream: &UnixStream, ask: Ask) -> anyhow::Result<(Duration, u64)> {
    let mut message = [0; MESSAGE];
    message[0] = ask as u8;
    let start = Instant::now();
    stream.write_all(&message)?;
    stream.read_exact(&mut message)?;
    let took = start.elapsed();
    let (_, value) = message.split_at(MESSAGE - size_of::<u64>());
    let value = u64::from_ne_bytes(value.try_into()?);
    ensure!(message[0] == ask as u8, "a process of the floors cannot {ask:?}");
    Ok((took, value))
}

/// The process B.
///
/// # Errors
/// If the system refuses; the end of its parent is none.
pub fn middle() -> anyhow::Result<()> {
    let parent = child::parent()?;
    let [mut a, mut c, mut bell_c] = streams(&parent)?;
    let doorbell = child::take(&parent)?;
    let answer = SharedMemory::map(child::take(&parent)?.as_fd(), 0, PAGE)?;
    let page = one_page()?;
    thread::spawn(move || -> anyhow::Result<()> {
        let (mut count, mut message) = (0, [0; MESSAGE]);
        loop {
            nix::unistd::read(&doorbell, &mut [0; 8])?;
            message[0] = Ask::Show as u8;
            bell_c.send_with_fd(&message[..], page.as_raw_fd())?;
            bell_c.read_exact(&mut message)?;
            count += 1;
            answer.store_u64_release(0, count)?;
        }
    });
    let mut message = [0; MESSAGE];
    while a.read_exact(&mut message).is_ok() {
        let twice = message[0] == Ask::Twice as u8;
        if twice {
            message[0] = Ask::Hide as u8;
            c.write_all(&message)?;
            c.read_exact(&mut message)?;
            message[0] = Ask::Nothing as u8;
        }
        c.write_all(&message)?;
        c.read_exact(&mut message)?;
        if twice {
            message[0] = Ask::Twice as u8;
        }
        a.write_all(&message)?;
    }
    Ok(())
}

fn streams(parent: &UnixStream) -> anyhow::Result<[UnixStream; 3]> {
    let stream = || child::take(parent).map(UnixStream::from);
    Ok([stream()?, stream()?, stream()?])
}

/// The process C.
///
/// # Errors
/// As of [`middle`].
pub fn end() -> anyhow::Result<()> {
    let parent = child::parent()?;
    let [a, b, bell] = streams(&parent)?;
    let doorbell = child::take(&parent)?;
    let answer = SharedMemory::map(child::take(&parent)?.as_fd(), 0, PAGE)?;
    let slot = Arc::new(Slot::new(one_page()?)?);
    let used = slot.clone();
    let user = Arc::new(User::spawn(move |_| used.touch())?);
    let driver = Arc::new(Driver { doorbell, answer });
    let (other, its_user, its_driver) = (slot.clone(), user.clone(), driver.clone());
    thread::spawn(move || serve(b, &other, &its_user, &its_driver));
    let other = slot.clone();
    thread::spawn(move || serve_bell(bell, &other));
    serve(a, &slot, &user, &driver)
}

/// C's part for [`Ask::Ring`].
#[derive(Debug)]
struct Driver {
    doorbell: OwnedFd,
    answer: SharedMemory,
}

impl Driver {
    fn ring(&self) -> anyhow::Result<Duration> {
        cpu::guest();
        let before = self.answer.load_u64_acquire(0)?;
        let start = Instant::now();
        nix::unistd::write(&self.doorbell, &1_u64.to_ne_bytes())?;
        while self.answer.load_u64_acquire(0)? == before {
            ensure!(start.elapsed() < PATIENCE, "the process in the middle does not answer");
            std::hint::spin_loop();
        }
        let took = start.elapsed();
        cpu::host();
        Ok(took)
    }
}

/// Maps the page of each descriptor that comes, as of SHMEM_MAP.
fn serve_bell(mut stream: UnixStream, slot: &Slot) -> anyhow::Result<()> {
    let mut message = [0; MESSAGE];
    while let (MESSAGE, Some(file)) = stream.recv_with_fd(&mut message)? {
        slot.show_file(&file)?;
        drop(file);
        stream.write_all(&message)?;
    }
    Ok(())
}

/// Answers until the other end is gone.
fn serve(mut stream: UnixStream, slot: &Slot, user: &User, driver: &Driver) -> anyhow::Result<()> {
    let mut message = [0; MESSAGE];
    while stream.read_exact(&mut message).is_ok() {
        let ask = Ask::ALL.into_iter().find(|ask| *ask as u8 == message[0]).context("an unknown message")?;
        let start = Instant::now();
        let value = match ask {
            // The second is B's to carry out.
            Ask::Nothing | Ask::Twice => Duration::ZERO,
            Ask::Show => slot.show().map(|()| start.elapsed())?,
            Ask::Hide => slot.hide().map(|()| start.elapsed())?,
            Ask::Use | Ask::Rest => {
                user.set((ask == Ask::Use).then_some(0));
                Duration::ZERO
            }
            Ask::Ring => driver.ring()?,
        };
        message[MESSAGE - size_of::<u64>()..].copy_from_slice(&(value.as_nanos() as u64).to_ne_bytes());
        stream.write_all(&message)?;
    }
    Ok(())
}
