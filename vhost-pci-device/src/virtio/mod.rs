//! The virtio side of the function: registers without I/O.
//!
//! | file | what it holds |
//! |---|---|
//! | [`common_config`] | the common configuration structure and the device status |
//! | [`queue`] | one virtqueue's registers |

pub mod common_config;
pub mod queue;
