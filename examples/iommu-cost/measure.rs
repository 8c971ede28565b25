//! The measurement: rounds, in each of which every figure has its turn.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::broker;
use crate::floor::{Ask, Floor};
use crate::owner::Link;
use crate::samples::Samples;
use crate::translate::Case;

/// Tables that are translated with: how many mappings, and whether half of them are far away.
pub const TABLES: [(usize, bool); 5] =
    [(1, false), (64, false), (4096, false), (65536, false), (65536, true)];
/// Operations of each kind in a round.
const BATCH: usize = 24;
/// What is done before anything counts.
const WARM_UP: usize = 2;
/// Rounds, and the time in which they have to begin, unless somebody wants so many.
const ROUNDS: usize = 250;
const TIME: Duration = Duration::from_secs(30);

/// Figures by name. Nanoseconds for translations, microseconds for all else.
#[derive(Debug, Default)]
pub struct Figures {
    samples: BTreeMap<String, Samples>,
}

impl Figures {
    /// A figure's samples.
    pub fn named(&self, name: &str) -> Option<&Samples> {
        self.samples.get(name)
    }

    fn begin_round(&mut self) {
        self.samples.values_mut().for_each(Samples::begin_round);
    }

    fn add(&mut self, name: &str, value: f64) {
        if let Some(samples) = self.samples.get_mut(name) {
            return samples.add(value);
        }
        let samples = self.samples.entry(name.into()).or_default();
        samples.begin_round();
        samples.add(value);
    }

    fn time(&mut self, name: &str, took: Duration) {
        self.add(name, took.as_secs_f64() * 1e6);
    }
}

/// The name of a figure of a table.
pub fn table_name(what: &str, (mappings, apart): (usize, bool)) -> String {
    format!("translate.{what}.{mappings}{}", if apart { ".apart" } else { "" })
}

/// Measures; gives how many rounds it were, too. `progress` is told how much is done, in percent.
///
/// # Errors
/// The step that failed.
pub fn measure(
    wanted: Option<usize>,
    shown: u64,
    progress: impl Fn(usize),
) -> anyhow::Result<(Figures, usize)> {
    let folder = tempfile::Builder::new().prefix("iommu-cost").tempdir().context("a folder for sockets")?;
    let mut cases: Vec<_> =
        TABLES.map(|(mappings, apart)| ((mappings, apart), Case::new(mappings, apart))).into();
    for (table, case) in &mut cases {
        ensure!(case.is_sound(), "a translation of {table:?} finds not all addresses");
    }
    let floor = Floor::start()?;
    let _broker = broker::start(folder.path())?;
    let mut links = Vec::new();
    for name in broker::LINKS {
        let link = Link::start(folder.path(), name, shown).with_context(|| format!("link {name}"))?;
        links.push((name, link));
    }
    let mut figures = Figures::default();
    let rounds = WARM_UP + wanted.unwrap_or(ROUNDS);
    let (mut done, start) = (0, Instant::now());
    for round in 0..rounds {
        if round == WARM_UP {
            figures = Figures::default();
        }
        let time = start.elapsed().as_secs_f64() / TIME.as_secs_f64();
        // At least one for each of the tables.
        if wanted.is_none() && time > 1.0 && round > WARM_UP + TABLES.len() {
            break;
        }
        let part = round as f64 / rounds as f64;
        progress((100.0 * if wanted.is_none() { part.max(time.min(1.0)) } else { part }) as usize);
        done = (round + 1).saturating_sub(WARM_UP);
        figures.begin_round();
        if let Some((table, case)) = cases.get_mut(round % TABLES.len()) {
            let times = case.measure();
            for (what, value) in [
                ("hit", times.hit),
                ("random", times.random),
                ("chained", times.chained),
                ("load", times.load),
            ] {
                figures.add(&table_name(what, *table), value);
            }
        }
        // Turn about, so that no figure is always the one after the same other.
        for step in 0..4 {
            match (step + round) % 4 {
                0 => floors(&mut figures, &floor)?,
                1 => floors_in_use(&mut figures, &floor)?,
                other => {
                    if let Some((name, link)) = links.get_mut(other - 2) {
                        operations(&mut figures, name, link).with_context(|| format!("link {name}"))?;
                    }
                }
            }
        }
    }
    Ok((figures, done))
}

fn floors(figures: &mut Figures, floor: &Floor) -> anyhow::Result<()> {
    for _ in 0..BATCH {
        let (took, _) = floor.direct(Ask::Nothing)?;
        figures.time("floor.socket", took);
        figures.time("floor.middle", floor.through_middle(Ask::Nothing)?);
        let (_, nanoseconds) = floor.direct(Ask::Ring)?;
        figures.add("floor.doorbell_map", nanoseconds as f64 / 1e3);
        figures.time("floor.middle_unmap", floor.through_middle(Ask::Hide)?);
        let (_, nanoseconds) = floor.direct(Ask::Show)?;
        figures.add("floor.map", nanoseconds as f64 / 1e3);
        let (_, nanoseconds) = floor.direct(Ask::Hide)?;
        figures.add("floor.unmap", nanoseconds as f64 / 1e3);
        floor.direct(Ask::Show)?;
        figures.time("floor.middle_twice", floor.through_middle(Ask::Twice)?);
    }
    Ok(())
}

fn floors_in_use(figures: &mut Figures, floor: &Floor) -> anyhow::Result<()> {
    for _ in 0..BATCH {
        floor.direct(Ask::Show)?;
        floor.direct(Ask::Use)?;
        figures.time("floor.middle_unmap_used", floor.through_middle(Ask::Hide)?);
        floor.direct(Ask::Rest)?;
        floor.direct(Ask::Show)?;
        floor.direct(Ask::Use)?;
        let (took, _) = floor.direct(Ask::Nothing)?;
        figures.time("floor.socket_used", took);
        let (_, nanoseconds) = floor.direct(Ask::Hide)?;
        figures.add("floor.unmap_used", nanoseconds as f64 / 1e3);
        floor.direct(Ask::Rest)?;
        floor.direct(Ask::Show)?;
        floor.direct(Ask::Use)?;
        figures.time("floor.middle_twice_used", floor.through_middle(Ask::Twice)?);
        floor.direct(Ask::Rest)?;
    }
    Ok(())
}

fn operations(figures: &mut Figures, name: &str, link: &mut Link) -> anyhow::Result<()> {
    for _ in 0..BATCH {
        let (took, page) = link.push()?;
        figures.time(&format!("{name}.push"), took);
        let (took, _) = link.peer.map(page.iova)?;
        figures.time(&format!("{name}.map"), took);
        figures.time(&format!("{name}.unmap"), link.unmap(page)?);

        let (_, page) = link.push()?;
        let (_, offset) = link.peer.map(page.iova)?;
        link.peer.set_use(Some(offset))?;
        figures.time(&format!("{name}.revoke"), link.revoke(page)?);
        link.peer.set_use(None)?;

        // What the thread has left in the hole, which the model of a VMM fills with memory, is in
        // no VMM's way: it goes, uncounted.
        let (_, page) = link.push()?;
        link.peer.map(page.iova)?;
        link.unmap(page)?;
    }
    Ok(())
}

/// A clock that says how long a measurement takes, on standard error.
pub fn progress_line() -> impl Fn(usize) {
    let start = Instant::now();
    let told = std::cell::Cell::new(usize::MAX);
    move |percent| {
        if told.replace(percent / 10) != percent / 10 {
            eprintln!("iommu-cost: {percent:3} %, {:.0} s", start.elapsed().as_secs_f64());
        }
    }
}
