//! `echo`: sends each packet back to its owner.

use std::time::Duration;

use super::ProgramError;
use super::peer_loop::{self, PeerArgs, PeerProgram};
use super::traffic::Traffic;
use super::wire::{BURST, Wire};
use crate::net::{Packet, PacketBurst};

/// What `echo` can be told.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct EchoArgs {
    /// What every peer can be told.
    #[command(flatten)]
    pub peer: PeerArgs,
    /// Swap source and destination address of each packet
    #[arg(long)]
    pub swap_macs: bool,
}

/// The program.
pub struct Echo {
    swap_macs: bool,
    /// By pair: what was received, and how much of it has been sent.
    held: Vec<Held>,
    traffic: Traffic,
}

#[derive(Default)]
struct Held {
    burst: PacketBurst,
    sent: usize,
    /// The frames with their addresses swapped, if they are.
    swapped: Vec<Vec<u8>>,
}

impl Held {
    fn left(&self) -> usize {
        self.burst.len().saturating_sub(self.sent)
    }

    fn swap_macs(&mut self) {
        self.swapped.resize_with(BURST.max(self.burst.len()), Vec::new);
        for (copy, frame) in self.swapped.iter_mut().zip(self.burst.frames()) {
            copy.clear();
            copy.extend_from_slice(frame);
            if let Some((one, rest)) = copy.split_first_chunk_mut::<6>()
                && let Some(other) = rest.first_chunk_mut::<6>()
            {
                std::mem::swap(one, other);
            }
        }
    }
}

impl Echo {
    /// Ready to start.
    pub fn new(args: &EchoArgs) -> Self {
        Self { swap_macs: args.swap_macs, held: Vec::new(), traffic: Traffic::default() }
    }
}

/// Runs `echo`.
///
/// # Errors
/// As [`peer_loop::run`].
pub fn run(args: &EchoArgs) -> Result<(), ProgramError> {
    peer_loop::run(&args.peer, "echo", &mut Echo::new(args))
}

impl PeerProgram for Echo {
    fn poll(&mut self, wire: &mut Wire<'_>) -> usize {
        let mut moved = 0;
        self.held.resize_with(wire.pairs().into(), Held::default);
        for (pair, held) in (0..).zip(&mut self.held) {
            if held.left() == 0 {
                held.sent = 0;
                let received = wire.receive(pair, &mut held.burst);
                self.traffic.rx_packets += received as u64;
                self.traffic.rx_bytes += held.burst.frames().map(|frame| frame.len() as u64).sum::<u64>();
                moved += received;
                if self.swap_macs {
                    held.swap_macs();
                }
            }
            if held.left() == 0 {
                continue;
            }
            let (from, to) = (held.sent, held.burst.len());
            let sent = match self.swap_macs {
                true => {
                    let swapped = held.burst.iter().zip(&held.swapped).take(to).skip(from);
                    wire.transmit(pair, swapped.map(|(packet, frame)| Packet { frame, ..packet }))
                }
                false => wire.transmit(pair, held.burst.iter().skip(from)),
            };
            self.traffic.count_sent(sent);
            held.sent += sent.done;
            moved += sent.done;
        }
        moved
    }

    fn link_lost(&mut self) {
        for held in self.held.drain(..) {
            self.traffic.dropped += held.left() as u64;
        }
    }

    fn takes_packets(&self, pair: u16) -> bool {
        !self.waits_for_buffers(pair)
    }

    fn waits_for_buffers(&self, pair: u16) -> bool {
        self.held.get(usize::from(pair)).is_some_and(|held| held.left() > 0)
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }
}
