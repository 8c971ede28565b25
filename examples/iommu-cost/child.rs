//! A process of the measurement: this program again, with a hidden subcommand. Its standard
//! input is a socket to its parent; when that closes it ends.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{self, Command, Stdio};

use anyhow::Context;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::cpu;

/// The process. Ended when dropped.
#[derive(Debug)]
pub struct Child {
    child: process::Child,
    /// To its standard input.
    pub stream: UnixStream,
}

impl Child {
    /// Starts this program with these arguments.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn start(arguments: &[&str]) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("where this program is")?;
        let (stream, theirs) = UnixStream::pair()?;
        let places = cpu::kept().map(|places| format!("--places={}", places.text()));
        let child = Command::new(program)
            .args(places)
            .args(arguments)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {arguments:?}"))?;
        Ok(Self { child, stream })
    }

    /// Gives the process a descriptor.
    ///
    /// # Errors
    /// If it is gone.
    pub fn give(&self, descriptor: &impl AsFd) -> anyhow::Result<()> {
        self.stream.send_with_fd(&b"."[..], descriptor.as_fd().as_raw_fd()).context("giving a descriptor")?;
        Ok(())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Both fail only if it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In a child: the socket to its parent.
///
/// # Errors
/// If the system refuses.
pub fn parent() -> io::Result<UnixStream> {
    Ok(UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?))
}

/// In a child: the next descriptor that its parent gives.
///
/// # Errors
/// If the parent is gone.
pub fn take(parent: &UnixStream) -> anyhow::Result<OwnedFd> {
    let (_, file) = parent.recv_with_fd(&mut [0]).context("taking a descriptor")?;
    file.map(OwnedFd::from).context("started by hand? this subcommand is for the program's own use")
}
