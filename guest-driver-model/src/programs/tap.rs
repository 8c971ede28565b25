//! `tap`: gives the peer's Linux an ordinary network interface to the owner.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use super::ProgramError;
use super::peer_loop::{self, PeerArgs, PeerProgram};
use super::sys::tun;
use super::traffic::Traffic;
use super::wire::{BURST, Wire};
use crate::net::{PacketBurst, spread};

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
    /// Frames read from the interface, one behind the other.
    frames: Vec<u8>,
    /// Which of them go by which pair.
    lanes: Vec<Lane>,
    traffic: Traffic,
}

/// Frames that wait for a pair, as places among those read, in order.
#[derive(Clone, Debug, Default)]
struct Lane {
    frames: Vec<Range<usize>>,
    /// How many of them are done with.
    sent: usize,
}

impl Lane {
    fn waiting(&self) -> usize {
        self.frames.len() - self.sent
    }
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
            lanes: Vec::new(),
            traffic: Traffic::default(),
        }
    }
}

impl<D> Tap<D> {
    /// Frames that were read and are not done with.
    fn waiting(&self) -> usize {
        self.lanes.iter().map(Lane::waiting).sum()
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

    /// Frames from the interface, each flow's to one of the owner's pairs.
    fn outward(&mut self, wire: &mut Wire<'_>) -> usize {
        if self.waiting() == 0 {
            self.read_burst(wire.receiving_pairs());
        }
        let mut done = 0;
        for (pair, lane) in (0..).zip(&mut self.lanes).filter(|(_, lane)| lane.waiting() > 0) {
            let frames = lane.frames.iter().skip(lane.sent);
            let sent = wire.transmit(pair, frames.filter_map(|place| self.frames.get(place.clone())));
            self.traffic.count_sent(sent);
            lane.sent += sent.done;
            done += sent.done;
        }
        done
    }

    /// Reads frames for so many pairs.
    fn read_burst(&mut self, pairs: u16) {
        self.lanes.clear();
        self.lanes.resize(usize::from(pairs.max(1)), Lane::default());
        let mut end = 0;
        for _ in 0..BURST {
            if self.frames.len() < end + MAX_FRAME {
                self.frames.resize(end + MAX_FRAME, 0);
            }
            let Some(room) = self.frames.get_mut(end..) else { return };
            match (&self.device).read(room) {
                Ok(0) => return,
                Ok(len) => {
                    let pair = spread::queue(room.get(..len).unwrap_or_default(), pairs);
                    if let Some(lane) = self.lanes.get_mut(usize::from(pair)) {
                        lane.frames.push(end..end + len);
                    }
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
        self.traffic.dropped += self.waiting() as u64;
        self.lanes.clear();
    }

    fn input(&self) -> Option<BorrowedFd<'_>> {
        // While frames wait for the owner's buffers, more of them are no news.
        (self.waiting() == 0).then(|| self.device.as_fd())
    }

    fn waits_for_buffers(&self, pair: u16) -> bool {
        self.lanes.get(usize::from(pair)).is_some_and(|lane| lane.waiting() > 0)
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
    use std::cell::RefCell;

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

    /// An interface with frames of flows that have these numbers.
    struct Frames(RefCell<Vec<u8>>);

    impl Read for &Frames {
        fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
            let Some(flow) = self.0.borrow_mut().pop() else { return Err(io::ErrorKind::WouldBlock.into()) };
            room[..60].fill(flow);
            Ok(60)
        }
    }

    impl Write for &Frames {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn each_flow_goes_by_one_pair_in_order_and_many_flows_by_all() {
        let flows: Vec<u8> = (0..BURST as u8).map(|at| at % 16).collect();
        let mut tap = Tap::new(Frames(RefCell::new(flows)), "vp7");
        tap.read_burst(3);
        assert_eq!((tap.waiting(), tap.lanes.len()), (BURST, 3));
        let mut seen = [None; 16];
        for (pair, lane) in tap.lanes.iter().enumerate() {
            assert!(lane.waiting() > 0, "nothing goes by pair {pair}");
            assert!(lane.frames.is_sorted_by_key(|place| place.start));
            for place in &lane.frames {
                let flow = usize::from(tap.frames[place.start]);
                assert_eq!(*seen[flow].get_or_insert(pair), pair, "flow {flow}");
            }
        }
        // All by the first, if the owner uses one only, or none yet.
        for pairs in [0, 1] {
            tap.device.0.borrow_mut().extend([1, 2, 3]);
            tap.read_burst(pairs);
            assert_eq!((tap.waiting(), tap.lanes.len(), tap.lanes[0].waiting()), (3, 1, 3));
        }
    }

    #[test]
    fn an_interface_that_was_deleted_ends_the_program_and_one_that_is_down_does_not() {
        let after_a_read = |errno| {
            let mut tap = Tap::new(Fails(errno), "vp7");
            tap.check().unwrap();
            tap.read_burst(1);
            tap.check()
        };
        // Nothing there; down.
        after_a_read(libc::EAGAIN).unwrap();
        after_a_read(libc::EIO).unwrap();
        let error = after_a_read(libc::EBADFD).unwrap_err().to_string();
        assert!(error.contains("vp7") && error.contains("deleted"), "{error}");
    }
}
