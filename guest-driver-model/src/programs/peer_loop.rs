//! The main loop of every peer's program: bursts, waiting, reports, and the program's
//! end. What the link does meanwhile is `session`'s. Nothing that an
//! owner does ends the loop.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::ProgramError;
use super::device::DeviceArgs;
use super::quantity::seconds;
use super::session::Session;
use super::stop::Stop;
use super::tally::Tally;
use super::traffic::{ReportArgs, Reporter, Traffic};
use super::unrest::{Unrest, UnrestArgs};
use super::waiting::{Idle, WaitArgs};
use super::wire::Wire;
use crate::transport::{Transport, TransportError};

/// Rounds between two looks at the clock.
pub(super) const ROUNDS: u32 = 64;
/// The longest sleep. Nothing but the look at the clock depends on it: who sleeps is woken
/// for each packet.
pub(super) const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// Between two tries to have the device back.
pub(super) const RECONNECT_PAUSE: Duration = Duration::from_millis(200);
/// What all peer programs can be told.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct PeerArgs {
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// How to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// Whether to pause.
    #[command(flatten)]
    pub unrest: UnrestArgs,
    /// How to report.
    #[command(flatten)]
    pub report: ReportArgs,
    /// End this many seconds after the first packet
    #[arg(long, value_parser = seconds)]
    pub seconds: Option<f64>,
    /// End after this many packets, sent and received together
    #[arg(long)]
    pub packets: Option<u64>,
    /// When the broker is gone, wait for it to come back instead of ending
    #[arg(long)]
    pub reconnect: bool,
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
    let stop =
        Stop::on_signals().map_err(|source| ProgramError::System { what: "signal handlers", source })?;
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
    let mut said = false;
    let result = loop {
        let result = args.device.open().and_then(|transport| {
            said = false;
            tracing::info!(device = transport.name(), "the device is started");
            peer.drive(&*transport, program)
        });
        match result {
            Err(
                error @ ProgramError::Transport(TransportError::Gone { .. } | TransportError::Broker { .. }),
            ) if args.reconnect => {
                if stop.is_requested() {
                    break Ok(());
                }
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!("{error}; waiting for it to come back");
                }
                std::thread::sleep(RECONNECT_PAUSE);
            }
            result => break result,
        }
    };
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
        Self { args, stop, tally: Tally::default(), reporter: Reporter::new(&args.report, name) }
    }

    /// Drives one device until the program is to end (`Ok`) or the device is gone.
    fn drive(
        &mut self,
        transport: &dyn Transport,
        program: &mut dyn PeerProgram,
    ) -> Result<(), ProgramError> {
        let mut session = Session::new(transport, self.args.wait.wait.needs_interrupts())?;
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
        let mut idle = Idle::new(self.args.wait);
        let mut unrest = Unrest::new(self.args.unrest);
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
                let over = self.args.seconds.is_some_and(|seconds| running.as_secs_f64() >= seconds);
                if enough || over || self.stop.is_requested() {
                    return Ok(());
                }
                if checked.elapsed() >= LONGEST_SLEEP {
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
