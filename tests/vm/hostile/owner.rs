//! A hostile owner, and a peer that sends each packet back.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use guest_driver_model::programs::hostile::owner::HONEST;
use guest_driver_model::programs::hostile::owner_attacks::{ATTACKS, OwnerAttack};
use serde_json::Value;

use super::{ATTACK, Hostile, check_kernel, new_faults, text};
use crate::programs::{Program, run as run_program};

impl Hostile<'_> {
    /// A hostile owner, and a peer that sends each packet back. Attacks that are for both formats are made on
    /// packed rings, or on split ones. A card behind an IOMMU does not have packed rings for those alone that
    /// can be made on no others: afterwards the kernel is to drive split ones.
    pub(super) fn owner(&mut self, iommu: bool, packed: bool) -> Result<()> {
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
            for attack in ATTACKS.iter().filter(|attack| self.chosen(attack.name)).collect::<Vec<_>>() {
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
}

/// How a program reaches its device.
const fn way(iommu: bool) -> &'static str {
    if iommu { "--vfio" } else { "" }
}

const fn format(packed: bool) -> &'static str {
    if packed { "packed" } else { "split" }
}
