//! A hostile peer, and an owner whose kernel drives the card.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use guest_driver_model::programs::hostile::peer_attacks::ATTACKS;
use serde_json::Value;
use vhost_pci_tests::Guest;

use super::{ATTACK, Hostile, RESUME, SPIN, check_kernel, new_faults, text};
use crate::programs::run as run_program;
use crate::testbed::{COMMAND, PEER};

impl Hostile<'_> {
    /// A hostile peer, and an owner whose kernel drives the card.
    pub(super) fn peer(&mut self) -> Result<()> {
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
            for attack in ATTACKS.iter().filter(|attack| self.chosen(attack.name)).collect::<Vec<_>>() {
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
