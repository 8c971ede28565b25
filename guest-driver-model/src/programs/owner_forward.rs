//! `owner-forward`: an owner without a VM that has two cards, and passes what each receives on to
//! the other without touching it.
//!
//! Owns: the memory, both cards' rings in it, and a connection to a broker for each card.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::ProgramError;
use super::pattern::{Checker, Generator, SAMPLE, Verdict};
use super::quantity::{address, frame_len, mebibytes, seconds};
use super::sink::Check;
use super::stop::Stop;
use super::traffic::{ReportArgs, Reporter, Traffic};
use super::unrest::{Unrest, UnrestArgs};
use super::waiting::{Idle, Sleeps, WaitArgs};
use super::wire::BURST;
use crate::net::crossover::Crossover;
use crate::net::{OwnerConfig, receive_vring, transmit_vring};
use crate::owner::{Kicks, OwnerMemory, OwnerVmm};
use crate::ring::{DriverFault, next_base};

/// What `owner-forward` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct OwnerForwardArgs {
    /// An owner socket of a broker. To be given twice, once for each card
    #[arg(long, value_name = "PATH", required = true)]
    pub socket: Vec<PathBuf>,
    /// How to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// Entries of each ring
    #[arg(long, default_value_t = 256)]
    pub ring_size: u16,
    /// Length of each buffer, bytes: a multiple of 64, of which the first 64 are for the header
    #[arg(long, default_value_t = OwnerConfig::default().buffer_len)]
    pub buffer_len: u32,
    /// Do without VIRTIO_NET_F_MRG_RXBUF
    #[arg(long)]
    pub no_mergeable: bool,
    /// Do without VIRTIO_F_EVENT_IDX
    #[arg(long)]
    pub no_event_idx: bool,
    /// Have packed rings (VIRTIO_F_RING_PACKED)
    #[arg(long)]
    pub packed: bool,
    /// Let the devices give buffers back in order only, several at once (VIRTIO_F_IN_ORDER)
    #[arg(long)]
    pub in_order: bool,
    /// Start with so many packets on their way by each card, at most half a ring: they go round for as
    /// long as the peer passes them on
    #[arg(long, default_value_t = 0, value_name = "PACKETS")]
    pub inject: u16,
    /// Length of the injected packets, bytes (30 to 65535, but each has to fit a buffer)
    #[arg(long, default_value_t = 64, value_name = "BYTES", value_parser = frame_len)]
    pub size: usize,
    /// How to judge packets, one in 64 bursts
    #[arg(long, value_enum, default_value_t = Check::None)]
    pub check: Check,
    /// Length of the memory, MiB
    #[arg(long = "memory-mib", default_value = "64", value_name = "MIB", value_parser = mebibytes)]
    pub memory_len: u64,
    /// Guest-physical address of the memory
    #[arg(long, default_value = "0x100000000", value_parser = address)]
    pub guest_start: u64,
    /// End this many seconds after the first packet
    #[arg(long, value_parser = seconds)]
    pub seconds: Option<f64>,
    /// End when so many packets have been passed on, both ways together
    #[arg(long)]
    pub packets: Option<u64>,
    /// When a broker is gone, wait for it to come back instead of ending
    #[arg(long)]
    pub reconnect: bool,
    /// Whether to pause.
    #[command(flatten)]
    pub unrest: UnrestArgs,
    /// How to report.
    #[command(flatten)]
    pub report: ReportArgs,
}

/// Rounds between two looks at the clock.
const ROUNDS: u32 = 64;
/// The longest sleep.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// The same when all that is left is to see the last packets home.
const LAST_SLEEP: Duration = Duration::from_millis(10);
/// Between two tries to have a broker back.
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);
/// How long packets on their way may take at the end.
const LAST_PACKETS: Duration = Duration::from_secs(2);
/// The vrings of a card.
const VRINGS: [u16; 2] = [receive_vring(0), transmit_vring(0)];

/// Runs `owner-forward`.
///
/// # Errors
/// If a broker does not serve the owner, or is gone.
pub fn run(args: &OwnerForwardArgs) -> Result<(), ProgramError> {
    let stop =
        Stop::on_signals().map_err(|source| ProgramError::System { what: "signal handlers", source })?;
    run_until(args, &stop)
}

/// As [`run`], until `stop` is requested.
///
/// # Errors
/// As [`run`].
pub fn run_until(args: &OwnerForwardArgs, stop: &Stop) -> Result<(), ProgramError> {
    let [_, _] = args.socket.as_slice() else {
        return Err(ProgramError::NotTwo { given: args.socket.len() });
    };
    let mut owner = Owner::new(args)?;
    let mut reporter = Reporter::new(&args.report, "owner-forward");
    let mut said = false;
    let result = loop {
        let gone =
            match owner.connect().map(|()| said = false).and_then(|()| owner.serve(&mut reporter, stop)) {
                Err(error @ (ProgramError::Owner(_) | ProgramError::BrokerGone { .. })) if args.reconnect => {
                    error
                }
                result => break result,
            };
        owner.vmms.clear();
        if stop.is_requested() {
            break Ok(());
        }
        if !std::mem::replace(&mut said, true) {
            tracing::warn!("{gone}; waiting for it to come back");
        }
        std::thread::sleep(RECONNECT_PAUSE);
    };
    reporter.end(&owner.traffic());
    result
}

struct Owner<'a> {
    args: &'a OwnerForwardArgs,
    memory: OwnerMemory,
    config: OwnerConfig,
    crossover: Crossover,
    /// By card, while it is connected.
    vmms: Vec<OwnerVmm>,
    traffic: Traffic,
    sleeps: Sleeps,
    /// Bursts since a packet was looked at, its copy, and who judges it.
    bursts: u32,
    frame: Vec<u8>,
    checker: Checker,
}

/// Two cards, with the packets that are to be on their way.
fn crossover(
    args: &OwnerForwardArgs,
    config: OwnerConfig,
    memory: &OwnerMemory,
) -> Result<Crossover, ProgramError> {
    let mut generator = Generator::new(args.size, std::process::id(), true);
    let mut bytes = Vec::new();
    generator.fill(&mut bytes, args.inject.into());
    let frames: Vec<_> = bytes.chunks_exact(generator.frame_len()).collect();
    Ok(Crossover::with_packets(memory.shared(), config, memory.guest_start(), &frames)?)
}

impl<'a> Owner<'a> {
    fn new(args: &'a OwnerForwardArgs) -> Result<Self, ProgramError> {
        let config = OwnerConfig {
            pairs: 1,
            ring_size: args.ring_size,
            buffer_len: args.buffer_len,
            mergeable: !args.no_mergeable,
            event_idx: !args.no_event_idx,
            packed: args.packed,
            in_order: args.in_order,
            ..OwnerConfig::default()
        };
        let memory = OwnerMemory::new(args.memory_len, args.guest_start)
            .map_err(|source| ProgramError::System { what: "the owner's memory", source })?;
        let crossover = crossover(args, config, &memory)?;
        let traffic = Traffic { copied_bytes: Some(0), ..Traffic::default() };
        Ok(Self {
            args,
            memory,
            config,
            crossover,
            vmms: Vec::new(),
            traffic,
            sleeps: Sleeps::default(),
            bursts: 0,
            frame: Vec::new(),
            checker: Checker::new(),
        })
    }

    fn traffic(&self) -> Traffic {
        // Packets that go round come again and again: no sequence is theirs.
        let Verdict { intact, corrupted, .. } = self.checker.verdict();
        Traffic { corrupted, checked: intact + corrupted, ..self.traffic.with_sleeps(self.sleeps) }
    }

    fn connect(&mut self) -> Result<(), ProgramError> {
        for socket in &self.args.socket {
            let vmm = OwnerVmm::connect(socket, VRINGS.len() as u16)?;
            let missing = self.config.features() & !vmm.offered();
            if missing != 0 {
                let socket = socket.display().to_string();
                return Err(ProgramError::Features { socket, offered: vmm.offered(), missing });
            }
            self.vmms.push(vmm);
        }
        self.start()
    }

    /// Starts both devices, each ring from where its device part stopped.
    fn start(&mut self) -> Result<(), ProgramError> {
        let (memory, formats) = (self.memory.shared(), self.config.ring_features());
        for (card, vmm) in self.vmms.iter_mut().enumerate() {
            let places = self.crossover.places(card).map_or(&[][..], |places| places);
            let base = |vring: u16| {
                let places = places.get(usize::from(vring));
                places.and_then(|places| next_base(places, memory, formats).ok()).unwrap_or(0)
            };
            vmm.start(self.config.features(), &self.memory, places, base)?;
            self.traffic.links += 1;
            // What was published before the start, and nobody was kicked for.
            VRINGS.into_iter().for_each(|vring| vmm.kick(vring));
        }
        tracing::info!(sockets = ?self.args.socket, "both of the owner's devices are started");
        // They are asked for before each sleep. A fault shows again with the next burst.
        let _ = self.crossover.set_calls(false);
        Ok(())
    }

    fn serve(&mut self, reporter: &mut Reporter, stop: &Stop) -> Result<(), ProgramError> {
        let mut idle = Idle::new(self.args.wait);
        let mut unrest = Unrest::new(self.args.unrest);
        let mut rounds = 0;
        let mut checked = Instant::now();
        let mut ending: Option<Instant> = None;
        loop {
            let moved = match self.round() {
                Ok(moved) => moved,
                Err(fault) => {
                    self.reset(fault)?;
                    continue;
                }
            };
            rounds += 1;
            if moved > 0 {
                idle.reset();
            } else if idle.rest() {
                self.sleep(ending.is_some());
                rounds = ROUNDS;
            }
            unrest.after_round();
            let enough = self.args.packets.is_some_and(|limit| self.traffic.tx_packets >= limit);
            if rounds < ROUNDS && !enough {
                continue;
            }
            rounds = 0;
            let running = reporter.tick(&self.traffic());
            let over = self.args.seconds.is_some_and(|seconds| running.as_secs_f64() >= seconds);
            if (over || enough || stop.is_requested()) && ending.is_none() {
                ending = Some(Instant::now());
            }
            // Packets that are on their way arrive, or have had their time; those that go round never do.
            if let Some(since) = ending
                && (self.args.inject > 0
                    || self.crossover.in_flight() == 0
                    || since.elapsed() >= LAST_PACKETS)
            {
                self.stop_devices();
                return Ok(());
            }
            if checked.elapsed() >= LONGEST_SLEEP {
                checked = Instant::now();
                if let Some((socket, _)) =
                    self.args.socket.iter().zip(&self.vmms).find(|(_, vmm)| vmm.is_gone())
                {
                    return Err(ProgramError::BrokerGone { socket: socket.display().to_string() });
                }
            }
        }
    }

    /// One burst each way.
    fn round(&mut self) -> Result<usize, DriverFault> {
        let mut moved = 0;
        for card in 0..self.vmms.len() {
            let crossed = self.crossover.pass(card, BURST)?;
            moved += crossed.packets + crossed.dropped + crossed.returned;
            self.traffic.rx_packets += crossed.packets as u64;
            self.traffic.tx_packets += crossed.packets as u64;
            self.traffic.rx_bytes += crossed.bytes;
            self.traffic.tx_bytes += crossed.bytes;
            self.traffic.dropped += crossed.dropped as u64;
            if crossed.packets > 0 {
                self.look(card);
                self.kick(1 - card, transmit_vring(0));
            }
            if crossed.dropped + crossed.returned > 0 {
                self.kick(card, receive_vring(0));
            }
        }
        Ok(moved)
    }

    /// Looks at one packet in so many bursts.
    #[inline]
    fn look(&mut self, card: usize) {
        self.bursts += 1;
        if self.args.check != Check::None && self.bursts >= SAMPLE {
            self.bursts = 0;
            if self.crossover.last_packet(card, &mut self.frame) {
                self.checker.check(&self.frame);
            }
        }
    }

    fn kick(&mut self, card: usize, vring: u16) {
        if let Some(vmm) = self.vmms.get(card)
            && self.crossover.needs_kick(card, vring)
        {
            vmm.kick(vring);
        }
    }

    /// Sleeps until a device calls.
    fn sleep(&mut self, ending: bool) {
        let crossover = &mut self.crossover;
        // First the calls are asked for, then all that they could tell is looked at. A fault shows
        // again with the next burst.
        if !crossover.set_calls(true).unwrap_or(true) {
            let calls: Vec<_> = self
                .vmms
                .iter()
                .flat_map(|vmm| VRINGS.into_iter().filter_map(|vring| vmm.call_fd(vring)))
                .collect();
            let longest = if ending { LAST_SLEEP } else { LONGEST_SLEEP };
            self.sleeps.sleep(&calls, &[], longest, || !ending && crossover.set_calls(true).unwrap_or(false));
        }
        let _ = crossover.set_calls(false);
    }

    /// A device broke a ring: begin again with fresh ones.
    fn reset(&mut self, fault: DriverFault) -> Result<(), ProgramError> {
        tracing::warn!("{fault}; restarting both devices");
        self.traffic.faults += 1;
        for vmm in &mut self.vmms {
            vmm.stop()?;
        }
        self.crossover = crossover(self.args, self.config, &self.memory)?;
        self.start()
    }

    fn stop_devices(&mut self) {
        for mut vmm in self.vmms.drain(..) {
            if let Err(error) = vmm.stop() {
                tracing::warn!("stopping: {error}");
            }
        }
    }
}
