//! `sink`: counts and checks what the owner sends.

use super::ProgramError;
use super::pattern::Checker;
use super::peer_loop::{self, PeerArgs, PeerProgram};
use super::traffic::Traffic;
use super::wire::{BURST, Wire};
use crate::net::PacketBurst;

/// How packets are judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Check {
    /// They are those of our own generator: look at every byte
    #[default]
    Pattern,
    /// The same, of one packet in 64; the others are only counted
    Sample,
    /// Only count them
    None,
}

impl Check {
    /// Judges a frame.
    #[inline]
    pub fn judge(self, checker: &mut Checker, frame: &[u8]) {
        match self {
            Self::Pattern => checker.check(frame),
            Self::Sample => checker.sample(frame),
            Self::None => {}
        }
    }
}

/// What `sink` can be told.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct SinkArgs {
    /// What every peer can be told.
    #[command(flatten)]
    pub peer: PeerArgs,
    /// How to judge packets
    #[arg(long, value_enum, default_value_t)]
    pub check: Check,
}

/// The program.
pub struct Sink {
    check: Check,
    burst: PacketBurst,
    /// One a pair: streams of different pairs overtake each other.
    checkers: Vec<Checker>,
    traffic: Traffic,
}

impl Sink {
    /// Ready to start.
    pub fn new(check: Check) -> Self {
        let burst = PacketBurst::with_capacity(BURST, 2048);
        Self { check, burst, checkers: Vec::new(), traffic: Traffic::default() }
    }
}

/// Runs `sink`.
///
/// # Errors
/// As [`peer_loop::run`].
pub fn run(args: &SinkArgs) -> Result<(), ProgramError> {
    peer_loop::run(&args.peer, "sink", &mut Sink::new(args.check))
}

impl PeerProgram for Sink {
    fn poll(&mut self, wire: &mut Wire<'_>) -> usize {
        let mut moved = 0;
        self.checkers.resize_with(self.checkers.len().max(wire.pairs().into()), Checker::new);
        for (pair, checker) in (0..wire.pairs()).zip(&mut self.checkers) {
            let received = wire.receive(pair, &mut self.burst);
            if received == 0 {
                continue;
            }
            moved += received;
            self.traffic.rx_packets += received as u64;
            for frame in self.burst.frames() {
                self.traffic.rx_bytes += frame.len() as u64;
                self.check.judge(checker, frame);
            }
        }
        moved
    }

    fn traffic(&self) -> Traffic {
        self.traffic.judged_by(&self.checkers)
    }
}
