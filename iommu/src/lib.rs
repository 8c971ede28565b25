//! The address arithmetic of a vhost-pci link. It owns every translation between
//! the owner's address spaces and the peer's window, and never does I/O: files are
//! opaque handles, time and messages do not exist here.
//!
//! Four values follow from each other, each computed from the one before it:
//!
//! 1. [`MemoryTable`]: which pieces of which files are the owner's memory, and
//!    under which guest and front-end addresses (vhost-user `SET_MEM_TABLE`,
//!    `ADD_MEM_REG`, `REM_MEM_REG`).
//! 2. [`IovaMap`]: what of it the owner's IOMMU allows its device to reach, under
//!    which IOVA and with which [`Access`]. Without a virtual IOMMU it is
//!    [`IovaMap::identity`]; with one, each vhost-user IOTLB update goes through
//!    [`MemoryTable::by_frontend`] and [`IovaMap::insert`].
//! 3. [`WindowLayout`]: where each mapped range appears in the peer's window.
//! 4. [`difference`]: the maps and unmaps that lead from one layout to the next.
//!
//! [`virtio_iommu`] is an IOMMU itself, for who plays the owner's VMM: what its
//! requests map, the owner's front-end tells the broker.
//!
//! A handle `R` (an index, an `Arc` with an identity) needs `Clone` and
//! `PartialEq` only. Two equal handles must mean the same file; one file that comes
//! under two unequal handles is merely mapped anew.
//!
//! ```
//! use iommu::{
//!     Change, FrontendVa, Gpa, Iova, IovaMap, MemoryTable, NewRegion, Span, WindowGeometry,
//!     WindowLayout, WindowOffset, difference,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut memory = MemoryTable::new(8);
//! memory.add(NewRegion {
//!     guest: Gpa::new(0),
//!     frontend: FrontendVa::new(0x7f00_0000_0000),
//!     len: 512 << 20,
//!     handle: "memfd",
//!     offset: 0,
//!     file_len: 512 << 20,
//! })?;
//! let map = IovaMap::identity(&memory);
//!
//! let data = Span::new(WindowOffset::new(2 << 20), 1022 << 20)?;
//! let geometry = WindowGeometry::new(data, 1024)?;
//! let mapped = WindowLayout::new();
//! let planned = WindowLayout::plan(&geometry, &map, &mapped)?;
//! for change in difference(&mapped, &planned) {
//!     match change {
//!         Change::Unmap(placement) => println!("SHMEM_UNMAP {}", placement.window()),
//!         Change::Map(placement) => println!("SHMEM_MAP {}", placement.window()),
//!     }
//! }
//! assert_eq!(planned.translate(Iova::new(0x1000), 16)?, WindowOffset::new(0x20_1000));
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod address;
mod diff;
mod layout;
mod map;
mod memory;
pub mod virtio_iommu;

pub use address::{Address, FrontendVa, Gpa, Iova, LookupError, PAGE_SIZE, Span, SpanError, WindowOffset};
pub use diff::{Change, difference};
pub use layout::{GeometryError, LARGE_PAGE_SIZE, LayoutError, Placement, WindowGeometry, WindowLayout};
pub use map::{Access, IovaMap, MapError, MappedRange, Piece, TranslateError};
pub use memory::{Backing, MemoryError, MemoryTable, NewRegion, Place, Region, RegionField};
