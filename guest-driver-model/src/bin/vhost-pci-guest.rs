//! Drives a vhost-pci device from a guest. See `guest_driver_model::programs`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    match guest_driver_model::programs::main(std::env::args_os().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-pci-guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}
