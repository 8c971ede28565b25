//! `owner`: an owner without a VM, which sends, receives and checks packets.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::ProgramError;
use super::owner_args::{MemoryArgs, RingArgs};
use super::pattern::Checker;
use super::ping::Ping;
use super::run::{LAST_PACKETS, LAST_SLEEP, LONGEST_SLEEP, ROUNDS, RunArgs, stop_on_signals, until_gone};
use super::sink::Check;
use super::source::{Source, SourceArgs};
use super::stop::Stop;
use super::traffic::{Reporter, Traffic};
use super::unrest::Unrest;
use super::waiting::{Idle, Sleeps};
use super::wire::{BURST, Sent};
use crate::net::owner::BufferMapping;
use crate::net::{OwnerConfig, OwnerLayout, OwnerPort, PacketBurst, receive_vring, transmit_vring};
use crate::owner::{
    Addressing, DmaError, IommuCounts, IommuDriver, IommuLink, IommuProtocol, Kicks, OwnerIommu, OwnerMemory,
    OwnerVmm, PacketMappings, StaticMappings, Untranslated,
};
use crate::ring::{DriverFault, RingPlaces, next_base};

/// What the owner does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Work {
    /// Send
    #[default]
    Gen,
    /// Receive and check
    Sink,
    /// Send, and receive what another generator sends
    Both,
    /// Send, and check that each packet comes back
    EchoCheck,
    /// Send one packet at a time, and measure how long it takes to come back
    Ping,
}

/// What the owner's IOMMU is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum IommuUse {
    /// There is none: the device reaches all memory
    #[default]
    Off,
    /// Rings and buffers are mapped once, and nothing else
    Static,
    /// Each buffer is mapped while it is with the device
    PerPacket,
}

/// What `owner` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct OwnerArgs {
    /// The owner socket of the broker
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// What to do
    #[arg(long = "mode", value_enum, default_value_t)]
    pub work: Work,
    /// How to run.
    #[command(flatten)]
    pub run: RunArgs,
    /// What to send.
    #[command(flatten)]
    pub source: SourceArgs,
    /// `sample`, `none`: look at one packet in 64, or only count; and send the same frames over and
    /// over, which costs nothing
    #[arg(long, value_enum, default_value_t)]
    pub check: Check,
    /// Queue pairs; packets are sent over all in turn
    #[arg(long, default_value_t = 1)]
    pub pairs: u16,
    /// The rings.
    #[command(flatten)]
    pub rings: RingArgs,
    /// Transmit long packets by indirect descriptors
    #[arg(long)]
    pub indirect: bool,
    /// The memory.
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Have an IOMMU
    #[arg(long, value_enum, default_value_t)]
    pub iommu: IommuUse,
    /// With --iommu static: transmit buffers only for reading, receive buffers only for
    /// writing
    #[arg(long, requires = "iommu")]
    pub iommu_directed: bool,
    /// Tell the broker of the IOMMU by pushes (VHOST_USER_PROTOCOL_F_IOMMU_PUSH), not by
    /// IOTLB messages
    #[arg(long, requires = "iommu", conflicts_with = "iommu_like_qemu")]
    pub iommu_push: bool,
    /// Tell the broker of the IOMMU as QEMU does: read-write, whatever is mapped
    #[arg(long, requires = "iommu")]
    pub iommu_like_qemu: bool,
    /// Stop and restart the device this often
    #[arg(long, value_name = "MILLISECONDS")]
    pub restart_every_ms: Option<u64>,
    /// End when so many packets have been sent (and, for echo-check, come back)
    #[arg(long)]
    pub packets: Option<u64>,
}

/// Runs `owner`.
///
/// # Errors
/// If the broker does not serve the owner, or is gone.
pub fn run(args: &OwnerArgs) -> Result<(), ProgramError> {
    let stop = stop_on_signals()?;
    run_until(args, &stop)
}

/// As [`run`], until `stop` is requested.
///
/// # Errors
/// As [`run`].
pub fn run_until(args: &OwnerArgs, stop: &Stop) -> Result<(), ProgramError> {
    let driver = |memory: &OwnerMemory| {
        let failed = |source| ProgramError::System { what: "the owner's IOMMU", source };
        let iommu = OwnerIommu::new(memory).map_err(failed)?;
        IommuDriver::attach(iommu).map_err(refused)
    };
    match args.iommu {
        IommuUse::Off => Owner::new(args, |_, _| Ok(Untranslated))?.run(stop),
        IommuUse::Static => Owner::new(args, |memory, layout| {
            StaticMappings::new(driver(memory)?, memory, layout, args.iommu_directed).map_err(refused)
        })?
        .run(stop),
        IommuUse::PerPacket => Owner::new(args, |memory, layout| {
            PacketMappings::new(driver(memory)?, memory, layout).map_err(refused)
        })?
        .run(stop),
    }
}

fn refused(error: DmaError) -> ProgramError {
    ProgramError::System { what: "the owner's mappings", source: std::io::Error::other(error) }
}

struct Owner<'a, A: Addressing> {
    args: &'a OwnerArgs,
    memory: OwnerMemory,
    layout: OwnerLayout,
    places: Vec<RingPlaces>,
    addressing: A,
    port: OwnerPort<A::Buffers>,
    vmm: Option<OwnerVmm>,
    /// One a pair.
    sources: Vec<Source>,
    ping: Option<Ping>,
    received: PacketBurst,
    checkers: Vec<Checker>,
    traffic: Traffic,
    sleeps: Sleeps,
}

impl<'a, A: Addressing> Owner<'a, A> {
    fn new(
        args: &'a OwnerArgs,
        addressing: impl FnOnce(&OwnerMemory, &OwnerLayout) -> Result<A, ProgramError>,
    ) -> Result<Self, ProgramError> {
        let (pairs, indirect) = (args.pairs, args.indirect);
        let config = OwnerConfig { pairs, indirect, ..args.rings.config() };
        let memory = args.memory.memory()?;
        let layout = OwnerLayout::new(config, 0, memory.len())?;
        let sources = Source::several(&args.source, args.check, args.pairs);
        let checker = |source: &Source| match args.work {
            Work::EchoCheck => Checker::of_stream(source.stream()),
            _ => Checker::new(),
        };
        let addressing = addressing(&memory, &layout)?;
        Ok(Self {
            port: addressing.port(&memory, &layout)?,
            addressing,
            places: layout.vrings().iter().map(|vring| vring.places).collect(),
            checkers: sources.iter().map(checker).collect(),
            vmm: None,
            ping: match args.work {
                Work::Ping => Some(Ping::new(args.source.size, args.source.rate, args.run.wait.wait)?),
                _ => None,
            },
            sources,
            received: PacketBurst::with_capacity(BURST, 2048),
            traffic: Traffic::default(),
            sleeps: Sleeps::default(),
            args,
            memory,
            layout,
        })
    }

    /// Until `stop` is requested, or its work is done.
    fn run(mut self, stop: &Stop) -> Result<(), ProgramError> {
        let mut reporter = Reporter::new(&self.args.run.report, "owner");
        let result = until_gone(self.args.run.patience(), stop, |outage| {
            let result = self.connect().and_then(|()| {
                outage.is_over();
                self.serve(&mut reporter, stop)
            });
            self.vmm = None;
            result
        });
        match &self.ping {
            Some(ping) => reporter.end_with_round_trips(&self.traffic(), &ping.round_trips()),
            None => reporter.end(&self.traffic()),
        }
        self.report_iommu();
        result
    }

    fn report_iommu(&self) {
        if let Some(counts) = self.addressing.iommu().map(OwnerIommu::counts) {
            let IommuCounts { misses, faults, denied, invalidations, pushed, failures } = counts;
            tracing::info!(misses, faults, denied, invalidations, pushed, failures, "the owner's IOMMU");
        }
    }

    fn traffic(&self) -> Traffic {
        self.traffic.judged_by(&self.checkers).with_sleeps(self.sleeps)
    }

    fn connect(&mut self) -> Result<(), ProgramError> {
        let protocol = match (self.args.iommu_push, self.args.iommu_like_qemu) {
            (true, _) => IommuProtocol::Push,
            (false, true) => IommuProtocol::IotlbLikeQemu,
            (false, false) => IommuProtocol::Iotlb,
        };
        let link = self.addressing.iommu().map(|iommu| IommuLink { iommu: iommu.clone(), protocol });
        let vrings = self.layout.vrings().len() as u16;
        let vmm = OwnerVmm::connect_with(&self.args.socket, vrings, link)?;
        check_offer(&vmm, &self.args.socket, self.layout.config())?;
        self.vmm = Some(vmm);
        self.start()
    }

    /// Starts the device, each ring from where its device part stopped: as QEMU does
    /// when a back-end comes back.
    fn start(&mut self) -> Result<(), ProgramError> {
        let Some(vmm) = &mut self.vmm else { return Ok(()) };
        let formats = self.layout.config().ring_features();
        let base = |vring: u16| {
            let places = self.places.get(usize::from(vring));
            places.and_then(|places| next_base(places, self.memory.shared(), formats).ok()).unwrap_or(0)
        };
        let features = self.layout.config().features();
        let ring_base = |vring| self.addressing.ring_base(&self.memory, vring);
        vmm.start_at(features, &self.memory, &self.places, ring_base, base)?;
        self.traffic.links += 1;
        tracing::info!(socket = %self.args.socket.display(), vrings = self.places.len(), "the owner's device is started");
        for vring in 0..self.places.len() as u16 {
            // What was published before the start, and nobody was kicked for.
            vmm.kick(vring);
        }
        // They are asked for before each sleep.
        let vrings: Vec<_> = (0..self.places.len() as u16).collect();
        set_calls(&mut self.port, &vrings, false);
        Ok(())
    }

    fn serve(&mut self, reporter: &mut Reporter, stop: &Stop) -> Result<(), ProgramError> {
        let mut idle = Idle::new(self.args.run.wait);
        let mut unrest = Unrest::new(self.args.run.unrest);
        let (mut rounds, mut slept) = (0, false);
        let (mut checked, mut restarted) = (Instant::now(), Instant::now());
        let mut ending: Option<Instant> = None;
        loop {
            let moved = match self.round(ending.is_none()) {
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
                (rounds, slept) = (ROUNDS, true);
            }
            unrest.after_round();
            let enough = self
                .args
                .packets
                .is_some_and(|limit| self.traffic.tx_packets.max(self.traffic.rx_packets) >= limit);
            if rounds < ROUNDS && !enough {
                continue;
            }
            rounds = 0;
            let running = reporter.tick(&self.traffic());
            let over = self.args.run.is_over(running);
            if (over || enough || stop.is_requested()) && ending.is_none() {
                ending = Some(Instant::now());
            }
            if ending.is_some_and(|since| self.is_done(since)) {
                self.end();
                return Ok(());
            }
            // Its end is what ended a sleep, perhaps.
            if std::mem::take(&mut slept) || checked.elapsed() >= LONGEST_SLEEP {
                checked = Instant::now();
                if self.vmm.as_ref().is_some_and(OwnerVmm::is_gone) {
                    return Err(ProgramError::BrokerGone { socket: self.args.socket.display().to_string() });
                }
            }
            let every = self.args.restart_every_ms.map(Duration::from_millis);
            if every.is_some_and(|every| restarted.elapsed() >= every) {
                restarted = Instant::now();
                self.restart()?;
            }
        }
    }

    /// One burst each way.
    fn round(&mut self, send: bool) -> Result<usize, DriverFault> {
        let mut moved = 0;
        let Some(vmm) = &self.vmm else { return Ok(0) };
        if let Some(ping) = &mut self.ping {
            let pinged = ping.round(&mut self.port, vmm, &mut self.received, send)?;
            self.traffic.count_pinged(pinged);
            return Ok(pinged.sent + pinged.received);
        }
        if send && self.args.work != Work::Sink {
            for (pair, source) in (0..self.args.pairs).zip(&mut self.sources) {
                let Some(queue) = self.port.queue(pair) else { break };
                let mut result = Ok(0);
                let before = queue.counters();
                let done = source.offer(|frames| {
                    result = queue.tx_burst(frames);
                    result.unwrap_or(0)
                });
                result?;
                if done > 0 && queue.needs_kick(transmit_vring(pair)) {
                    vmm.kick(transmit_vring(pair));
                }
                self.traffic.count_sent(Sent::between(before, queue.counters(), done));
                moved += done;
            }
        }
        for (pair, checker) in (0..self.args.pairs).zip(&mut self.checkers) {
            self.received.clear();
            let received = self.port.rx_burst(pair, &mut self.received, BURST)?;
            if received == 0 {
                continue;
            }
            if self.port.needs_kick(receive_vring(pair)) {
                vmm.kick(receive_vring(pair));
            }
            moved += received;
            self.traffic.rx_packets += received as u64;
            for frame in self.received.frames() {
                self.traffic.rx_bytes += frame.len() as u64;
                if self.args.work != Work::Gen {
                    self.args.check.judge(checker, frame);
                }
            }
        }
        Ok(moved)
    }

    /// Sleeps until the device calls.
    fn sleep(&mut self, ending: bool) {
        let Some(vmm) = &self.vmm else { return };
        let port = &mut self.port;
        // What was transmitted is news only to who waits for its buffers.
        let transmits =
            |(pair, source): (u16, &Source)| (ending || source.is_blocked()).then_some(transmit_vring(pair));
        let receives = (0..self.args.pairs).map(receive_vring);
        let vrings: Vec<_> = receives.chain((0..).zip(&self.sources).filter_map(transmits)).collect();
        // First the calls are asked for, then all that they could tell is looked at.
        if !set_calls(port, &vrings, true) {
            let calls: Vec<_> = vrings.iter().filter_map(|vring| vmm.call_fd(*vring)).collect();
            let longest = if ending { LAST_SLEEP } else { LONGEST_SLEEP };
            let patience = self.sources.iter().map(Source::patience).fold(longest, Duration::min);
            self.sleeps
                .sleep(&calls, &[vmm.connection()], patience, || !ending && set_calls(port, &vrings, true));
        }
        set_calls(port, &vrings, false);
    }

    /// Whether packets that are on their way have arrived, or have had their time.
    fn is_done(&mut self, since: Instant) -> bool {
        let in_flight = (0..self.args.pairs)
            .map(|pair| self.port.reap_transmitted(pair).map_or(0, u64::from))
            .sum::<u64>();
        let echoed = !matches!(self.args.work, Work::EchoCheck | Work::Ping)
            || self.traffic.rx_packets >= self.traffic.tx_packets;
        (in_flight == 0 && echoed) || since.elapsed() >= LAST_PACKETS
    }

    /// The device broke a ring: begin again with fresh ones.
    fn reset(&mut self, fault: DriverFault) -> Result<(), ProgramError> {
        tracing::warn!("{fault}; restarting the device");
        self.traffic.faults += 1;
        if let Some(vmm) = &mut self.vmm {
            vmm.stop()?;
        }
        self.port = self.addressing.port(&self.memory, &self.layout)?;
        self.start()
    }

    fn restart(&mut self) -> Result<(), ProgramError> {
        if let Some(vmm) = &mut self.vmm {
            vmm.stop()?;
        }
        self.start()
    }

    fn end(&mut self) {
        // What never came back is lost.
        if self.args.work == Work::EchoCheck && self.args.check == Check::Pattern {
            let seen: u64 = self.checkers.iter().map(|checker| checker.verdict().intact).sum();
            let known: u64 = self.checkers.iter().map(|checker| checker.verdict().lost).sum();
            self.traffic.lost += self.traffic.tx_packets.saturating_sub(seen + known);
        }
        if let Some(mut vmm) = self.vmm.take()
            && let Err(error) = vmm.stop()
        {
            tracing::warn!("stopping: {error}");
        }
    }
}

/// Whether the broker offers what a driver with this configuration needs.
pub(super) fn check_offer(vmm: &OwnerVmm, socket: &Path, config: &OwnerConfig) -> Result<(), ProgramError> {
    let offered = vmm.offered();
    match config.features() & !offered {
        0 => Ok(()),
        missing => Err(ProgramError::Features { socket: socket.display().to_string(), offered, missing }),
    }
}

/// Asks the device for calls of all of the vrings, or of none. Whether one has completions
/// already, of which no call will tell.
fn set_calls<M: BufferMapping>(port: &mut OwnerPort<M>, vrings: &[u16], enabled: bool) -> bool {
    vrings.iter().fold(false, |work, vring| {
        let transmits = enabled && vring % 2 == 1;
        let set =
            if transmits { port.set_calls_for_room(vring / 2) } else { port.set_calls(*vring, enabled) };
        // A fault shows again with the next burst.
        work | set.unwrap_or(false)
    })
}
