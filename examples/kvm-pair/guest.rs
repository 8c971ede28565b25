//! A guest that exchanges notifications: what it is told to run, and what comes of it.

use std::fmt::Write;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use kvm_bindings::kvm_regs;

use crate::layout::{self, RESULTS, RESULTS_LEN};
use crate::sys::blobs;
use crate::vcpu::{Processor, Program};
use crate::vm::Vm;

/// Round trips of a batch at most.
const MOST_ROUNDS: u64 = RESULTS_LEN / 8;
/// How long a batch may take: far more than it does.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a program may take to see that it is to end.
const END: Duration = Duration::from_secs(5);

/// The guest's two ends: where it notifies, and what it gets.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// Address of its doorbell.
    pub doorbell: u64,
    /// What is stored there.
    pub value: u16,
    /// The interrupt vector of the other's notifications.
    pub vector: u8,
}

/// The guest.
pub struct Guest<'a> {
    /// Its VM.
    pub vm: &'a Vm,
    /// Its processor.
    pub processor: &'a Processor,
    /// Its ends.
    pub ends: Ends,
}

impl Guest<'_> {
    /// Does what the parent's line says, if that is for any guest:
    ///
    /// - `measure N` gives ticks of the time-stamp counter, N numbers;
    /// - `echo` and `idle` begin something that `stop` ends; that gives how many interrupts
    ///   came meanwhile;
    /// - `kick N` notifies so often;
    /// - `khz` gives the counter's frequency.
    ///
    /// # Errors
    /// If it cannot be done.
    pub fn obey(&self, line: &str) -> anyhow::Result<String> {
        match line.split_once(' ').unwrap_or((line, "")) {
            ("measure", rounds) => self.measure(rounds.parse()?),
            ("echo", _) => self.begin(blobs::echo()),
            ("idle", _) => self.begin(blobs::idle()),
            ("stop", _) => {
                self.processor.stop()?;
                Ok(self.processor.wait(END)?.to_string())
            }
            ("kick", times) => {
                let arguments = kvm_regs { rsi: times.parse()?, ..self.arguments()? };
                self.processor.run(Program { code: blobs::kick(), arguments })?;
                self.processor.wait(PATIENCE).map(|_| String::new())
            }
            ("khz", _) => Ok(self.processor.khz().to_string()),
            ("interrupts", _) => Ok(self.processor.interrupts(self.ends.vector)?.to_string()),
            other => bail!("{other:?} is nothing to do"),
        }
    }

    fn begin(&self, code: &'static [u8]) -> anyhow::Result<String> {
        self.processor.run(Program { code, arguments: self.arguments()? })?;
        Ok(String::new())
    }

    fn measure(&self, rounds: u64) -> anyhow::Result<String> {
        ensure!((1..=MOST_ROUNDS).contains(&rounds), "{rounds} rounds");
        let before = self.processor.interrupts(self.ends.vector)?;
        let arguments = kvm_regs { rdi: RESULTS, rsi: rounds, ..self.arguments()? };
        self.processor.run(Program { code: blobs::measure(), arguments })?;
        if let Err(error) = self.processor.wait(PATIENCE) {
            self.processor.stop()?;
            let left = self.processor.wait(END)?;
            return Err(error.context(format!("{left} of {rounds} rounds were not made")));
        }
        let came = self.processor.interrupts(self.ends.vector)?.wrapping_sub(before);
        ensure!(u64::from(came) == rounds, "{came} interrupts came in {rounds} rounds");
        let mut text = String::new();
        for round in 0..rounds {
            write!(text, "{} ", self.vm.memory().shared().load_u64(RESULTS + round * 8)?)?;
        }
        Ok(text)
    }

    fn arguments(&self) -> anyhow::Result<kvm_regs> {
        Ok(kvm_regs {
            r8: layout::counter(self.ends.vector),
            r11: self.ends.doorbell,
            rcx: self.ends.value.into(),
            // What came already needs no answer.
            rbp: self.processor.interrupts(self.ends.vector)?.into(),
            ..kvm_regs::default()
        })
    }
}

/// A batch's times, from the answer to `measure`, in microseconds.
///
/// # Errors
/// If it is none.
pub fn times(answer: &str, khz: f64) -> anyhow::Result<Vec<f64>> {
    let ticks = answer.split_whitespace().map(|ticks| ticks.parse::<u64>().context("a time"));
    ticks.map(|ticks| Ok(ticks? as f64 * 1e3 / khz)).collect()
}
