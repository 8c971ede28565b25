//! Split virtqueues (virtio 1.3, 2.7), both halves.
//!
//! | module | what it holds |
//! |---|---|
//! | [`layout`] | lengths of the three areas, and what is where in them |
//! | [`index`] | index publication and notification suppression; nothing else orders memory |
//! | [`device`] | the device half |
//! | [`driver`] | the driver half |

pub mod device;
pub mod driver;
pub mod index;
pub mod layout;
