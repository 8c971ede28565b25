//! `vhost-pci-guest` of a test build: it leaves out marking what the environment variable
//! VHOST_PCI_UNLOGGED says (`ring` or `payload`) while its owner is migrated.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    match guest_driver_model::programs::main(std::env::args_os().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-pci-guest-unlogged: {error:#}");
            ExitCode::FAILURE
        }
    }
}
