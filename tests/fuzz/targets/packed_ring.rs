//! The device half of a packed ring: size, addresses, mappings, indices and descriptors by the
//! fuzzer, rewritten between the device's calls and, by another thread, during them.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| vhost_pci_fuzz::rings::run(bytes, true));
