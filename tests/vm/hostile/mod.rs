//! An owner, and then a peer, whose guest breaks every rule of the rings and of the device that it can. The
//! other VM, the broker and a second link carry on.
//!
//! The second link's round trip is compared with that beside guests that are as busy and honest: the machine
//! may have two processors, and two guests keep them busy.

mod owner;
mod peer;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vhost_pci_tests::{Guest, Random, Sandbox, Usage};

use crate::beside::{Beside, Pings, Questions, RoundTrips};
use crate::setup::{Iommu, Mode, OwnerDriver, Setup};
use crate::testbed::{COMMAND, Testbed};
use crate::{Scenario, option};

pub const SCENARIO: Scenario = Scenario {
    name: "hostile",
    shows: "an owner's guest, then a peer's, breaks every rule it can (--seconds N, --seed S): the other VM, the broker \
            and a second link carry on",
    run,
};

/// What the scenario can be told, each with a value.
pub const OPTIONS: [&str; 3] = ["--seconds", "--seed", "--only"];

/// The second link's median round trip may be so many times that beside honest guests.
const SLOWER: f64 = 2.0;
/// Round trips of which it is; of fewer, as with `--only`, it is told and not judged.
const JUDGED: u64 = 1000;
/// How long honest guests are busy before that, and after.
const HONEST_TIME: Duration = Duration::from_millis(2500);
/// Both guests' processors are never idle, with hostile programs or honest ones: so the machine is as busy.
const SPIN: &str = "nice -n 19 sh -c 'while :; do :; done' >/dev/null 2>&1 &";
/// Memory of its own that the broker may have more of than before, KiB: what its threads' heaps keep of
/// what was freed. Each thread that starts may take a heap (an arena) that another one left half full.
const MEMORY: u64 = 1024;
/// How long the broker may take to let go of what it has no use for.
const LET_GO: Duration = Duration::from_secs(10);
/// Pings, a second each, of which one has to be answered after an attack.
const RESUME: u32 = 60;
/// Longer than any attack lasts.
const ATTACK: Duration = Duration::from_secs(120);

fn run(sandbox: &Sandbox) -> Result<()> {
    let number = |name: &str| -> Result<Option<u64>> {
        option(name).map(|text| text.parse().with_context(|| format!("{name} {text}: no number"))).transpose()
    };
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    // Even by itself: a Linux with split rings hangs more often, and its VM has to start again.
    let seed = number("--seed")?.unwrap_or(u64::from(clock.subsec_nanos() & !1));
    let seconds = number("--seconds")?.unwrap_or(0);
    println!("seed {seed}; each attack once, and again for {seconds} s");
    // Rings at places that cannot be cost the owner's VMM its connection: it is to come back.
    let setup = Setup { reconnect: true, driver: OwnerDriver::Vfio, ..Mode::Interrupt.into() };
    let setup = Setup { packed: true, beside: true, ..setup };
    let bed = Testbed::boot(sandbox, setup)?;
    let questions = Questions::start(sandbox.dir().join("control.sock"));
    let mut hostile = Hostile {
        bed,
        beside: Beside::start(sandbox)?,
        random: Random::new(seed),
        seconds: Duration::from_secs(seconds),
        only: option("--only"),
        with_iommu: Setup { iommu: Iommu::Intel, packed: seed % 2 == 0, ..setup },
        defects: Vec::new(),
    };
    let result = hostile.all();
    result.or_else(|error| hostile.bed.explain(&format!("{error:#}")))?;
    let (answers, longest) = questions.end()?;
    hostile.beside.end()?;
    println!("the broker answered {answers} questions for its status, the longest in {longest:.1?}");
    println!("VMs that ended by a defect of QEMU or Linux: {}", hostile.defects.len());
    hostile.defects.iter().for_each(|defect| println!("  {defect}"));
    Ok(())
}

struct Hostile<'s> {
    bed: Testbed<'s>,
    beside: Beside,
    random: Random,
    seconds: Duration,
    only: Option<String>,
    with_iommu: Setup,
    /// VMs that ended by defects that are not the switch's.
    defects: Vec<String>,
}

/// What honest guests do for a while.
type Honest = fn(&mut Hostile<'_>) -> Result<()>;

/// One time of trouble, and what was before.
struct Phase {
    name: &'static str,
    /// What honest guests do for a while.
    honest: Honest,
    before: RoundTrips,
    usage: Usage,
    pings: Pings,
}

impl Hostile<'_> {
    fn chosen(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only.split(',').any(|only| only == name))
    }

    fn seed(&mut self) -> u64 {
        self.random.below(1 << 32)
    }

    /// The second link's figures beside honest guests.
    fn beside_honest(&mut self, honest: Honest) -> Result<RoundTrips> {
        let pings = self.beside.pings(self.bed.sandbox())?;
        let start = Instant::now();
        while start.elapsed() < HONEST_TIME {
            honest(self)?;
        }
        pings.end()
    }

    /// The figures beside honest guests, and from there on those beside hostile ones.
    fn begin(&mut self, name: &'static str, honest: Honest) -> Result<Phase> {
        let before = self.beside_honest(honest)?;
        let pings = self.beside.pings(self.bed.sandbox())?;
        // What goes soon was not there for long.
        std::thread::sleep(Duration::from_millis(300));
        let usage = Usage::of(self.bed.broker().pid())?;
        Ok(Phase { name, honest, before, usage, pings })
    }

    fn end(&mut self, phase: Phase) -> Result<()> {
        let Phase { name, honest, before, usage, pings } = phase;
        let now = self.let_go(usage)?;
        let hostile = pings.end()?;
        // Other programs of the machine come and go: the slower of the times before and after counts.
        let after = self.beside_honest(honest)?;
        let ratio = hostile.p50_ns as f64 / before.p50_ns.max(after.p50_ns) as f64;
        println!("{name}: the second link, 0 lost, {ratio:.2} times the median beside honest guests:");
        for (what, trips) in [("honest before", before), ("hostile", hostile), ("honest after", after)] {
            println!(
                "  {what:<14} {:>6} round trips: median {:>4.0} us, 99 % {:>5.0} us, longest {:>5.1} ms",
                trips.count,
                trips.p50_ns as f64 / 1e3,
                trips.p99_ns as f64 / 1e3,
                trips.max_ns as f64 / 1e6,
            );
        }
        println!(
            "{name}: the broker had {} descriptors, {} threads and {} KiB, and has {}, {} and {}",
            usage.descriptors,
            usage.threads,
            usage.anonymous_kib,
            now.descriptors,
            now.threads,
            now.anonymous_kib
        );
        ensure!(
            ratio <= SLOWER || hostile.count < JUDGED,
            "the second link's median round trip is {ratio:.2} times that beside honest guests"
        );
        Ok(())
    }

    /// Waits until the broker has no more than it had.
    fn let_go(&mut self, before: Usage) -> Result<Usage> {
        let pid = self.bed.broker().pid();
        let start = Instant::now();
        loop {
            let now = Usage::of(pid)?;
            let memory = before.anonymous_kib + MEMORY;
            if now.is_within(&before) && now.anonymous_kib <= memory {
                return Ok(now);
            }
            ensure!(
                start.elapsed() < LET_GO,
                "the broker has {now:?} and had {before:?}; {MEMORY} KiB more are allowed"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What the first link's faults were counted to.
    fn faults(&self) -> Result<BTreeMap<String, u64>> {
        let status = self.bed.status()?;
        let faults = &status["links"][0]["counters"]["faults"];
        Ok(serde_json::from_value(faults.clone())?)
    }

    fn all(&mut self) -> Result<()> {
        let with_iommu = self.with_iommu;
        for guest in [&mut self.bed.owner, &mut self.bed.peer] {
            guest.sh_ok(SPIN, COMMAND)?;
        }
        self.owner(false, !with_iommu.packed)?;
        self.bed.boot_owner(with_iommu)?;
        self.bed.owner.sh_ok(SPIN, COMMAND)?;
        self.owner(true, with_iommu.packed)?;
        self.peer()
    }
}

fn new_faults(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let new = after.iter().map(|(kind, count)| (kind.clone(), count - before.get(kind).unwrap_or(&0)));
    new.filter(|(_, count)| *count > 0).collect()
}

fn text(faults: &BTreeMap<String, u64>) -> String {
    match faults.is_empty() {
        true => "nothing".to_owned(),
        false => {
            let faults = faults.iter().map(|(kind, count)| format!("{kind} {count}"));
            faults.collect::<Vec<_>>().join(", ")
        }
    }
}

/// No kernel may have crashed, nor a program of it.
fn check_kernel(name: &str, guest: &mut Guest) -> Result<()> {
    let bad = "dmesg | grep -E 'Oops|BUG:|Kernel panic|segfault|general protection|invalid opcode|rcu: INFO'";
    let text = guest.sh(bad, COMMAND)?.text;
    ensure!(text.trim().is_empty(), "the {name}'s kernel says:\n{text}");
    Ok(())
}
