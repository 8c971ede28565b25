//! Where in the peer's window each mapped range appears. This file owns the policy
//! (linear, else packed, and never move what is in place); it never talks to the
//! VMM that carries a layout out.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::address::{Iova, LookupError, PAGE_SIZE, Span, WindowOffset, offset_in};
use crate::diff::Change;
use crate::map::{IovaMap, MappedRange};

/// The large page, bytes, whose alignment placements keep: an IOVA and its window
/// offset are congruent modulo this wherever a host or guest could use one.
pub const LARGE_PAGE_SIZE: u64 = 2 << 20;

/// Why a window cannot have a layout at all: a mistake in its configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("data area {data} of the window must start on 2 MiB and be whole pages long")]
pub struct GeometryError {
    /// The data area.
    pub data: Span<WindowOffset>,
}

/// What of the window the owner's memory can appear in. The same for as long as a
/// link exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowGeometry {
    data: Span<WindowOffset>,
    max_mappings: usize,
}

impl WindowGeometry {
    /// The data area, and how many ranges the link page can name. Refuses an area
    /// that does not start on [`LARGE_PAGE_SIZE`] or is not whole pages long.
    pub fn new(data: Span<WindowOffset>, max_mappings: usize) -> Result<Self, GeometryError> {
        let start_fits = data.start().raw().is_multiple_of(LARGE_PAGE_SIZE);
        if !start_fits || !data.is_aligned(PAGE_SIZE) {
            return Err(GeometryError { data });
        }
        Ok(Self { data, max_mappings })
    }

    /// Where the owner's memory may appear.
    pub fn data(&self) -> Span<WindowOffset> {
        self.data
    }

    /// How many ranges a layout may have.
    pub fn max_mappings(&self) -> usize {
        self.max_mappings
    }
}

/// A mapped range and the part of the window that it takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement<R> {
    range: MappedRange<R>,
    window: Span<WindowOffset>,
}

impl<R> Placement<R> {
    /// The range.
    pub fn range(&self) -> &MappedRange<R> {
        &self.range
    }

    /// The part of the window that the range takes; as long as the range.
    pub fn window(&self) -> Span<WindowOffset> {
        self.window
    }

    /// Where the range's first byte is.
    pub fn offset(&self) -> WindowOffset {
        self.window.start()
    }
}

/// Why a map does not fit into a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// The window's data area is too small, or what is in place leaves no gap that
    /// is large enough.
    #[error(
        "the mappings need {needed:#x} bytes of the window's data area, which has \
         {available:#x}; {}", advice(*.window_len)
    )]
    TooSmall {
        /// Length of a data area that would do, bytes; `u64::MAX` if none would.
        needed: u64,
        /// Length of the data area, bytes.
        available: u64,
        /// Length of a whole window that would do, bytes: a power of two, as a PCI
        /// BAR's is. `None` if no window would.
        window_len: Option<u64>,
    },
    /// More ranges than the link page can name.
    #[error("{count} mapped ranges, the link page has room for {max}")]
    TooMany {
        /// Ranges there are.
        count: usize,
        /// Ranges there may be.
        max: usize,
    },
}

fn advice(window_len: Option<u64>) -> String {
    match window_len {
        Some(len) if len >= 1 << 20 => format!("a window of {} MiB would do", len >> 20),
        Some(len) => format!("a window of {len} bytes would do"),
        None => "no window is large enough".to_owned(),
    }
}

/// The places of all mapped ranges, sorted by IOVA. No two share a byte of the
/// window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WindowLayout<R> {
    placements: BTreeMap<Iova, Placement<R>>,
}

impl<R> Default for WindowLayout<R> {
    fn default() -> Self {
        Self { placements: BTreeMap::new() }
    }
}

impl<R: Clone + PartialEq> WindowLayout<R> {
    /// The layout of an empty window.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives each range of `map` a place.
    ///
    /// - A range that `previous` has too, with equal IOVA, length, access and
    ///   backing, stays where it is. Nothing that is in place is moved to make room.
    /// - If none stays, the layout is *linear* where that fits: the offset is the
    ///   start of the data area + IOVA - base, base being the lowest IOVA rounded
    ///   down to [`LARGE_PAGE_SIZE`].
    /// - If some stay and are linear, others join that line if they all can.
    /// - Otherwise each range goes, by rising IOVA, to the first gap that it fits
    ///   into; its offset is congruent to its IOVA modulo [`LARGE_PAGE_SIZE`] if it
    ///   is that long.
    ///
    /// Refuses a map that does not fit. The error then names a length of the data
    /// area with which the same call would succeed.
    pub fn plan(geometry: &WindowGeometry, map: &IovaMap<R>, previous: &Self) -> Result<Self, LayoutError> {
        let (data, max) = (geometry.data, geometry.max_mappings);
        if map.len() > max {
            let count = map.len();
            return Err(LayoutError::TooMany { count, max });
        }
        let mut kept = previous.kept(data, map);
        let line = match kept.is_empty() {
            true => Line::fresh(data, map),
            false => kept.line(),
        };
        if let Some(line) = line.filter(|line| line.end(data, map).is_some()) {
            for range in map.iter() {
                // What is kept is on the line already.
                if let Some(window) = line.window(range.iova())
                    && !kept.placements.contains_key(&range.iova().start())
                {
                    kept.place(range, window);
                }
            }
            return Ok(kept);
        }
        let Some(gaps) = kept.gaps(data, map) else {
            let needed = kept.needed(data, map, line);
            let window_len = data.start().raw().checked_add(needed);
            return Err(LayoutError::TooSmall {
                needed,
                available: data.len(),
                window_len: window_len.and_then(u64::checked_next_power_of_two),
            });
        };
        for (range, window) in gaps {
            kept.place(range, window);
        }
        Ok(kept)
    }

    /// Takes out every placement with an IOVA in `span`; says whether there was one. The rest
    /// stays, as with [`Self::plan`] of a map without them.
    pub fn remove_overlapping(&mut self, span: Span<Iova>) -> bool {
        let before = self.placements.range(..=span.last()).rev();
        let overlapping = before.take_while(|(_, placement)| placement.range.iova().overlaps(span));
        let starts: Vec<Iova> = overlapping.map(|(iova, _)| *iova).collect();
        starts.iter().for_each(|start| drop(self.placements.remove(start)));
        !starts.is_empty()
    }

    /// Makes one of the changes that [`difference`](crate::difference) gives.
    pub fn make(&mut self, change: &Change<R>) {
        match change {
            Change::Unmap(placement) if self.has(placement) => {
                self.placements.remove(&placement.range.iova().start());
            }
            Change::Unmap(_) => {}
            Change::Map(placement) => self.place(&placement.range, placement.window),
        }
    }

    /// Where in the window the `len` bytes from `iova` on are. Refuses a range that
    /// is not wholly inside one placement, even if another follows. Says nothing
    /// about access.
    pub fn translate(&self, iova: Iova, len: u64) -> Result<WindowOffset, LookupError<Iova>> {
        let span = Span::new(iova, len)?;
        let before = self.placements.range(..=iova).next_back();
        let (_, placement) = before.ok_or(LookupError::Unknown { span })?;
        let offset = offset_in(placement.range.iova(), span)?;
        // Inside the placement, hence no wrap.
        Ok(WindowOffset::new(placement.offset().raw() + offset))
    }

    /// The placement whose range has `iova` in it.
    pub fn placement_at(&self, iova: Iova) -> Option<&Placement<R>> {
        let (_, placement) = self.placements.range(..=iova).next_back()?;
        placement.range.iova().contains(iova).then_some(placement)
    }

    /// If one number leads from every IOVA to its window offset, that number: the
    /// offset is `iova.wrapping_add(delta)`. `None` if nothing is placed.
    pub fn linear_delta(&self) -> Option<u64> {
        let delta = |p: &Placement<R>| p.offset().raw().wrapping_sub(p.range.iova().start().raw());
        let mut deltas = self.iter().map(delta);
        let first = deltas.next()?;
        deltas.all(|delta| delta == first).then_some(first)
    }

    /// All placements, by rising IOVA.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Placement<R>> {
        self.placements.values()
    }

    /// How many ranges have a place.
    pub fn len(&self) -> usize {
        self.placements.len()
    }

    /// Whether the window is empty.
    pub fn is_empty(&self) -> bool {
        self.placements.is_empty()
    }

    /// Whether exactly this placement is part of the layout.
    pub fn has(&self, placement: &Placement<R>) -> bool {
        self.placements.get(&placement.range.iova().start()) == Some(placement)
    }

    /// The placements whose ranges are in `map` unchanged.
    fn kept(&self, data: Span<WindowOffset>, map: &IovaMap<R>) -> Self {
        let kept = self.placements.iter().filter(|(iova, placement)| {
            map.range_at(**iova) == Some(&placement.range) && data.contains_span(placement.window)
        });
        Self { placements: kept.map(|(iova, p)| (*iova, p.clone())).collect() }
    }

    /// The line that all placements are on, if there is one that large pages allow.
    fn line(&self) -> Option<Line> {
        let delta = self.linear_delta()?;
        let (iova, placement) = self.placements.first_key_value()?;
        delta.is_multiple_of(LARGE_PAGE_SIZE).then(|| Line { iova: *iova, offset: placement.offset() })
    }

    /// Places for the rest of `map`, each at its first fit beside these placements, if all
    /// fit.
    fn gaps<'m>(
        &self,
        data: Span<WindowOffset>,
        map: &'m IovaMap<R>,
    ) -> Option<Vec<(&'m MappedRange<R>, Span<WindowOffset>)>> {
        let mut taken: Vec<_> = self.iter().map(|placement| placement.window).collect();
        taken.sort_unstable_by_key(|window| window.start());
        let mut gaps = Vec::new();
        for range in map.iter() {
            if self.placements.contains_key(&range.iova().start()) {
                continue;
            }
            let window = first_fit(data, taken.iter(), range.iova())?;
            let at = taken.partition_point(|taken| taken.start() < window.start());
            taken.insert(at, window);
            gaps.push((range, window));
        }
        Some(gaps)
    }

    fn place(&mut self, range: &MappedRange<R>, window: Span<WindowOffset>) {
        let range = range.clone();
        let placement = Placement { range, window };
        self.placements.insert(placement.range.iova().start(), placement);
    }

    /// Length of the data area, bytes, in which these placements and the rest of
    /// `map` have room; `u64::MAX` if that is past the top of the address space.
    fn needed(&self, data: Span<WindowOffset>, map: &IovaMap<R>, line: Option<Line>) -> u64 {
        let start = data.start();
        let Ok(boundless) = Span::new(start, u64::MAX - start.raw()) else {
            return u64::MAX;
        };
        let packed = self.gaps(boundless, map).map(|gaps| {
            let kept = self.iter().map(|placement| placement.window.last());
            kept.chain(gaps.iter().map(|(_, window)| window.last())).max().unwrap_or(start)
        });
        let linear = line.and_then(|line| line.end(boundless, map));
        let ends = [linear, packed].into_iter().flatten();
        ends.map(|last| last.raw() - start.raw() + 1).min().unwrap_or(u64::MAX)
    }
}

/// Where a linear layout is anchored: one IOVA and its window offset, at a distance
/// that is a multiple of [`LARGE_PAGE_SIZE`].
#[derive(Clone, Copy)]
struct Line {
    iova: Iova,
    offset: WindowOffset,
}

impl Line {
    /// The line on which the lowest IOVA comes as early as large pages allow.
    fn fresh<R: Clone + PartialEq>(data: Span<WindowOffset>, map: &IovaMap<R>) -> Option<Self> {
        let lowest = map.iter().next()?.iova().start().raw();
        Some(Self { iova: Iova::new(lowest - lowest % LARGE_PAGE_SIZE), offset: data.start() })
    }

    /// The last byte of the window that `map` takes on the line, if all of it is in `data`; the
    /// first of `data` if the map is empty.
    fn end<R: Clone + PartialEq>(self, data: Span<WindowOffset>, map: &IovaMap<R>) -> Option<WindowOffset> {
        let mut end = data.start();
        for range in map.iter() {
            let window = self.window(range.iova()).filter(|window| data.contains_span(*window))?;
            end = end.max(window.last());
        }
        Some(end)
    }

    /// Where `iova` is on the line, unless that would wrap.
    fn window(self, iova: Span<Iova>) -> Option<Span<WindowOffset>> {
        let (start, anchor) = (iova.start().raw(), self.iova.raw());
        let offset = match start.checked_sub(anchor) {
            Some(above) => self.offset.raw().checked_add(above)?,
            None => self.offset.raw().checked_sub(anchor - start)?,
        };
        Span::new(WindowOffset::new(offset), iova.len()).ok()
    }
}

/// The first place in `data` for a range of IOVAs between the `taken` parts of the
/// window, which come by rising offset.
fn first_fit<'a>(
    data: Span<WindowOffset>,
    taken: impl Iterator<Item = &'a Span<WindowOffset>>,
    iova: Span<Iova>,
) -> Option<Span<WindowOffset>> {
    let at = |from: u64| {
        let start = match iova.len() >= LARGE_PAGE_SIZE {
            // `from` is page-aligned already.
            false => from,
            true => {
                let ahead = iova.start().raw().wrapping_sub(from) % LARGE_PAGE_SIZE;
                from.checked_add(ahead)?
            }
        };
        let window = Span::new(WindowOffset::new(start), iova.len()).ok()?;
        data.contains_span(window).then_some(window)
    };
    let mut window = at(data.start().raw())?;
    for taken in taken {
        if window.last() < taken.start() {
            break;
        }
        if window.overlaps(*taken) {
            window = at(taken.last().raw().checked_add(1)?)?;
        }
    }
    Some(window)
}
