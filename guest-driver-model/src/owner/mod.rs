//! An owner without a VM: its memory, its driver's port, and a model of its VMM.
//!
//! | module | what it holds |
//! |---|---|
//! | [`memory`] | guest RAM in a sealed memfd |
//! | [`vmm`] | a vhost-user front-end towards the broker, as QEMU with a virtio-net card |
//! | [`iommu`] | the VM's IOMMU, and what the front-end tells of it |
//! | [`iotlb`] | the messages by which it does |
//! | [`misses`] | answers what the broker asks |
//! | [`dma`] | the guest's driver of the IOMMU: addresses, mappings |
//! | [`addressing`] | what the card's driver maps, and when |
//!
//! The driver itself is [`OwnerPort`](crate::net::OwnerPort).

pub mod addressing;
pub mod dma;
pub mod iommu;
pub mod iotlb;
pub mod memory;
pub mod misses;
pub mod vmm;

pub use addressing::{Addressing, PacketMappings, StaticMappings, Untranslated};
pub use dma::{DmaError, IommuDriver};
pub use iommu::{IommuCounts, IommuProtocol, OwnerIommu, TellError};
pub use memory::OwnerMemory;
pub use vmm::{IommuLink, Kicks, OwnerError, OwnerVmm};
