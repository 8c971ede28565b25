//! An IOMMU with the requests of virtio-iommu (virtio 1.3, 5.13): endpoints, the
//! domains that they are in, and what is mapped there. It takes a request's bytes and
//! gives the answer's, and tells what changed for whom; queues, memory and messages
//! are its user's.
//!
//! | module | what it holds |
//! |---|---|
//! | [`wire`] | the bytes of requests, properties and fault reports |
//! | `domain` | an address space: overlap, splits, walks over mappings |
//! | `device` | requests, endpoints, translation |
//! | `outcome` | answers, changes, faults |
//! | `settings` | what the device is like, and its endpoints |
//! | `probe` | an endpoint's properties, written and read |
//!
//! ```
//! use iommu::virtio_iommu::{EndpointId, Iommu, Settings, Status, wire};
//! use iommu::{Access, Gpa, Iova};
//! use zerocopy::IntoBytes;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut iommu = Iommu::new(Settings::default());
//! iommu.add_endpoint(EndpointId(8), Vec::new())?;
//! let attach = wire::ReqAttach::new(1, 8, 0);
//! let map = wire::ReqMap::new(1, 0x1000..=0x1fff, 0xa000, wire::VIRTIO_IOMMU_MAP_F_READ);
//! for request in [attach.as_bytes(), map.as_bytes()] {
//!     let outcome = iommu.request(request, size_of::<wire::ReqTail>());
//!     assert_eq!(outcome.status(), Some(Status::Ok));
//!     println!("{:?}", outcome.changes);
//! }
//! let pieces = iommu.translate(EndpointId(8), Iova::new(0x1010), 16, Access::Read)?;
//! assert_eq!(pieces[0].start(), Gpa::new(0xa010));
//! assert!(iommu.translate(EndpointId(8), Iova::new(0x1010), 16, Access::Write).is_err());
//! # Ok(())
//! # }
//! ```

mod device;
mod domain;
mod outcome;
mod probe;
mod settings;
pub mod wire;

pub use device::Iommu;
pub use domain::{Mapping, Reached};
pub use outcome::{Change, Fault, FaultReason, Outcome, Untranslated};
pub use probe::{Reserved, parse_properties};
pub use settings::{DomainId, EndpointError, EndpointId, Settings};
pub use wire::Status;
