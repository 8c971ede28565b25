//! What has to be unmapped and mapped to get from one layout to the next. This file
//! owns the order of the changes; it never carries one out.

use std::cmp::Ordering;

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
    let (mut unmaps, mut maps) = (Vec::new(), Vec::new());
    let (mut olds, mut news) = (old.iter().peekable(), new.iter().peekable());
    let start = |placement: &Placement<R>| placement.range().iova().start();
    // Both come by rising IOVA: one walk along them.
    loop {
        let order = match (olds.peek(), news.peek()) {
            (Some(old), Some(new)) => start(old).cmp(&start(new)),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => break,
        };
        let old = if order.is_le() { olds.next() } else { None };
        let new = if order.is_ge() { news.next() } else { None };
        if old != new {
            unmaps.extend(old.cloned().map(Change::Unmap));
            maps.extend(new.cloned().map(Change::Map));
        }
    }
    unmaps.append(&mut maps);
    unmaps
}
