//! `hostile-owner`: an owner's card whose driver breaks what its specification demands, between times of
//! honest traffic with a peer that sends each packet back (`echo`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use super::forge::{Forge, Piece};
use super::owner_attacks::{ATTACKS, OwnerAttack};
use super::random::Random;
use crate::link::VringInfo;
use crate::net::{OwnerConfig, OwnerLayout, OwnerPort, PacketBurst, receive_vring, transmit_vring};
use crate::programs::ProgramError;
use crate::programs::pattern::{Checker, Generator};
use crate::programs::wire::BURST;
use crate::ring::RingPlaces;
use crate::transport::TransportError;
use crate::transport::bare::{Bare, REACHED_LEN, Reached};
use crate::transport::sysfs::Kind;

/// Entries of each ring.
const RING_SIZE: u16 = 64;
/// How long honest traffic may take to come back, and after how long without a packet the card is reset once
/// more.
const PATIENCE: Duration = Duration::from_secs(30);
const STALLED: Duration = Duration::from_secs(2);
/// Honest packets that are sent at once.
const AT_ONCE: usize = 8;

/// What `hostile-owner` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct HostileOwnerArgs {
    /// What to do: an attack's name, or `honest` for none
    #[arg(long, value_name = "NAME")]
    pub attack: String,
    /// Have packed rings
    #[arg(long)]
    pub packed: bool,
    /// The card is behind an IOMMU: work it through VFIO
    #[arg(long)]
    pub vfio: bool,
    /// How often each attack is made on each of the two rings
    #[arg(long, default_value_t = 1)]
    pub rounds: u32,
    /// Decides all numbers
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How long the other side has for each
    #[arg(long, default_value_t = 30, value_name = "MILLISECONDS")]
    pub dwell_ms: u64,
    /// Packets that have to come back before and after
    #[arg(long, default_value_t = 64)]
    pub packets: u64,
}

/// Runs `hostile-owner`.
///
/// # Errors
/// If there is no card to be had, or honest traffic does not come back.
pub fn run(args: &HostileOwnerArgs) -> Result<(), ProgramError> {
    let attack = ATTACKS.iter().find(|attack| attack.name == args.attack);
    if attack.is_none() && args.attack != HONEST {
        let names: Vec<_> = ATTACKS.iter().map(|attack| attack.name).collect();
        return Err(ProgramError::NoAttack { name: args.attack.clone(), names: names.join(", ") });
    }
    let mut rig = Rig::open(args)?;
    let mut times = 0;
    let refused = match attack {
        Some(attack) => {
            times = rig.attack(attack)?;
            rig.refused
        }
        None => 0,
    };
    // What was broken does not come back from a reset.
    let began = Instant::now();
    let resets = rig.honest(args.packets)?;
    let line = json!({
        "attack": args.attack,
        "times": times,
        "not_started": refused,
        "resets": resets,
        "resumed_ms": began.elapsed().as_millis() as u64,
        "packets": args.packets,
    });
    crate::programs::say(&line.to_string());
    Ok(())
}

/// Instead of an attack.
pub const HONEST: &str = "honest";

/// A card with memory and a port, as honest as what is done with it.
pub struct Rig {
    /// The card.
    pub bare: Bare,
    /// Memory that it reaches.
    pub reached: Reached,
    /// Where the rings are in it.
    pub layout: OwnerLayout,
    /// Whoever drives it honestly.
    pub port: OwnerPort,
    /// Decides all numbers.
    pub random: Random,
    args: HostileOwnerArgs,
    generator: Generator,
    received: PacketBurst,
    /// Times that the card did not take what it was started with.
    refused: u64,
}

impl Rig {
    fn open(args: &HostileOwnerArgs) -> Result<Self, ProgramError> {
        let bare = Bare::open(Kind::NetworkCard, args.vfio)?;
        bare.reset();
        let reached = bare.reached()?;
        let config = OwnerConfig {
            ring_size: RING_SIZE,
            buffer_len: 2048,
            indirect: true,
            packed: args.packed,
            ..OwnerConfig::default()
        };
        let layout = OwnerLayout::new(config, 0, REACHED_LEN)?;
        let port = OwnerPort::new(&reached.memory, &layout, reached.bus)?;
        let mut random = Random::new(args.seed);
        let generator = Generator::new(200, random.number() as u32, true);
        Ok(Self {
            bare,
            reached,
            layout,
            port,
            random,
            args: args.clone(),
            generator,
            received: PacketBurst::with_capacity(BURST, 2048),
            refused: 0,
        })
    }

    fn attack(&mut self, attack: &OwnerAttack) -> Result<u64, ProgramError> {
        let mut times = 0;
        for _ in 0..self.args.rounds {
            for vring in [transmit_vring(0), receive_vring(0)] {
                self.fresh()?;
                (attack.run)(self, vring)?;
                times += 1;
                if attack.once {
                    break;
                }
            }
        }
        Ok(times)
    }

    /// Whether rings are packed ones.
    pub fn is_packed(&self) -> bool {
        self.args.packed
    }

    /// The card is reset, and its rings are fresh. It is not started.
    ///
    /// # Errors
    /// If the memory is too small.
    pub fn fresh(&mut self) -> Result<(), ProgramError> {
        self.bare.reset();
        self.bare.map(&mut self.reached)?;
        self.reached.memory.zero(0, self.layout.end())?;
        self.port = OwnerPort::new(&self.reached.memory, &self.layout, self.reached.bus)?;
        Ok(())
    }

    /// The vrings as they are.
    pub fn infos(&self) -> Vec<VringInfo> {
        self.layout.infos(self.reached.bus)
    }

    /// The features that the port wants.
    pub fn features(&self) -> u64 {
        self.layout.config().features()
    }

    /// Starts the card with the rings where they are.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(&mut self) -> Result<(), ProgramError> {
        let infos = self.infos();
        self.bare
            .start_card(self.features(), &infos)
            .map_err(|source| TransportError::Init { address: "the card".to_owned(), source })?;
        self.kick();
        Ok(())
    }

    /// Starts it with something else, which it need not take.
    pub fn start_with(&mut self, features: u64, infos: &[VringInfo]) {
        self.refused += u64::from(self.bare.start_card(features, infos).is_err());
        self.kick();
    }

    /// Both queues.
    pub fn kick(&self) {
        self.bare.kick(receive_vring(0));
        self.bare.kick(transmit_vring(0));
    }

    /// A vring's areas in the memory.
    pub fn places(&self, vring: u16) -> Option<RingPlaces> {
        self.layout.vrings().get(usize::from(vring)).map(|layout| layout.places)
    }

    /// Forges a ring, which has not started.
    pub fn forge(&self, vring: u16) -> Option<Forge> {
        // The port has posted what there is to receive into.
        let posted = if vring == receive_vring(0) { RING_SIZE } else { 0 };
        let places = self.places(vring)?;
        Some(Forge::new(&self.reached.memory, places, self.args.packed, posted))
    }

    /// Memory that no ring uses: its start, and the same as a bus address.
    pub fn spare(&self) -> (u64, u64) {
        (self.layout.end(), self.reached.bus + self.layout.end())
    }

    /// A piece that is as it should be for the ring.
    pub fn good(&self, vring: u16) -> Piece {
        // VIRTQ_DESC_F_WRITE.
        let flags = if vring == receive_vring(0) { 2 } else { 0 };
        Piece { addr: self.spare().1 + 0x8000, len: 256, flags, next: None }
    }

    /// Sends honest packets, if that goes, so that the other side has something for the other ring.
    pub fn bait(&mut self) {
        let mut frames = Vec::new();
        self.generator.fill(&mut frames, 4);
        let _ = self.port.tx_burst(0, frames.chunks_exact(self.generator.frame_len()));
    }

    /// The other side has its time.
    pub fn dwell(&mut self) {
        self.kick();
        std::thread::sleep(Duration::from_millis(self.args.dwell_ms));
    }

    /// Forges a ring, starts the card, and gives the other side its time.
    ///
    /// # Errors
    /// If it does not start.
    pub fn offer(
        &mut self,
        vring: u16,
        forge: impl FnOnce(&mut Self, &mut Forge) -> Result<(), ProgramError>,
    ) -> Result<(), ProgramError> {
        let Some(mut forged) = self.forge(vring) else { return Ok(()) };
        forge(self, &mut forged)?;
        if vring == receive_vring(0) {
            self.bait();
        }
        self.start()?;
        self.dwell();
        Ok(())
    }

    /// Stores anything into ranges of the memory, by another thread, while `meanwhile` does what it likes.
    pub fn scribble(&mut self, ranges: &[(u64, u64)], millis: u64, mut meanwhile: impl FnMut(&mut Self)) {
        let stop = AtomicBool::new(false);
        let memory = self.reached.memory.clone();
        let addresses = [self.reached.bus, self.spare().1, self.reached.bus + REACHED_LEN];
        let mut random = self.random.clone();
        self.random.number();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Relaxed: nothing is told by it but the end.
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..256 {
                        let range = random.one(ranges, (0, 0));
                        let _ = random.scribble(&memory, range, &addresses);
                    }
                }
            });
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(millis) {
                meanwhile(self);
                std::thread::sleep(Duration::from_millis(1));
            }
            stop.store(true, Ordering::Relaxed);
        });
    }

    /// As many packets there and back, whole, by a card that was reset. If they do not come it is reset
    /// again: a VMM that lost its broker by an attack takes a while. Says how often.
    ///
    /// # Errors
    /// If they never come back.
    pub fn honest(&mut self, packets: u64) -> Result<u32, ProgramError> {
        let start = Instant::now();
        let mut resets = 1;
        loop {
            match self.exchange(packets) {
                Ok(()) => return Ok(resets),
                Err(error) if start.elapsed() > PATIENCE => return Err(error),
                Err(error) => tracing::warn!("{error}; resetting the card once more"),
            }
            resets += 1;
        }
    }

    fn exchange(&mut self, packets: u64) -> Result<(), ProgramError> {
        self.fresh()?;
        self.start()?;
        let stream = self.random.number() as u32;
        let mut generator = Generator::new(200, stream, true);
        let mut checker = Checker::of_stream(stream);
        let (mut frames, mut waiting) = (Vec::new(), 0);
        let (mut made, mut last) = (0, Instant::now());
        while checker.verdict().intact < packets {
            if waiting == 0 && made < packets {
                generator.fill(&mut frames, AT_ONCE);
                waiting = AT_ONCE;
                made += AT_ONCE as u64;
            }
            let left = frames.chunks_exact(generator.frame_len()).skip(AT_ONCE - waiting);
            waiting -= self.port.tx_burst(0, left)?;
            self.received.clear();
            let received = self.port.rx_burst(0, &mut self.received, BURST)?;
            self.received.frames().for_each(|frame| checker.check(frame));
            for vring in [transmit_vring(0), receive_vring(0)] {
                if self.port.needs_kick(vring) {
                    self.bare.kick(vring);
                }
            }
            let verdict = checker.verdict();
            if last.elapsed() > STALLED || verdict.corrupted > 0 {
                let attack = self.args.attack.clone();
                let (back, corrupted) = (verdict.intact, verdict.corrupted);
                return Err(ProgramError::NotBack { attack, packets, back, corrupted });
            }
            match received {
                0 => std::thread::sleep(Duration::from_micros(200)),
                _ => last = Instant::now(),
            }
        }
        self.bare.reset();
        Ok(())
    }
}
