//! `owner-forward`: an owner without a VM that has two cards, and passes what each receives on to
//! the other without touching it.
//!
//! Owns: the memory, both cards' rings in it, and a connection to a broker for each card.

use std::path::PathBuf;
use std::time::Instant;

use super::ProgramError;
use super::owner::check_offer;
use super::owner_args::{MemoryArgs, RingArgs};
use super::pattern::{Checker, Generator, SAMPLE, Verdict};
use super::quantity::frame_len;
use super::run::{LAST_PACKETS, LAST_SLEEP, LONGEST_SLEEP, ROUNDS, RunArgs, stop_on_signals, until_gone};
use super::sink::Check;
use super::stop::Stop;
use super::traffic::{Reporter, Traffic};
use super::unrest::Unrest;
use super::waiting::{Idle, Sleeps};
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
    /// How to run.
    #[command(flatten)]
    pub run: RunArgs,
    /// The rings.
    #[command(flatten)]
    pub rings: RingArgs,
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
    /// The memory.
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// End when so many packets have been passed on, both ways together
    #[arg(long)]
    pub packets: Option<u64>,
}

/// The vrings of a card.
const VRINGS: [u16; 2] = [receive_vring(0), transmit_vring(0)];

/// Runs `owner-forward`.
///
/// # Errors
/// If a broker does not serve the owner, or is gone.
pub fn run(args: &OwnerForwardArgs) -> Result<(), ProgramError> {
    let stop = stop_on_signals()?;
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
    let mut reporter = Reporter::new(&args.run.report, "owner-forward");
    let result = until_gone(args.run.patience(), stop, |outage| {
        let result = owner.connect().and_then(|()| {
            outage.is_over();
            owner.serve(&mut reporter, stop)
        });
        owner.vmms.clear();
        result
    });
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
        let config = args.rings.config();
        let memory = args.memory.memory()?;
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
            check_offer(&vmm, socket, &self.config)?;
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
        let mut idle = Idle::new(self.args.run.wait);
        let mut unrest = Unrest::new(self.args.run.unrest);
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
            let over = self.args.run.is_over(running);
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
