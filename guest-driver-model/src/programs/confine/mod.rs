//! Programs that try whether a peer sees and changes what its owner maps, and nothing
//! else. Most of them run in pairs, one in each guest.
//!
//! | module | what it holds |
//! |---|---|
//! | [`secret`] | what is looked for |

pub mod secret;
