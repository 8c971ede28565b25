//! `forward`: a peer of two owners, which passes the packets of each on to the other: out of the
//! buffers of one straight into those of the other, with one copy.
//!
//! Owns: the sessions with both devices, and the lanes between them. While one link is down nothing
//! moves: the packets stay with their owner.

use std::time::Instant;

use super::ProgramError;
use super::allowance::Allowance;
use super::device::{DeviceArgs, TwoDevicesArgs};
use super::live::Live;
use super::run::{LONGEST_SLEEP, ROUNDS, RunArgs, stop_on_signals, until_gone};
use super::session::Session;
use super::stop::Stop;
use super::tally::Tally;
use super::traffic::{Reporter, Traffic};
use super::unrest::Unrest;
use super::waiting::{Idle, Sleeps, sleep};
use super::wire::{Wire, receiving_pairs};
use crate::net::{Lane, receive_vring, transmit_vring};
use crate::transport::Transport;

/// What `forward` can be told.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ForwardArgs {
    /// The devices.
    #[command(flatten)]
    pub devices: TwoDevicesArgs,
    /// How to run.
    #[command(flatten)]
    pub run: RunArgs,
    /// End after this many packets, both ways together
    #[arg(long)]
    pub packets: Option<u64>,
}

/// Runs `forward`.
///
/// # Errors
/// If a device cannot be had, or is gone.
pub fn run(args: &ForwardArgs) -> Result<(), ProgramError> {
    let stop = stop_on_signals()?;
    run_until(args, &stop)
}

/// As [`run`], until `stop` is requested.
///
/// # Errors
/// As [`run`].
pub fn run_until(args: &ForwardArgs, stop: &Stop) -> Result<(), ProgramError> {
    let devices = args.devices.both()?;
    let mut forwarder = Forwarder::new(args, stop);
    let result = until_gone(args.run.patience(), stop, |outage| {
        let both = open(&devices)?;
        outage.is_over();
        forwarder.drive(both.each_ref().map(|transport| &**transport))
    });
    forwarder.reporter.end(&forwarder.traffic);
    result
}

fn open(devices: &[DeviceArgs; 2]) -> Result<[Box<dyn Transport>; 2], ProgramError> {
    let [one, other] = devices;
    let both = [one.open()?, other.open()?];
    for transport in &both {
        tracing::info!(device = transport.name(), "the device is started");
    }
    Ok(both)
}

/// Forwards between two devices that are started already, until `stop` is requested. Returns what it
/// has moved.
///
/// # Errors
/// If a device is gone, or is not what its config space says.
pub fn run_on(
    transports: [&dyn Transport; 2],
    args: &ForwardArgs,
    stop: &Stop,
) -> (Result<(), ProgramError>, Traffic) {
    let mut forwarder = Forwarder::new(args, stop);
    let result = forwarder.drive(transports);
    (result, forwarder.traffic)
}

/// What outlives the devices.
struct Forwarder<'a> {
    args: &'a ForwardArgs,
    stop: &'a Stop,
    reporter: Reporter,
    /// From the first owner to the second, and back: by pair of the transmitting owner.
    lanes: [Vec<Lane>; 2],
    /// What was moved, and what the sessions that have ended came to.
    moved: Traffic,
    ended: Tally,
    sleeps: Sleeps,
    /// All of it.
    traffic: Traffic,
}

impl<'a> Forwarder<'a> {
    fn new(args: &'a ForwardArgs, stop: &'a Stop) -> Self {
        Self {
            args,
            stop,
            reporter: Reporter::new(&args.run.report, "forward"),
            lanes: Default::default(),
            moved: Traffic { copied_bytes: Some(0), ..Traffic::default() },
            ended: Tally::default(),
            sleeps: Sleeps::default(),
            traffic: Traffic::default(),
        }
    }

    /// Drives two devices until the program is to end (`Ok`) or one is gone.
    fn drive(&mut self, transports: [&dyn Transport; 2]) -> Result<(), ProgramError> {
        let interrupt = self.args.run.wait.wait.needs_interrupts();
        let [one, other] = transports;
        // Who does not answer keeps its own packets, and not the program from the other's link.
        let session = |transport| -> Result<_, ProgramError> {
            Ok(Session::new(transport, interrupt)?.allowing(Allowance::of_one()))
        };
        let mut both = [session(one)?, session(other)?];
        let result = self.serve(&mut both);
        for side in 0..2 {
            self.drop_held(side);
        }
        self.count(&both);
        for session in both {
            self.ended += session.tally();
            session.end(result.is_ok());
        }
        result
    }

    fn serve(&mut self, both: &mut [Session<'_>; 2]) -> Result<(), ProgramError> {
        let mut idle = Idle::new(self.args.run.wait);
        let mut unrest = Unrest::new(self.args.run.unrest);
        let mut rounds = 0_u32;
        let mut checked = Instant::now();
        loop {
            let moved = self.round(both)?;
            rounds += 1;
            if moved > 0 {
                idle.reset();
            } else if !is_live(both) || idle.rest() {
                self.sleep(both);
                rounds = ROUNDS;
            }
            unrest.after_round();
            let enough = self.args.packets.is_some_and(|limit| self.moved.rx_packets >= limit);
            if rounds >= ROUNDS || enough {
                rounds = 0;
                both.iter().for_each(Session::follow_doorbell);
                self.count(both);
                let running = self.reporter.tick(&self.traffic);
                let over = self.args.run.is_over(running);
                if enough || over || self.stop.is_requested() {
                    return Ok(());
                }
                if checked.elapsed() >= LONGEST_SLEEP {
                    checked = Instant::now();
                    both.iter_mut().try_for_each(Session::check)?;
                }
            }
        }
    }

    /// One burst each way and pair. Returns how many packets moved.
    fn round(&mut self, both: &mut [Session<'_>; 2]) -> Result<usize, ProgramError> {
        let [one, other] = both;
        let mut lost = [false; 2];
        let [lost_one, lost_other] = &mut lost;
        let mut wires = [one.wire(|| *lost_one = true)?, other.wire(|| *lost_other = true)?];
        // Before anything moves: a link may be gone and be up again, with somebody else's port.
        for (side, lost) in lost.into_iter().enumerate() {
            if lost {
                self.drop_held(side);
            }
        }
        let mut moved = 0;
        let mut faulted = [false; 2];
        if let [Some(one), Some(other)] = &mut wires {
            let [out, back] = &mut self.lanes;
            moved = forward(one, other, out, &mut self.moved) + forward(other, one, back, &mut self.moved);
            faulted = [one.is_faulted(), other.is_faulted()];
        }
        // Both owners are called.
        drop(wires);
        for (session, faulted) in both.iter_mut().zip(faulted) {
            if faulted {
                session.report_faults();
            }
        }
        Ok(moved)
    }

    /// What is held for an owner, whose link is lost, goes with it.
    fn drop_held(&mut self, side: usize) {
        let lanes = self.lanes.get_mut(1 - side).into_iter().flatten();
        self.moved.dropped += lanes.map(|lane| lane.clear() as u64).sum::<u64>();
    }

    /// Sleeps until an owner kicks, or a link changes.
    fn sleep(&mut self, both: &mut [Session<'_>; 2]) {
        let [out, back] = self.lanes.each_ref().map(Vec::as_slice);
        let are_live = is_live(both);
        let [one, other] = both;
        let [to_one, to_other] = [one.receiving_pairs(), other.receiving_pairs()];
        let waited_for = |live: &Live, lanes: (&[Lane], &[Lane]), other_pairs| match are_live {
            true => vrings(live, lanes, other_pairs),
            // Nothing can move.
            false => Vec::new(),
        };
        let first = one.arm(|live| waited_for(live, (out, back), to_other));
        let second = other.arm(|live| waited_for(live, (back, out), to_one));
        let events: Vec<_> = first.events.iter().chain(&second.events).copied().collect();
        let most = first.most.min(second.most);
        if events.is_empty() {
            std::thread::sleep(most);
        } else if !are_live {
            sleep(&events, &[], most);
        } else if !first.has_work && !second.has_work {
            let missed = || one.has_missed(&first) | other.has_missed(&second);
            self.sleeps.sleep(&events, &[], most, missed);
        }
        one.disarm(&first);
        other.disarm(&second);
    }

    fn count(&mut self, both: &[Session<'_>; 2]) {
        let tally = both.iter().fold(self.ended, |sum, session| sum + session.tally());
        let traffic = self.moved.with_demand(tally.demand).with_sleeps(self.sleeps);
        self.traffic = Traffic { faults: tally.faults, links: tally.links, ..traffic };
    }
}

fn is_live(both: &[Session<'_>; 2]) -> bool {
    both.iter().all(Session::is_live)
}

/// What an owner is waited for: its packets, unless the other one, which receives by so many pairs, has
/// no room for them; and room for the other one's, in those pairs that have none. What is there already
/// is never waited for: it would end the sleep at once, and nothing would move.
fn vrings(live: &Live, (from, to): (&[Lane], &[Lane]), other_pairs: u16) -> Vec<u16> {
    let blocked = |pair: u16| from.get(usize::from(pair)).is_some_and(Lane::waits_for_room);
    let packets = (0..live.port.pairs()).filter(|pair| other_pairs > 0 && !blocked(*pair));
    let pairs = receiving_pairs(&live.port);
    let waiting = (0..).zip(to).filter(|(_, lane)| lane.waits_for_room());
    let mut room: Vec<_> = waiting.filter_map(|(from, _)| pair_of(from, pairs)).collect();
    room.sort_unstable();
    room.dedup();
    packets.map(transmit_vring).chain(room.into_iter().map(receive_vring)).collect()
}

/// The pair by which an owner, who receives by so many, gets what the other one sends by this pair.
fn pair_of(from: u16, pairs: u16) -> Option<u16> {
    from.checked_rem(pairs)
}

/// One burst of each pair, one way.
fn forward(from: &mut Wire<'_>, to: &mut Wire<'_>, lanes: &mut Vec<Lane>, traffic: &mut Traffic) -> usize {
    let pairs = to.receiving_pairs();
    // An owner may come back with fewer pairs than it had.
    let gone = lanes.iter_mut().skip(from.pairs().into());
    traffic.dropped += gone.map(|lane| lane.clear() as u64).sum::<u64>();
    lanes.resize_with(from.pairs().into(), Lane::default);
    let mut moved = 0;
    for (pair, lane) in (0..from.pairs()).zip(lanes) {
        let Some(to_pair) = pair_of(pair, pairs) else { break };
        let forwarded = from.forward(pair, to, to_pair, lane);
        if forwarded.is_nothing() {
            continue;
        }
        moved += forwarded.taken.max(forwarded.packets);
        traffic.rx_packets += forwarded.taken as u64;
        traffic.rx_bytes += forwarded.taken_bytes;
        traffic.tx_packets += forwarded.packets as u64;
        traffic.tx_bytes += forwarded.bytes;
        traffic.dropped += forwarded.dropped as u64;
        *traffic.copied_bytes.get_or_insert(0) += forwarded.copied_bytes;
    }
    moved
}
