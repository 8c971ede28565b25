//! The vhost-pci device.
//!
//! [`abi`] is everything that a guest's driver and the side that plays the
//! device (the broker) have to agree on. It is the machine-readable half of
//! `docs/vhost-pci-device.md`; section numbers in its comments are that
//! document's. The crate needs neither std nor an allocator, so a guest can use
//! it as it is.
#![no_std]
#![forbid(unsafe_code)]

pub mod abi;
