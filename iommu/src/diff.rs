//! What has to be unmapped and mapped to get from one layout to the next. This file
//! owns the order of the changes; it never carries one out.

use crate::layout::{Placement, WindowLayout};

/// One step from a layout to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change<R> {
    /// Take a placement out of the window: always a whole one, with the offset and
    /// length that it was mapped with (QEMU takes nothing else).
    Unmap(Placement<R>),
    /// Put a placement into the window, where nothing is at that time.
    Map(Placement<R>),
}

/// The changes that lead from `old` to `new`: all unmaps, then all maps, each by
/// rising IOVA. A placement that is the same in both appears in neither. Applied in
/// order, no two placements share a byte of the window at any step.
pub fn difference<R: Clone + PartialEq>(old: &WindowLayout<R>, new: &WindowLayout<R>) -> Vec<Change<R>> {
    let unmaps = old.iter().filter(|placement| !new.has(placement));
    let maps = new.iter().filter(|placement| !old.has(placement));
    unmaps.cloned().map(Change::Unmap).chain(maps.cloned().map(Change::Map)).collect()
}
