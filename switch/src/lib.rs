//! The vhost-pci broker: it receives one VM's memory over vhost-user, shows it to
//! another VM's VMM as the window of a vhost-pci device, joins their notifications,
//! and then stays out of the way.
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`] | what a configuration file may say |
//! | [`confine`] | what a running broker gives up |
//! | [`guardian`] | takes owners' memory back when the broker was killed |
//! | [`kind`] | what an owner's device can be: a network card, a disk |
//! | [`opener`] | makes sockets, which a confined broker cannot |
//! | [`link`] | one owner joined to one peer: a state machine without I/O |
//! | [`session`] | a front-end's connection: messages to requests |
//! | [`runtime`] | threads, sockets and descriptors around the links |
//! | [`control`] | `status`, `watch`, `plug`, `unplug`, `reload` |
//! | [`vm`] | plugs a link's devices into running VMs |
//! | [`demo`] | `demo`: a broker and two guest models on one machine |
//!
//! Data goes one way: `session` decodes, `link` decides, `runtime` carries out.
// `runtime::sys` and `session::sys` alone allow themselves some.
#![deny(unsafe_code)]

pub mod config;
pub mod confine;
pub mod control;
pub mod demo;
pub mod guardian;
pub mod kind;
pub mod link;
pub mod opener;
pub mod runtime;
pub mod session;
pub mod vm;
