//! An owner, and then a peer, whose guest breaks every rule of the rings and of the device that it can. The
//! other VM, the broker and a second link carry on.
//!
//! The second link's round trip is compared with that beside guests that are as busy and honest: the machine
//! may have two processors, and two guests keep them busy.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use guest_driver_model::programs::hostile::owner::HONEST;
use guest_driver_model::programs::hostile::owner_attacks::{ATTACKS as OWNER_ATTACKS, OwnerAttack};
use guest_driver_model::programs::hostile::peer_attacks::ATTACKS as PEER_ATTACKS;
use serde_json::Value;
use vhost_pci_tests::{Guest, Random, Sandbox, Usage};

use crate::Scenario;
use crate::beside::{Beside, Pings, Questions, RoundTrips};
use crate::programs::{Program, run as run_program};
use crate::setup::{Iommu, Mode, OwnerDriver, Setup};
use crate::testbed::{COMMAND, PEER, Testbed};

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

fn option(name: &str) -> Option<String> {
    let arguments: Vec<_> = std::env::args().collect();
    let at = arguments.iter().position(|argument| argument == name)?;
    Some(arguments.get(at + 1).cloned().unwrap_or_default())
}

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

    /// A hostile owner, and a peer that sends each packet back. Attacks that are for both formats are made on
    /// packed rings, or on split ones. A card behind an IOMMU does not have packed rings for those alone that
    /// can be made on no others: afterwards the kernel is to drive split ones.
    fn owner(&mut self, iommu: bool, packed: bool) -> Result<()> {
        let echo = Program::start(&mut self.bed.peer, "echo --device auto --vfio --wait interrupt --json")?;
        let phase = match iommu {
            true => self.begin("hostile owner behind an IOMMU", |hostile| hostile.honest_owner(true))?,
            false => self.begin("hostile owner", |hostile| hostile.honest_owner(false))?,
        };
        println!(
            "{:<24} {:<7} {:>6} {:>11}  what the peer's driver reported",
            "owner's attack", "rings", "times", "resumed in"
        );
        let start = Instant::now();
        let mut again = true;
        while std::mem::take(&mut again) || start.elapsed() < self.seconds {
            for attack in OWNER_ATTACKS.iter().filter(|attack| self.chosen(attack.name)).collect::<Vec<_>>() {
                let formats = [false, true].into_iter().filter(|format| attack.is_in_turn(*format, packed));
                for packed in formats.filter(|format| !format || packed || !iommu) {
                    self.owner_attack(attack, iommu, packed)
                        .with_context(|| format!("{}, {} rings", attack.name, format(packed)))?;
                    ensure!(echo.is_running(&mut self.bed.peer)?, "the peer's driver ended");
                }
            }
        }
        self.end(phase)?;
        let messages = echo.messages(&mut self.bed.peer)?;
        ensure!(!messages.contains("panicked"), "the peer's driver panicked:\n{messages}");
        let end = echo.end(&mut self.bed.peer)?;
        let end = end.last().context("the peer's driver printed nothing")?;
        println!(
            "the peer's driver: faults {}, links {}, packets {}",
            end["faults"], end["links"], end["rx_packets"]
        );
        check_kernel("peer", &mut self.bed.peer)?;
        check_kernel("owner", &mut self.bed.owner)
    }

    fn owner_attack(&mut self, attack: &OwnerAttack, iommu: bool, packed: bool) -> Result<()> {
        // Those that have to be found are given more time, where the host is slow.
        for dwell in [30, 300, 2000] {
            let before = self.faults()?;
            let line = self.hostile_owner(attack.name, iommu, packed, dwell)?;
            let found = new_faults(&before, &self.faults()?);
            if attack.faults.is_empty() || attack.faults.iter().any(|fault| found.contains_key(*fault)) {
                println!(
                    "{:<24} {:<7} {:>6} {:>8} ms  {}",
                    attack.name,
                    format(packed),
                    line["times"].to_string(),
                    line["resumed_ms"].to_string(),
                    text(&found)
                );
                return Ok(());
            }
        }
        bail!("the peer's driver should have reported one of {:?}", attack.faults)
    }

    fn honest_owner(&mut self, iommu: bool) -> Result<()> {
        let seed = self.seed();
        let command = format!("hostile-owner --attack {HONEST} {} --packets 2000 --seed {seed}", way(iommu));
        run_program(&mut self.bed.owner, &command, ATTACK).map(drop)
    }

    fn hostile_owner(&mut self, attack: &str, iommu: bool, packed: bool, dwell: u64) -> Result<Value> {
        let seed = self.seed();
        let packed = if packed { "--packed" } else { "" };
        let command = format!(
            "hostile-owner --attack {attack} {} {packed} --seed {seed} --dwell-ms {dwell}",
            way(iommu)
        );
        run_program(&mut self.bed.owner, &command, ATTACK)
    }

    /// A hostile peer, and an owner whose kernel drives the card.
    fn peer(&mut self) -> Result<()> {
        self.start_kernel()?;
        give_back(&mut self.bed.owner)?;
        let phase = self.begin("hostile peer", |hostile| {
            hostile.fresh()?;
            hostile.bed.ping_every(100, 0.005)?;
            hostile.end_tap()
        })?;
        println!(
            "{:<24} {:>6} {:>6} {:>11}  what the owner's kernel and the broker said",
            "peer's attack", "times", "rings", "resumed in"
        );
        let start = Instant::now();
        let mut first = true;
        while std::mem::take(&mut first) || start.elapsed() < self.seconds {
            for attack in PEER_ATTACKS.iter().filter(|attack| self.chosen(attack.name)).collect::<Vec<_>>() {
                self.peer_attack(attack.name).with_context(|| attack.name)?;
            }
        }
        self.fresh()?;
        self.end_tap()?;
        self.end(phase)?;
        check_kernel("owner", &mut self.bed.owner)?;
        check_kernel("peer", &mut self.bed.peer)
    }

    fn peer_attack(&mut self, name: &str) -> Result<()> {
        let (before, seed) = (self.faults()?, self.seed());
        let said = said(&mut self.bed.owner)?.len();
        // What the owner sends meanwhile.
        self.bed.owner.sh_ok(&format!("ping -i 0.01 {PEER} >/dev/null 2>&1 &"), COMMAND)?;
        let command = format!("hostile-peer --attack {name} --vfio --seed {seed}");
        let line = match run_program(&mut self.bed.peer, &command, ATTACK) {
            Ok(line) => line,
            Err(error) => {
                self.survive(name, error)?;
                Value::Null
            }
        };
        let (words, resumed) = match self.aftermath() {
            Err(error) => {
                self.survive(name, error)?;
                self.aftermath()?
            }
            done => done?,
        };
        let words = words.get(said..).unwrap_or_default();
        println!(
            "{name:<24} {:>6} {:>6} {:>8} ms  {} lines{}; {}",
            line["times"].to_string(),
            line["vrings"].to_string(),
            resumed.as_millis(),
            words.len(),
            words.last().map_or_else(String::new, |last| format!(" ({last})")),
            text(&new_faults(&before, &self.faults()?))
        );
        Ok(())
    }

    /// What the owner's kernel has said, and how long it took until packets flowed again.
    fn aftermath(&mut self) -> Result<(Vec<String>, Duration)> {
        self.bed.owner.sh("kill $(pidof ping)", COMMAND)?;
        let words = said(&mut self.bed.owner)?;
        let began = Instant::now();
        self.fresh()?;
        let resumed = began.elapsed();
        self.end_tap()?;
        Ok((words, resumed))
    }

    /// What is no failure of the switch's is noted, and that VM started anew: the peer's QEMU has ended by what
    /// its own guest did to it; or the owner's Linux looks at a ring for ever that contradicts itself, which
    /// no device may give it, and none can be kept from.
    fn survive(&mut self, attack: &str, error: anyhow::Error) -> Result<()> {
        // It may be about to end.
        std::thread::sleep(Duration::from_millis(200));
        let text = std::fs::read_to_string(self.bed.sandbox().dir().join("owner.serial.log"))?;
        if let Some(status) = self.bed.peer.qemu().exited()? {
            let log = self.bed.peer.qemu().log();
            let last = log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing");
            self.defects.push(format!("{attack}: the peer's QEMU: {status}, having said: {last}"));
            self.bed.boot_peer()?;
            return self.bed.peer.sh_ok(SPIN, COMMAND).map(drop);
        }
        let (_, panic) = text.split_once("softlockup: hung tasks").unwrap_or_default();
        let place = panic.lines().find_map(|line| line.split_once("RIP: 0010:"));
        let Some((_, place)) = place.filter(|_| panic.contains("[virtio_net]")) else { return Err(error) };
        self.defects.push(format!("{attack}: the owner's Linux does not leave its driver, at {place}"));
        self.bed.boot_owner(self.with_iommu)?;
        self.bed.owner.sh_ok(SPIN, COMMAND)?;
        self.end_tap()?;
        self.start_kernel()
    }

    /// The owner's kernel gets its card, and is to notice soon when it loops.
    fn start_kernel(&mut self) -> Result<()> {
        let command = "echo 5 >/proc/sys/kernel/watchdog_thresh; echo 1 >/proc/sys/kernel/softlockup_panic; modprobe virtio_net";
        self.bed.owner.sh_ok(command, COMMAND).map(drop)
    }

    /// The owner's driver and the peer's begin anew: packets flow.
    fn fresh(&mut self) -> Result<()> {
        self.bed.start_peer_network()?;
        rebind(&mut self.bed.owner)?;
        self.bed.start_owner_network()?;
        for _ in 0..RESUME {
            if self.bed.owner.sh(&format!("ping -c 1 -W 1 {PEER} >/dev/null"), COMMAND)?.code == 0 {
                return Ok(());
            }
            ensure!(self.bed.peer.qemu().exited()?.is_none(), "the peer's QEMU ended");
        }
        bail!("no ping is answered")
    }

    fn end_tap(&mut self) -> Result<()> {
        let end = "kill $(pidof vhost-pci-guest) 2>/dev/null; for i in $(seq 100); do pidof vhost-pci-guest >/dev/null || exit 0; \
                   sleep 0.05; done; exit 1";
        self.bed.peer.sh_ok(end, COMMAND)?;
        let log = self.bed.peer.sh_ok("cat /tmp/tap.log", COMMAND)?;
        ensure!(!log.contains("panicked"), "the peer's driver panicked:\n{log}");
        Ok(())
    }
}

/// How a program reaches its device.
const fn way(iommu: bool) -> &'static str {
    if iommu { "--vfio" } else { "" }
}

const fn format(packed: bool) -> &'static str {
    if packed { "packed" } else { "split" }
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

/// The card's PCI address, in a variable.
const CARD: &str = "card=$(basename $(dirname $(grep -l 0x1041 /sys/bus/pci/devices/*/device)))";

/// Gives the card from VFIO back to the kernel's driver.
fn give_back(owner: &mut Guest) -> Result<()> {
    let command = format!(
        "{CARD}; echo >/sys/bus/pci/devices/$card/driver_override; echo $card >/sys/bus/pci/drivers/vfio-pci/unbind; \
         echo $card >/sys/bus/pci/drivers_probe; for i in $(seq 100); do [ -e /sys/class/net/eth0 ] && exit 0; sleep 0.1; done; exit 1"
    );
    owner.sh_ok(&command, COMMAND).map(drop)
}

/// The kernel's driver begins anew with its card.
fn rebind(owner: &mut Guest) -> Result<()> {
    let command = format!(
        "{CARD}; cd /sys/bus/pci/drivers/virtio-pci; echo $card >unbind; echo $card >bind; \
         for i in $(seq 100); do [ -e /sys/class/net/eth0 ] && exit 0; sleep 0.1; done; exit 1"
    );
    owner.sh_ok(&command, COMMAND).map(drop)
}

/// Lines that the owner's kernel has said of its card, without their times.
fn said(owner: &mut Guest) -> Result<Vec<String>> {
    let text = owner.sh("dmesg | grep -E 'virtio_net|virtio[0-9]|eth0'", COMMAND)?.text;
    Ok(text.lines().filter_map(|line| Some(line.split_once("] ")?.1.to_owned())).collect())
}

/// No kernel may have crashed, nor a program of it.
fn check_kernel(name: &str, guest: &mut Guest) -> Result<()> {
    let bad = "dmesg | grep -E 'Oops|BUG:|Kernel panic|segfault|general protection|invalid opcode|rcu: INFO'";
    let text = guest.sh(bad, COMMAND)?.text;
    ensure!(text.trim().is_empty(), "the {name}'s kernel says:\n{text}");
    Ok(())
}
