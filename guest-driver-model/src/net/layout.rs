//! Where an owner's port keeps its rings and buffers in a memory of its own.
//! Touches no memory.
//!
//! For each vring, from the start of a page: descriptor table, available ring, used
//! ring, indirect tables if there are any, and from the next page on its buffers, one
//! for each descriptor.
//!
//! ```text
//! a buffer:  | unused, 52 bytes | header, 12 | frame, `buffer_len` - 64 bytes ...  |
//!            ^ cache line                    ^ cache line
//! ```
//!
//! Header and frame are contiguous, as one descriptor wants them, and on cache lines of
//! their own: a header that is the same for each packet is written once, and its line is
//! then in both processors' caches and stays there.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::header::{HEADER_LEN, MAX_FRAME};
use super::offload;
use crate::link::VringInfo;
use crate::ring::layout::is_valid_size;
use crate::ring::{IndirectTables, RingFeatures, RingPlaces};

const PAGE: u64 = 4096;
/// Bytes of a buffer before the frame: a cache line, of which the header is the end.
pub(super) const HEADROOM: usize = 64;
/// Where the header is in a buffer.
pub(super) const HEADER_AT: usize = HEADROOM - HEADER_LEN;
/// Pieces of the longest indirect buffer.
const TABLE_ENTRIES: u16 = 64;

/// What an owner's port is to be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerConfig {
    /// Queue pairs; at least 1.
    pub pairs: u16,
    /// Entries of each ring; a power of two, at most 32768.
    pub ring_size: u16,
    /// Length of each buffer, bytes; a multiple of 64, at least 128. The first 64 are the
    /// header's; a frame longer than the rest is transmitted in several pieces. Buffers lie
    /// one behind the other: a length that is no power of two spreads them over all sets of
    /// the caches.
    pub buffer_len: u32,
    /// Received packets may take several buffers (VIRTIO_NET_F_MRG_RXBUF).
    pub mergeable: bool,
    /// Packets in several pieces are transmitted through indirect tables
    /// (VIRTIO_F_INDIRECT_DESC).
    pub indirect: bool,
    /// Each side names the entry that it wants to be notified of (VIRTIO_F_EVENT_IDX).
    pub event_idx: bool,
    /// The rings are packed ones (VIRTIO_F_RING_PACKED).
    pub packed: bool,
    /// Buffers come back in order (VIRTIO_F_IN_ORDER).
    pub in_order: bool,
    /// Checksums and segments may be left to the receiver, both ways (VIRTIO_NET_F_CSUM and the
    /// others of [`offload::FEATURES`]).
    pub offloads: bool,
}

impl Default for OwnerConfig {
    fn default() -> Self {
        Self {
            pairs: 1,
            ring_size: 256,
            buffer_len: 1600,
            mergeable: true,
            indirect: false,
            event_idx: true,
            packed: false,
            in_order: false,
            offloads: false,
        }
    }
}

impl OwnerConfig {
    /// The virtio features that a driver with this configuration accepts, as far as
    /// this crate's data path cares.
    pub fn features(&self) -> u64 {
        let ring = self.ring_features().bits();
        let offloads = if self.offloads { offload::FEATURES } else { 0 };
        1 << VIRTIO_F_VERSION_1 | u64::from(self.mergeable) << VIRTIO_NET_F_MRG_RXBUF | ring | offloads
    }

    /// Those that are about its rings.
    pub fn ring_features(&self) -> RingFeatures {
        RingFeatures {
            indirect: self.indirect,
            event_idx: self.event_idx,
            packed: self.packed,
            in_order: self.in_order,
        }
    }

    /// Buffers that a frame takes when it is transmitted.
    #[inline]
    pub(super) fn pieces(&self, frame_len: usize) -> usize {
        let room = self.room();
        // No division for what is common.
        if frame_len <= room { 1 } else { frame_len.div_ceil(room) }
    }

    /// Bytes of a frame that a buffer takes.
    #[inline]
    pub fn room(&self) -> usize {
        (self.buffer_len as usize).saturating_sub(HEADROOM)
    }
}

/// Why there is no layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A field of the configuration has a value that it does not allow.
    #[error("not a possible configuration: {0:?}")]
    Config(OwnerConfig),
    /// The memory is too small.
    #[error("the port takes {needed:#x} bytes, the memory has {available:#x}")]
    TooSmall {
        /// What the rings and buffers take, bytes.
        needed: u64,
        /// What there is, bytes.
        available: u64,
    },
}

/// Where one vring and its buffers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringLayout {
    /// The ring.
    pub places: RingPlaces,
    /// Its indirect tables.
    pub tables: Option<IndirectTables>,
    /// Its first buffer, bytes from the start of the memory; the others follow.
    pub buffers: u64,
}

/// Where everything of an owner's port is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerLayout {
    config: OwnerConfig,
    vrings: Vec<VringLayout>,
    end: u64,
}

impl OwnerLayout {
    /// Lays the port out from `offset` (rounded up to a page) on in a memory of
    /// `memory_len` bytes.
    pub fn new(config: OwnerConfig, offset: u64, memory_len: u64) -> Result<Self, LayoutError> {
        let possible = config.pairs > 0
            && config.pairs <= 1 << 14
            && is_valid_size(u32::from(config.ring_size))
            && config.buffer_len.is_multiple_of(64)
            && (128..=1 << 20).contains(&config.buffer_len);
        if !possible {
            return Err(LayoutError::Config(config));
        }
        let too_small = |needed| LayoutError::TooSmall { needed, available: memory_len };
        let mut vrings = Vec::new();
        let mut end = offset.checked_next_multiple_of(PAGE).ok_or_else(|| too_small(u64::MAX))?;
        for vring in 0..2 * config.pairs {
            // Beyond the memory's end nothing is worth laying out; and no sum below
            // can overflow.
            if end > memory_len {
                return Err(too_small(end));
            }
            let (places, ring_end) = RingPlaces::at(end, config.ring_size);
            let entries = TABLE_ENTRIES.min(config.ring_size);
            let with_tables = config.indirect && vring % 2 == 1;
            let tables = with_tables.then_some(IndirectTables { offset: ring_end, entries });
            let tables_len = tables.map_or(0, |tables| IndirectTables::len(tables.entries, config.ring_size));
            let buffers = (ring_end + tables_len).next_multiple_of(PAGE);
            vrings.push(VringLayout { places, tables, buffers });
            end =
                (buffers + u64::from(config.buffer_len) * u64::from(config.ring_size)).next_multiple_of(PAGE);
        }
        if end > memory_len {
            return Err(too_small(end));
        }
        Ok(Self { config, vrings, end })
    }

    /// What was asked for.
    pub fn config(&self) -> &OwnerConfig {
        &self.config
    }

    /// By vring number.
    pub fn vrings(&self) -> &[VringLayout] {
        &self.vrings
    }

    /// The first offset behind all of it, bytes; a multiple of the page size.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The vrings as the link page would tell them, if the memory started at
    /// `iova_base`.
    pub fn infos(&self, iova_base: u64) -> Vec<VringInfo> {
        self.vrings.iter().map(|vring| vring.places.info(iova_base)).collect()
    }

    /// The longest frame that can be transmitted, bytes.
    pub fn max_frame(&self) -> usize {
        let buffers = usize::from(self.config.ring_size);
        (buffers * self.config.room()).min(MAX_FRAME)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_fits_its_memory_exactly_or_is_refused() {
        let config = OwnerConfig { pairs: 2, indirect: true, ..OwnerConfig::default() };
        let layout = OwnerLayout::new(config, 100, 1 << 30).unwrap();
        let end = layout.end();
        assert_eq!(OwnerLayout::new(config, 100, end), Ok(layout));
        assert!(matches!(OwnerLayout::new(config, 100, end - 1), Err(LayoutError::TooSmall { .. })));
        assert!(matches!(OwnerLayout::new(config, u64::MAX, end), Err(LayoutError::TooSmall { .. })));
    }

    #[test]
    fn impossible_configurations_are_refused() {
        let good = OwnerConfig::default();
        for config in [
            OwnerConfig { pairs: 0, ..good },
            OwnerConfig { ring_size: 100, ..good },
            OwnerConfig { buffer_len: 64, ..good },
            OwnerConfig { buffer_len: 100, ..good },
        ] {
            assert_eq!(OwnerLayout::new(config, 0, 1 << 30), Err(LayoutError::Config(config)));
        }
    }
}
