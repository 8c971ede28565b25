//! What a session has while its link is up: the port, and what the device knows of it. Sends
//! nothing.

use crate::net::PeerPort;
use crate::port::Port;
use crate::ring::Fault;

/// A link that is up.
pub(super) struct Live<P = PeerPort> {
    /// The owner's vrings.
    pub port: P,
    /// The owner has an IOMMU, so the device is asked for what the window does not show.
    pub asks: bool,
    /// Faults that the device was told of.
    pub reported: Vec<Fault>,
    /// The device is still to be told of what has changed, by ATTACH.
    pub attach_owed: bool,
}

impl<P: Port> Live<P> {
    /// Asks for kicks of all of the vrings, or of none. Whether one has work already, of which
    /// no kick will tell.
    pub fn set_kicks(&mut self, vrings: &[u16], enabled: bool) -> bool {
        // A fault shows again with the next burst.
        let set = |work, vring: &u16| work | self.port.set_kicks(*vring, enabled).unwrap_or(false);
        vrings.iter().fold(false, set)
    }
}
