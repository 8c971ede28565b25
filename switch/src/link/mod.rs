//! A link: one owner device joined to one peer device, as a state machine without
//! I/O. Events of both front-ends go in, effects for the runtime come out.
//!
//! | file | what it holds |
//! |---|---|
//! | [`message`] | requests, replies, events, effects |
//! | [`descriptor`] | files and eventfds that front-ends sent |
//! | [`owner`], [`vring`] | what the owner's front-end has told |
//! | [`peer`] | what the peer's front-end has told |
//! | [`iommu`] | an owner with an IOMMU: what the peer asks for, what it is shown |
//! | [`log`] | the owner's dirty log: which can be taken |
//! | [`migration`] | when logging begins, and which of two owners' VMMs has the link |
//! | [`window`] | what the peer has mapped, and how that changes |
//! | [`release`] | what a device of the peer's VM has to let go of before it leaves the window |
//! | [`served`] | the burst that the peer's driver is in the middle of when its link ends |
//! | [`wiring`] | the owner's eventfds that the peer's VMM has |
//! | [`doorbell`] | the same for a VMM that knows `ivshmem-doorbell` only |
//! | [`notify`] | which way each notification goes |
//! | [`link_page`] | the bytes that the peer's guest reads |
//! | `requests`, `command` | requests of the two front-ends; commands of the peer's driver |
//! | `pending` | answers that wait until the peer has lost something |
//! | [`state`] | the link itself: it joins the others |
//! | [`view`] | what follows from its state for the peer: link page, wires |
//! | [`fault`], [`features`], [`report`] | errors, feature names, status |

mod command;
pub mod descriptor;
pub mod doorbell;
pub mod fault;
pub mod features;
pub mod iommu;
pub mod link_page;
pub mod log;
pub mod message;
pub mod migration;
pub mod notify;
pub mod owner;
pub mod peer;
mod pending;
pub mod release;
pub mod report;
mod requests;
pub mod served;
pub mod state;
pub mod view;
pub mod vring;
pub mod window;
pub mod wiring;

pub use fault::Fault;
pub use message::{Effect, Event, Side};
pub use state::Link;
