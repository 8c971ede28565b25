//! Areas of rings that are written while the other side reads them, those of the device, too.

use super::Done;
use super::chains::table;
use crate::net::receive_vring;
use crate::programs::hostile::forge::Piece;
use crate::programs::hostile::owner::Rig;
use crate::ring::layout::DESC_LEN;

/// Whether another VM's stores could hit what this guest's kernel lives on, if it wrote to whatever
/// address comes: without an IOMMU, where the ring says where to write.
fn is_suicide(rig: &Rig, vring: u16) -> bool {
    vring == receive_vring(0) && !rig.bare.is_behind_iommu()
}

/// Where both sides of a ring say what they want, and the device what it used.
fn used_ranges(rig: &Rig, vring: u16) -> Vec<(u64, u64)> {
    let Some(places) = rig.places(vring) else { return Vec::new() };
    let size = u64::from(places.size);
    match rig.is_packed() {
        true => vec![(places.avail, 4), (places.used, 4)],
        false => vec![(places.avail, 2), (places.avail + 4 + 2 * size, 2), (places.used, 6 + 8 * size)],
    }
}

pub fn used_written(rig: &mut Rig, vring: u16) -> Done {
    let Some(places) = rig.places(vring) else { return Ok(()) };
    // The used index, or the place in a packed ring, before the start: the peer goes on there.
    let value = rig.random.word() as u16;
    let at = if rig.is_packed() { 0 } else { 2 };
    rig.reached.memory.store_u16(places.used + at, value)?;
    rig.bait();
    rig.start()?;
    rig.dwell();
    let ranges = [used_ranges(rig, vring), used_ranges(rig, vring ^ 1)].concat();
    rig.scribble(&ranges, 20, |rig| {
        rig.bait();
        rig.kick();
    });
    Ok(())
}

pub fn events(rig: &mut Rig, vring: u16) -> Done {
    rig.start()?;
    let ranges = used_ranges(rig, vring);
    let ranges: Vec<_> = ranges.into_iter().map(|(start, len)| (start, len.min(4))).collect();
    rig.scribble(&ranges, 40, |rig| {
        rig.bait();
        rig.kick();
    });
    Ok(())
}

pub fn rewritten_rings(rig: &mut Rig, vring: u16) -> Done {
    if is_suicide(rig, vring) {
        return Ok(());
    }
    rig.start()?;
    let Some(forge) = rig.forge(vring) else { return Ok(()) };
    let mut ranges = used_ranges(rig, vring);
    ranges.extend([forge.descriptors(); 4]);
    if let Some(places) = rig.places(vring).filter(|_| !rig.is_packed()) {
        ranges.push((places.avail, 4 + 2 * u64::from(places.size)));
    }
    rig.scribble(&ranges, 60, |rig| {
        rig.bait();
        rig.kick();
    });
    Ok(())
}

pub fn rewritten_tables(rig: &mut Rig, vring: u16) -> Done {
    if is_suicide(rig, vring) {
        return Ok(());
    }
    let (good, at) = (rig.good(vring), rig.spare());
    if let Some(mut forge) = rig.forge(vring) {
        for _ in 0..forge.size() {
            forge.table(at.0, &[Piece { len: 64, ..good }; 8])?;
            forge.chain(&[table(rig, 8 * DESC_LEN)])?;
        }
    }
    rig.start()?;
    rig.scribble(&[(at.0, u64::from(8 * DESC_LEN))], 40, |rig| {
        if vring == receive_vring(0) {
            rig.bait();
        }
        rig.kick();
    });
    Ok(())
}
