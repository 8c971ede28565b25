//! All `unsafe` of this example: the guests' code as bytes, memory slots, descriptors.

pub mod blobs;
pub mod fd;
pub mod slots;
pub mod window;
