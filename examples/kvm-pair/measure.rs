//! The measurement: batches, in which every mode has its turn again and again.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use vhost_pci_switch::config::DEFAULT_CONFIRM_TIMEOUT;

use crate::bare;
use crate::broker::BrokerProcess;
use crate::pair::{DIRECT, DIRECT_WAY, Direction, Pair, RELAY, wiring};
use crate::samples::Samples;
use crate::wakeups::Wakeups;

/// Round trips until the next one has its turn.
const SLICE: u64 = 250;
/// How long a timer may be late.
const MARGIN: Duration = Duration::from_millis(500);

/// What is between the two VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nothing: the broker has handed the owner's eventfds to the peer's VMM.
    Direct,
    /// A thread of the broker.
    Relay,
    /// A process that is not the broker.
    RelayProcess,
}

impl Mode {
    /// All.
    pub const ALL: [Self; 3] = [Self::Direct, Self::Relay, Self::RelayProcess];

    /// As it is printed, and the name of its link.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Relay => "relay",
            Self::RelayProcess => "relay-process",
        }
    }

    /// Lines of the link's configuration.
    const fn config(self) -> &'static str {
        match self {
            Self::Relay => RELAY,
            Self::Direct | Self::RelayProcess => DIRECT,
        }
    }

    /// Arguments of the peer's process.
    const fn peer(self) -> &'static [&'static str] {
        match self {
            Self::RelayProcess => &["--relay"],
            Self::Direct | Self::Relay => &[],
        }
    }
}

/// What was measured of one mode, in one direction.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Which.
    pub mode: Mode,
    /// Which.
    pub direction: Direction,
    /// Round trips.
    pub times: Samples,
    /// How often threads of the broker were woken meanwhile.
    pub broker_wakeups: Wakeups,
    /// Notifications that the broker says to have relayed meanwhile.
    pub notifications_relayed: u64,
    /// How the vring is wired, as the broker says.
    pub wiring: String,
}

/// The whole measurement.
#[derive(Clone, Debug)]
pub struct Measured {
    /// By mode and direction.
    pub figures: Vec<Figures>,
    /// By direction.
    pub bare: Vec<(Direction, Samples)>,
}

/// Measures so many batches of so many round trips.
///
/// # Errors
/// If anything fails, or a notification gets lost.
pub fn measure(
    folder: &Path,
    batches: u64,
    rounds: u64,
    mut progress: impl FnMut(&str),
) -> anyhow::Result<Measured> {
    progress("starting a broker and eight VMs");
    let links = Mode::ALL.map(|mode| (mode.name(), mode.config()));
    let broker = BrokerProcess::start(folder, &links)?;
    let start = |mode: Mode| Pair::start(&broker, folder, mode.name(), mode.peer());
    let mut pairs = Mode::ALL.into_iter().map(start).collect::<anyhow::Result<Vec<_>>>()?;
    let up_since = Instant::now();
    let mut bare = bare::start()?;
    let mut measured = Measured { figures: Vec::new(), bare: Vec::new() };
    for direction in Direction::ALL {
        for (mode, pair) in Mode::ALL.into_iter().zip(&mut pairs) {
            pair.settle()?;
            pair.measure(direction, SLICE).with_context(|| format!("warming up {mode:?}"))?;
            measured.figures.push(Figures {
                mode,
                direction,
                times: Samples::default(),
                broker_wakeups: Wakeups::default(),
                notifications_relayed: 0,
                wiring: wiring(&broker, mode.name())?,
            });
        }
        bare.measure(direction, SLICE)?;
        measured.bare.push((direction, Samples::default()));
    }
    // A link's clock wakes once more for the answers to its set-up, which have come long since.
    thread::sleep(DEFAULT_CONFIRM_TIMEOUT.saturating_sub(up_since.elapsed()) + MARGIN);
    for batch in 0..batches {
        progress(&format!("batch {} of {batches}", batch + 1));
        measured.figures.iter_mut().for_each(|figures| figures.times.begin());
        measured.bare.iter_mut().for_each(|(_, times)| times.begin());
        for slice in 0..rounds.div_ceil(SLICE) {
            let rounds = SLICE.min(rounds - slice * SLICE);
            for figures in &mut measured.figures {
                let pair = pairs.get_mut(figures.mode as usize).context("a pair for each mode")?;
                figures.slice(&broker, pair, rounds)?;
            }
            for (direction, times) in &mut measured.bare {
                times.add(bare.measure(*direction, rounds)?);
            }
        }
    }
    Ok(measured)
}

impl Figures {
    /// Some round trips. The broker is asked outside of the time in which its wake-ups count.
    fn slice(&mut self, broker: &BrokerProcess, pair: &mut Pair, rounds: u64) -> anyhow::Result<()> {
        let relayed = || anyhow::Ok(broker.link(self.mode.name())?.counters.notifications_relayed);
        let (id, relayed_before) = (broker.process.id(), relayed()?);
        let before = Wakeups::at_rest(id)?;
        let times = pair.measure(self.direction, rounds);
        let after = Wakeups::of(id)?;
        let times = times.with_context(|| format!("{:?}, {}", self.mode, self.direction.name()))?;
        self.broker_wakeups.add(&after.since(&before));
        self.notifications_relayed += relayed()? - relayed_before;
        self.times.add(times);
        Ok(())
    }
}

/// Checks what has to be so on any machine.
///
/// # Errors
/// If the broker was woken in direct mode, or relayed anything.
pub fn verify(measured: &Measured) -> anyhow::Result<()> {
    for figures in measured.figures.iter().filter(|figures| figures.mode != Mode::Relay) {
        let (woken, relayed) = (&figures.broker_wakeups, figures.notifications_relayed);
        let (mode, way) = (figures.mode.name(), figures.direction.name());
        ensure!(figures.wiring == DIRECT_WAY, "{mode}: the broker wires it {}", figures.wiring);
        ensure!(
            woken.sum() == 0 && relayed == 0,
            "{mode}, {way}: the broker was woken ({woken:?}) or relayed {relayed}"
        );
    }
    Ok(())
}
