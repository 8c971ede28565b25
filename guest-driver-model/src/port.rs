//! A peer's port on a device of the owner's, of any kind: what whoever follows the link does with it.
//!
//! Owns: nothing. What moves through a port is the kind's own affair.

use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use crate::link::{LinkPage, LinkSnapshot};
use crate::reach::Demand;
use crate::ring::Fault;
use crate::shm::{SharedMemory, ShmError};

/// Why a link gives no port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// The link is not up.
    #[error("the link is not up")]
    NotUp,
    /// The owner's device is of another kind.
    #[error("the owner's device has virtio number {device}, not that of {wanted}")]
    OtherKind {
        /// The virtio device number.
        device: u32,
        /// What the port serves.
        wanted: &'static str,
    },
    /// The owner's driver is a legacy one.
    #[error("the owner's driver did not accept VIRTIO_F_VERSION_1 (features {features:#x})")]
    Legacy {
        /// What it accepted.
        features: u64,
    },
    /// The owner is being migrated, and its dirty log is not in this window.
    #[error("the owner's dirty log: {0}")]
    Log(#[from] ShmError),
    /// The owner's driver accepted features that this port does not serve.
    #[error("the owner's driver accepted features that are not known here: {features:#x}")]
    Unknown {
        /// Those features alone.
        features: u64,
    },
    /// The link does not say what the owner was told of its device.
    #[error("the link page has {len} bytes of the device's configuration space, where {needed} are needed")]
    Config {
        /// Bytes that it has.
        len: usize,
        /// Bytes that are looked at.
        needed: usize,
    },
}

/// The device half of all vrings of an owner's device. It belongs to one link generation and is
/// made anew for the next.
pub trait Port: Sized {
    /// Starts to serve all enabled vrings of the snapshot, which was taken of this page of
    /// this window.
    ///
    /// # Errors
    /// If the owner's device is not what the port serves.
    fn open(window: &SharedMemory, page: &LinkPage, snapshot: &LinkSnapshot) -> Result<Self, PortError>;

    /// The link generation that it belongs to.
    fn generation(&self) -> u64;

    /// Vrings; some may not be enabled.
    fn vrings(&self) -> u16;

    /// Whether the owner's front-end has enabled the vring.
    fn is_enabled(&self, vring: u16) -> bool;

    /// Asks the owner's driver for kicks of the vring, or not to kick. Whether chains are waiting
    /// already: who gets `true` must not sleep.
    ///
    /// # Errors
    /// If the vring is broken.
    fn set_kicks(&mut self, vring: u16, enabled: bool) -> Result<bool, Fault>;

    /// All faults so far, one for each broken vring.
    fn faults(&self) -> Vec<Fault>;

    /// What the device was asked for since the port was made.
    fn demand(&self) -> Demand;

    /// How long it will be before the device is asked again for what it did not have, if there is such a
    /// thing.
    fn pause(&self) -> Option<Duration>;
}

/// Whether a port can serve what the snapshot shows: a device of this number and name, whose driver
/// accepted no features but those that are `served`, which change its rings and what is in them.
pub(crate) fn check(
    snapshot: &LinkSnapshot,
    (number, wanted): (u32, &'static str),
    served: u64,
) -> Result<(), PortError> {
    let device = snapshot.owner_device;
    let unknown = snapshot.features & !served;
    match () {
        () if !snapshot.up => Err(PortError::NotUp),
        () if device != number => Err(PortError::OtherKind { device, wanted }),
        () if !snapshot.has_feature(VIRTIO_F_VERSION_1) => {
            Err(PortError::Legacy { features: snapshot.features })
        }
        () if unknown != 0 => Err(PortError::Unknown { features: unknown }),
        () => Ok(()),
    }
}
