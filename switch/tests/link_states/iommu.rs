//! An owner with an IOMMU: what its front-end tells, what the peer's driver asks for, and
//! what the peer then holds.
//!
//! | file | what it holds |
//! |---|---|
//! | `page_table` | the guest's IOMMU, naively: the judge of what may be reached |
//! | `owner_vmm` | an owner's VMM that answers misses as QEMU does |
//! | `peer_driver` | the peer's driver: its commands and their answers |
//! | the others | one behaviour each |

#[path = "iommu/commands.rs"]
mod commands;
#[path = "iommu/fairness.rs"]
mod fairness;
#[path = "iommu/features.rs"]
mod features;
#[path = "iommu/invalidate.rs"]
mod invalidate;
#[path = "iommu/misses.rs"]
mod misses;
#[path = "iommu/owner_vmm.rs"]
pub mod owner_vmm;
#[path = "iommu/page_table.rs"]
pub mod page_table;
#[path = "iommu/peer_driver.rs"]
pub mod peer_driver;
#[path = "iommu/promotion.rs"]
mod promotion;
#[path = "iommu/push.rs"]
mod push;
#[path = "iommu/random.rs"]
pub mod random;
#[path = "iommu/rings.rs"]
mod rings;
#[path = "iommu/room.rs"]
mod room;
#[path = "iommu/strict.rs"]
mod strict;
