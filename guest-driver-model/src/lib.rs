//! The guests' side of a vhost-pci link.
//!
//! | module | what it holds |
//! |---|---|
//! | [`shm`] | memory that another VM can rewrite at any moment |
//! | [`link`] | the link page: generation, mappings, vrings |
//! | [`translate`] | IOVA to window, with a last-hit range |
//! | [`ring`] | split virtqueues: the device half and the driver half |
//! | [`reach`] | what a peer's port needs besides rings: the mapping table of now, and the device |
//! | [`port`] | a peer's port on a device of any kind |
//! | [`net`] | virtio-net packets over rings: `rx_burst`, `rx_lend`, `tx_burst`, `forward_burst` |
//! | [`blk`] | virtio-blk requests: a disk for the owner |
//! | [`nic`] | a network card of this VM that reads and writes the owner's buffers where they lie |
//! | [`transport`] | the vhost-pci device: through sysfs, through VFIO, or a model of its VMM |
//! | [`control`] | the control ring |
//! | [`owner`] | an owner without a VM: its memory, its driver, a model of its VMM |
//! | [`programs`] | what `vhost-pci-guest` runs: tap, echo, sink, gen, owner |
// `shm` and the two modules `sys` alone allow themselves some.
#![deny(unsafe_code)]

/// Counts are added field by field.
macro_rules! counts {
    ($counts:ident { $($field:ident),* }) => {
        impl std::ops::Add for $counts {
            type Output = Self;

            fn add(self, other: Self) -> Self {
                Self { $($field: self.$field + other.$field),* }
            }
        }
    };
}

pub mod blk;
pub mod control;
pub mod link;
pub mod net;
pub mod nic;
pub mod owner;
pub mod port;
pub mod programs;
pub mod reach;
pub mod ring;
pub mod shm;
pub mod translate;
pub mod transport;
