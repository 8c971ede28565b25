//! The link as a state machine: events in, effects out, with a model of the peer's
//! VMM in place of a process. No sockets, threads or clocks.
//!
//! | file | what it holds |
//! |---|---|
//! | `bench` | runs the effects as the runtime does, and checks what must always hold |
//! | `vmm` | the model of the peer's VMM: what it has mapped, what it was asked |
//! | `lent` | a device of the peer's VM that uses the window, and its driver |
//! | `front_end` | requests as front-ends make them, and what the owner shares by them |
//! | the others | one behaviour each |
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "link_states/bench.rs"]
mod bench;
#[path = "link_states/bring_up.rs"]
mod bring_up;
#[path = "link_states/control.rs"]
mod control;
#[path = "link_states/disk.rs"]
mod disk;
#[path = "link_states/doorbell.rs"]
mod doorbell;
#[path = "link_states/front_end.rs"]
mod front_end;
#[path = "link_states/iommu.rs"]
mod iommu_owner;
#[path = "link_states/lent.rs"]
mod lent;
#[path = "link_states/migration.rs"]
mod migration;
#[path = "link_states/peer_restart.rs"]
mod peer_restart;
#[path = "link_states/peer_trouble.rs"]
mod peer_trouble;
#[path = "link_states/random.rs"]
mod random;
#[path = "link_states/release.rs"]
mod release;
#[path = "link_states/requests.rs"]
mod requests;
#[path = "link_states/revocation.rs"]
mod revocation;
#[path = "link_states/served.rs"]
mod served;
#[path = "link_states/unplug.rs"]
mod unplug;
#[path = "link_states/vmm.rs"]
mod vmm;
#[path = "link_states/wirer.rs"]
mod wirer;
#[path = "link_states/wiring.rs"]
mod wiring;
