//! Indirect tables, which both formats have: the private copy of one.

use vhost_pci_device::abi::FaultKind;

use super::chain::Descriptor;
use super::walk::{Lookup, Stop};
use crate::shm::{SharedMemory, ShmError};
use crate::translate::{Access, Part};

/// Makes `table` the private copy of the indirect table that a descriptor of the chain at `at`
/// names. Its length was checked: at most `MAX_CHAIN` descriptors.
pub(super) fn copy_table(
    table: &mut Vec<u8>,
    window: &SharedMemory,
    lookup: &mut Lookup,
    descriptor: &Descriptor,
    at: u16,
) -> Result<(), Stop> {
    let Descriptor { addr, len, .. } = *descriptor;
    table.resize(len as usize, 0);
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
