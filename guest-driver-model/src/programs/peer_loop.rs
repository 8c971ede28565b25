//! The main loop of every peer's program: bursts, waiting, reports, and the program's
//! end. What the link does meanwhile is `session`'s. Nothing that an
//! owner does ends the loop.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::ProgramError;
use super::device::DeviceArgs;
use super::run::{LONGEST_SLEEP, ROUNDS, RunArgs, stop_on_signals, until_gone};
use super::session::Session;
use super::stop::Stop;
use super::tally::Tally;
use super::traffic::{Reporter, Traffic};
use super::unrest::Unrest;
use super::waiting::Idle;
use super::wire::Wire;
use crate::transport::Transport;

/// What all peer programs can be told.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct PeerArgs {
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// How to run.
    #[command(flatten)]
    pub run: RunArgs,
    /// End after this many packets, sent and received together
    #[arg(long)]
    pub packets: Option<u64>,
}

/// What a program does with the packets.
pub trait PeerProgram {
    /// Moves at most a burst or two. Returns how many packets that were.
    fn poll(&mut self, wire: &mut Wire<'_>) -> usize;

    /// The link is down: what was held for it is to be dropped.
    fn link_lost(&mut self) {}

    /// Where packets come from besides the link; readable when there are some.
    fn input(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Whether the next poll takes what the owner sends on a pair.
    fn takes_packets(&self, _pair: u16) -> bool {
        true
    }

    /// Whether packets are held until the owner provides receive buffers of a pair.
    fn waits_for_buffers(&self, _pair: u16) -> bool {
        false
    }

    /// How long the program may sleep although nothing happens.
    fn patience(&self) -> Duration {
        LONGEST_SLEEP
    }

    /// Whether the program can go on: asked after each sleep and every few rounds.
    ///
    /// # Errors
    /// If what the program works with besides the link is gone.
    fn check(&self) -> Result<(), ProgramError> {
        Ok(())
    }

    /// What it has moved.
    fn traffic(&self) -> Traffic;
}

/// Runs a program until it is asked to end.
///
/// # Errors
/// If the device cannot be had, or is gone.
pub fn run(args: &PeerArgs, name: &'static str, program: &mut dyn PeerProgram) -> Result<(), ProgramError> {
    let stop = stop_on_signals()?;
    run_until(args, name, program, &stop)
}

/// As [`run`], until `stop` is requested.
///
/// # Errors
/// As [`run`].
pub fn run_until(
    args: &PeerArgs,
    name: &'static str,
    program: &mut dyn PeerProgram,
    stop: &Stop,
) -> Result<(), ProgramError> {
    let mut peer = Peer::new(args, name, stop);
    let result = until_gone(args.run.patience(), stop, |outage| {
        let transport = args.device.open()?;
        outage.is_over();
        tracing::info!(device = transport.name(), "the device is started");
        peer.drive(&*transport, program)
    });
    peer.reporter.end(&traffic(program, peer.tally));
    result
}

/// Runs a program on a device that is started already, until `stop` is requested.
///
/// # Errors
/// If the device is gone, or is not what its config space says.
pub fn run_on(
    transport: &dyn Transport,
    args: &PeerArgs,
    name: &'static str,
    program: &mut dyn PeerProgram,
    stop: &Stop,
) -> Result<(), ProgramError> {
    let mut peer = Peer::new(args, name, stop);
    let result = peer.drive(transport, program);
    peer.reporter.end(&traffic(program, peer.tally));
    result
}

/// What outlives a device.
struct Peer<'a> {
    args: &'a PeerArgs,
    stop: &'a Stop,
    tally: Tally,
    reporter: Reporter,
}

impl<'a> Peer<'a> {
    fn new(args: &'a PeerArgs, name: &'static str, stop: &'a Stop) -> Self {
        Self { args, stop, tally: Tally::default(), reporter: Reporter::new(&args.run.report, name) }
    }

    /// Drives one device until the program is to end (`Ok`) or the device is gone.
    fn drive(
        &mut self,
        transport: &dyn Transport,
        program: &mut dyn PeerProgram,
    ) -> Result<(), ProgramError> {
        let mut session = Session::new(transport, self.args.run.wait.wait.needs_interrupts())?;
        let result = self.serve(&mut session, program);
        program.link_lost();
        self.tally += session.tally();
        session.end(result.is_ok());
        result
    }

    fn serve(
        &mut self,
        session: &mut Session<'_>,
        program: &mut dyn PeerProgram,
    ) -> Result<(), ProgramError> {
        let mut idle = Idle::new(self.args.run.wait);
        let mut unrest = Unrest::new(self.args.run.unrest);
        let mut rounds = 0_u32;
        let mut checked = Instant::now();
        loop {
            let moved = session.round(program)?;
            rounds += 1;
            if moved > 0 {
                idle.reset();
            } else if !session.is_live() || idle.rest() {
                session.sleep(program);
                rounds = ROUNDS;
            }
            unrest.after_round();
            let limit = self.args.packets;
            let enough = limit.is_some_and(|limit| {
                let traffic = program.traffic();
                traffic.tx_packets + traffic.rx_packets >= limit
            });
            if rounds >= ROUNDS || enough {
                rounds = 0;
                session.follow_doorbell();
                program.check()?;
                let running = self.reporter.tick(&traffic(program, self.tally + session.tally()));
                let over = self.args.run.is_over(running);
                if enough || over || self.stop.is_requested() {
                    return Ok(());
                }
                if checked.elapsed() >= LONGEST_SLEEP || session.is_over() {
                    checked = Instant::now();
                    session.check()?;
                }
            }
        }
    }
}

fn traffic(program: &dyn PeerProgram, tally: Tally) -> Traffic {
    let traffic = program.traffic().with_demand(tally.demand).with_sleeps(tally.sleeps);
    Traffic { faults: tally.faults, links: tally.links, ..traffic }
}
