//! The main loop of every peer's program: waits for the link, serves its bursts, and
//! begins again when the link changes. Nothing that an owner does ends it.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use vhost_pci_device::abi::{self, queue_of_vring};

use super::ProgramError;
use super::device::DeviceArgs;
use super::quiet::Quiet;
use super::stop::Stop;
use super::traffic::{ReportArgs, Reporter, Traffic};
use super::waiting::{Mode, Pause, WaitArgs, sleep};
use super::wire::Wire;
use crate::control::{Command, ControlRing};
use crate::link::{LinkError, LinkPage};
use crate::net::{PeerPort, receive_vring, transmit_vring};
use crate::ring::Fault;
use crate::transport::{Transport, TransportError};

/// Rounds between two looks at the clock.
const ROUNDS: u32 = 64;
/// The longest sleep: an interrupt that gets lost costs no more than this.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// Between two looks for a link, where no interrupt tells of it.
const LINK_PAUSE: Duration = Duration::from_millis(1);
/// Between two tries to have the device back.
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);
/// How long the device may take to answer when the program ends.
const DETACH_TIME: Duration = Duration::from_millis(500);

/// What all peer programs can be told.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct PeerArgs {
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// How to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// How to report.
    #[command(flatten)]
    pub report: ReportArgs,
    /// End this many seconds after the first packet
    #[arg(long)]
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

    /// Whether packets are held until the owner provides receive buffers.
    fn waits_for_buffers(&self) -> bool {
        false
    }

    /// How long the program may sleep although nothing happens.
    fn patience(&self) -> Duration {
        LONGEST_SLEEP
    }

    /// What it has moved.
    fn traffic(&self) -> Traffic;
}

/// Runs a program until it is asked to end.
///
/// # Errors
/// If the device cannot be had, or is gone.
pub fn run(args: &PeerArgs, name: &'static str, program: &mut dyn PeerProgram) -> Result<(), ProgramError> {
    let stop = Stop::on_signals().map_err(|source| ProgramError::System { what: "signal handlers", source })?;
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
    let mut peer = Peer { args, stop, faults: 0, links: 0, reporter: Reporter::new(&args.report, name) };
    let mut said = false;
    let result = loop {
        let result = args.device.open().and_then(|transport| {
            said = false;
            tracing::info!(device = transport.name(), "the device is started");
            peer.session(&*transport, program)
        });
        match result {
            Err(error @ ProgramError::Transport(TransportError::Gone { .. } | TransportError::Broker { .. }))
                if args.reconnect && !stop.is_requested() =>
            {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!("{error}; waiting for it to come back");
                }
                std::thread::sleep(RECONNECT_PAUSE);
            }
            result => break result,
        }
    };
    peer.reporter.end(&peer.traffic(program));
    result
}

/// What outlives a device.
struct Peer<'a> {
    args: &'a PeerArgs,
    stop: &'a Stop,
    faults: u64,
    links: u64,
    reporter: Reporter,
}

/// A link that is up.
struct Live {
    port: PeerPort,
    reported: Vec<Fault>,
}

/// One device, from its start to its end.
struct Session<'a> {
    transport: &'a dyn Transport,
    page: LinkPage,
    /// There while the control area is.
    control: Option<ControlRing>,
    live: Option<Live>,
    /// The generation that gave no port, and will not.
    refused: Option<u64>,
    /// For lines that the owner can cause.
    quiet: Quiet,
}

impl Peer<'_> {
    fn traffic(&self, program: &dyn PeerProgram) -> Traffic {
        Traffic { faults: self.faults, links: self.links, ..program.traffic() }
    }

    /// Drives one device until the program is to end (`Ok`) or the device is gone.
    fn session(&mut self, transport: &dyn Transport, program: &mut dyn PeerProgram) -> Result<(), ProgramError> {
        let interrupt = self.args.wait.mode == Mode::Interrupt;
        if interrupt && transport.interrupt_fd(abi::QUEUE_CONTROL).is_none() {
            return Err(ProgramError::NoInterrupts { device: transport.name().to_owned() });
        }
        let config = transport.config();
        let page = LinkPage::new(transport.window().clone(), config.link_offset.value(), config.link_len.value())?;
        let mut session = Session { transport, page, control: None, live: None, refused: None, quiet: Quiet::default() };
        let result = self.serve(&mut session, program);
        program.link_lost();
        // The owner's vrings are let go of before the device is told so.
        session.live = None;
        if result.is_ok()
            && let Some(mut control) = session.control
            && let Err(error) = control.call(transport, Command::Detach, DETACH_TIME)
        {
            tracing::warn!("{error}");
        }
        result
    }

    fn serve(&mut self, session: &mut Session<'_>, program: &mut dyn PeerProgram) -> Result<(), ProgramError> {
        let mut pause = Pause::default();
        let mut rounds = 0_u32;
        let mut checked = Instant::now();
        loop {
            session.follow_link(self, program)?;
            let moved = match &mut session.live {
                Some(live) => {
                    let mut wire = Wire::new(&mut live.port, session.transport);
                    let moved = program.poll(&mut wire);
                    if wire.is_faulted() {
                        session.report_faults(&mut self.faults);
                    }
                    moved
                }
                None => 0,
            };
            rounds += 1;
            if moved > 0 {
                pause.reset();
            } else if session.live.is_none() || self.args.wait.mode == Mode::Interrupt {
                session.sleep(program);
                rounds = ROUNDS;
            } else {
                pause.rest(&self.args.wait);
            }
            let limit = self.args.packets;
            let enough = limit.is_some_and(|limit| {
                let traffic = program.traffic();
                traffic.tx_packets + traffic.rx_packets >= limit
            });
            if rounds >= ROUNDS || enough {
                rounds = 0;
                let running = self.reporter.tick(&self.traffic(program));
                let over = self.args.seconds.is_some_and(|seconds| running.as_secs_f64() >= seconds);
                if enough || over || self.stop.is_requested() {
                    return Ok(());
                }
                if checked.elapsed() >= LONGEST_SLEEP {
                    checked = Instant::now();
                    session.transport.check()?;
                    session.hear_answers();
                }
            }
        }
    }
}

impl Session<'_> {
    /// Brings the port up to the link page's generation.
    fn follow_link(&mut self, peer: &mut Peer<'_>, program: &mut dyn PeerProgram) -> Result<(), ProgramError> {
        let generation = self.page.generation();
        if self.live.as_ref().is_some_and(|live| live.port.generation() == generation) {
            return Ok(());
        }
        if self.live.take().is_some() {
            program.link_lost();
        }
        if self.refused == Some(generation) && generation != 0 {
            return Ok(());
        }
        self.refused = None;
        let snapshot = match self.page.snapshot() {
            Ok(snapshot) => snapshot,
            Err(LinkError::Changing) => return Ok(()),
            Err(LinkError::NotMapped) => {
                // The next control area is another one.
                self.control = None;
                return Ok(());
            }
            Err(error) => {
                // The device's fault; what it writes next may be better.
                if self.quiet.allows_line() {
                    tracing::error!(device = self.transport.name(), "{error}");
                }
                self.refused = Some(generation);
                return Ok(());
            }
        };
        if self.control.is_none() {
            self.control = Some(ControlRing::new(self.transport)?);
        }
        if !snapshot.up {
            self.refused = Some(snapshot.generation);
            return Ok(());
        }
        match PeerPort::new(self.transport.window(), &snapshot) {
            Ok(port) => self.go_live(port, peer),
            Err(error) => {
                if self.quiet.allows_line() {
                    tracing::error!(device = self.transport.name(), "cannot serve this owner: {error}");
                }
                self.refused = Some(snapshot.generation);
            }
        }
        Ok(())
    }

    fn go_live(&mut self, mut port: PeerPort, peer: &mut Peer<'_>) {
        for pair in 0..port.pairs() {
            // A fault shows again with the first burst.
            let _ = port.set_kicks(transmit_vring(pair), false);
            let _ = port.set_kicks(receive_vring(pair), false);
        }
        let generation = port.generation();
        if self.quiet.allows_line() {
            tracing::info!(device = self.transport.name(), generation, pairs = port.pairs(), "the link is up");
        }
        peer.links += 1;
        let broken = port.faults().next().is_some();
        self.live = Some(Live { port, reported: Vec::new() });
        let interrupt = peer.args.wait.mode == Mode::Interrupt;
        self.tell(Command::Attach { generation, interrupt });
        if broken {
            self.report_faults(&mut peer.faults);
        }
    }

    /// Tells the device what is broken and new, unless the link has just changed:
    /// memory that is being taken away looks broken, too.
    fn report_faults(&mut self, count: &mut u64) {
        let Some(live) = &mut self.live else { return };
        if self.page.generation() != live.port.generation() {
            return;
        }
        let new: Vec<_> = live.port.faults().filter(|fault| !live.reported.contains(fault)).collect();
        live.reported.extend(&new);
        *count += new.len() as u64;
        for fault in new {
            if self.quiet.allows_line() {
                tracing::warn!(device = self.transport.name(), "{fault}; not served until the link changes");
            }
            self.tell(fault.into());
        }
    }

    /// Gives the device a command. It may answer or not: the link works all the same.
    fn tell(&mut self, command: Command) {
        // Makes room, too.
        self.hear_answers();
        if let Some(control) = &mut self.control
            && let Err(error) = control.send(self.transport, command)
            && self.quiet.allows_line()
        {
            tracing::warn!(device = self.transport.name(), "control ring: {error}");
        }
    }

    fn hear_answers(&mut self) {
        let answers = self.control.as_mut().map_or(Ok(Vec::new()), ControlRing::answers);
        match answers {
            Ok(answers) => {
                // An attachment to a generation that has passed meanwhile is no news.
                let news = |status| status != abi::CTRL_OK && status != abi::CTRL_STALE;
                let quiet = &mut self.quiet;
                for answer in answers.into_iter().filter(|answer| news(answer.status) && quiet.allows_line()) {
                    tracing::warn!(device = self.transport.name(), ?answer, "the device refuses a command");
                }
            }
            Err(error) if self.quiet.allows_line() => tracing::warn!(device = self.transport.name(), "{error}"),
            Err(_) => {}
        }
    }

    /// Sleeps until the owner kicks, the link changes, or the program has input.
    fn sleep(&mut self, program: &mut dyn PeerProgram) {
        let Some(control) = self.transport.interrupt_fd(abi::QUEUE_CONTROL) else {
            std::thread::sleep(LINK_PAUSE);
            return;
        };
        let mut events = vec![control];
        let mut input = Vec::new();
        let mut kicked = Vec::new();
        if let Some(live) = &mut self.live {
            let buffers = program.waits_for_buffers();
            for pair in 0..live.port.pairs() {
                kicked.push(transmit_vring(pair));
                if buffers {
                    kicked.push(receive_vring(pair));
                }
            }
            // Enabling every kick before looking at any ring would miss none either,
            // but one that has work already needs no sleep.
            let mut work = false;
            for vring in &kicked {
                work |= live.port.set_kicks(*vring, true).unwrap_or(false);
            }
            let generation = self.page.generation();
            if !work && generation == live.port.generation() {
                let kicks = kicked.iter().filter_map(|vring| self.transport.interrupt_fd(queue_of_vring(*vring)));
                events.extend(kicks);
                input.extend(program.input());
                sleep(&events, &input, program.patience().min(LONGEST_SLEEP));
            }
            for vring in &kicked {
                let _ = live.port.set_kicks(*vring, false);
            }
            return;
        }
        // Without a link: a change of the link page interrupts; but look now and then.
        sleep(&events, &input, Duration::from_millis(20));
    }
}
