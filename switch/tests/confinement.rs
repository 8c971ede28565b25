//! The broker's process without privileges: what it gives up, that a link works all the same, and
//! that what it must not do ends it. As user nobody, where the tests are root's.
//!
//! | file | what it holds |
//! |---|---|
//! | `bench` | a folder, a broker in it and guest models, all of them processes |
//! | `given_up` | what the kernel says of the process, and `status` |
//! | `works` | links of every kind under the filter |
//! | `forbidden` | what ends the process, or is refused |
//! | `admission` | who may join a link |
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "confinement/admission.rs"]
mod admission;
#[path = "confinement/bench.rs"]
mod bench;
#[path = "confinement/forbidden.rs"]
mod forbidden;
#[path = "confinement/given_up.rs"]
mod given_up;
#[path = "confinement/works.rs"]
mod works;
