//! `hold`: keeps a page with a secret in memory and gives it to nobody. In an owner
//! without an IOMMU the peer sees it all the same.

use std::sync::Arc;
use std::time::Duration;

use super::secret::Secret;
use crate::programs::ProgramError;
use crate::programs::run::stop_on_signals;
use crate::shm::mapping::MappedRange;

/// What `hold` can be told.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct HoldArgs {
    /// The secret
    #[arg(long, value_name = "SEED")]
    pub secret: u64,
}

/// Runs `hold` until it is asked to end.
///
/// # Errors
/// If there is no page to be had.
pub fn run(args: &HoldArgs) -> Result<(), ProgramError> {
    let system = |what| move |source| ProgramError::System { what, source };
    let stop = stop_on_signals()?;
    let page = Arc::new(MappedRange::locked_pages(Secret::LEN as usize).map_err(system("a locked page"))?);
    let page = page.shared();
    Secret::new(args.secret).fill(&page)?;
    crate::programs::say("{\"holding\":true}");
    while !stop.is_requested() {
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
