//! What must hold. Each check gives one line that says what it has found, or an error.

mod leaks;
mod masking;
mod window;

use clap::Subcommand;

/// A check.
#[derive(Clone, Debug, Subcommand)]
pub enum Check {
    /// A vector is masked while the owner kicks: nothing comes, the pending bit says so, and
    /// exactly one interrupt comes when it is unmasked.
    Masking {
        #[arg(long, default_value_t = 1000)]
        rounds: u64,
    },
    /// The peer's device is reset, its function is reset, its VM is killed: no eventfd stays
    /// registered and no descriptor leaks.
    Leaks {
        #[arg(long, default_value_t = 1000)]
        rounds: u64,
    },
    /// The peer's guest loads and stores all over the window while pages come and go.
    Window {
        #[arg(long, default_value_t = 10_000)]
        rounds: u64,
    },
}

impl Check {
    /// Checks. Gives what to tell.
    ///
    /// # Errors
    /// What does not hold.
    pub fn run(&self) -> anyhow::Result<String> {
        match *self {
            Self::Masking { rounds } => masking::run(rounds),
            Self::Leaks { rounds } => leaks::run(rounds),
            Self::Window { rounds } => window::run(rounds),
        }
    }
}
