//! What this program's processes allocate. A process that is measured answers on its standard output
//! whoever asks on its standard input, and does nothing for it while nobody does.

use std::alloc::System;
use std::io::{BufRead, BufReader, Lines, PipeReader, PipeWriter, Read, Write, stdin, stdout};
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use vhost_pci_tests::Process;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Answers from now on, each line with how often this process has allocated.
pub fn answer() {
    thread::spawn(|| {
        let mut question = [0; 64];
        // A question is read whole, as nobody asks before the answer to the one before.
        while stdin().read(&mut question).is_ok_and(|read| read > 0) {
            let stats = ALLOCATOR.stats();
            // Who does not listen any more has no more questions.
            let _ = writeln!(stdout(), "{}", stats.allocations + stats.reallocations);
        }
    });
}

/// A process that answers.
pub struct Answering {
    process: Process,
    input: PipeWriter,
    output: Lines<BufReader<PipeReader>>,
}

impl Answering {
    /// Starts it, and asks a first time, which allocates what answers need.
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let (input, our_input) = std::io::pipe()?;
        let (output, their_output) = std::io::pipe()?;
        command.stdin(input).stdout(their_output);
        let process = Process::spawn_with_pipes(name, command, log)?;
        let mut answering = Self { process, input: our_input, output: BufReader::new(output).lines() };
        answering.allocations()?;
        Ok(answering)
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it has written, besides answers.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// How often it has allocated.
    pub fn allocations(&mut self) -> Result<u64> {
        writeln!(self.input)?;
        let line = self.output.next().with_context(|| format!("it ended\n{}", self.process.log()))??;
        line.parse().with_context(|| format!("{line:?} is no number of allocations"))
    }
}
