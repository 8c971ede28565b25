//! The process that is our receiver: the library's peer loop with a program that counts. It takes a
//! private copy of each packet (the *copy* contract), looks at its length, and at every byte of
//! one packet in a few thousand.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use guest_driver_model::net::PacketBurst;
use guest_driver_model::programs::device::DeviceArgs;
use guest_driver_model::programs::pattern::Checker;
use guest_driver_model::programs::peer_loop::{self, PeerArgs, PeerProgram};
use guest_driver_model::programs::traffic::Traffic;
use guest_driver_model::programs::wire::{BURST, Wire};

use crate::board::{Board, Numbers};

/// One packet in so many bursts is looked at: often enough to find what goes wrong within a
/// second, too rarely to be what is measured.
const SAMPLE: u64 = 64;

/// Whose packets they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Content {
    /// Our generator's, with a checksum over each.
    Pattern,
    /// Testpmd's: IPv4 headers have a checksum.
    Testpmd,
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
}

/// Runs until it is ended.
pub fn run(args: Args) -> Result<()> {
    let mut program = Counting {
        board: Board::open(&args.board)?,
        burst: PacketBurst::with_capacity(BURST, 2048),
        size: args.size,
        content: args.content,
        bursts: 0,
        numbers: Numbers::default(),
    };
    let device = DeviceArgs { socket: Some(args.socket), ..DeviceArgs::default() };
    let args = PeerArgs { device, ..PeerArgs::default() };
    peer_loop::run(&args, "compare", &mut program).map_err(|error| anyhow!(error)).context("the peer")
}

/// The program.
struct Counting {
    board: Board,
    burst: PacketBurst,
    size: usize,
    content: Content,
    bursts: u64,
    numbers: Numbers,
}

impl PeerProgram for Counting {
    fn poll(&mut self, wire: &mut Wire<'_>) -> usize {
        let received = wire.receive(0, &mut self.burst);
        if received == 0 {
            return 0;
        }
        let (mut bytes, mut wrong) = (0, 0);
        for frame in self.burst.frames() {
            bytes += frame.len() as u64;
            wrong += u64::from(frame.len() != self.size);
        }
        self.bursts += 1;
        if self.bursts.is_multiple_of(SAMPLE) {
            self.look(received);
        }
        self.numbers.packets += received as u64;
        self.numbers.bytes += bytes;
        self.numbers.corrupted += wrong;
        self.board.write(&self.numbers);
        received
    }

    fn traffic(&self) -> Traffic {
        Traffic { rx_packets: self.numbers.packets, rx_bytes: self.numbers.bytes, ..Traffic::default() }
    }
}

impl Counting {
    /// At every byte of a packet of the burst: another place each time.
    #[cold]
    fn look(&mut self, received: usize) {
        let at = (self.bursts / SAMPLE) as usize % received;
        let Some(packet) = self.burst.packet(at) else { return };
        let whole = match self.content {
            Content::Pattern => {
                let mut checker = Checker::new();
                checker.check(packet.frame);
                checker.verdict().corrupted == 0
            }
            Content::Testpmd => is_testpmds(packet.frame),
        };
        self.numbers.sampled += 1;
        self.numbers.corrupted += u64::from(!whole);
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
