//! `tap`: gives the peer's Linux an ordinary network interface to the owner.
//!
//! Owns: the interface, and what it may leave to the owner: what the owner's driver accepts. Headers
//! that the owner wrote are checked before the kernel sees them.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use super::ProgramError;
use super::peer_loop::{self, PeerArgs, PeerProgram};
use super::sys::tun;
use super::traffic::Traffic;
use super::wire::{BURST, Wire};
use crate::net::{HEADER_LEN, MAX_FRAME, NetHeader, Offloads, Packet, PacketBurst, spread};

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

/// The most that one read gives.
const MAX_READ: usize = HEADER_LEN + MAX_FRAME;

/// What the program needs of an interface: a header and a frame a read, and a write; and it never
/// blocks.
pub trait Interface: AsFd
where
    for<'a> &'a Self: Read + Write,
{
    /// From now on frames that are read may leave this to their reader.
    ///
    /// # Errors
    /// If the kernel does not do so.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;
}

impl Interface for File {
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        tun::set_offloads(self, offloads.tun_bits())
    }
}

/// The program.
pub struct Tap<D> {
    device: D,
    name: String,
    /// The interface is no more.
    deleted: bool,
    /// What it may leave to the owner.
    offloads: Offloads,
    received: PacketBurst,
    /// Frames read from the interface, each behind its header, one behind the other.
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
    /// Over a device that leaves nothing to its reader yet.
    pub fn new(device: D, name: &str) -> Self {
        Self {
            device,
            name: name.to_owned(),
            deleted: false,
            offloads: Offloads::default(),
            received: PacketBurst::with_capacity(BURST, 2048),
            frames: vec![0; MAX_READ],
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
    D: Interface,
    for<'a> &'a D: Read + Write,
{
    /// Has the interface leave to the owner what its driver accepts, and no more.
    fn follow(&mut self, accepted: Offloads) {
        if self.offloads == accepted {
            return;
        }
        self.offloads = accepted;
        // Without them all goes on: what is in the way by then the port completes, or drops.
        if let Err(error) = self.device.set_offloads(accepted) {
            tracing::warn!(interface = self.name, "the interface takes no offloads: {error}");
        }
    }

    /// Frames from the owner, to the interface.
    fn inward(&mut self, wire: &mut Wire<'_>) -> usize {
        let mut moved = 0;
        for pair in 0..wire.pairs() {
            moved += wire.receive(pair, &mut self.received);
            for packet in self.received.iter() {
                write(&self.device, packet, &mut self.traffic);
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
            let packets = frames.filter_map(|place| packet(self.frames.get(place.clone())?));
            let sent = wire.transmit(pair, packets.clone());
            self.traffic.count_sent(sent);
            let long = packets.take(sent.done).filter(|packet| packet.header.is_long()).count();
            self.traffic.tx_long += long as u64;
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
            if self.frames.len() < end + MAX_READ {
                self.frames.resize(end + MAX_READ, 0);
            }
            let Some(room) = self.frames.get_mut(end..) else { return };
            match (&self.device).read(room) {
                Ok(len) => {
                    let Some(frame) = room.get(HEADER_LEN..len) else { return };
                    let pair = spread::queue(frame, pairs);
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

/// Gives the interface a packet of the owner's.
fn write<D>(device: &D, Packet { header, frame }: Packet<'_>, traffic: &mut Traffic)
where
    for<'a> &'a D: Write,
{
    traffic.rx_packets += 1;
    traffic.rx_bytes += frame.len() as u64;
    // The owner wrote it: what it names is inside the frame, or the kernel does not see it.
    let Some(header) = header.checked(frame.len()) else {
        traffic.bad_headers += 1;
        traffic.dropped += 1;
        return;
    };
    traffic.rx_long += u64::from(header.is_long());
    let header = header.to_bytes();
    let mut device = device;
    // An interface that is down or full drops, as networks do.
    if device.write_vectored(&[IoSlice::new(&header), IoSlice::new(frame)]).is_err() {
        traffic.dropped += 1;
    }
}

/// What was read: a header and its frame.
fn packet(bytes: &[u8]) -> Option<Packet<'_>> {
    let (header, frame) = bytes.split_first_chunk()?;
    Some(Packet { header: NetHeader::from_bytes(header), frame })
}

impl<D: Interface> PeerProgram for Tap<D>
where
    for<'a> &'a D: Read + Write,
{
    fn poll(&mut self, wire: &mut Wire<'_>) -> usize {
        self.follow(wire.offloads());
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
#[path = "tap_tests.rs"]
mod tests;
