//! What the broker's `status` says of an owner's IOMMU and of the window.

use std::fmt;

use anyhow::{Context, Result};
use serde_json::Value;

/// The figures of the first link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figures {
    pub misses: u64,
    pub updates: u64,
    pub invalidations: u64,
    pub denied: u64,
    pub mapped: u64,
    pub revoked: u64,
    /// Bytes that were copied for the peer, either way.
    pub copied: u64,
    /// Bytes of the owner's memory in the window, now and at most.
    pub in_use: u64,
    pub largest: u64,
}

impl Figures {
    pub fn of(status: &Value) -> Result<Self> {
        let link = &status["links"][0];
        let number = |part: &str, name: &str| {
            link[part][name].as_u64().with_context(|| format!("status has no {part}.{name}: {link}"))
        };
        let counter = |name| number("counters", name);
        Ok(Self {
            misses: counter("iotlb_misses")?,
            updates: counter("iotlb_updates")?,
            invalidations: counter("iotlb_invalidations")?,
            denied: counter("iotlb_denied")?,
            mapped: counter("mappings_made")?,
            revoked: counter("mappings_revoked")?,
            copied: counter("bytes_fetched")? + counter("bytes_stored")?,
            in_use: number("window", "mapped_bytes")?,
            largest: number("window", "largest_mapped_bytes")?,
        })
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "misses {}, updates {}, invalidations {}, denied {}, maps {}, revocations {}, {} KiB copied, \
             window {} KiB in use, {} KiB at most",
            self.misses,
            self.updates,
            self.invalidations,
            self.denied,
            self.mapped,
            self.revoked,
            self.copied >> 10,
            self.in_use >> 10,
            self.largest >> 10,
        )
    }
}
