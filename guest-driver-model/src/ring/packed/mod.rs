//! Packed virtqueues (virtio 1.3, 2.8), both halves.
//!
//! | module | what it holds |
//! |---|---|
//! | [`layout`] | lengths of the three areas, and what is where in them |
//! | [`position`] | a slot and the lap in which it is meant; whose flags say it is |
//! | [`event`] | notification suppression |
//! | `popped` | the chains that the device half has taken and not yet given back |
//! | [`device`] | the device half |
//! | [`driver`] | the driver half |

pub mod device;
pub mod driver;
pub mod event;
pub mod layout;
mod popped;
pub mod position;
