//! The owner's front-end: its messages, descriptors and back-end channel, by the fuzzer, through the
//! session's decoder and the link's driver.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vhost_pci_switch::link::Side;

fuzz_target!(|bytes: &[u8]| vhost_pci_fuzz::script::run(bytes, Side::Owner));
