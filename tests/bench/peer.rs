//! The process that is our receiver: the library's peer loop with a program that counts. It takes a
//! private copy of each packet (the *copy* contract) or reads its beginning where it lies (*in
//! place*), looks at its length, and at every byte of one packet in a few thousand.

use std::hint::black_box;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use guest_driver_model::net::{LentBurst, PacketBurst};
use guest_driver_model::programs::device::DeviceArgs;
use guest_driver_model::programs::pattern::{Checker, Verdict};
use guest_driver_model::programs::peer_loop::{self, PeerArgs, PeerProgram};
use guest_driver_model::programs::traffic::Traffic;
use guest_driver_model::programs::wire::{BURST, Wire};

use crate::allocations;
use crate::board::{Board, Numbers};

/// One packet in so many bursts is looked at: often enough to find what goes wrong within a
/// second, too rarely to be what is measured.
const SAMPLE: u64 = 64;

/// No packet is longer, bytes.
const LONGEST: usize = 2048;
/// What a receiver in place reads of each packet, bytes.
const HEAD: usize = 64;

/// Where packets are when the receiver looks at them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Contract {
    /// In its own memory, all of each.
    Copy,
    /// In the owner's: it reads the first [`HEAD`] bytes of each.
    InPlace,
}

impl Contract {
    /// As the process is told.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::InPlace => "in-place",
        }
    }
}

/// Whose packets they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Content {
    /// Our generator's, with a checksum over each.
    Pattern,
    /// Testpmd's: IPv4 headers have a checksum.
    Testpmd,
    /// Our generator's, each once and in order: all are looked at.
    Sequence,
}

/// What the process is told.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The peer socket of the broker.
    #[arg(long)]
    socket: PathBuf,
    /// Where it counts.
    #[arg(long)]
    board: PathBuf,
    /// Length of each packet.
    #[arg(long)]
    size: usize,
    /// Whose packets they are.
    #[arg(long, value_enum)]
    content: Content,
    /// Where it looks at packets.
    #[arg(long, value_enum)]
    contract: Contract,
}

/// Runs until it is ended.
pub fn run(args: Args) -> Result<()> {
    allocations::answer();
    let mut program = Counting {
        board: Board::open(&args.board)?,
        burst: match args.contract {
            Contract::Copy => Burst::Copied(PacketBurst::with_capacity(BURST, 2048)),
            Contract::InPlace => Burst::Lent(LentBurst::with_capacity(BURST)),
        },
        size: args.size,
        content: args.content,
        bursts: 0,
        checker: Checker::new(),
        numbers: Numbers::default(),
    };
    let device = DeviceArgs { socket: Some(args.socket), ..DeviceArgs::default() };
    let args = PeerArgs { device, ..PeerArgs::default() };
    peer_loop::run(&args, "compare", &mut program).map_err(|error| anyhow!(error)).context("the peer")
}

/// The packets at hand.
enum Burst {
    Copied(PacketBurst),
    Lent(LentBurst),
}

/// The program.
struct Counting {
    board: Board,
    burst: Burst,
    size: usize,
    content: Content,
    bursts: u64,
    /// Of a sequence.
    checker: Checker,
    numbers: Numbers,
}

impl PeerProgram for Counting {
    fn poll(&mut self, wire: &mut Wire<'_>) -> usize {
        if self.content == Content::Sequence {
            return self.poll_sequence(wire);
        }
        let sample = self.next_sample();
        let (size, content, numbers) = (self.size, self.content, &mut self.numbers);
        let received = match &mut self.burst {
            Burst::Copied(burst) => {
                let received = wire.receive(0, burst);
                burst.frames().for_each(|frame| numbers.count(frame.len(), size));
                let sample = sample.filter(|_| received > 0);
                if let Some(packet) = sample.and_then(|sample| burst.packet(sample % received)) {
                    numbers.look(packet.frame, content);
                }
                received
            }
            Burst::Lent(burst) => {
                let lent = wire.lend(0, burst);
                for packet in burst.iter() {
                    numbers.count(packet.len(), size);
                    black_box(packet.head::<HEAD>());
                }
                let sample = sample.filter(|_| lent > 0);
                if let Some(packet) = sample.and_then(|sample| burst.packet(sample % lent)) {
                    let mut frame = [0; LONGEST];
                    let len = packet.read(0, &mut frame);
                    numbers.look(frame.get(..len).unwrap_or_default(), content);
                }
                wire.give_back(0, burst);
                lent
            }
        };
        if received > 0 {
            self.bursts += 1;
            if sample.is_some() {
                self.numbers.searches = wire.searches();
            }
            self.board.write(&self.numbers);
        }
        received
    }

    fn traffic(&self) -> Traffic {
        Traffic { rx_packets: self.numbers.packets, rx_bytes: self.numbers.bytes, ..Traffic::default() }
    }
}

impl Counting {
    /// Looks at every byte of each packet, and at which it is.
    #[cold]
    fn poll_sequence(&mut self, wire: &mut Wire<'_>) -> usize {
        let (size, checker, numbers) = (self.size, &mut self.checker, &mut self.numbers);
        let received = match &mut self.burst {
            Burst::Copied(burst) => {
                let received = wire.receive(0, burst);
                for frame in burst.frames() {
                    numbers.count(frame.len(), size);
                    checker.check(frame);
                }
                received
            }
            Burst::Lent(burst) => {
                let lent = wire.lend(0, burst);
                for packet in burst.iter() {
                    numbers.count(packet.len(), size);
                    let mut frame = [0; LONGEST];
                    let len = packet.read(0, &mut frame);
                    checker.check(frame.get(..len).unwrap_or_default());
                }
                wire.give_back(0, burst);
                lent
            }
        };
        if received > 0 {
            let Verdict { intact, corrupted, lost, reordered, .. } = checker.verdict();
            numbers.sampled = intact + corrupted;
            numbers.corrupted = corrupted + lost + reordered;
            self.board.write(numbers);
        }
        received
    }

    /// Which packet of the next burst is looked at, modulo its length, if one is: another place
    /// each time.
    fn next_sample(&self) -> Option<usize> {
        let next = self.bursts + 1;
        next.is_multiple_of(SAMPLE).then_some((next / SAMPLE) as usize)
    }
}

impl Numbers {
    fn count(&mut self, len: usize, expected: usize) {
        self.packets += 1;
        self.bytes += len as u64;
        self.corrupted += u64::from(len != expected);
    }

    /// At every byte of a packet, or at its header where nothing tells what the rest should be.
    #[cold]
    fn look(&mut self, frame: &[u8], content: Content) {
        let whole = match content {
            Content::Pattern => {
                self.sampled += 1;
                let mut checker = Checker::new();
                checker.check(frame);
                checker.verdict().corrupted == 0
            }
            Content::Testpmd => {
                self.headers += 1;
                is_testpmds(frame)
            }
            // Not looked at here.
            Content::Sequence => return,
        };
        self.corrupted += u64::from(!whole);
    }
}

/// Whether the frame is IPv4 with a right checksum and the frame's length.
fn is_testpmds(frame: &[u8]) -> bool {
    let Some((ethernet, ip)) = frame.split_first_chunk::<14>() else { return false };
    let (Some(header), true) = (ip.first_chunk::<20>(), ethernet[12..] == [0x08, 0x00]) else { return false };
    let word = |at: usize| u32::from(header[at]) << 8 | u32::from(header[at + 1]);
    let sum: u32 = (0..20).step_by(2).map(word).sum();
    // Ones' complement: carries come back in at the other end.
    let sum = (sum & 0xffff) + (sum >> 16);
    header[0] == 0x45 && word(2) as usize == ip.len() && (sum & 0xffff) + (sum >> 16) == 0xffff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_of_testpmd_is_known_by_its_checksum() {
        let mut frame = vec![0; 64];
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        frame[14..34]
            .copy_from_slice(&[0x45, 0, 0, 50, 0, 0, 0, 0, 64, 17, 0, 0, 198, 18, 0, 1, 198, 18, 0, 2]);
        let sum: u32 = frame[14..34].chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(two[1])).sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        assert!(is_testpmds(&frame));
        for at in [12, 14, 16, 17, 22, 30] {
            let mut changed = frame.clone();
            changed[at] ^= 4;
            assert!(!is_testpmds(&changed), "byte {at}");
        }
        assert!(!is_testpmds(&frame[..63]) && !is_testpmds(&[]));
    }
}
