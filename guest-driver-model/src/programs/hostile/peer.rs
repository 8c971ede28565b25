//! `hostile-peer`: a peer's driver that writes all over its device, and serves nobody.

use std::time::{Duration, Instant};

use serde_json::json;
use vhost_pci_device::abi::{CONTROL_AVAIL, CONTROL_DESC, CONTROL_RING_SIZE, CONTROL_USED, DeviceConfig};

use super::peer_attacks::{ATTACKS, PeerAttack};
use super::random::Random;
use crate::link::{LinkPage, LinkSnapshot};
use crate::programs::ProgramError;
use crate::ring::{RingConfig, RingFeatures, RingPlaces};
use crate::shm::SharedMemory;
use crate::translate::Translation;
use crate::transport::TransportError;
use crate::transport::bare::{Bare, Reached};
use crate::transport::sysfs::Kind;

/// How long the link may take to be up.
const LINK_TIME: Duration = Duration::from_secs(20);

/// What `hostile-peer` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct HostilePeerArgs {
    /// What to do: an attack's name
    #[arg(long, value_name = "NAME")]
    pub attack: String,
    /// The guest has an IOMMU: reach the device through VFIO
    #[arg(long)]
    pub vfio: bool,
    /// How often each attack is made
    #[arg(long, default_value_t = 2)]
    pub rounds: u32,
    /// Decides all numbers
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How long each attack lasts
    #[arg(long, default_value_t = 150, value_name = "MILLISECONDS")]
    pub lasts_ms: u64,
}

/// Runs `hostile-peer`.
///
/// # Errors
/// If there is no device to be had, or no link comes up after the device was reset.
pub fn run(args: &HostilePeerArgs) -> Result<(), ProgramError> {
    let Some(attack) = ATTACKS.iter().find(|attack| attack.name == args.attack) else {
        let names: Vec<_> = ATTACKS.iter().map(|attack| attack.name).collect();
        return Err(ProgramError::NoAttack { name: args.attack.clone(), names: names.join(", ") });
    };
    let bare = Bare::open(Kind::VhostPci, args.vfio)?;
    let reached = bare.reached()?;
    let config = bare.device_config();
    let window = bare.window().ok_or(ProgramError::NoDevice)?.clone();
    let lasts = Duration::from_millis(args.lasts_ms);
    let mut rig = Rig { bare, reached, config, window, lasts, random: Random::new(args.seed), stores: 0 };
    let mut vrings = 0;
    for _ in 0..args.rounds {
        rig.bare.reset();
        let link = rig.start()?;
        vrings = rig.rings(&link).len();
        strike(&mut rig, attack, &link)?;
    }
    rig.bare.reset();
    let line = json!({
        "attack": args.attack,
        "times": args.rounds,
        "vrings": vrings,
        "stores": rig.stores,
    });
    crate::programs::say(&line.to_string());
    Ok(())
}

fn strike(rig: &mut Rig, attack: &PeerAttack, link: &LinkSnapshot) -> Result<(), ProgramError> {
    let kept = rig.bare.keep_config_space();
    let areas = rig.areas(link);
    let bytes: Vec<_> = areas
        .iter()
        .map(|(start, len)| {
            let mut bytes = vec![0; *len as usize];
            rig.window.read(*start, &mut bytes).map(|()| bytes)
        })
        .collect::<Result<_, _>>()?;
    let result = (attack.run)(rig, link);
    rig.bare.restore_config_space(&kept);
    // Linux looks at its rings in a loop for as long as what they say contradicts itself: often, if not always,
    // it comes back when they say what they said.
    for ((start, _), bytes) in areas.iter().zip(&bytes) {
        rig.window.write(*start, bytes)?;
    }
    std::thread::sleep(Duration::from_millis(20));
    result
}

/// A device.
pub struct Rig {
    /// The device.
    pub bare: Bare,
    /// Memory that it reaches.
    pub reached: Reached,
    /// What it says of itself.
    pub config: DeviceConfig,
    /// Its window.
    pub window: SharedMemory,
    /// Decides all numbers.
    pub random: Random,
    lasts: Duration,
    stores: u64,
}

impl Rig {
    /// Starts the device and waits until the link is up.
    ///
    /// # Errors
    /// If it does not start, or there is no link.
    pub fn start(&mut self) -> Result<LinkSnapshot, ProgramError> {
        self.bare
            .start_device(&self.reached)
            .map_err(|source| TransportError::Init { address: "the device".to_owned(), source })?;
        let page = LinkPage::new(&self.window, &self.config)?;
        let start = Instant::now();
        loop {
            match page.snapshot() {
                Ok(snapshot) if snapshot.up => return Ok(snapshot),
                _ if start.elapsed() > LINK_TIME => {
                    return Err(ProgramError::NoLink { device: "the device".to_owned(), waited: LINK_TIME });
                }
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Strikes until the attack's time is over.
    pub fn for_a_while(&mut self, mut strike: impl FnMut(&mut Self)) {
        let start = Instant::now();
        while start.elapsed() < self.lasts {
            for _ in 0..16 {
                strike(self);
                self.stores += 1;
            }
        }
    }

    /// Where the owner's vrings are in the window, and whether they are packed.
    pub fn rings(&self, link: &LinkSnapshot) -> Vec<(RingPlaces, bool)> {
        let features = RingFeatures::of(link.features);
        let translation = Translation::new(&link.mappings);
        let enabled = link.vrings.iter().filter(|vring| vring.enabled);
        let configs = enabled.filter_map(|vring| RingConfig::new(vring, features).ok());
        configs.filter_map(|config| Some((config.place(&translation).ok()?, features.packed))).collect()
    }

    /// What the owner's rings take of the window.
    fn areas(&self, link: &LinkSnapshot) -> Vec<(u64, u64)> {
        let areas = self.rings(link).into_iter().map(|(places, packed)| {
            let size = u64::from(places.size);
            let (avail, used) = if packed { (4, 4) } else { (6 + 2 * size, 6 + 8 * size) };
            [(places.desc, 16 * size), (places.avail, avail), (places.used, used)]
        });
        areas.flatten().collect()
    }

    /// Where the control ring is in the window.
    pub fn control_ring(&self) -> RingPlaces {
        let start = self.config.control_offset.value();
        RingPlaces {
            size: CONTROL_RING_SIZE,
            desc: start + CONTROL_DESC,
            avail: start + CONTROL_AVAIL,
            used: start + CONTROL_USED,
        }
    }

    /// Stores anything into ranges of the window.
    pub fn scribble(&mut self, ranges: &[(u64, u64)], addresses: &[u64]) {
        let range = self.random.one(ranges, (0, 0));
        // Ranges are parts of the window.
        let _ = self.random.scribble(&self.window, range, addresses);
    }
}
