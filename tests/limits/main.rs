//! `limits`: hits each limit of a link on purpose. Each time a line of the log names the link, a
//! counter counts, and a second link of the same broker carries on: nothing of what it sends is
//! lost, and its rate is printed beside that of a time without trouble.
//!
//! `tests/limits/run` builds the programs and starts this.
#![forbid(unsafe_code)]

mod attack;
mod bench;
// The front-end that says what it likes.
#[allow(clippy::unwrap_used, clippy::panic, dead_code, missing_docs)]
#[path = "../../switch/tests/bad_input/raw.rs"]
mod raw;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use attack::ATTACKS;
use bench::Bench;

/// How long the second link is watched with nothing going on.
const QUIET: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    match limits() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("limits: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn limits() -> Result<()> {
    let bench = Bench::start()?;
    let before = bench.usage()?;
    let quiet = bench.rate_of_other(|_| {
        std::thread::sleep(QUIET);
        Ok(())
    })?;
    println!("limits: the other link alone: {quiet:.0} packets a second");
    println!("| limit | counted as | times | the other link's packets a second, of those alone |");
    println!("|---|---|---|---|");
    for attack in ATTACKS {
        let told = |what: &str| format!("{} ({what}); logs in {}", attack.limit, bench.place().display());
        let counted = bench.counted(attack.counter)?;
        let rate = bench.rate_of_other(attack.hit).with_context(|| told("the attack"))?;
        let times = bench.wait_counted(attack.counter, counted).with_context(|| told("its counter"))?;
        bench.logged(attack.line).with_context(|| told("its line in the log"))?;
        println!("| {} | `{}` | {times} | {:.2} |", attack.limit, attack.counter, rate / quiet);
    }
    let (descriptors, threads) = bench.usage_when(before)?;
    bench.end()?;
    ensure!(
        descriptors <= before.0 && threads <= before.1,
        "the broker has {descriptors} descriptors and {threads} threads, and had {before:?}"
    );
    println!(
        "limits: passed: {} limits; nothing of the other link lost, descriptors and threads given back",
        ATTACKS.len()
    );
    Ok(())
}
