//! What a test needs to run real virtual machines and programs around them, and to say what
//! went wrong when one fails. Owns no test: those are the scenarios in `vm/`.
//!
//! ```no_run
//! # use std::time::Duration;
//! # use vhost_pci_tests::Sandbox;
//! # fn main() -> anyhow::Result<()> {
//! let sandbox = Sandbox::open()?;
//! let mut guest = sandbox
//!     .guest("peer")
//!     .args(["-device", "intel-iommu,intremap=on"])
//!     .kernel_arg("intel_iommu=on")
//!     .modules(["vfio-pci"])
//!     .spawn()?;
//! guest.wait_ready(Duration::from_secs(60))?;
//! println!("{}", guest.sh_ok("uname -r", Duration::from_secs(5))?);
//! # Ok(())
//! # }
//! ```
#![deny(unsafe_code)]

mod console;
mod guest;
mod newc;
pub mod pcap;
mod process;
mod qmp;
mod random;
mod sandbox;
mod sys;
mod usage;

pub use console::Output;
pub use guest::{Guest, GuestConfig};
pub use process::Process;
pub use random::Random;
pub use sandbox::Sandbox;
pub use usage::Usage;
