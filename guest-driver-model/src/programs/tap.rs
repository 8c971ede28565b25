//! `tap`: gives the peer's Linux an ordinary network interface to the owner.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use super::ProgramError;
use super::peer_loop::{self, PeerArgs, PeerProgram};
use super::sys::tun;
use super::traffic::Traffic;
use super::wire::{BURST, Sent, Wire};
use crate::net::PacketBurst;

/// What `tap` can be told.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct TapArgs {
    /// What every peer can be told.
    #[command(flatten)]
    pub peer: PeerArgs,
    /// Name of the interface; made if there is none
    #[arg(long, default_value = "vp0")]
    pub ifname: String,
    /// Its MTU, bytes
    #[arg(long)]
    pub mtu: Option<u16>,
}

/// Longest frame that Linux sends over a tap interface.
const MAX_FRAME: usize = 65_536;

/// The program.
pub struct Tap<D> {
    device: D,
    name: String,
    /// The interface is no more.
    deleted: bool,
    received: PacketBurst,
    /// Frames read from the interface, one behind the other, and their lengths.
    frames: Vec<u8>,
    lens: Vec<usize>,
    /// How many of them are done with.
    sent: usize,
    traffic: Traffic,
}

/// Runs `tap`.
///
/// # Errors
/// If there is no interface; and as [`peer_loop::run`].
pub fn run(args: &TapArgs) -> Result<(), ProgramError> {
    let error =
        |step, advice| move |source| ProgramError::Tap { name: args.ifname.clone(), step, source, advice };
    let device = tun::open_tap(&args.ifname).map_err(error(
        "opening /dev/net/tun",
        " (run as root, with the module tun loaded; each interface has one user at a time)",
    ))?;
    if let Some(mtu) = args.mtu {
        tun::set_mtu(&args.ifname, mtu).map_err(error("setting the MTU", ""))?;
    }
    tun::bring_up(&args.ifname).map_err(error("bringing it up", ""))?;
    tracing::info!(interface = args.ifname, "the interface is up");
    peer_loop::run(&args.peer, "tap", &mut Tap::<File>::new(device, &args.ifname))
}

impl<D> Tap<D> {
    /// Over a device that gives a frame a read and takes one a write, and never blocks.
    pub fn new(device: D, name: &str) -> Self {
        Self {
            device,
            name: name.to_owned(),
            deleted: false,
            received: PacketBurst::with_capacity(BURST, 2048),
            frames: vec![0; MAX_FRAME],
            lens: Vec::new(),
            sent: 0,
            traffic: Traffic::default(),
        }
    }
}

impl<D> Tap<D>
where
    for<'a> &'a D: Read + Write,
{
    /// Frames from the owner, to the interface.
    fn inward(&mut self, wire: &mut Wire<'_>) -> usize {
        let mut moved = 0;
        for pair in 0..wire.pairs() {
            moved += wire.receive(pair, &mut self.received);
            for frame in self.received.frames() {
                self.traffic.rx_packets += 1;
                self.traffic.rx_bytes += frame.len() as u64;
                // An interface that is down or full drops, as networks do.
                if (&self.device).write(frame).is_err() {
                    self.traffic.dropped += 1;
                }
            }
        }
        moved
    }

    /// Frames from the interface, to the owner's first pair.
    fn outward(&mut self, wire: &mut Wire<'_>) -> usize {
        if self.sent == self.lens.len() {
            self.read_burst();
        }
        let mut rest = self.frames.as_slice();
        let frames = self.lens.iter().map_while(|len| {
            let frame;
            (frame, rest) = rest.split_at_checked(*len)?;
            Some(frame)
        });
        let sent = match self.sent < self.lens.len() {
            true => wire.transmit(0, frames.skip(self.sent)),
            false => Sent::default(),
        };
        self.traffic.count_sent(sent);
        self.sent += sent.done;
        sent.done
    }

    fn read_burst(&mut self) {
        self.lens.clear();
        self.sent = 0;
        let mut end = 0;
        while self.lens.len() < BURST {
            if self.frames.len() < end + MAX_FRAME {
                self.frames.resize(end + MAX_FRAME, 0);
            }
            let Some(room) = self.frames.get_mut(end..) else { return };
            match (&self.device).read(room) {
                Ok(0) => return,
                Ok(len) => {
                    self.lens.push(len);
                    end += len;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // EBADFD: the interface was deleted. Others: nothing there; or it is
                    // down, for now.
                    self.deleted |= error.raw_os_error() == Some(libc::EBADFD);
                    return;
                }
            }
        }
    }
}

impl<D: AsFd> PeerProgram for Tap<D>
where
    for<'a> &'a D: Read + Write,
{
    fn poll(&mut self, wire: &mut Wire<'_>) -> usize {
        self.inward(wire) + self.outward(wire)
    }

    fn link_lost(&mut self) {
        self.traffic.dropped += (self.lens.len() - self.sent) as u64;
        self.lens.clear();
        self.sent = 0;
    }

    fn input(&self) -> Option<BorrowedFd<'_>> {
        // While frames wait for the owner's buffers, more of them are no news.
        (self.sent == self.lens.len()).then(|| self.device.as_fd())
    }

    fn waits_for_buffers(&self, pair: u16) -> bool {
        pair == 0 && self.sent < self.lens.len()
    }

    fn check(&self) -> Result<(), ProgramError> {
        match self.deleted {
            true => Err(ProgramError::Tap {
                name: self.name.clone(),
                step: "reading from it",
                source: io::Error::from_raw_os_error(libc::EBADFD),
                advice: ": it was deleted",
            }),
            false => Ok(()),
        }
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// An interface whose reads end with an error, and that takes nothing.
    struct Fails(i32);

    impl Read for &Fails {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(self.0))
        }
    }

    impl Write for &Fails {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(self.0))
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl AsFd for Fails {
        fn as_fd(&self) -> BorrowedFd<'_> {
            unreachable!("nothing sleeps here")
        }
    }

    #[test]
    fn an_interface_that_was_deleted_ends_the_program_and_one_that_is_down_does_not() {
        let after_a_read = |errno| {
            let mut tap = Tap::new(Fails(errno), "vp7");
            tap.check().unwrap();
            tap.read_burst();
            tap.check()
        };
        // Nothing there; down.
        after_a_read(libc::EAGAIN).unwrap();
        after_a_read(libc::EIO).unwrap();
        let error = after_a_read(libc::EBADFD).unwrap_err().to_string();
        assert!(error.contains("vp7") && error.contains("deleted"), "{error}");
    }
}
