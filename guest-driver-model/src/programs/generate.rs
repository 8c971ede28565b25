//! `gen`: sends packets to the owner.

use std::time::Duration;

use super::ProgramError;
use super::peer_loop::{self, PeerArgs, PeerProgram};
use super::sink::{Check, Sink};
use super::source::{Source, SourceArgs};
use super::traffic::Traffic;
use super::wire::{Sent, Wire};

/// What `gen` can be told.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct GenArgs {
    /// What every peer can be told.
    #[command(flatten)]
    pub peer: PeerArgs,
    /// What to send.
    #[command(flatten)]
    pub source: SourceArgs,
    /// How to judge what the owner sends meanwhile. `sample`, `none`: look at one packet in 64, or
    /// only count; and send the same frames over and over, which costs nothing
    #[arg(long, value_enum, default_value_t)]
    pub check: Check,
}

/// The program.
pub struct Generate {
    source: Source,
    /// Takes what the owner sends, so that it does not stall.
    sink: Sink,
    sent: Traffic,
}

impl Generate {
    /// Ready to start.
    pub fn new(args: &GenArgs) -> Self {
        Self {
            source: Source::new(&args.source, args.check),
            sink: Sink::new(args.check),
            sent: Traffic::default(),
        }
    }
}

/// Runs `gen`.
///
/// # Errors
/// As [`peer_loop::run`].
pub fn run(args: &GenArgs) -> Result<(), ProgramError> {
    peer_loop::run(&args.peer, "gen", &mut Generate::new(args))
}

impl PeerProgram for Generate {
    fn poll(&mut self, wire: &mut Wire<'_>) -> usize {
        let mut sent = Sent::default();
        self.source.offer(|frames| {
            sent = wire.transmit(0, frames);
            sent.done
        });
        self.sent.count_sent(sent);
        sent.done + self.sink.poll(wire)
    }

    fn waits_for_buffers(&self, pair: u16) -> bool {
        pair == 0 && self.source.is_blocked()
    }

    fn patience(&self) -> Duration {
        self.source.patience()
    }

    fn traffic(&self) -> Traffic {
        let received = self.sink.traffic();
        let Traffic { tx_packets, tx_bytes, .. } = self.sent;
        Traffic { tx_packets, tx_bytes, dropped: self.sent.dropped + received.dropped, ..received }
    }
}
