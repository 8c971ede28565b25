//! The vhost-pci device.
//!
//! [`abi`] is everything that a guest's driver and the side that plays the
//! device (the broker) have to agree on. It is the machine-readable half of
//! `docs/vhost-pci-device.md`; section numbers in its comments are that
//! document's. It needs neither std nor an allocator, so a guest can use it as it is.
//!
//! With the feature `device` the crate is also the device itself: a PCI function that a
//! VMM built from rust-vmm's parts puts on its PCI bus (`docs/embedding.md`).
//!
//! | module | what it holds |
//! |---|---|
//! | `device` | `Device`: the assembled function |
//! | `vmm` | `Vmm`: what the function needs from its VMM |
//! | `pci` | configuration space, BARs, capabilities, MSI-X: registers, no I/O |
//! | `virtio` | the common configuration structure and its queues: registers, no I/O |
//! | `window` | what is shown where in the window, and the showing |
//! | `frontend` | the vhost-user connection to the broker, with its two threads |
//! | `sys` | system calls; the only `unsafe` |
#![cfg_attr(not(feature = "device"), no_std)]
#![deny(unsafe_code)]

pub mod abi;

#[cfg(feature = "device")]
pub mod device;
#[cfg(feature = "device")]
mod frontend;
#[cfg(feature = "device")]
mod pci;
#[cfg(feature = "device")]
mod sys;
#[cfg(feature = "device")]
mod virtio;
#[cfg(feature = "device")]
pub mod vmm;
#[cfg(feature = "device")]
mod window;

#[cfg(feature = "device")]
pub use device::{BarInfo, Device, DeviceError, HandshakeError, Options, Snapshot};
#[cfg(feature = "device")]
pub use vmm::{BarRange, Held, MsiMessage, Vmm, WindowSlot};

/// The page's skeleton of an embedding is compiled with the tests.
#[cfg(all(doctest, feature = "device"))]
#[doc = include_str!("../../docs/embedding.md")]
mod embedding {}
