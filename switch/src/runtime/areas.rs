//! The broker's own memory in a peer's window: the link area, the control area and
//! the witness page. All are in memfds of the broker that nobody can resize: the two areas
//! in one, as a descriptor a link counts. The link area is only ever written here, never
//! read back: a guest may have scribbled on it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_pci_device::abi;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use zerocopy::IntoBytes;

use crate::link::descriptor::MemoryFile;
use crate::link::link_page;
use crate::link::message::{Generations, LinkContents};

/// A file that can be mapped into the window.
#[derive(Clone, Debug)]
pub enum Source {
    /// The owner's.
    Owner(MemoryFile),
    /// The broker's own.
    Own(Arc<File>),
}

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Owner(file) => file.as_fd(),
            Self::Own(fd) => fd.as_fd(),
        }
    }
}

/// A memfd of `len` bytes that can neither shrink nor grow.
pub(super) fn sealed_memfd(name: &std::ffi::CStr, len: u64, seals: SealFlag) -> io::Result<Arc<File>> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let file = File::from(fd);
    file.set_len(len)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | seals))?;
    Ok(Arc::new(file))
}

/// Maps a memfd of the broker at its place in the window, so that addresses in it
/// are window offsets.
pub(super) fn map(file: &Arc<File>, offset: u64, len: u64) -> io::Result<GuestMemoryMmap> {
    let file = FileOffset::from_arc(Arc::clone(file), 0);
    let range = (GuestAddress(offset), len as usize, Some(file));
    GuestMemoryMmap::from_ranges_with_files([range]).map_err(io::Error::other)
}

/// Length of both areas, which lie one behind the other from the window's start on.
const AREAS_LEN: u64 = abi::CONTROL_OFFSET + abi::CONTROL_LEN;
const _: () = assert!(abi::LINK_OFFSET == 0 && abi::LINK_LEN == abi::CONTROL_OFFSET);

/// The file of a link's two areas. Offsets in it are window offsets.
#[derive(Clone, Debug)]
pub struct AreaFile {
    file: Arc<File>,
    memory: GuestMemoryMmap,
}

impl AreaFile {
    /// Zeroed areas.
    ///
    /// # Errors
    /// When the host gives no memory or descriptor.
    pub fn new() -> io::Result<Self> {
        Self::of(sealed_memfd(c"vhost-pci areas", AREAS_LEN, SealFlag::F_SEAL_SEAL)?)
    }

    /// Those of a file that [`Self::new`] made.
    ///
    /// # Errors
    /// When the host gives no memory.
    pub fn open(file: File) -> io::Result<Self> {
        Self::of(Arc::new(file))
    }

    fn of(file: Arc<File>) -> io::Result<Self> {
        let memory = map(&file, 0, AREAS_LEN)?;
        Ok(Self { file, memory })
    }

    /// What the peer's VMM is to map.
    pub fn source(&self) -> Source {
        Source::Own(Arc::clone(&self.file))
    }
}

/// The link area.
#[derive(Debug)]
pub struct LinkArea {
    memory: GuestMemoryMmap,
    link_id: u64,
}

impl LinkArea {
    /// An area that says nothing yet, of the link with this number (0: it has no doorbell).
    pub fn new(areas: &AreaFile, link_id: u64) -> Self {
        Self { memory: areas.memory.clone(), link_id }
    }

    /// Lets the area say this, from these generations on.
    ///
    /// # Errors
    /// Never, as the area has room for all that a link can show.
    pub fn publish(&self, contents: &LinkContents, generations: Generations) -> io::Result<()> {
        // Odd: readers that see it wait.
        let changing = generations.link.wrapping_sub(1);
        self.store(std::mem::offset_of!(abi::LinkHeader, generation), changing)?;
        for (index, vring) in contents.vrings.iter().take(usize::from(abi::MAX_VRINGS)).enumerate() {
            let offset = abi::VRING_TABLE as usize + index * size_of::<abi::Vring>();
            self.write(vring.as_bytes(), offset)?;
        }
        let config = &contents.config[..contents.config.len().min(abi::MAX_OWNER_CONFIG as usize)];
        self.write(config, abi::OWNER_CONFIG as usize)?;
        self.publish_table(&contents.mappings, generations.table)?;
        let header = link_page::header(contents, Generations { link: changing, ..generations }, self.link_id);
        self.write(header.as_bytes(), 0)?;
        self.store(std::mem::offset_of!(abi::LinkHeader, generation), generations.link)
    }

    /// Lets the mapping table alone say this, from this generation of it on.
    ///
    /// # Errors
    /// As [`Self::publish`].
    pub fn publish_table(&self, mappings: &[abi::Mapping], generation: u64) -> io::Result<()> {
        let generation_at = std::mem::offset_of!(abi::LinkHeader, table_generation);
        let mappings = &mappings[..mappings.len().min(abi::MAX_MAPPINGS as usize)];
        self.store(generation_at, generation.wrapping_sub(1))?;
        self.write(mappings.as_bytes(), abi::MAPPING_TABLE as usize)?;
        let count = (mappings.len() as u32).to_le_bytes();
        self.write(&count, std::mem::offset_of!(abi::LinkHeader, mapping_count))?;
        self.store(generation_at, generation)
    }

    /// Stores a generation. Release and the fence after it pair with the driver's acquire
    /// load of the generation and the fence before its second load
    /// (docs/vhost-pci-device.md, 7.2): what was written before it is seen by a driver that
    /// loads it, and a driver that sees what is written after it sees it too.
    fn store(&self, offset: usize, generation: u64) -> io::Result<()> {
        let at = GuestAddress(abi::LINK_OFFSET + offset as u64);
        self.memory.store(generation.to_le(), at, Ordering::Release).map_err(io::Error::other)?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: usize) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let at = GuestAddress(abi::LINK_OFFSET + offset as u64);
        self.memory.write_slice(bytes, at).map_err(io::Error::other)
    }
}

/// The control area.
#[derive(Debug)]
pub struct ControlArea(AreaFile);

impl ControlArea {
    /// The area of this file.
    pub fn new(areas: &AreaFile) -> Self {
        Self(areas.clone())
    }

    /// The area as memory whose addresses are window offsets.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.0.memory
    }

    /// The generation that the driver says it serves at this moment; 0: none, or it says nothing (9.1). To be
    /// asked after the link page has changed: a driver that has not said so by then sees the page first.
    pub fn served(&self) -> u64 {
        let at = abi::CONTROL_OFFSET + abi::CONTROL_LEN - abi::CONTROL_SERVED_FROM_END;
        // Acquire: what the driver wrote before it said so is written. The area is the whole window's part.
        let word = self.0.memory.load::<u64>(GuestAddress(at), Ordering::Acquire);
        word.map_or(0, u64::from_le)
    }

    /// Zeroes the area, and gives its memory back.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn clear(&self) -> io::Result<()> {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        // Both are far below 2^63.
        let (start, len) = (abi::CONTROL_OFFSET as i64, abi::CONTROL_LEN as i64);
        Ok(fallocate(&self.0.file, hole, start, len)?)
    }
}

/// A page that only the peer's VMM maps. As long as any process has it mapped for
/// writing the kernel refuses to seal it: so the broker learns from the kernel, and
/// not from the VMM's word, when the VMM has let go of its window.
#[derive(Debug)]
pub struct Witness(Arc<File>);

impl Witness {
    /// A new page.
    ///
    /// # Errors
    /// When the host gives no memory.
    pub fn new() -> io::Result<Self> {
        sealed_memfd(c"vhost-pci witness", abi::PAGE_SIZE, SealFlag::empty()).map(Self)
    }

    /// Whether no process has the page mapped for writing. When that was once so,
    /// nobody can map it so again.
    ///
    /// # Errors
    /// When the kernel cannot tell.
    pub fn is_gone(&self) -> io::Result<bool> {
        match fcntl(&self.0, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)) {
            Ok(_) => Ok(true),
            Err(nix::Error::EBUSY) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// What the peer's VMM is to map.
    pub fn source(&self) -> Source {
        Source::Own(Arc::clone(&self.0))
    }
}

impl From<File> for Witness {
    /// The page of a file that [`Witness::new`] made.
    fn from(file: File) -> Self {
        Self(Arc::new(file))
    }
}

impl AsFd for Witness {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for AreaFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_witness_is_gone_when_no_mapping_is_left() {
        let witness = Witness::new().unwrap();
        let mapped = map(&witness.0, abi::WITNESS_OFFSET, abi::PAGE_SIZE).unwrap();
        assert!(!witness.is_gone().unwrap());
        assert!(!witness.is_gone().unwrap());
        drop(mapped);
        assert!(witness.is_gone().unwrap());
        assert!(map(&witness.0, abi::WITNESS_OFFSET, abi::PAGE_SIZE).is_err());
    }

    #[test]
    fn a_published_link_page_has_the_contents_and_an_even_generation() {
        let area = LinkArea::new(&AreaFile::new().unwrap(), 77);
        let contents = LinkContents {
            status: abi::LINK_S_UP,
            mappings: vec![abi::Mapping { iova: 4096.into(), ..Default::default() }],
            config: vec![9, 8, 7],
            ..LinkContents::default()
        };
        area.publish(&contents, Generations { link: 42, table: 6 }).unwrap();
        let mut page = vec![0; abi::LINK_LEN as usize];
        area.memory.read_slice(&mut page, GuestAddress(0)).unwrap();
        assert_eq!(page[..4], *b"VPLP");
        assert_eq!(u64::from_le_bytes(page[8..16].try_into().unwrap()), 42);
        assert_eq!(page[16], abi::LINK_S_UP as u8);
        assert_eq!((page[32], page[48], page[56]), (1, 6, 77));
        assert_eq!(page[abi::MAPPING_TABLE as usize + 1], 16);
        assert_eq!(page[64..68], [3, 0, 0, 0]);
        assert_eq!(page[abi::OWNER_CONFIG as usize..][..4], [9, 8, 7, 0]);
    }

    #[test]
    fn nobody_can_resize_the_areas() {
        let file = AreaFile::new().unwrap().file;
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(1 << 20).is_err());
    }

    #[test]
    fn clearing_the_control_area_gives_its_memory_back_and_leaves_the_link_area() {
        let areas = AreaFile::new().unwrap();
        let used = || areas.file.metadata().unwrap().blocks();
        let (link, control) = (LinkArea::new(&areas, 5), ControlArea::new(&areas));
        link.publish(&LinkContents::default(), Generations { link: 2, table: 2 }).unwrap();
        let before = used();
        let (first, last) = (GuestAddress(abi::CONTROL_OFFSET), GuestAddress(AREAS_LEN - 8));
        for at in [first, last] {
            control.memory().write_obj(u64::MAX, at).unwrap();
        }
        assert!(used() > before);
        control.clear().unwrap();
        assert_eq!(used(), before);
        for at in [first, last] {
            assert_eq!(control.memory().read_obj::<u64>(at).unwrap(), 0);
        }
        assert_eq!(link.memory.read_obj::<[u8; 4]>(GuestAddress(0)).unwrap(), *b"VPLP");
    }
}
