//! What the fuzz targets share.
//!
//! | module | what it holds |
//! |---|---|
//! | [`input`] | the fuzzer's bytes as a list of choices |
//! | [`memory`] | memory between pages that nobody may touch |
//! | [`scribbler`] | a thread that rewrites such memory |
//! | [`rings`] | a device half of a ring over it |
//! | [`ring_writer`] | what its driver stores |
//! | [`packets`] | packets with headers, some of them right |
//! | [`census`] | descriptors and threads of the process |
//! | [`broker`] | a link with its real driver, without listening sockets |
//! | [`front`] | a vhost-user front-end that sends what it likes |
//! | [`messages`] | what it can send |
//! | [`commands`] | what a peer's driver can ask for on the control ring |
//! | [`script`] | what such a front-end does, by the fuzzer's choice |
//! | `sys` | the `unsafe` code |
//!
//! A target is a file of `targets/`, a seed corpus of `corpus/` and perhaps a dictionary of
//! `dict/`. Any panic, in whatever thread, ends the fuzzer: what must hold is asserted.
#![deny(unsafe_code)]

pub mod broker;
pub mod census;
pub mod commands;
pub mod front;
pub mod input;
pub mod memory;
pub mod messages;
pub mod packets;
pub mod ring_writer;
pub mod rings;
pub mod scribbler;
pub mod script;
mod sys;

pub use sys::ignore_sigpipe;
