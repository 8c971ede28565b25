//! Which CPU each of the two busy processes gets. Both poll; on one CPU they would hand over no more
//! than a ring's worth of packets a time slice.

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

/// The sink's: the first that we may use.
pub fn of_sink() -> Result<usize> {
    allowed()?.next().context("there is no CPU")
}

/// Testpmd's: the last that we may use, which is the sink's if there is one only.
pub fn of_testpmd() -> Result<usize> {
    allowed()?.next_back().context("there is no CPU")
}

fn allowed() -> Result<impl DoubleEndedIterator<Item = usize>> {
    let set = sched_getaffinity(Pid::from_raw(0)).context("which CPUs there are")?;
    Ok((0..CpuSet::count()).filter(move |cpu| set.is_set(*cpu) == Ok(true)))
}
