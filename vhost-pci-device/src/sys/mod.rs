//! System calls that Rust cannot check: the only `unsafe` of the crate.
//!
//! | file | what it holds |
//! |---|---|
//! | [`reservation`] | an address range whose parts show files, or nothing |
//! | [`event`] | eventfds, and descriptors of types that predate `AsFd` |
#![allow(unsafe_code)]

pub mod event;
pub mod reservation;
