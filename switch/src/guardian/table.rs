//! Where in each peer's window the owner's memory, or a witness page, may be mapped: in memory
//! that broker and guardian share, so that a change of a window costs two stores and no system
//! call, and none is ever missing, wherever the broker was when it was killed. An entry is there
//! before the peer's VMM is asked to map, and until it has answered that it unmapped.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_pci_device::abi;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// Entries of a link. All that a window shows, all that it stops to show meanwhile, and the witnesses.
const SLOTS: u64 = 4096;
const _: () = assert!(SLOTS > 2 * abi::MAX_MAPPINGS as u64 + 8);
/// What stands before the links: whether the guardian is to take nothing back.
const HEAD_LEN: u64 = abi::PAGE_SIZE;
/// An entry: its window offset and its length, bytes, which is 0 where there is none.
const ENTRY_LEN: u64 = 16;
const LINK_LEN: u64 = SLOTS * ENTRY_LEN;

/// The table of all links.
#[derive(Clone, Debug)]
pub struct Table {
    file: Arc<File>,
    memory: GuestMemoryMmap,
}

impl Table {
    /// An empty one. Takes as much memory as has entries.
    ///
    /// # Errors
    /// When the host gives no memory or descriptor.
    pub fn new(links: usize) -> io::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"vhost-pci guardian's table", flags)?);
        file.set_len(HEAD_LEN + links as u64 * LINK_LEN)?;
        Self::map(file)
    }

    /// That of the file.
    ///
    /// # Errors
    /// When the host gives no memory.
    pub fn open(file: OwnedFd) -> io::Result<Self> {
        Self::map(file.into())
    }

    fn map(file: File) -> io::Result<Self> {
        let (len, file) = (file.metadata()?.len(), Arc::new(file));
        let range = (GuestAddress(0), len as usize, Some(FileOffset::from_arc(Arc::clone(&file), 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).map_err(io::Error::other)?;
        Ok(Self { file, memory })
    }

    /// Its file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The entries of a link, none, to be written.
    pub fn spans(&self, link: usize) -> Spans {
        Spans { table: self.clone(), base: base(link), slots: HashMap::new(), free: Vec::new(), used: 0 }
    }

    /// Those that are there, as window offset and length, bytes. Takes no memory for those that are not.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn entries(&self, link: usize) -> io::Result<Vec<(u64, u64)>> {
        let mut bytes = vec![0; LINK_LEN as usize];
        self.file.read_exact_at(&mut bytes, base(link))?;
        let (longs, _) = bytes.as_chunks::<8>();
        let (pairs, _) = longs.as_chunks::<2>();
        let pairs = pairs.iter().map(|[offset, len]| (u64::from_ne_bytes(*offset), u64::from_ne_bytes(*len)));
        Ok(pairs.filter(|(_, len)| *len > 0).collect())
    }

    /// Has the guardian take nothing back: it was not told everything.
    pub fn forsake(&self) {
        self.store(0, 1);
    }

    /// Whether it is to.
    pub fn is_forsaken(&self) -> bool {
        self.memory.load::<u64>(GuestAddress(0), Ordering::Acquire).is_ok_and(|word| word != 0)
    }

    fn store(&self, at: u64, value: u64) -> bool {
        self.memory.store(value, GuestAddress(at), Ordering::Release).is_ok()
    }
}

fn base(link: usize) -> u64 {
    HEAD_LEN + link as u64 * LINK_LEN
}

/// One link's entries, as the broker writes them.
#[derive(Debug)]
pub struct Spans {
    table: Table,
    base: u64,
    /// By offset and length: the slot, and the request that mapped it last.
    slots: HashMap<(u64, u64), (u64, u64)>,
    /// Slots below `used` that are free.
    free: Vec<u64>,
    used: u64,
}

impl Spans {
    /// Adds one, which request `op` maps. Says whether there was room.
    pub fn add(&mut self, op: u64, offset: u64, len: u64) -> bool {
        if let Some((_, mapped)) = self.slots.get_mut(&(offset, len)) {
            *mapped = op;
            return true;
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.used < SLOTS => {
                self.used += 1;
                self.used - 1
            }
            None => return false,
        };
        self.slots.insert((offset, len), (slot, op));
        let at = self.base + slot * ENTRY_LEN;
        // The length last: it makes the entry one.
        self.table.store(at, offset) && self.table.store(at + 8, len)
    }

    /// Takes one away, which request `op` unmapped, unless a later one mapped it again.
    pub fn remove(&mut self, op: u64, offset: u64, len: u64) {
        if let Some((slot, mapped)) = self.slots.get(&(offset, len)).copied()
            && mapped < op
        {
            self.slots.remove(&(offset, len));
            self.free.push(slot);
            self.table.store(self.base + slot * ENTRY_LEN + 8, 0);
        }
    }

    /// Takes all away.
    pub fn clear(&mut self) {
        for (_, (slot, _)) in self.slots.drain() {
            self.table.store(self.base + slot * ENTRY_LEN + 8, 0);
        }
        // A window that had thousands keeps no room for them.
        self.slots = HashMap::new();
        self.free = Vec::new();
        self.used = 0;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn sorted(table: &Table, link: usize) -> Vec<(u64, u64)> {
        let mut entries = table.entries(link).unwrap();
        entries.sort_unstable();
        entries
    }

    #[test]
    fn what_one_writes_the_other_reads_link_by_link() {
        let table = Table::new(3).unwrap();
        let other = Table::open(table.file().try_clone_to_owned().unwrap()).unwrap();
        let (mut first, mut last) = (table.spans(0), table.spans(2));
        assert!(first.add(1, 0, 4096) && last.add(1, 8192, 1) && first.add(2, 4096, 4096));
        assert_eq!(sorted(&other, 0), [(0, 4096), (4096, 4096)]);
        assert_eq!((sorted(&other, 1), sorted(&other, 2)), (vec![], vec![(8192, 1)]));
        first.remove(3, 0, 4096);
        assert_eq!(sorted(&other, 0), [(4096, 4096)]);
        assert!(!other.is_forsaken());
        table.forsake();
        assert!(other.is_forsaken());
        first.clear();
        assert_eq!((sorted(&other, 0), sorted(&other, 2).len()), (vec![], 1));
    }

    #[test]
    fn a_late_answer_takes_nothing_away_that_was_mapped_again() {
        let table = Table::new(1).unwrap();
        let mut spans = table.spans(0);
        spans.add(1, 0, 4096);
        // Asked to unmap by 2, to map the same by 3, and another length by 4.
        spans.add(3, 0, 4096);
        spans.add(4, 0, 8192);
        spans.remove(2, 0, 4096);
        assert_eq!(sorted(&table, 0), [(0, 4096), (0, 8192)]);
        spans.remove(5, 0, 4096);
        assert_eq!(sorted(&table, 0), [(0, 8192)]);
    }

    #[test]
    fn slots_are_used_again_and_when_all_are_taken_that_is_said() {
        let table = Table::new(1).unwrap();
        let mut spans = table.spans(0);
        for round in 0..3 {
            assert!((0..SLOTS).all(|entry| spans.add(round, entry * 4096, 4096)));
            assert!(!spans.add(round, 1 << 40, 4096));
            assert_eq!(table.entries(0).unwrap().len() as u64, SLOTS);
            match round {
                0 => (0..SLOTS).for_each(|entry| spans.remove(9, entry * 4096, 4096)),
                _ => spans.clear(),
            }
            assert_eq!(table.entries(0).unwrap(), []);
        }
    }
}
