//! `vfio-owner`: an owner whose driver is a program in its guest, as DPDK's is: it maps
//! its rings and buffers once, by VFIO, behind the guest's IOMMU, and nothing else of
//! the guest is ever the card's. Sends, receives and checks packets.

use std::time::Instant;

use serde_json::json;

use super::ProgramError;
use super::confine::secret::Secret;
use super::owner::Work;
use super::owner_args::BufferArgs;
use super::pattern::Checker;
use super::quantity::seconds;
use super::run::{LAST_PACKETS, ROUNDS, stop_on_signals};
use super::sink::Check;
use super::source::{Source, SourceArgs};
use super::stop::Stop;
use super::traffic::{ReportArgs, Reporter, Traffic};
use super::waiting::{Idle, Wait, WaitArgs};
use super::wire::{BURST, Sent};
use crate::net::{OwnerConfig, OwnerLayout, OwnerPort, PacketBurst, receive_vring, transmit_vring};
use crate::ring::DriverFault;
use crate::shm::SharedMemory;
use crate::translate::Access;
use crate::transport::card::{Card, Mapped};

/// What every owner behind an IOMMU can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct CardArgs {
    /// The PCI address of the virtio network card, or `auto` for the first that the
    /// kernel does not use
    #[arg(long, default_value = "auto", value_name = "ADDRESS")]
    pub device: String,
    /// Entries of each ring
    #[arg(long, default_value_t = 64)]
    pub ring_size: u16,
    /// Their buffers.
    #[command(flatten)]
    pub buffers: BufferArgs,
    /// Transmit long packets by indirect descriptors
    #[arg(long)]
    pub indirect: bool,
}

/// What `vfio-owner` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct VfioOwnerArgs {
    /// The card.
    #[command(flatten)]
    pub card: CardArgs,
    /// What to do
    #[arg(long = "mode", value_enum, default_value_t)]
    pub work: Work,
    /// When nothing happened for a while, sleep this long between looks
    #[arg(long, default_value_t = 0, value_name = "MICROSECONDS")]
    pub idle_us: u64,
    /// What to send.
    #[command(flatten)]
    pub source: SourceArgs,
    /// `none`: only count; and send the same frames over and over
    #[arg(long, value_enum, default_value_t)]
    pub check: Check,
    /// Have one page with a secret more, which is mapped for reading only
    #[arg(long, value_name = "SEED")]
    pub read_only: Option<u64>,
    /// End this many seconds after the first packet
    #[arg(long, value_parser = seconds)]
    pub seconds: Option<f64>,
    /// End when so many packets have been sent (and, for echo-check, come back)
    #[arg(long)]
    pub packets: Option<u64>,
    /// How to report.
    #[command(flatten)]
    pub report: ReportArgs,
}

/// Where the card finds rings and buffers; further pages follow after a gap.
const IOVA: u64 = 0x1000_0000;
/// From there on pages that are no part of the port.
pub(super) const EXTRA_IOVA: u64 = 0x2000_0000;

/// A started card with a port on it. Fields in the order of release: a card that is
/// reset reaches nothing any more.
pub(super) struct CardPort {
    pub card: Card,
    pub port: OwnerPort,
    /// Bytes that the port takes.
    pub len: u64,
    _mapped: Mapped,
}

impl CardPort {
    /// Maps rings and buffers, and starts the card.
    pub fn start(args: &CardArgs) -> Result<Self, ProgramError> {
        let config = OwnerConfig { indirect: args.indirect, ..args.buffers.config(args.ring_size) };
        let address = Some(args.device.as_str()).filter(|address| *address != "auto");
        let mut card = Card::open(address)?;
        let layout = OwnerLayout::new(config, 0, EXTRA_IOVA - IOVA)?;
        let pages = card.pages(layout.end())?;
        let mut port = OwnerPort::new(&pages.memory(), &layout, IOVA)?;
        let mapped = card.map(IOVA, &pages, Access::READ_WRITE)?;
        card.start(config.features(), &layout.infos(IOVA))?;
        let len = layout.end();
        tracing::info!(device = card.name(), len, "the card is started");
        for vring in [receive_vring(0), transmit_vring(0)] {
            // It polls. A fault shows again with the first burst.
            let _ = port.set_calls(vring, false);
            // What was published before the start nobody was kicked for.
            card.kick(vring);
        }
        Ok(Self { card, port, len, _mapped: mapped })
    }
}

/// Runs `vfio-owner`.
///
/// # Errors
/// If there is no card to be had, or it breaks a ring.
pub fn run(args: &VfioOwnerArgs) -> Result<(), ProgramError> {
    let stop = stop_on_signals()?;
    let mut owner = VfioOwner::start(args)?;
    let mut reporter = Reporter::new(&args.report, "vfio-owner");
    let result = owner.serve(&mut reporter, &stop);
    owner.count_missing();
    reporter.end(&owner.traffic());
    if let Some(page) = &owner.read_only {
        super::say(&json!({ "read_only_page_intact": page.secret.is_in(&page.memory)? }).to_string());
    }
    result
}

/// The page that the card may only read.
struct ReadOnly {
    secret: Secret,
    memory: SharedMemory,
    _mapped: Mapped,
}

struct VfioOwner<'a> {
    args: &'a VfioOwnerArgs,
    card: CardPort,
    read_only: Option<ReadOnly>,
    source: Source,
    received: PacketBurst,
    checker: Checker,
    traffic: Traffic,
}

impl<'a> VfioOwner<'a> {
    fn start(args: &'a VfioOwnerArgs) -> Result<Self, ProgramError> {
        let source = Source::new(&args.source, args.check);
        let checker = match args.work {
            Work::EchoCheck => Checker::of_stream(source.stream()),
            _ => Checker::new(),
        };
        let card = CardPort::start(&args.card)?;
        let read_only = args
            .read_only
            .map(|seed| {
                let pages = card.card.pages(Secret::LEN)?;
                let (secret, memory) = (Secret::new(seed), pages.memory());
                secret.fill(&memory)?;
                let mapped = card.card.map(EXTRA_IOVA, &pages, Access::READ)?;
                Ok::<_, ProgramError>(ReadOnly { secret, memory, _mapped: mapped })
            })
            .transpose()?;
        let line = json!({
            "mapped_bytes": card.len + read_only.as_ref().map_or(0, |page| page.memory.len()),
            "read_only_iova": read_only.as_ref().map(|_| EXTRA_IOVA),
        });
        super::say(&line.to_string());
        let received = PacketBurst::with_capacity(BURST, 2048);
        let traffic = Traffic { links: 1, ..Traffic::default() };
        Ok(Self { args, card, read_only, source, received, checker, traffic })
    }

    fn traffic(&self) -> Traffic {
        self.traffic.judged_by(std::slice::from_ref(&self.checker))
    }

    fn serve(&mut self, reporter: &mut Reporter, stop: &Stop) -> Result<(), ProgramError> {
        let mut idle = Idle::new(WaitArgs { wait: Wait::Poll, idle_us: self.args.idle_us });
        let mut rounds = 0;
        let mut ending: Option<Instant> = None;
        loop {
            match self.round(ending.is_none())? {
                0 => drop(idle.rest()),
                _ => idle.reset(),
            }
            rounds += 1;
            let moved = self.traffic.tx_packets.max(self.traffic.rx_packets);
            let enough = self.args.packets.is_some_and(|limit| moved >= limit);
            if rounds < ROUNDS && !enough {
                continue;
            }
            rounds = 0;
            let running = reporter.tick(&self.traffic());
            let over = self.args.seconds.is_some_and(|seconds| running.as_secs_f64() >= seconds);
            if (over || enough || stop.is_requested()) && ending.is_none() {
                ending = Some(Instant::now());
            }
            if ending.is_some_and(|since| self.is_done(since)) {
                return Ok(());
            }
        }
    }

    /// One burst each way.
    fn round(&mut self, send: bool) -> Result<usize, DriverFault> {
        let CardPort { card, port, .. } = &mut self.card;
        let mut moved = 0;
        if send && self.args.work != Work::Sink {
            let before = port.counters();
            let mut result = Ok(0);
            let done = self.source.offer(|frames| {
                result = port.tx_burst(0, frames);
                result.unwrap_or(0)
            });
            result?;
            if done > 0 && port.needs_kick(transmit_vring(0)) {
                card.kick(transmit_vring(0));
            }
            self.traffic.count_sent(Sent::between(before, port.counters(), done));
            moved += done;
        }
        self.received.clear();
        let received = port.rx_burst(0, &mut self.received, BURST)?;
        if received == 0 {
            return Ok(moved);
        }
        if port.needs_kick(receive_vring(0)) {
            card.kick(receive_vring(0));
        }
        self.traffic.rx_packets += received as u64;
        for frame in self.received.frames() {
            self.traffic.rx_bytes += frame.len() as u64;
            if self.args.check == Check::Pattern && self.args.work != Work::Gen {
                self.checker.check(frame);
            }
        }
        Ok(moved + received)
    }

    /// Whether packets that are on their way have arrived, or have had their time.
    fn is_done(&mut self, since: Instant) -> bool {
        let in_flight = self.card.port.reap_transmitted(0).unwrap_or(0);
        let echoed = self.args.work != Work::EchoCheck || self.traffic.rx_packets >= self.traffic.tx_packets;
        (in_flight == 0 && echoed) || since.elapsed() >= LAST_PACKETS
    }

    /// What never came back is lost.
    fn count_missing(&mut self) {
        if self.args.work == Work::EchoCheck && self.args.check == Check::Pattern {
            let verdict = self.checker.verdict();
            self.traffic.lost += self.traffic.tx_packets.saturating_sub(verdict.intact + verdict.lost);
        }
    }
}
