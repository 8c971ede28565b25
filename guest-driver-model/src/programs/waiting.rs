//! What a program does when there is nothing to do: spins, yields, or sleeps until
//! something happens.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How a program finds out that there is work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Look all the time; the other side is told not to notify
    #[default]
    Poll,
    /// Sleep until notified
    Interrupt,
}

/// How a polling program waits.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct WaitArgs {
    /// How to find out about work
    #[arg(long, value_enum, default_value_t)]
    pub mode: Mode,
    /// When polling has found nothing for a while, sleep this many microseconds between
    /// looks: for a guest whose only virtual CPU has other things to do
    #[arg(long, default_value_t = 0, value_name = "MICROSECONDS")]
    pub idle_us: u64,
}

/// Empty looks before a polling program yields or sleeps.
const PATIENCE: u32 = 1024;

/// A polling program's pause.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pause {
    empty: u32,
}

impl Pause {
    /// Something was found.
    pub fn reset(&mut self) {
        self.empty = 0;
    }

    /// Nothing was found.
    pub fn rest(&mut self, args: &WaitArgs) {
        self.empty = self.empty.saturating_add(1);
        if self.empty < PATIENCE {
            std::hint::spin_loop();
        } else if args.idle_us > 0 {
            std::thread::sleep(Duration::from_micros(args.idle_us));
        } else {
            std::thread::yield_now();
        }
    }
}

/// Sleeps until one of the descriptors is readable, or a signal comes, at most so
/// long. Eventfds among `events` are drained.
pub fn sleep(events: &[BorrowedFd<'_>], others: &[BorrowedFd<'_>], most: Duration) {
    // Queues may share an eventfd; poll(2) does not mind, but there is no need.
    let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(events.len() + others.len());
    for (at, fd) in events.iter().enumerate() {
        let earlier = events.iter().take(at);
        if earlier.clone().all(|other| other.as_raw_fd() != fd.as_raw_fd()) {
            fds.push(PollFd::new(*fd, PollFlags::POLLIN));
        }
    }
    fds.extend(others.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)));
    let most = u16::try_from(most.as_millis()).unwrap_or(u16::MAX);
    // EINTR: a signal, which the caller looks for anyway. Other errors: look again.
    if poll(&mut fds, PollTimeout::from(most)).is_ok_and(|ready| ready > 0) {
        for fd in events {
            // Non-blocking: one that is not readable gives EAGAIN.
            let _ = nix::unistd::read(fd, &mut [0; 8]);
        }
    }
}
