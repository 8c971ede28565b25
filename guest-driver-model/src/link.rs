//! The link page: what the device tells the peer's driver about the link
//! (`docs/vhost-pci-device.md`, section 7).
//!
//! Owns: reading it, by plain loads, under its generation counter, and refusing
//! what cannot be true. Never writes it, and never believes a count or an offset in
//! it before comparing it with the lengths of the link area and of the window.

use std::mem::{offset_of, size_of};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vhost_pci_device::abi;

use crate::shm::log::{LoggedRange, WriteLog, has_bits};
use crate::shm::{SharedMemory, ShmError};
pub use crate::translate::{Access, Mapping};

/// How often a snapshot is tried while the device changes the page.
const ATTEMPTS: usize = 64;

/// Why the link page gave no snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The link area is not in the window (yet): it reads as zero.
    #[error("no link area is mapped")]
    NotMapped,
    /// The device was changing the page all the time. Try again later.
    #[error("the link page is being changed")]
    Changing,
    /// The page starts with something else than `LINK_MAGIC`.
    #[error("the link page's magic is {found:#x}")]
    Magic {
        /// What was read.
        found: u32,
    },
    /// The page has a version or header length that this driver does not know.
    #[error("link page version {version} with a header of {header_len} bytes is not known")]
    Version {
        /// The version read.
        version: u16,
        /// The header length read, bytes.
        header_len: u16,
    },
    /// A table does not fit the link area.
    #[error("a table of {count} entries at {offset:#x} is not inside the link area")]
    Table {
        /// Where it is said to start, bytes from the start of the link area.
        offset: u32,
        /// How many entries it is said to have.
        count: u32,
    },
    /// The copy of the owner's configuration space is longer than it may be, or not in the area.
    #[error("a configuration space of {len} bytes at {offset:#x} is not inside the link area")]
    OwnerConfig {
        /// Where it is said to start, bytes from the start of the link area.
        offset: u32,
        /// How long it is said to be, bytes.
        len: u32,
    },
    /// There are more vrings than the device announces.
    #[error("the link page has {count} vrings; its device announces at most {most}")]
    Vrings {
        /// How many entries the table is said to have.
        count: u32,
        /// The config space's number.
        most: u16,
    },
    /// A mapping is empty, not made of pages, wraps, or is not inside the part of the
    /// window that is the owner's memory.
    #[error("mapping {index} cannot be: IOVA {iova:#x}, {len:#x} bytes, window offset {window_offset:#x}")]
    Mapping {
        /// Its place in the table.
        index: usize,
        /// The IOVA read.
        iova: u64,
        /// The length read, bytes.
        len: u64,
        /// The window offset read.
        window_offset: u64,
    },
    /// A mapping starts before its predecessor ends.
    #[error("mapping {index} at IOVA {iova:#x} is not after its predecessor")]
    Order {
        /// Its place in the table.
        index: usize,
        /// The IOVA read.
        iova: u64,
    },
    /// The dirty log is not inside the window.
    #[error("a dirty log of {len:#x} bytes at {offset:#x} is not inside the window")]
    Log {
        /// Its window offset.
        offset: u64,
        /// Its length, bytes.
        len: u64,
    },
    /// The dirty log has no bit for a page that can be written.
    #[error("mapping {index} starts with page {page:#x} and runs beyond a dirty log of {len:#x} bytes")]
    LogPage {
        /// Its place in the table.
        index: usize,
        /// The number of its first page.
        page: u64,
        /// Length of the log, bytes.
        len: u64,
    },
    /// The link area is not inside the window, or not aligned.
    #[error("link area: {0}")]
    Area(#[from] ShmError),
}

/// One of the owner's vrings, as the link page tells. Not yet validated:
/// [`RingConfig`](crate::ring::RingConfig) does that, for each vring by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VringInfo {
    /// The owner's front-end has started and enabled it.
    pub enabled: bool,
    /// Entries.
    pub size: u32,
    /// IOVA of the descriptor table.
    pub desc: u64,
    /// IOVA of the available ring.
    pub avail: u64,
    /// IOVA of the used ring.
    pub used: u64,
    /// The available index that the owner's front-end named at the start.
    pub base: u32,
}

/// The link page of one generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkSnapshot {
    /// The generation; even.
    pub generation: u64,
    /// The owner's VMM is connected.
    pub owner: bool,
    /// All mappings are in place and the vrings may be used.
    pub up: bool,
    /// The owner has an IOMMU: the mappings are those of now, and change while the link
    /// is up.
    pub iommu: bool,
    /// What is not in `mappings` is to be fetched and stored by commands.
    pub copy: bool,
    /// The generation of `mappings` alone; even.
    pub table_generation: u64,
    /// The virtio device number of the owner's device.
    pub owner_device: u32,
    /// The virtio features that the owner's driver accepted.
    pub features: u64,
    /// Sorted by IOVA; they do not overlap and each lies inside the window.
    pub mappings: Vec<Mapping>,
    /// By the owner's vring number.
    pub vrings: Vec<VringInfo>,
    /// The configuration space of the owner's device; empty if the link knows of none.
    pub config: Vec<u8>,
    /// The owner is being migrated, and each page that is written is to be marked (8.7): so whoever has a
    /// device write there which cannot do that has to leave it.
    pub log: Option<DirtyLog>,
}

/// Where written pages are to be marked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyLog {
    /// Window offset of the log.
    pub offset: u64,
    /// Its length, bytes.
    pub len: u64,
    /// By mapping: the number of its first page. Each page has a bit.
    pub pages: Vec<u64>,
}

impl DirtyLog {
    /// The log of this window, whose mappings are these.
    ///
    /// # Errors
    /// When it is not in this window.
    pub fn open(&self, window: &SharedMemory, mappings: &[Mapping]) -> Result<Arc<WriteLog>, ShmError> {
        let bits = window.part(self.offset, self.len)?;
        Ok(Arc::new(WriteLog::new(window, bits, self.ranges(mappings))))
    }

    /// What of the window is to be marked, and where.
    pub fn ranges(&self, mappings: &[Mapping]) -> Vec<LoggedRange> {
        let written =
            mappings.iter().zip(&self.pages).filter(|(mapping, _)| mapping.access.allows(Access::WRITE));
        let range = |(mapping, page): (&Mapping, &u64)| LoggedRange {
            window_offset: mapping.window_offset,
            len: mapping.len,
            page: *page,
        };
        written.map(range).collect()
    }
}

impl LinkSnapshot {
    /// The window as whoever serves the owner's vrings has to write to it: what is stored to it is marked, if
    /// the owner's VMM wants that (8.7). With the log, of which the ranges follow the mapping table.
    ///
    /// # Errors
    /// When the log is not in this window.
    pub fn serving(&self, window: &SharedMemory) -> Result<(SharedMemory, Option<Arc<WriteLog>>), ShmError> {
        let Some(log) = &self.log else { return Ok((window.clone(), None)) };
        let log = log.open(window, &self.mappings)?;
        Ok((window.logged(&log), Some(log)))
    }

    /// Whether the owner's driver accepted the feature with this bit number.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features.checked_shr(bit).is_some_and(|rest| rest & 1 == 1)
    }
}

/// The mapping table of one table generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableSnapshot {
    /// The generation of the rest of the page that the table belongs to.
    pub generation: u64,
    /// The table's own generation; even.
    pub table_generation: u64,
    /// Sorted by IOVA; they do not overlap and each lies inside the window.
    pub mappings: Vec<Mapping>,
    /// As in the snapshot.
    pub log: Option<DirtyLog>,
}

/// The link area of a window.
#[derive(Clone, Debug)]
pub struct LinkPage {
    area: SharedMemory,
    /// Where the owner's memory can be: window offsets from here, and up to there.
    data: Range<u64>,
    max_vrings: u16,
}

impl LinkPage {
    /// The link area of the window of a device with this config space.
    ///
    /// # Errors
    /// [`LinkError::Area`].
    pub fn new(window: &SharedMemory, config: &abi::DeviceConfig) -> Result<Self, LinkError> {
        // A longer area has nothing more to say, and bounds nothing.
        let area = window.part(config.link_offset.value(), config.link_len.value().min(abi::LINK_LEN))?;
        let data = config.data_offset.value()..config.window_len.value().min(window.len());
        let page = Self { area, data, max_vrings: config.max_vrings.value() };
        // Bounds and alignment of the header's last and its widest field.
        page.area.part(0, size_of::<abi::LinkHeader>() as u64)?;
        page.area.load_u64(offset_of!(abi::LinkHeader, generation) as u64)?;
        Ok(page)
    }

    /// The generation: one load, cheap enough to poll. Odd while the device changes
    /// the page; another value than the snapshot's means that the snapshot is old.
    #[inline]
    pub fn generation(&self) -> u64 {
        // Acquire: pairs with the device's release store of the generation at the end
        // of a change. `new` has made the same access, so it does not fail.
        self.area.load_u64_acquire(offset_of!(abi::LinkHeader, generation) as u64).unwrap_or(1)
    }

    /// The generation of the mapping table: one load, as cheap as [`Self::generation`].
    /// It changes with each change of that one, too. Odd while the device changes the
    /// table.
    #[inline]
    pub fn table_generation(&self) -> u64 {
        // Acquire: as in `generation`.
        self.area.load_u64_acquire(offset_of!(abi::LinkHeader, table_generation) as u64).unwrap_or(1)
    }

    /// The number that the link's doorbell page has as well (12.2); 0: there is no doorbell
    /// function, or no link area.
    pub fn link_id(&self) -> u64 {
        self.area.load_u64(offset_of!(abi::LinkHeader, link_id) as u64).unwrap_or(0)
    }

    /// Whether the mapping table is still at `table_generation`, so that everything loaded
    /// from the window before this call was there when it was loaded (7.2: the generation
    /// becomes larger before a mapping goes).
    #[inline]
    pub fn table_is_at(&self, table_generation: u64) -> bool {
        // Acquire fence: as in `snapshot`, for the packets copied before it.
        fence(Ordering::Acquire);
        self.table_generation() == table_generation
    }

    /// A consistent copy of the page, validated.
    pub fn snapshot(&self) -> Result<LinkSnapshot, LinkError> {
        self.consistent(|generation, table_generation| self.read(generation, table_generation))
    }

    /// A consistent copy of the mapping table alone, validated as in a snapshot.
    pub fn table(&self) -> Result<TableSnapshot, LinkError> {
        self.consistent(|generation, table_generation| {
            let (mappings, pages) = self.mappings()?;
            let log = self.log(&mappings, pages)?;
            Ok(TableSnapshot { generation, table_generation, mappings, log })
        })
    }

    /// What `read` gives while neither generation changes.
    fn consistent<T>(&self, read: impl Fn(u64, u64) -> Result<T, LinkError>) -> Result<T, LinkError> {
        for _ in 0..ATTEMPTS {
            let (generation, table_generation) = (self.generation(), self.table_generation());
            if !generation.is_multiple_of(2) || !table_generation.is_multiple_of(2) {
                std::hint::spin_loop();
                continue;
            }
            let result = read(generation, table_generation);
            // Acquire fence: pairs with the device's release fence between its store
            // of an odd generation and its stores to the page: had a load above
            // seen one of these, the loads below see the odd value or a later one.
            fence(Ordering::Acquire);
            if self.generation() == generation && self.table_generation() == table_generation {
                return result;
            }
        }
        Err(LinkError::Changing)
    }

    fn read(&self, generation: u64, table_generation: u64) -> Result<LinkSnapshot, LinkError> {
        let area = &self.area;
        let word = |field: usize| area.load_u32(field as u64);
        match word(offset_of!(abi::LinkHeader, magic))? {
            abi::LINK_MAGIC => {}
            0 => return Err(LinkError::NotMapped),
            found => return Err(LinkError::Magic { found }),
        }
        let version = area.load_u16(offset_of!(abi::LinkHeader, version) as u64)?;
        let header_len = area.load_u16(offset_of!(abi::LinkHeader, header_len) as u64)?;
        if version != abi::ABI_VERSION || usize::from(header_len) < size_of::<abi::LinkHeader>() {
            return Err(LinkError::Version { version, header_len });
        }
        let status = word(offset_of!(abi::LinkHeader, status))?;
        let (mappings, pages) = self.mappings()?;
        Ok(LinkSnapshot {
            generation,
            owner: status & abi::LINK_S_OWNER != 0,
            up: status & abi::LINK_S_UP != 0,
            iommu: status & abi::LINK_S_IOMMU != 0,
            copy: status & abi::LINK_S_COPY != 0,
            table_generation,
            owner_device: word(offset_of!(abi::LinkHeader, owner_device))?,
            features: area.load_u64(offset_of!(abi::LinkHeader, features) as u64)?,
            log: self.log(&mappings, pages)?,
            mappings,
            vrings: self.vrings(
                word(offset_of!(abi::LinkHeader, vring_table))?,
                word(offset_of!(abi::LinkHeader, vring_count))?,
            )?,
            config: self.owner_config(
                word(offset_of!(abi::LinkHeader, config))?,
                word(offset_of!(abi::LinkHeader, config_len))?,
            )?,
        })
    }

    fn owner_config(&self, offset: u32, len: u32) -> Result<Vec<u8>, LinkError> {
        let wrong = LinkError::OwnerConfig { offset, len };
        if len > abi::MAX_OWNER_CONFIG {
            return Err(wrong);
        }
        let mut bytes = vec![0; len as usize];
        self.area.read(offset.into(), &mut bytes).map_err(|_| wrong)?;
        Ok(bytes)
    }

    /// A table of `count` entries of `T`, after checking that it lies inside the
    /// area: so its length, and what is allocated for it, is bounded by the area's.
    fn table_of<T>(&self, offset: u32, count: u32) -> Result<SharedMemory, LinkError> {
        let len = u64::from(count) * size_of::<T>() as u64;
        let aligned = u64::from(offset).is_multiple_of(8);
        let table = self.area.part(u64::from(offset), len);
        table.ok().filter(|_| aligned).ok_or(LinkError::Table { offset, count })
    }

    /// The dirty log, if there is one: inside the window, with a bit for each page of the mappings, of
    /// which these are the first.
    fn log(&self, mappings: &[Mapping], pages: Vec<u64>) -> Result<Option<DirtyLog>, LinkError> {
        if self.area.load_u32(offset_of!(abi::LinkHeader, status) as u64)? & abi::LINK_S_LOG == 0 {
            return Ok(None);
        }
        let offset = self.area.load_u64(offset_of!(abi::LinkHeader, log) as u64)?;
        let len = self.area.load_u64(offset_of!(abi::LinkHeader, log_len) as u64)?;
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.data.end);
        if !inside || len == 0 || !offset.is_multiple_of(abi::PAGE_SIZE) {
            return Err(LinkError::Log { offset, len });
        }
        for (index, (mapping, page)) in mappings.iter().zip(&pages).enumerate() {
            if mapping.access.allows(Access::WRITE) && !has_bits(len, *page, mapping.len) {
                return Err(LinkError::LogPage { index, page: *page, len });
            }
        }
        Ok(Some(DirtyLog { offset, len, pages }))
    }

    fn mappings(&self) -> Result<(Vec<Mapping>, Vec<u64>), LinkError> {
        let word = |field: usize| self.area.load_u32(field as u64);
        let offset = word(offset_of!(abi::LinkHeader, mapping_table))?;
        let count = word(offset_of!(abi::LinkHeader, mapping_count))?;
        let table = self.table_of::<abi::Mapping>(offset, count)?;
        // One copy, then only the copy: a table that changes is read often.
        let mut bytes = vec![0; table.len() as usize];
        table.read(0, &mut bytes)?;
        let (entries, _) = bytes.as_chunks::<{ size_of::<abi::Mapping>() }>();
        let mut mappings = Vec::with_capacity(entries.len());
        let mut pages = Vec::with_capacity(entries.len());
        // The first IOVA that the next mapping may have; `None` past the last address.
        let mut free_from = Some(0_u64);
        for (index, entry) in entries.iter().enumerate() {
            let entry: abi::Mapping = zerocopy::transmute!(*entry);
            let mapping = Mapping {
                iova: entry.iova.value(),
                len: entry.len.value(),
                window_offset: entry.window_offset.value(),
                access: Access::from_bits(entry.access.value()),
            };
            let Mapping { iova, len, window_offset, .. } = mapping;
            if !self.can_be(&mapping) {
                return Err(LinkError::Mapping { index, iova, len, window_offset });
            }
            if free_from.is_none_or(|free| iova < free) {
                return Err(LinkError::Order { index, iova });
            }
            free_from = iova.checked_add(len);
            mappings.push(mapping);
            pages.push(entry.log_page.value().into());
        }
        Ok((mappings, pages))
    }

    fn can_be(&self, mapping: &Mapping) -> bool {
        let Mapping { iova, len, window_offset, .. } = *mapping;
        let pages = [iova, len, window_offset].into_iter().all(|value| value.is_multiple_of(abi::PAGE_SIZE));
        // Both ends inclusive, so that a range may end with the address space.
        let within = |start: u64| len.checked_sub(1).and_then(|last| start.checked_add(last));
        let window_last = within(window_offset);
        pages
            && within(iova).is_some()
            && window_offset >= self.data.start
            && window_last.is_some_and(|last| last < self.data.end)
    }

    fn vrings(&self, offset: u32, count: u32) -> Result<Vec<VringInfo>, LinkError> {
        if count > self.max_vrings.into() {
            return Err(LinkError::Vrings { count, most: self.max_vrings });
        }
        let table = self.table_of::<abi::Vring>(offset, count)?;
        let vring = |index: usize| {
            let at = (index * size_of::<abi::Vring>()) as u64;
            Ok(VringInfo {
                enabled: table.load_u32(at + offset_of!(abi::Vring, flags) as u64)? & abi::VRING_F_ENABLED
                    != 0,
                size: table.load_u32(at + offset_of!(abi::Vring, size) as u64)?,
                desc: table.load_u64(at + offset_of!(abi::Vring, desc) as u64)?,
                avail: table.load_u64(at + offset_of!(abi::Vring, avail) as u64)?,
                used: table.load_u64(at + offset_of!(abi::Vring, used) as u64)?,
                base: table.load_u32(at + offset_of!(abi::Vring, base) as u64)?,
            })
        };
        (0..count as usize).map(vring).collect()
    }
}
