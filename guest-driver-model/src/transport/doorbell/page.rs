//! The doorbell page (`docs/vhost-pci-device.md`, 12.2) and how its entries are rung by (12.4).
//!
//! Other software of the same guest can write the page: each field is read once, and compared
//! with what it has to fit before it is used. Nothing here writes it.

use std::mem::{offset_of, size_of};
use std::sync::atomic::{Ordering, fence};

use vhost_pci_device::abi;

use crate::shm::{SharedMemory, ShmError};

/// How often a page is looked at that the device changes meanwhile.
const ATTEMPTS: usize = 64;

/// Why a page is none, or not the one that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// Some other shared memory.
    #[error("its memory starts with {found:#x}, not with \"VPDB\": it belongs to something else")]
    Magic {
        /// What was read.
        found: u32,
    },
    /// A later layout.
    #[error("its page has version {version} and a header of {header_len} bytes, which is not known")]
    Version {
        /// The version read.
        version: u16,
        /// The header length read, bytes.
        header_len: u16,
    },
    /// That of another link, or of an earlier broker.
    #[error("it belongs to link {found:#x}, not to this one; if it should, plug it anew")]
    Link {
        /// The link's number that was read.
        found: u64,
    },
    /// The memory is shorter than a page.
    #[error("its page cannot be read: {0}")]
    Memory(#[from] ShmError),
}

/// How the notifications of a vring go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Kicks arrive as this MSI-X vector; else as the virtqueue's interrupt.
    pub vector: Option<u32>,
    /// A call is a store of this to the doorbell register; else a notification of the virtqueue.
    pub doorbell: Option<u32>,
}

/// The entries of one generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// The generation; even.
    pub generation: u64,
    /// By vring; at most `MAX_VRINGS`.
    pub entries: Vec<Entry>,
}

/// The page of a function.
#[derive(Clone, Debug)]
pub struct DoorbellPage(SharedMemory);

impl DoorbellPage {
    /// The page in this memory, if it is that of the link.
    ///
    /// # Errors
    /// [`PageError`].
    pub fn new(memory: SharedMemory, link_id: u64) -> Result<Self, PageError> {
        let word = |field: usize| memory.load_u32(field as u64);
        let magic = word(offset_of!(abi::DoorbellHeader, magic))?;
        if magic != abi::DOORBELL_MAGIC {
            return Err(PageError::Magic { found: magic });
        }
        let version = memory.load_u16(offset_of!(abi::DoorbellHeader, version) as u64)?;
        let header_len = memory.load_u16(offset_of!(abi::DoorbellHeader, header_len) as u64)?;
        if version != abi::ABI_VERSION || usize::from(header_len) < size_of::<abi::DoorbellHeader>() {
            return Err(PageError::Version { version, header_len });
        }
        let found = memory.load_u64(offset_of!(abi::DoorbellHeader, link_id) as u64)?;
        if found != link_id {
            return Err(PageError::Link { found });
        }
        Ok(Self(memory))
    }

    /// The generation; odd while the device changes the page.
    pub fn generation(&self) -> u64 {
        // Acquire: pairs with the device's release store of the generation at the end of a
        // change. `new` has read the same page, so it does not fail.
        self.0.load_u64_acquire(offset_of!(abi::DoorbellHeader, generation) as u64).unwrap_or(1)
    }

    /// All entries, if the page's generation is another one than `known` and the device changes
    /// nothing meanwhile. None that the page has no room for counts.
    pub fn changed(&self, known: u64) -> Option<Changed> {
        self.changed_unless(known, || {})
    }

    /// As [`Self::changed`]; `meanwhile` happens when the entries are copied.
    fn changed_unless(&self, known: u64, meanwhile: impl FnOnce()) -> Option<Changed> {
        let generation = self.generation();
        if generation == known || !generation.is_multiple_of(2) {
            return None;
        }
        let count = self.table().map_or(0, |(_, count)| count);
        let entries = (0..count).map(|vring| self.entry(vring)).collect();
        meanwhile();
        // Acquire fence: pairs with the device's release fence between its store of an odd
        // generation and its stores to the page: had a load above seen one of these, the
        // load below sees the odd value or a later one.
        fence(Ordering::Acquire);
        (self.generation() == generation).then_some(Changed { generation, entries })
    }

    /// The entry of a vring; for one that has none, all goes by the virtqueue.
    pub fn entry(&self, vring: u16) -> Entry {
        self.read(vring).unwrap_or_default()
    }

    fn table(&self) -> Option<(u64, u16)> {
        let count = self.0.load_u32(offset_of!(abi::DoorbellHeader, vring_count) as u64).ok()?;
        let at = u64::from(self.0.load_u32(offset_of!(abi::DoorbellHeader, entries) as u64).ok()?);
        let count = u16::try_from(count).ok().filter(|count| *count <= abi::MAX_VRINGS)?;
        self.0.part(at, u64::from(count) * size_of::<abi::DoorbellEntry>() as u64).ok()?;
        Some((at, count))
    }

    fn read(&self, vring: u16) -> Option<Entry> {
        let (at, count) = self.table()?;
        if vring >= count {
            return None;
        }
        let at = at + u64::from(vring) * size_of::<abi::DoorbellEntry>() as u64;
        // Fails for a table that is not aligned.
        let word = |field: usize| self.0.load_u32(at + field as u64).ok();
        let flags = word(offset_of!(abi::DoorbellEntry, flags))?;
        let vector = word(offset_of!(abi::DoorbellEntry, vector))?;
        let doorbell = word(offset_of!(abi::DoorbellEntry, doorbell))?;
        Some(Entry {
            vector: (flags & abi::DOORBELL_F_KICK != 0).then_some(vector),
            doorbell: (flags & abi::DOORBELL_F_CALL != 0).then_some(doorbell),
        })
    }

    /// Calls the owner for a vring: `ring` does as the entry says, and once more if the page
    /// has changed meanwhile.
    pub fn ring(&self, vring: u16, ring: impl Fn(Entry)) {
        let generation = self.generation();
        ring(self.entry(vring));
        // The store to the register is done before the generation is loaded again: had the
        // device gone over to another entry before that store, the load below sees it.
        fence(Ordering::SeqCst);
        if generation.is_multiple_of(2) && self.generation() == generation {
            return;
        }
        // A device that never ends its change is one that interrupts when it does.
        for _ in 0..ATTEMPTS {
            if self.generation().is_multiple_of(2) {
                break;
            }
            std::hint::spin_loop();
        }
        ring(self.entry(vring));
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::cell::RefCell;

    use zerocopy::IntoBytes;

    pub const GENERATION: u64 = offset_of!(abi::DoorbellHeader, generation) as u64;
    const COUNT: u64 = offset_of!(abi::DoorbellHeader, vring_count) as u64;
    const PLACE: u64 = offset_of!(abi::DoorbellHeader, entries) as u64;

    /// A page of link 7 with these entries.
    pub fn page(entries: &[(u32, u32, u32)]) -> SharedMemory {
        let memory = SharedMemory::private(abi::DOORBELL_PAGE_LEN as usize).unwrap();
        let header = abi::DoorbellHeader {
            magic: abi::DOORBELL_MAGIC.into(),
            version: 1.into(),
            header_len: 64.into(),
            link_id: 7.into(),
            generation: 2.into(),
            vring_count: (entries.len() as u32).into(),
            entries: abi::DOORBELL_ENTRIES.into(),
            ..Default::default()
        };
        memory.write(0, header.as_bytes()).unwrap();
        for (vring, entry) in entries.iter().enumerate() {
            set(&memory, vring as u64, *entry);
        }
        memory
    }

    /// Changes an entry: flags, vector, doorbell.
    pub fn set(memory: &SharedMemory, vring: u64, (flags, vector, doorbell): (u32, u32, u32)) {
        let at = u64::from(abi::DOORBELL_ENTRIES) + 16 * vring;
        for (into, value) in [(0, flags), (4, vector), (8, doorbell)] {
            memory.store_u32(at + into, value).unwrap();
        }
    }

    #[test]
    fn only_the_page_of_the_link_is_taken() {
        let memory = page(&[]);
        assert!(DoorbellPage::new(memory.clone(), 7).is_ok());
        assert_eq!(DoorbellPage::new(memory.clone(), 8).unwrap_err(), PageError::Link { found: 7 });
        memory.store_u16(4, 2).unwrap();
        assert!(matches!(DoorbellPage::new(memory.clone(), 7), Err(PageError::Version { version: 2, .. })));
        memory.store_u32(0, 0).unwrap();
        assert_eq!(DoorbellPage::new(memory, 7).unwrap_err(), PageError::Magic { found: 0 });
    }

    #[test]
    fn each_direction_of_an_entry_counts_by_itself() {
        let both = abi::DOORBELL_F_KICK | abi::DOORBELL_F_CALL;
        let page =
            DoorbellPage::new(page(&[(both, 3, 9), (abi::DOORBELL_F_CALL, 3, 9), (0, 3, 9)]), 7).unwrap();
        assert_eq!(page.entry(0), Entry { vector: Some(3), doorbell: Some(9) });
        assert_eq!(page.entry(1), Entry { vector: None, doorbell: Some(9) });
        assert_eq!(page.entry(2), Entry::default());
        assert_eq!(page.entry(3), Entry::default(), "no such vring");
        assert_eq!(page.changed(0).unwrap().entries.len(), 3);
    }

    #[test]
    fn a_table_that_does_not_fit_its_page_is_none() {
        let memory = page(&[(abi::DOORBELL_F_CALL, 0, 9); 2]);
        let page = DoorbellPage::new(memory.clone(), 7).unwrap();
        for (count, place) in [
            (u32::MAX, abi::DOORBELL_ENTRIES),
            (1 << 16, abi::DOORBELL_ENTRIES),
            (65, abi::DOORBELL_ENTRIES),
            (2, 4096 - 16),
            (2, u32::MAX),
            (2, 65),
        ] {
            memory.store_u32(COUNT, count).unwrap();
            memory.store_u32(PLACE, place).unwrap();
            for vring in [0, 1, 64, u16::MAX] {
                assert_eq!(page.entry(vring), Entry::default(), "{count} at {place}");
            }
            let entries = page.changed(0).unwrap().entries;
            assert!(entries.iter().all(|entry| *entry == Entry::default()), "{count} at {place}");
        }
    }

    /// What is rung while `change` happens after the first of it.
    fn rung(memory: &SharedMemory, change: impl Fn()) -> Vec<Option<u32>> {
        let rung = RefCell::new(Vec::new());
        DoorbellPage::new(memory.clone(), 7).unwrap().ring(0, |entry| {
            rung.borrow_mut().push(entry.doorbell);
            if rung.borrow().len() == 1 {
                change();
            }
        });
        rung.into_inner()
    }

    #[test]
    fn a_ring_that_meets_a_change_is_repeated_by_the_new_entry() {
        let memory = page(&[(abi::DOORBELL_F_CALL, 0, 9)]);
        assert_eq!(rung(&memory, || {}), [Some(9)]);
        let change = || {
            memory.store_u64(GENERATION, 3).unwrap();
            set(&memory, 0, (abi::DOORBELL_F_CALL, 0, 10));
            memory.store_u64(GENERATION, 4).unwrap();
        };
        assert_eq!(rung(&memory, change), [Some(9), Some(10)]);
        assert_eq!(rung(&memory, || {}), [Some(10)]);
        // Odd: in the middle of a change, which does not end.
        memory.store_u64(GENERATION, 5).unwrap();
        assert_eq!(rung(&memory, || set(&memory, 0, (0, 0, 10))), [Some(10), None]);
    }

    #[test]
    fn a_copy_of_the_entries_that_meets_a_change_is_none() {
        let memory = page(&[(abi::DOORBELL_F_KICK, 3, 0); 2]);
        let page = DoorbellPage::new(memory.clone(), 7).unwrap();
        let of = |generation, vectors: [u32; 2]| {
            let entries = vectors.map(|vector| Entry { vector: Some(vector), doorbell: None }).to_vec();
            Some(Changed { generation, entries })
        };
        assert_eq!(page.changed(1), of(2, [3, 3]));
        assert_eq!(page.changed(2), None, "nothing new");
        // The first entry was copied before the change, so to speak, the second within it.
        let begin = || {
            memory.store_u64(GENERATION, 3).unwrap();
            set(&memory, 1, (abi::DOORBELL_F_KICK, 4, 0));
        };
        assert_eq!(page.changed_unless(1, begin), None);
        assert_eq!(page.changed(1), None, "in the middle of a change");
        memory.store_u64(GENERATION, 4).unwrap();
        assert_eq!(page.changed(2), of(4, [3, 4]));
        // A change from beginning to end.
        assert_eq!(page.changed_unless(2, || memory.store_u64(GENERATION, 6).unwrap()), None);
        assert_eq!(page.changed(4), of(6, [3, 4]));
    }
}
