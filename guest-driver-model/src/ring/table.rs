//! Indirect tables, which both formats have: which are possible, and the private copy of one.

use vhost_pci_device::abi::FaultKind;

use super::chain::Descriptor;
use super::layout::DESC_LEN;
use super::walk::{Lookup, Stop};
use crate::shm::{SharedMemory, ShmError};
use crate::translate::{Access, Part};

/// What is wrong with a table that a descriptor names.
pub(super) fn wrong(descriptor: &Descriptor) -> Stop {
    Stop::Broken((FaultKind::Indirect, u64::from(descriptor.len)))
}

/// Makes `table` the private copy of the indirect table that a descriptor of the chain at `at`
/// names (2.7.5.3, 2.8.7), which may have `limit` descriptors. The descriptor's write flag means
/// nothing here. No byte of the table is fetched again.
pub(super) fn open_table<'table>(
    table: &'table mut Vec<u8>,
    window: &SharedMemory,
    lookup: &mut Lookup,
    descriptor: &Descriptor,
    limit: u16,
    at: u16,
) -> Result<&'table [[u8; DESC_LEN as usize]], Stop> {
    let count = descriptor.len / DESC_LEN;
    let possible = descriptor.next().is_none()
        && (1..=u32::from(limit)).contains(&count)
        && descriptor.len.is_multiple_of(DESC_LEN);
    if !possible {
        return Err(wrong(descriptor));
    }
    table.resize(descriptor.len as usize, 0);
    copy_table(table, window, lookup, descriptor, at)?;
    Ok(table.as_chunks().0)
}

fn copy_table(
    table: &mut [u8],
    window: &SharedMemory,
    lookup: &mut Lookup,
    descriptor: &Descriptor,
    at: u16,
) -> Result<(), Stop> {
    let Descriptor { addr, len, .. } = *descriptor;
    let outside = |_: ShmError| (FaultKind::Unmapped, addr);
    if let Ok(offset) = lookup.translation.translate(addr, len, Access::READ) {
        return Ok(window.read(offset, table).map_err(outside)?);
    }
    let mut done = 0_usize;
    while let Some(rest) = table.get_mut(done..)
        && !rest.is_empty()
    {
        let iova = addr.wrapping_add(done as u64);
        match lookup.translation.part(iova, rest.len() as u32, Access::READ) {
            Part::Mapped { offset, len } => {
                let (now, _) = rest.split_at_mut(len as usize);
                window.read(offset, now).map_err(outside)?;
                done += len as usize;
            }
            Part::Missing { len: gap, why } => {
                let offset = lookup.missing_table(at, (addr, len), (iova, gap), why)?;
                return Ok(window.read(offset, table).map_err(outside)?);
            }
        }
    }
    Ok(())
}
