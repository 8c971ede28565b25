//! Memory for the virtqueues of a device without an IOMMU in front of it: locked
//! pages, and their physical addresses from /proc/self/pagemap.
//!
//! The queues carry no buffers, so nobody writes to these pages: should the kernel
//! move one (locked pages may be compacted), the device is left with the address of
//! zeroed or foreign memory that it does not touch.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vhost_pci_device::abi::PAGE_SIZE;

use super::TransportError;
use super::virtio_pci::QueuePages;
use crate::shm::mapping::MappedRange;

const PAGEMAP: &str = "/proc/self/pagemap";
/// pagemap: the page is in memory.
const PRESENT: u64 = 1 << 63;
/// pagemap: the page frame number; zero for who may not see it.
const FRAME: u64 = (1 << 55) - 1;

/// Locks zeroed pages for `queues` virtqueues and finds their physical addresses.
/// The mapping must live as long as the device works.
pub(super) fn lock(address: &str, queues: u16) -> Result<(MappedRange, QueuePages), TransportError> {
    let problem = |problem: String| TransportError::RingMemory { address: address.to_owned(), problem };
    let count = QueuePages::pages_for(queues);
    let memory = MappedRange::locked_pages(count * PAGE_SIZE as usize)
        .map_err(|error| problem(format!("mlock of {count} pages: {error} (see `ulimit -l`)")))?;
    let pages = (0..count as u64).map(|index| physical(&memory, index));
    let pages = pages.collect::<Result<_, _>>().map_err(problem)?;
    Ok((memory, QueuePages { pages }))
}

/// The physical address of a page of a range, by its number; or what is wrong.
pub(super) fn physical(memory: &MappedRange, index: u64) -> Result<u64, String> {
    let pagemap = File::open(PAGEMAP).map_err(|error| format!("{PAGEMAP}: {error} (is /proc mounted?)"))?;
    let first = memory.base().addr().get() as u64 / PAGE_SIZE;
    let mut entry = [0; 8];
    pagemap.read_exact_at(&mut entry, (first + index) * 8).map_err(|error| format!("{PAGEMAP}: {error}"))?;
    let entry = u64::from_ne_bytes(entry);
    match entry & FRAME {
        frame if entry & PRESENT != 0 && frame != 0 => Ok(frame * PAGE_SIZE),
        _ => Err(format!(
            "{PAGEMAP} shows no physical addresses: that takes CAP_SYS_ADMIN. Run as root, or use --vfio"
        )),
    }
}
