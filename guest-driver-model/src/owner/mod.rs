//! An owner without a VM: its memory, its driver's port, and a model of its VMM.
//!
//! | module | what it holds |
//! |---|---|
//! | [`memory`] | guest RAM in a sealed memfd |
//! | [`vmm`] | a vhost-user front-end towards the broker, as QEMU with a virtio-net card |
//!
//! The driver itself is [`OwnerPort`](crate::net::OwnerPort).

pub mod memory;
pub mod vmm;

pub use memory::OwnerMemory;
pub use vmm::{Kicks, OwnerError, OwnerVmm};
