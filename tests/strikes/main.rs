//! `torture`: an owner, a peer and a broker, each of which dies, stops for a while, or is started
//! anew, at random, one or two at once, while packets that can be checked flow both ways. A second
//! link, of which only the broker is ever touched, has packets too.
//!
//! After each strike packets flow again on both links. None was ever corrupted, none delivered
//! twice, and none lost between programs that live: also not across the death of a broker. Each
//! broker has as many descriptors and threads at its end as when it was new.
//!
//! `tests/torture` builds the programs and starts this.
#![forbid(unsafe_code)]

mod bed;
mod program;
mod report;
mod strike;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Parser;
use vhost_pci_tests::{Random, Usage};

use self::bed::{Bed, End, Role, SOON};
use self::report::{BrokerLife, Report, Row};
use self::strike::{Falling, Kind, Strike};

/// Kills, stops and restarts owner, peer and broker at random while packets flow.
#[derive(Debug, Parser)]
#[command(name = "torture")]
struct Args {
    /// How often somebody is struck
    #[arg(long, default_value_t = 60)]
    strikes: u64,
    /// What decides who is struck when and how; random by default, and printed
    #[arg(long)]
    seed: Option<u64>,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
    /// Strike only in these ways
    #[arg(long, value_enum)]
    only: Vec<Kind>,
    /// Go on after something went wrong
    #[arg(long)]
    go_on: bool,
}

/// Between two looks.
const LOOK: Duration = Duration::from_millis(2);
/// Between two lines for who watches.
const TELL: Duration = Duration::from_secs(5);
/// What may be wrong with packets.
const WRONG: [&str; 4] = ["corrupted", "twice or late", "lost", "of a broken ring"];
/// A pause that is worth a line.
const LONG: Duration = Duration::from_secs(2);
/// How long the broker may take to let go of what it has no use for.
const LET_GO: Duration = Duration::from_secs(5);
/// Memory that a broker may have more at its end than when it was new, KiB: what the allocator keeps
/// for each thread that ran at once with others.
const MOST_GROWTH_KIB: u64 = 1024;

fn main() -> ExitCode {
    let args = Args::parse();
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let seed = args.seed.unwrap_or(clock.as_nanos() as u64 & 0xffff_ffff);
    eprintln!("torture: {} strikes, seed {seed}", args.strikes);
    match Torture::start(seed).and_then(|mut torture| torture.run(&args)) {
        Ok(report) if report.wrong.is_empty() => {
            eprintln!("torture: passed: {} strikes in {:.0} s", report.strikes, report.seconds);
            ExitCode::SUCCESS
        }
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("torture: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

struct Torture {
    seed: u64,
    random: Random,
    bed: Bed,
    began: Instant,
    done: u64,
    rows: Vec<Row>,
    /// The one for strikes of which two fell at once.
    pairs: Row,
    lives: Vec<BrokerLife>,
    /// What the present broker had with these kinds of programs.
    usual: BTreeMap<String, Usage>,
    wrong: Vec<String>,
    /// By program: how many packets were found wrong in which way.
    known: BTreeMap<String, [u64; 4]>,
}

impl Torture {
    fn start(seed: u64) -> Result<Self> {
        let mut random = Random::new(seed);
        let bed = Bed::start(&mut random)?;
        Ok(Self {
            seed,
            random,
            bed,
            began: Instant::now(),
            done: 0,
            rows: Kind::ALL.iter().map(|kind| Row::new(kind.name())).collect(),
            pairs: Row::new("two at once"),
            lives: Vec::new(),
            usual: BTreeMap::new(),
            wrong: Vec::new(),
            known: BTreeMap::new(),
        })
    }

    fn run(&mut self, args: &Args) -> Result<Report> {
        let result = self.strike_all(args);
        if result.is_err() || !self.wrong.is_empty() {
            eprintln!("torture: the logs are in {}", self.bed.keep().display());
        }
        result?;
        let all = |ends: [&End; 2]| ends[0].all_counts().and(ends[1].all_counts());
        let mut kinds = std::mem::take(&mut self.rows);
        kinds.push(std::mem::take(&mut self.pairs));
        let report = Report {
            seed: self.seed,
            strikes: self.done,
            seconds: self.began.elapsed().as_secs_f64(),
            kinds,
            struck: all(self.bed.struck.ends()),
            other: all(self.bed.other.ends()),
            brokers: std::mem::take(&mut self.lives),
            wrong: std::mem::take(&mut self.wrong),
        };
        if args.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            report.print();
        }
        for wrong in &report.wrong {
            eprintln!("torture: FAILED: {wrong}");
        }
        Ok(report)
    }

    fn strike_all(&mut self, args: &Args) -> Result<()> {
        self.flow_again(&[0; 4])?;
        self.look_at_broker()?;
        let mut told = Instant::now();
        while self.done < args.strikes {
            // In the last third the broker lives on, and has to have what it had at the end.
            let brokers_die = self.done < args.strikes * 2 / 3;
            let chosen = if args.only.is_empty() { &Kind::ALL[..] } else { &args.only };
            let may = |kind: &Kind| brokers_die || *kind != Kind::BrokerKilled;
            let mut kinds: Vec<_> = chosen.iter().copied().filter(may).collect();
            if kinds.is_empty() {
                kinds = chosen.to_vec();
            }
            let first = Strike::any(&mut self.random, &kinds);
            let mut strikes = vec![first];
            if self.random.percent(25) {
                let second = Strike::any(&mut self.random, &kinds);
                if second.kind.role() != first.kind.role() {
                    strikes.push(second);
                }
            }
            self.strike(&strikes)?;
            if !self.wrong.is_empty() && !args.go_on {
                return Ok(());
            }
            if told.elapsed() > TELL {
                told = Instant::now();
                eprintln!(
                    "torture: {:.0} s, {} strikes of {}, the last: {}",
                    self.began.elapsed().as_secs_f64(),
                    self.done,
                    args.strikes,
                    names(&strikes)
                );
            }
            std::thread::sleep(self.random.between_ms(0, 300));
        }
        self.judge_all();
        self.broker_ends()
    }

    /// What programs found wrong right before they ended counts, too.
    fn judge_all(&mut self) {
        for (name, [one, other]) in [("struck", self.bed.struck.ends()), ("other", self.bed.other.ends())] {
            let all = one.all_counts().and(other.all_counts());
            let found = [all.corrupted, all.reordered, all.lost, all.faults];
            if found != [0; 4] {
                self.wrong.push(format!("{name} link, in all: {found:?} packets {WRONG:?}"));
            }
        }
    }

    /// One strike, or two at once, and all that follows.
    fn strike(&mut self, strikes: &[Strike]) -> Result<()> {
        let context = format!("strike {}, {}", self.done + 1, names(strikes));
        self.strike_and_look(strikes).map_err(|error| error.context(context.clone()))?;
        self.done += strikes.len() as u64;
        self.judge(&context);
        Ok(())
    }

    fn strike_and_look(&mut self, strikes: &[Strike]) -> Result<()> {
        let links = self.ends().map(|end| end.counts().links);
        let broker_dies = strikes.iter().any(|strike| strike.kind == Kind::BrokerKilled);
        if broker_dies {
            self.broker_ends()?;
        }
        self.ends().into_iter().for_each(|end| end.arrivals().begin());
        let mut falling = Vec::new();
        for strike in strikes {
            falling.push(strike.begin(&mut self.bed)?);
        }
        let roles: Vec<Role> = strikes.iter().map(|strike| strike.kind.role()).collect();
        let began = Instant::now();
        while !falling.is_empty() {
            let mut left = Vec::new();
            for strike in falling {
                let undone = Falling::undo(&strike, &mut self.bed, &mut self.random)?;
                if !undone {
                    left.push(strike);
                }
            }
            falling = left;
            self.bed.all_run(&roles)?;
            if began.elapsed() > SOON {
                bail!("{} cannot be undone after {SOON:?}", names(strikes));
            }
            std::thread::sleep(LOOK);
        }
        let undone = Instant::now();
        // Who lives has another link when the broker was another; who is new has a first one.
        let ended = |role| strikes.iter().any(|strike| strike.kind.ends() && strike.kind.role() == role);
        let wanted = [ended(Role::Owner), ended(Role::Peer), false, false];
        let mut least = [0; 4];
        for ((least, before), new) in least.iter_mut().zip(links).zip(wanted) {
            *least = if new { 1 } else { before + u64::from(broker_dies) };
        }
        self.flow_again(&least)?;
        let after = undone.elapsed();
        let [to_owner, to_peer, other @ ..] = self.ends().map(|end| end.arrivals().longest());
        if after > LONG {
            eprintln!(
                "torture: {:.1} s: strike {}, {}: packets everywhere {} ms after it only; {}",
                self.began.elapsed().as_secs_f64(),
                self.done + 1,
                names(strikes),
                after.as_millis(),
                self.ends().map(|end| format!("{} {}", end.incarnation(), end.arguments())).join(", ")
            );
        }
        let row = match strikes {
            [one] => self.rows.iter_mut().find(|row| row.kind == one.kind.name()),
            _ => Some(&mut self.pairs),
        };
        if let Some(row) = row {
            row.add(to_owner.max(to_peer), after, other[0].max(other[1]));
        }
        if let Some(life) = self.lives.last_mut()
            && !broker_dies
        {
            life.strikes += strikes.len() as u64;
        }
        self.look_at_broker()
    }

    /// The struck link's owner and peer, and the other link's.
    fn ends(&self) -> [&End; 4] {
        let ([one, two], [three, four]) = (self.bed.struck.ends(), self.bed.other.ends());
        [one, two, three, four]
    }

    /// Waits until each program has had so many links, and something arrives everywhere.
    fn flow_again(&mut self, links: &[u64; 4]) -> Result<()> {
        let start = Instant::now();
        let mut before = None;
        loop {
            self.bed.all_run(&[])?;
            let linked = self.ends().iter().zip(links).all(|(end, links)| end.counts().links >= *links);
            let times = self.ends().map(|end| end.arrivals().times());
            match before {
                None if linked => before = Some(times),
                // Twice: the first may have been counted before.
                Some(before) if times.iter().zip(before).all(|(now, before)| *now >= before + 2) => {
                    return Ok(());
                }
                _ => {}
            }
            if start.elapsed() > SOON {
                let counts = self.ends().map(|end| format!("{}: {:?}", end.incarnation(), end.counts()));
                bail!(
                    "packets do not flow everywhere after {SOON:?}; links {:?} wanted {links:?}, {}",
                    self.bed.states(),
                    counts.join(", ")
                );
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Notes what the programs have found wrong since this was last asked.
    fn judge(&mut self, context: &str) {
        let mut news = Vec::new();
        for end in self.ends() {
            let counts = end.counts();
            let found = [counts.corrupted, counts.reordered, counts.lost, counts.faults];
            news.push((end.incarnation(), found));
        }
        for (program, found) in news {
            let known = self.known.insert(program.clone(), found).unwrap_or_default();
            for ((what, now), before) in WRONG.iter().zip(found).zip(known) {
                if now > before {
                    self.wrong(format!("{context}: {program}: {} packets {what}", now - before));
                }
            }
        }
    }

    fn wrong(&mut self, what: String) {
        eprintln!("torture: {:.1} s: {what}", self.began.elapsed().as_secs_f64());
        self.wrong.push(what);
    }

    /// Whether the broker has what it had when the programs were of these kinds before.
    fn look_at_broker(&mut self) -> Result<()> {
        let kind = self.bed.kind();
        let start = Instant::now();
        let (mut now, usual) = (self.bed.usage()?, self.usual.get(&kind).copied());
        while let Some(usual) = usual
            && !now.is_within(&usual)
            && start.elapsed() < LET_GO
        {
            std::thread::sleep(LOOK);
            now = self.bed.usage()?;
        }
        match usual {
            None => {
                // What goes soon was not there for long.
                std::thread::sleep(Duration::from_millis(300));
                let now = self.bed.usage()?;
                if self.usual.is_empty() {
                    self.lives.push(BrokerLife { strikes: 0, first: now, last: now });
                }
                self.usual.insert(kind, now);
            }
            Some(usual) if !now.is_within(&usual) => {
                self.wrong(format!(
                    "the broker has {now:?} and had {usual:?} ({kind}, {} strikes)",
                    self.done
                ));
            }
            Some(_) => {}
        }
        if let Some(life) = self.lives.last_mut() {
            life.last = now;
        }
        Ok(())
    }

    /// The present broker's last look.
    fn broker_ends(&mut self) -> Result<()> {
        self.look_at_broker()?;
        let Some(life) = self.lives.last() else { return Ok(()) };
        let grown = life.last.anonymous_kib.saturating_sub(life.first.anonymous_kib);
        if grown > MOST_GROWTH_KIB {
            self.wrong(format!("a broker has {grown} KiB more after {} strikes", life.strikes));
        }
        self.usual.clear();
        Ok(())
    }
}

fn names(strikes: &[Strike]) -> String {
    let name = |strike: &Strike| format!("{} for {} ms", strike.kind.name(), strike.lasts.as_millis());
    strikes.iter().map(name).collect::<Vec<_>>().join(" and ")
}
