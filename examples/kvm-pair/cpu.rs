//! Where threads run: each guest's processor has one of the host's to itself, as far as guests
//! go. What else has to run, a relay for example, is moved about by the kernel.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

const THIS_THREAD: Pid = Pid::from_raw(0);

/// The owner's guest runs on the first processor that there is.
pub const OWNER: usize = 0;
/// The peer's guest runs on the second.
pub const PEER: usize = 1;

/// Puts this thread on the `place`-th of the processors that it may run on. Leaves the choice
/// to the kernel if there are fewer.
pub fn pin(place: usize) {
    let Ok(allowed) = sched_getaffinity(THIS_THREAD) else { return };
    let mut processors = (0..CpuSet::count()).filter(|number| allowed.is_set(*number).unwrap_or(false));
    let Some(number) = processors.nth(place) else { return };
    let mut set = CpuSet::new();
    let _ = set.set(number).and_then(|()| sched_setaffinity(THIS_THREAD, &set));
}
