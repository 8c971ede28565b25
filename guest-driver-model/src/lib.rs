//! The guests' side of a vhost-pci link.
//!
//! | module | what it holds |
//! |---|---|
//! | [`shm`] | memory that another VM can rewrite at any moment |
//! | [`link`] | the link page: generation, mappings, vrings |
//! | [`translate`] | IOVA to window, with a last-hit range |
//! | [`ring`] | split virtqueues: the device half and the driver half |
//! | [`net`] | virtio-net packets over rings: `rx_burst`, `rx_lend`, `tx_burst`, `forward_burst` |
//! | [`transport`] | the vhost-pci device: through sysfs, through VFIO, or a model of its VMM |
//! | [`control`] | the control ring |
//! | [`owner`] | an owner without a VM: its memory, its driver, a model of its VMM |
//! | [`programs`] | what `vhost-pci-guest` runs: tap, echo, sink, gen, owner |
// `shm` and the two modules `sys` alone allow themselves some.
#![deny(unsafe_code)]

pub mod control;
pub mod link;
pub mod net;
pub mod owner;
pub mod programs;
pub mod ring;
pub mod shm;
pub mod translate;
pub mod transport;
