//! Virtqueues, both halves, over memory that another VM can rewrite at any moment.
//!
//! | module | what it holds |
//! |---|---|
//! | [`features`] | what of the format is negotiated |
//! | [`layout`] | geometry: sizes, alignments, where the three areas are |
//! | [`chain`] | what a popped burst of descriptor chains is |
//! | [`device`] | the device half, which a peer plays through the window |
//! | [`walk`] | the walk along one chain, and how its buffers are found |
//! | [`miss`] | what the device half cannot reach, and what was found out about it |
//! | [`driver`] | the driver half, which an owner's guest plays in its own memory |
//! | [`word`] | a word that both sides reach, and in which orders |
//! | [`split`] | both halves in the split format (virtio 1.3, 2.7) |
//! | [`packed`] | both halves in the packed format (2.8) |
//!
//! What a port does with a ring is five operations: pop a burst of chains, push used
//! entries, flush them, ask whether to notify, and (un)suppress notifications. None of
//! them shows the ring's format: [`DeviceRing`] and [`DriverRing`] forward them to the
//! format's own half, and each fills the same [`ChainBurst`]. There is no second data path.

pub mod chain;
pub mod device;
pub mod driver;
pub mod features;
pub mod layout;
pub mod miss;
pub mod packed;
pub mod split;
mod table;
pub mod walk;
pub mod word;

pub use chain::{Chain, ChainBurst, Direction, Place, Segment};
pub use device::{DeviceRing, Fault, next_base};
pub use driver::{AddError, Buffer, Completion, DriverFault, DriverFaultKind, DriverRing, IndirectTables};
pub use features::RingFeatures;
pub use layout::{RingConfig, RingPlaces};
pub use miss::{Finding, Miss, OnMiss, Want};

#[cfg(test)]
pub(crate) mod fetch_tests;
