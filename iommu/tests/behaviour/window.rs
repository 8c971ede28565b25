//! The window's layout and the changes between two layouts.

use iommu::{
    Access, Backing, Change, GeometryError, Iova, IovaMap, LayoutError, LookupError, MappedRange, Span,
    SpanError, WindowGeometry, WindowLayout, WindowOffset, difference,
};

use crate::{MIB, TOP_PAGE, iova, range, window};

const GIB: u64 = 1 << 30;

fn geometry(len: u64) -> WindowGeometry {
    WindowGeometry::new(window(2 * MIB, len), 8).unwrap()
}

fn map(ranges: impl IntoIterator<Item = MappedRange<char>>) -> IovaMap<char> {
    let mut map = IovaMap::new();
    for range in ranges {
        map.insert(range).unwrap();
    }
    map
}

fn plan(len: u64, map: &IovaMap<char>, previous: &WindowLayout<char>) -> WindowLayout<char> {
    WindowLayout::plan(&geometry(len), map, previous).unwrap()
}

fn offsets(layout: &WindowLayout<char>) -> Vec<u64> {
    layout.iter().map(|p| p.offset().raw()).collect()
}

#[test]
fn a_map_that_fits_is_linear() {
    let map = map([range(5 * MIB, MIB, 0), range(8 * MIB, MIB, MIB)]);
    let layout = plan(5 * MIB, &map, &WindowLayout::new());
    // The base is 4 MiB, the highest address 9 MiB: all of the data area.
    assert_eq!(offsets(&layout), [3 * MIB, 6 * MIB]);
    assert_eq!(layout.linear_delta(), Some((2 * MIB).wrapping_sub(4 * MIB)));
}

#[test]
fn a_map_too_wide_to_be_linear_is_packed() {
    let map = map([range(MIB, 0x3000, 0), range(GIB + MIB, 4 * MIB, MIB), range(TOP_PAGE, 0x1000, 0x3000)]);
    let layout = plan(5 * MIB, &map, &WindowLayout::new());
    // The long range keeps its alignment, the small ones fill the gap before it.
    assert_eq!(offsets(&layout), [2 * MIB, 3 * MIB, 2 * MIB + 0x3000]);
    assert_eq!(layout.linear_delta(), None);
}

#[test]
fn what_is_in_place_stays_even_if_all_could_be_linear() {
    let wide = map([range(0, MIB, 0), range(GIB, MIB, MIB)]);
    let layout = plan(8 * MIB, &wide, &WindowLayout::new());
    assert_eq!(offsets(&layout), [2 * MIB, 3 * MIB]);
    let near = map([range(GIB, MIB, MIB), range(GIB + 4 * MIB, MIB, 0)]);
    let layout = plan(8 * MIB, &near, &layout);
    assert_eq!(offsets(&layout), [3 * MIB, 2 * MIB]);
}

#[test]
fn a_new_range_joins_the_line() {
    let one = map([range(8 * MIB, MIB, 0)]);
    let before = plan(32 * MIB, &one, &WindowLayout::new());
    let two = map([range(8 * MIB, MIB, 0), range(16 * MIB, MIB, MIB)]);
    let layout = plan(32 * MIB, &two, &before);
    assert_eq!(offsets(&layout), [2 * MIB, 10 * MIB]);
    assert!(layout.linear_delta().is_some());
}

#[test]
fn a_new_range_below_the_line_takes_the_first_gap() {
    let one = map([range(8 * MIB, MIB, 0)]);
    let before = plan(32 * MIB, &one, &WindowLayout::new());
    let two = map([range(8 * MIB, MIB, 0), range(4 * MIB, 2 * MIB, MIB)]);
    let layout = plan(32 * MIB, &two, &before);
    assert_eq!(offsets(&layout), [4 * MIB, 2 * MIB]);
}

#[test]
fn a_new_range_below_joins_the_line_where_it_has_room() {
    let (low, high) = (range(0, MIB, 0), range(8 * MIB, MIB, MIB));
    let both = plan(32 * MIB, &map([low, high.clone()]), &WindowLayout::new());
    let one = plan(32 * MIB, &map([high.clone()]), &both);
    assert_eq!(offsets(&one), [10 * MIB]);
    let layout = plan(32 * MIB, &map([range(4 * MIB, MIB, 0), high]), &one);
    assert_eq!(offsets(&layout), [6 * MIB, 10 * MIB]);
}

#[test]
fn a_window_that_is_too_small_says_which_would_do() {
    let map = map([range(0, 4 * MIB, 0), range(GIB, 4 * MIB, 4 * MIB)]);
    let error = WindowLayout::plan(&geometry(6 * MIB), &map, &WindowLayout::new()).unwrap_err();
    let expected = LayoutError::TooSmall { needed: 8 * MIB, available: 6 * MIB, window_len: Some(16 * MIB) };
    assert_eq!(error, expected);
    assert!(error.to_string().ends_with("a window of 16 MiB would do"), "{error}");
    plan(8 * MIB, &map, &WindowLayout::new());
}

#[test]
fn no_window_is_large_enough_for_more_than_there_are_addresses() {
    let half = u64::MAX / 2 - (MIB - 1);
    let map = map([range(0, half, 0), range(half + MIB, half, 0)]);
    let error = WindowLayout::plan(&geometry(6 * MIB), &map, &WindowLayout::new()).unwrap_err();
    let LayoutError::TooSmall { window_len, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(window_len, None);
    assert!(error.to_string().ends_with("no window is large enough"), "{error}");
}

#[test]
fn more_ranges_than_the_link_page_can_name_are_refused() {
    let map = map((0..9).map(|page| range(page << 12, 0x1000, 0)));
    let error = WindowLayout::plan(&geometry(MIB), &map, &WindowLayout::new()).unwrap_err();
    assert_eq!(error, LayoutError::TooMany { count: 9, max: 8 });
}

#[test]
fn a_data_area_that_is_not_aligned_is_refused() {
    for data in [window(MIB, 2 * MIB), window(2 * MIB, 0x1001)] {
        assert_eq!(WindowGeometry::new(data, 8), Err(GeometryError { data }));
    }
}

#[test]
fn translation_stops_at_the_end_of_a_placement() {
    let map = map([range(0x1000, 0x1000, 0), range(0x2000, 0x1000, 0x5000)]);
    let layout = plan(MIB, &map, &WindowLayout::new());
    let found = layout.translate(Iova::new(0x1fff), 1).unwrap();
    assert_eq!(found, WindowOffset::new(2 * MIB + 0x1fff));
    let (span, entry) = (iova(0x1fff, 2), iova(0x1000, 0x1000));
    let error = layout.translate(Iova::new(0x1fff), 2).unwrap_err();
    assert_eq!(error, LookupError::Crosses { span, entry });
    for outside in [0xfff, 0x3000] {
        let span = iova(outside, 1);
        let error = layout.translate(span.start(), 1).unwrap_err();
        assert_eq!(error, LookupError::Unknown { span });
    }
    let error = layout.translate(Iova::new(0x1000), 0).unwrap_err();
    assert!(matches!(error, LookupError::Range(SpanError::Empty { .. })));
}

#[test]
fn a_range_with_another_backing_is_unmapped_and_mapped() {
    let before = plan(MIB, &map([range(0, 0x1000, 0)]), &WindowLayout::new());
    let after = plan(MIB, &map([range(0, 0x1000, 0x1000)]), &before);
    let (old, new) = (before.iter().next().unwrap(), after.iter().next().unwrap());
    let expected = [Change::Unmap(old.clone()), Change::Map(new.clone())];
    assert_eq!(difference(&before, &after), expected);
}

#[test]
fn unmaps_come_before_maps() {
    let ranges = [range(0, 0x1000, 0), range(0x1000, 0x1000, 0x1000)];
    let before = plan(MIB, &map(ranges.clone()), &WindowLayout::new());
    let kept = range(0x1000, 0x1000, 0x1000);
    let after = plan(MIB, &map([kept, range(0x2000, 0x1000, 0)]), &before);
    let changes = difference(&before, &after);
    assert!(matches!(&changes[..], [Change::Unmap(old), Change::Map(new)]
        if *old.range() == ranges[0] && new.range().iova() == iova(0x2000, 0x1000)));
    assert_eq!(difference(&after, &after), []);
}

#[test]
fn what_is_taken_out_of_a_layout_leaves_the_rest_where_a_plan_leaves_it() {
    let geometry = WindowGeometry::new(Span::new(WindowOffset::new(2 << 20), 1 << 20).unwrap(), 64).unwrap();
    let mut map = IovaMap::new();
    for start in [0x1000, 0x3000, 0x8000_0000, 0x8000_1000, 0x8000_5000] {
        let span = Span::new(Iova::new(start), 0x1000).unwrap();
        let backing = Backing { handle: 1, offset: 0 };
        map.insert(MappedRange::new(span, Access::ReadWrite, backing).unwrap()).unwrap();
    }
    let whole = WindowLayout::plan(&geometry, &map, &WindowLayout::new()).unwrap();
    for (start, len, gone) in
        [(0x3000, 0x1000, 1), (0x3800, 0x8000_0000, 3), (0x2000, 0x1000, 0), (0, u64::MAX, 5)]
    {
        let span = Span::new(Iova::new(start), len).unwrap();
        let mut left = whole.clone();
        assert_eq!(left.remove_overlapping(span), gone > 0);
        let mut less = map.clone();
        assert_eq!(less.remove_overlapping(span).len(), gone);
        assert_eq!(left, WindowLayout::plan(&geometry, &less, &whole).unwrap());
        // And so do the changes that lead there.
        let mut changed = whole.clone();
        difference(&whole, &left).iter().for_each(|change| changed.make(change));
        assert_eq!(changed, left);
        difference(&left, &whole).iter().for_each(|change| changed.make(change));
        assert_eq!(changed, whole);
    }
}
