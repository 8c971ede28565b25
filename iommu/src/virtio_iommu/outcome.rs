//! What comes of a request and of an access: answers, changes and faults. Values
//! only.

use thiserror::Error;
use zerocopy::FromBytes;
use zerocopy::little_endian::{U32, U64};

use super::settings::EndpointId;
use super::wire::{
    FaultReport, ReqTail, Status, VIRTIO_IOMMU_FAULT_F_ADDRESS, VIRTIO_IOMMU_FAULT_F_READ,
    VIRTIO_IOMMU_FAULT_F_WRITE, VIRTIO_IOMMU_FAULT_R_DOMAIN, VIRTIO_IOMMU_FAULT_R_MAPPING,
};
use crate::address::{Gpa, Iova, Span, SpanError};
use crate::map::Access;

/// What a request changed for an endpoint. Mappings that give no memory (registers, or
/// neither access) appear in none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A range can be reached now.
    Mapped {
        /// The endpoint.
        endpoint: EndpointId,
        /// The range.
        iova: Span<Iova>,
        /// Where its first address leads.
        gpa: Gpa,
        /// What it may do there.
        access: Access,
    },
    /// A range, as it was mapped, cannot be reached any more.
    Unmapped {
        /// The endpoint.
        endpoint: EndpointId,
        /// The range.
        iova: Span<Iova>,
    },
    /// All memory can be reached untranslated now.
    BypassOn {
        /// The endpoint.
        endpoint: EndpointId,
    },
    /// That is over.
    BypassOff {
        /// The endpoint.
        endpoint: EndpointId,
    },
}

/// What came of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// What goes into the writable part of the request's buffer, from its start; its
    /// length is the used length. Empty if the request could not be parsed.
    pub response: Vec<u8>,
    /// What changed, in the order in which it has to be carried out.
    pub changes: Vec<Change>,
}

impl Outcome {
    /// The status in the response, if there is one.
    pub fn status(&self) -> Option<Status> {
        let (_, tail) = ReqTail::read_from_suffix(&self.response).ok()?;
        Status::from_code(tail.status)
    }
}

/// Why an access of an endpoint was not let through (5.13.6.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultReason {
    /// It is in no domain, and not in bypass mode.
    Domain,
    /// The address is not mapped, or not as memory, or not for this access.
    Mapping,
}

/// An access that was not let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("endpoint {}: {wanted} access at {address} faults: {reason:?}", endpoint.0)]
pub struct Fault {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// Why.
    pub reason: FaultReason,
    /// What it wanted to do.
    pub wanted: Access,
    /// The first address that it does not reach.
    pub address: Iova,
}

impl Fault {
    /// As the event queue tells it.
    pub fn report(&self) -> FaultReport {
        let direction = match self.wanted {
            Access::Read => VIRTIO_IOMMU_FAULT_F_READ,
            Access::Write => VIRTIO_IOMMU_FAULT_F_WRITE,
            Access::ReadWrite => VIRTIO_IOMMU_FAULT_F_READ | VIRTIO_IOMMU_FAULT_F_WRITE,
        };
        FaultReport {
            reason: match self.reason {
                FaultReason::Domain => VIRTIO_IOMMU_FAULT_R_DOMAIN,
                FaultReason::Mapping => VIRTIO_IOMMU_FAULT_R_MAPPING,
            },
            reserved: [0; 3],
            flags: U32::new(direction | VIRTIO_IOMMU_FAULT_F_ADDRESS),
            endpoint: U32::new(self.endpoint.0),
            reserved1: U32::ZERO,
            address: U64::new(self.address.raw()),
        }
    }
}

/// Why an access leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Untranslated {
    /// It is no range of addresses: the endpoint's own mistake.
    #[error(transparent)]
    Range(#[from] SpanError),
    /// The IOMMU does not let it through.
    #[error(transparent)]
    Fault(#[from] Fault),
}
