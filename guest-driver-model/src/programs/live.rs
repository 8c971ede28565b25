//! What a session has while its link is up: the port, what the device knows of it, and which of
//! its vrings are slept for. Sends nothing.

use super::peer_loop::PeerProgram;
use crate::net::{PeerPort, receive_vring, transmit_vring};
use crate::ring::Fault;

/// A link that is up.
pub(super) struct Live {
    /// The owner's vrings.
    pub port: PeerPort,
    /// The owner has an IOMMU, so the device is asked for what the window does not show.
    pub asks: bool,
    /// Faults that the device was told of.
    pub reported: Vec<Fault>,
    /// The device is still to be told of what has changed, by ATTACH.
    pub attach_owed: bool,
}

impl Live {
    /// The vrings that the program sleeps for.
    pub fn waited_for(&self, program: &dyn PeerProgram) -> Vec<u16> {
        let of_pair = |pair| {
            let packets = program.takes_packets(pair).then_some(transmit_vring(pair));
            let buffers = program.waits_for_buffers(pair).then_some(receive_vring(pair));
            packets.into_iter().chain(buffers)
        };
        (0..self.port.pairs()).flat_map(of_pair).collect()
    }

    /// Asks for kicks of all of the vrings, or of none. Whether one has work already, of which
    /// no kick will tell.
    pub fn set_kicks(&mut self, vrings: &[u16], enabled: bool) -> bool {
        // A fault shows again with the next burst.
        let set = |work, vring: &u16| work | self.port.set_kicks(*vring, enabled).unwrap_or(false);
        vrings.iter().fold(false, set)
    }
}
