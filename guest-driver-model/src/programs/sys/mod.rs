//! The programs' only `unsafe` code.

pub mod tun;
