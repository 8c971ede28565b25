//! What a program does when there is nothing to do: spins, yields, or sleeps until
//! something happens; and what ended its sleeps.

use std::fmt;
use std::ops::{Add, AddAssign};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long an adaptive program looks for more after the last packet, if it is not told:
/// about what it costs the two sides to notify a sleeper and to wake it up.
const LOOK: Duration = Duration::from_micros(50);

/// How a program finds out that there is work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wait {
    /// It looks all the time; the other side is told not to notify.
    #[default]
    Poll,
    /// It sleeps until notified, as soon as there is nothing to do.
    Interrupt,
    /// It looks for this long after the last packet, while the other side is told not to
    /// notify, and then sleeps until notified.
    Adaptive(Duration),
}

impl Wait {
    /// Whether it ever sleeps until notified.
    pub fn needs_interrupts(self) -> bool {
        self != Self::Poll
    }
}

impl FromStr for Wait {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text}: is none of poll, interrupt, adaptive, adaptive=MICROSECONDS");
        match text.split_once('=') {
            None if text == "poll" => Ok(Self::Poll),
            None if text == "interrupt" => Ok(Self::Interrupt),
            None if text == "adaptive" => Ok(Self::Adaptive(LOOK)),
            Some(("adaptive", time)) => {
                time.parse().map(|time| Self::Adaptive(Duration::from_micros(time))).map_err(|_| wrong())
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Poll => f.write_str("poll"),
            Self::Interrupt => f.write_str("interrupt"),
            Self::Adaptive(time) => write!(f, "adaptive={}", time.as_micros()),
        }
    }
}

/// How a program waits.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct WaitArgs {
    /// How to find out about work: `poll` looks all the time, `interrupt` sleeps until
    /// notified, `adaptive` looks for so long after the last packet (50 us) and then sleeps
    #[arg(long, default_value_t, value_name = "poll|interrupt|adaptive[=MICROSECONDS]")]
    pub wait: Wait,
    /// When polling has found nothing for a while, sleep this many microseconds between
    /// looks: for a guest whose only virtual CPU has other things to do
    #[arg(long, default_value_t = 0, value_name = "MICROSECONDS")]
    pub idle_us: u64,
}

/// Empty looks before a polling program yields or sleeps.
const PATIENCE: u32 = 1024;

/// What a program does between two looks that find nothing.
#[derive(Clone, Copy, Debug)]
pub struct Idle {
    wait: Wait,
    idle_us: u64,
    /// Looks that found nothing.
    empty: u32,
    /// The first of them, of an adaptive program.
    since: Option<Instant>,
}

impl Idle {
    /// Waits like this.
    pub fn new(args: WaitArgs) -> Self {
        Self { wait: args.wait, idle_us: args.idle_us, empty: 0, since: None }
    }

    /// Something was found.
    #[inline]
    pub fn reset(&mut self) {
        self.empty = 0;
        self.since = None;
    }

    /// Nothing was found. Lets a little time pass, unless it is time to ask for
    /// notifications and to sleep until one comes: then it returns `true` at once, and
    /// goes on to until something is found.
    #[inline]
    pub fn rest(&mut self) -> bool {
        match self.wait {
            Wait::Interrupt => return true,
            Wait::Adaptive(time) => {
                if self.since.get_or_insert_with(Instant::now).elapsed() >= time {
                    return true;
                }
                std::hint::spin_loop();
            }
            Wait::Poll => {
                self.empty = self.empty.saturating_add(1);
                if self.empty < PATIENCE {
                    std::hint::spin_loop();
                } else if self.idle_us > 0 {
                    std::thread::sleep(Duration::from_micros(self.idle_us));
                } else {
                    std::thread::yield_now();
                }
            }
        }
        false
    }
}

/// How late a notification may be. One that comes later is lost for all that a sleeper
/// knows: whoever sends it rings right after it has published the work.
const LATEST: Duration = Duration::from_secs(1);

/// How often a program slept until notified, and what ended it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sleeps {
    /// How often.
    pub count: u64,
    /// Ended by a notification, or by other input.
    pub notified: u64,
    /// Ended by the clock although there was work, and no notification of it came within a
    /// second more: each is a notification lost.
    pub rescued: u64,
}

impl Sleeps {
    /// Sleeps until one of the descriptors is readable, or a signal comes, at most so long.
    /// Eventfds among `events` are drained. `has_work` says, if nobody did, whether there is
    /// work that was to be notified of.
    pub fn sleep(
        &mut self,
        events: &[BorrowedFd<'_>],
        others: &[BorrowedFd<'_>],
        most: Duration,
        has_work: impl FnOnce() -> bool,
    ) {
        let mut woken = sleep(events, others, most);
        if woken == Woken::ByClock && has_work() {
            // It may have come at this very moment, and its notification is under way.
            woken = sleep(events, others, LATEST);
            self.rescued += u64::from(woken == Woken::ByClock);
        }
        self.count += 1;
        self.notified += u64::from(woken == Woken::ByEvent);
    }
}

impl Add for Sleeps {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            count: self.count + other.count,
            notified: self.notified + other.notified,
            rescued: self.rescued + other.rescued,
        }
    }
}

impl AddAssign for Sleeps {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// What ended a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// A descriptor is readable.
    ByEvent,
    /// The time is over.
    ByClock,
    /// A signal came.
    BySignal,
}

/// Sleeps until one of the descriptors is readable, or a signal comes, at most so
/// long. Eventfds among `events` are drained.
pub fn sleep(events: &[BorrowedFd<'_>], others: &[BorrowedFd<'_>], most: Duration) -> Woken {
    // Queues may share an eventfd; poll(2) does not mind, but there is no need.
    let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(events.len() + others.len());
    for (at, fd) in events.iter().enumerate() {
        let earlier = events.iter().take(at);
        if earlier.clone().all(|other| other.as_raw_fd() != fd.as_raw_fd()) {
            fds.push(PollFd::new(*fd, PollFlags::POLLIN));
        }
    }
    let drained = fds.len();
    fds.extend(others.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)));
    let most = u16::try_from(most.as_millis()).unwrap_or(u16::MAX);
    match poll(&mut fds, PollTimeout::from(most)) {
        Ok(0) => Woken::ByClock,
        Ok(_) => {
            for fd in fds.iter().take(drained).filter(|fd| fd.any() == Some(true)) {
                // Non-blocking: one that somebody else has read gives EAGAIN.
                let _ = nix::unistd::read(fd.as_fd(), &mut [0; 8]);
            }
            Woken::ByEvent
        }
        Err(Errno::EINTR) => Woken::BySignal,
        // Look again.
        Err(_) => Woken::ByEvent,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;

    fn eventfd() -> EventFd {
        EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap()
    }

    #[test]
    fn a_way_to_wait_is_read_as_it_is_written() {
        for text in ["poll", "interrupt", "adaptive=50", "adaptive=0", "adaptive=100000"] {
            assert_eq!(text.parse::<Wait>().unwrap().to_string(), text);
        }
        assert_eq!("adaptive".parse(), Ok(Wait::Adaptive(LOOK)));
        for text in ["", "Poll", "adaptive=", "adaptive=x", "adaptive=-1", "poll=50", "interrupt="] {
            assert!(text.parse::<Wait>().unwrap_err().contains("adaptive=MICROSECONDS"));
        }
    }

    #[test]
    fn an_adaptive_program_looks_for_its_time_and_sleeps_until_something_is_found() {
        let time = Duration::from_millis(5);
        let mut idle = Idle::new(WaitArgs { wait: Wait::Adaptive(time), idle_us: 0 });
        for _ in 0..2 {
            let start = Instant::now();
            let mut looks = 0_u64;
            while !idle.rest() {
                looks += 1;
            }
            assert!(start.elapsed() >= time && looks > 10, "{looks} looks in {:?}", start.elapsed());
            // A wake-up for nothing is no reason to look for long again.
            assert!(idle.rest() && idle.rest());
            idle.reset();
        }
        assert!(Idle::new(WaitArgs { wait: Wait::Interrupt, idle_us: 0 }).rest());
        let mut polling = Idle::new(WaitArgs::default());
        assert!((0..10 * PATIENCE).all(|_| !polling.rest()));
    }

    #[test]
    fn a_sleep_drains_each_eventfd_that_fired_and_no_other_descriptor() {
        let (first, second, silent, other) = (eventfd(), eventfd(), eventfd(), eventfd());
        for fired in [&first, &second, &other] {
            fired.write(3).unwrap();
        }
        let events = [first.as_fd(), silent.as_fd(), first.as_fd(), second.as_fd()];
        assert_eq!(sleep(&events, &[other.as_fd()], Duration::from_secs(20)), Woken::ByEvent);
        assert!([&first, &second, &silent].into_iter().all(|eventfd| eventfd.read().is_err()));
        assert_eq!(other.read(), Ok(3));
        assert_eq!(sleep(&events, &[other.as_fd()], Duration::ZERO), Woken::ByClock);
    }

    #[test]
    fn only_work_that_nobody_announces_counts_as_rescued() {
        let silent = eventfd();
        let mut sleeps = Sleeps::default();
        sleeps.sleep(&[silent.as_fd()], &[], Duration::ZERO, || false);
        // Late, but not lost.
        sleeps.sleep(&[silent.as_fd()], &[], Duration::ZERO, || {
            silent.write(1).unwrap();
            true
        });
        assert_eq!(sleeps, Sleeps { count: 2, notified: 1, rescued: 0 });
        sleeps.sleep(&[silent.as_fd()], &[], Duration::ZERO, || true);
        assert_eq!(sleeps + Sleeps::default(), Sleeps { count: 3, notified: 1, rescued: 1 });
    }
}
