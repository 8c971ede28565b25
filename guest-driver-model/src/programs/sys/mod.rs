//! The programs' only `unsafe` code.
#![allow(unsafe_code)]

pub mod tun;
