//! The virtio side of the function: registers without I/O.
//!
//! | file | what it holds |
//! |---|---|
//! | [`common`] | the common configuration structure and the device status |
//! | [`queue`] | one virtqueue's registers |

pub mod common;
pub mod queue;
