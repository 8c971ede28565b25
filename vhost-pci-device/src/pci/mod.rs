//! The PCI side of the function: registers without I/O.
//!
//! | file | what it holds |
//! |---|---|
//! | [`config`] | configuration space: bytes, and which of their bits can be written |
//! | [`bar`] | the two BARs: what is where in them, sizing, addresses |
//! | [`capability`] | the capability list |
//! | [`msix`] | the MSI-X table |

pub mod bar;
pub mod capability;
pub mod config;
pub mod msix;
