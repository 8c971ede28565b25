//! An owner with an IOMMU: what of its memory the peer gets to see, and when.
//!
//! | file | what it holds |
//! |---|---|
//! | [`iotlb`] | what the owner's front-end has told of its guest's IOMMU |
//! | [`demand`] | what the peer's driver has asked for; the open question to the owner |
//! | [`denials`] | how often the owner may be asked in vain |
//! | [`shown`] | the ranges that the window is to show |
//! | [`listen`] | takes what the owner's front-end says |
//! | [`serve`] | serves the driver's commands, and asks for what is missing |
//! | [`room`] | what is chosen to be shown, and what makes room for it |

pub mod demand;
pub mod denials;
pub mod iotlb;
pub mod listen;
pub mod room;
pub mod serve;
pub mod shown;
