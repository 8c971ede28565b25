//! Where threads run. The host's side of everything (VMMs, broker, the floors' processes) runs
//! on one processor, the peer's guest (its driver, and the thread that uses a page) on
//! another, as with virtual processors that have one of their own. Otherwise the kernel
//! moves threads together and apart, and a wake-up costs now 2 and now 20 microseconds: of
//! floor and operation not the same.

use std::sync::OnceLock;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The two processors.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    host: usize,
    guest: usize,
}

static PLACES: OnceLock<Places> = OnceLock::new();
const THIS_THREAD: Pid = Pid::from_raw(0);

/// The first two processors that this process may run on; `None` if it has but one.
pub fn places() -> Option<Places> {
    let allowed = sched_getaffinity(THIS_THREAD).ok()?;
    let mut processors = (0..CpuSet::count()).filter(|number| allowed.is_set(*number).unwrap_or(false));
    Some(Places { host: processors.next()?, guest: processors.next()? })
}

impl Places {
    /// As an argument.
    pub fn text(self) -> String {
        format!("{},{}", self.host, self.guest)
    }

    /// From an argument.
    ///
    /// # Errors
    /// If it is none.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let (host, guest) = text.split_once(',').ok_or_else(|| anyhow::anyhow!("two numbers are wanted"))?;
        Ok(Self { host: host.parse()?, guest: guest.parse()? })
    }

    /// From now on threads of this process have these places.
    pub fn keep(self) {
        let _ = PLACES.set(self);
        host();
    }
}

/// The places, if threads have any.
pub fn kept() -> Option<Places> {
    PLACES.get().copied()
}

/// Puts this thread, and those that it starts, on the host's processor.
pub fn host() {
    put(|places| places.host);
}

/// Puts this thread on the guest's processor.
pub fn guest() {
    put(|places| places.guest);
}

fn put(place: impl Fn(Places) -> usize) {
    let Some(number) = kept().map(place) else { return };
    let mut set = CpuSet::new();
    // One that is taken away meanwhile is left to the kernel.
    let _ = set.set(number).and_then(|()| sched_setaffinity(THIS_THREAD, &set));
}
