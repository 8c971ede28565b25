//! The transport's only `unsafe` code: memory mappings, device registers, DMA.
//!
//! Everything here is offered through safe functions. No reference into a mapping
//! ever leaves these files.
#![allow(unsafe_code)]

pub mod device;
pub mod dma;
pub mod event;
pub mod fd;
pub mod irq;
pub mod mmio;
pub mod reservation;
