//! Starts a program in such a way that it dies with us. The only module here that needs `unsafe`.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::{LazyLock, Mutex, PoisonError, mpsc};
use std::thread;

use anyhow::{Result, anyhow};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{getpid, getppid};

type Job = (Command, mpsc::SyncSender<io::Result<Child>>);

/// Spawns a command that the kernel kills when this process ends.
///
/// The kernel means by that the end of the *thread* that spawned it. A test may spawn from a
/// thread that ends early, so one thread that lives as long as the process does all the spawning.
pub fn spawn_dying_with_us(mut command: Command) -> Result<Child> {
    static SPAWNER: LazyLock<Mutex<mpsc::Sender<Job>>> = LazyLock::new(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, answer) in queue {
                // The asker waits for the answer; if it is gone, the child is dropped unasked for.
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(jobs)
    });

    let parent = getpid();
    // SAFETY: between fork and exec the closure only makes two system calls, allocates nothing
    // and takes no lock, so it is safe in the child of a process with several threads.
    unsafe {
        command.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // The parent may have died before the line above.
            if getppid() == parent { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
        });
    }
    let (answer, child) = mpsc::sync_channel(1);
    let jobs = SPAWNER.lock().unwrap_or_else(PoisonError::into_inner);
    jobs.send((command, answer)).map_err(|_| anyhow!("the spawning thread has ended"))?;
    Ok(child.recv()??)
}
