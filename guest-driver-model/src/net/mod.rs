//! Virtio-net packets over rings (virtio 1.3, 5.1): bursts in the manner of DPDK's
//! `rx_burst` and `tx_burst`, for both sides of a link.
//!
//! | module | what it holds |
//! |---|---|
//! | [`header`] | the header before each packet |
//! | [`offload`] | what it may leave to the receiver: checksums and segments |
//! | [`burst`] | private storage of a burst of received packets |
//! | [`lent`] | a burst of packets that stay in the owner's buffers |
//! | [`forward`] | packets from one owner to another with one copy, or to several with one each |
//! | [`passage`] | buffers of a vring that are passed on to a device of this VM, and come back |
//! | [`peer`] | the peer's port: the device half of the owner's queues, each by itself |
//! | [`owner`] | the owner's port: the driver half, with buffers in its own memory, each by itself |
//! | [`spread`] | which of several pairs a flow goes by |
//! | [`crossover`] | two cards of an owner, of which each transmits what the other receives |
//! | `receive` | what the peer's port receives |
//! | `ethernet` | the header of a frame, as far as anybody looks at it |
//! | `segment` | cuts a TCP segment that its receiver does not take in one piece |
//! | `transmit`, `store` | what it transmits: into the window, and beyond it |
//! | `vring` | a vring of a card's, besides what every vring has |
//! | [`layout`] | where an owner's port keeps its rings and buffers |
//!
//! Vring `2 * pair` is the owner's receive queue, `2 * pair + 1` its transmit queue
//! (5.1.2). What the owner transmits the peer receives.

pub mod burst;
pub mod crossover;
mod ethernet;
pub mod forward;
pub mod header;
pub mod layout;
pub mod lent;
pub mod offload;
pub mod owner;
pub mod passage;
pub mod peer;
mod receive;
mod segment;
pub mod spread;
mod store;
mod transmit;
mod vring;

pub use burst::{Packet, PacketBurst};
pub use forward::{
    Copied, ForwardFault, Forwarded, Lane, Pick, copy_lent, forward_burst, forward_burst_by, receive_lent,
    send_copies,
};
pub use header::{HEADER_LEN, MAX_FRAME, NetHeader};
pub use layout::{LayoutError, OwnerConfig, OwnerLayout};
pub use lent::{LentBurst, LentPacket};
pub use offload::Offloads;
pub use owner::{OwnerPort, OwnerQueue};
pub use peer::{PeerPort, PeerQueue};

/// The owner's receive queue of a pair.
pub const fn receive_vring(pair: u16) -> u16 {
    pair.wrapping_mul(2)
}

/// The owner's transmit queue of a pair.
pub const fn transmit_vring(pair: u16) -> u16 {
    pair.wrapping_mul(2).wrapping_add(1)
}

/// What has passed through a port. Received and transmitted are as the port's own
/// side sees it; bytes are those of frames, without headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received that were not whole, and dropped.
    pub rx_drops: u64,
    /// Packets transmitted.
    pub tx_packets: u64,
    /// Bytes transmitted.
    pub tx_bytes: u64,
    /// Packets to transmit that no buffer of the other side can take, or whose header asks for what
    /// it does not accept, dropped.
    pub tx_drops: u64,
}

counts!(Counters { rx_packets, rx_bytes, rx_drops, tx_packets, tx_bytes, tx_drops });

#[cfg(test)]
mod fetch_tests;
