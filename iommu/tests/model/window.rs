//! Histories of layouts against the rules that every layout keeps, and the changes
//! between them against a plain list of what is in the window.

use iommu::{
    Access, Backing, Change, Iova, IovaMap, LARGE_PAGE_SIZE, LayoutError, MappedRange, Placement, Span,
    WindowGeometry, WindowLayout, WindowOffset, difference,
};
use proptest::prelude::{Just, ProptestConfig, Strategy, prop_oneof};
use proptest::test_runner::TestCaseError;
use proptest::{collection::vec, prop_assert, prop_assert_eq, proptest};

use crate::PAGE;

const MAX_MAPPINGS: usize = 10;

/// Pages near the bottom, apart from it, or at the very top of the IOVA space.
fn range() -> impl Strategy<Value = Option<MappedRange<u8>>> {
    let base = prop_oneof![3 => Just(0), 1 => Just(1u64 << 40), 1 => Just(u64::MAX - (4096 * PAGE - 1))];
    let pages = prop_oneof![1..4u64, Just(511), 512..1100u64];
    (base, 0..4096u64, pages, 0..2u8).prop_map(|(base, page, pages, handle)| {
        let span = Span::new(Iova::new(base + page * PAGE), pages * PAGE).ok()?;
        let access = if page % 2 == 0 { Access::Read } else { Access::ReadWrite };
        MappedRange::new(span, access, Backing { handle, offset: 0 }).ok()
    })
}

#[derive(Clone, Debug)]
enum Step {
    Insert(Option<MappedRange<u8>>),
    Remove(proptest::sample::Index),
    /// The same range with another backing.
    Replace(proptest::sample::Index),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => range().prop_map(Step::Insert),
        2 => proptest::prelude::any::<proptest::sample::Index>().prop_map(Step::Remove),
        1 => proptest::prelude::any::<proptest::sample::Index>().prop_map(Step::Replace),
    ]
}

fn apply(map: &mut IovaMap<u8>, step: Step) {
    let pick = |map: &IovaMap<u8>, index: proptest::sample::Index| {
        let ranges: Vec<_> = map.iter().cloned().collect();
        (!ranges.is_empty()).then(|| ranges[index.index(ranges.len())].clone())
    };
    match step {
        Step::Insert(Some(range)) => drop(map.insert(range)),
        Step::Insert(None) => {}
        Step::Remove(index) => {
            if let Some(range) = pick(map, index) {
                map.remove(range.iova()).unwrap();
            }
        }
        Step::Replace(index) => {
            if let Some(range) = pick(map, index) {
                map.remove(range.iova()).unwrap();
                let mut backing = range.backing().clone();
                backing.offset += PAGE;
                map.insert(MappedRange::new(range.iova(), range.access(), backing).unwrap()).unwrap();
            }
        }
    }
}

fn geometry(data: u64, pages: u64) -> WindowGeometry {
    let data = Span::new(WindowOffset::new(data), pages * PAGE).unwrap();
    WindowGeometry::new(data, MAX_MAPPINGS).unwrap()
}

/// Whether offset = data + IOVA - base has room, in arithmetic that cannot wrap.
fn linear_fits(geometry: &WindowGeometry, map: &IovaMap<u8>) -> bool {
    let (Some(first), Some(last)) = (map.iter().next(), map.iter().last()) else {
        return true;
    };
    let base = first.iova().start().raw() / LARGE_PAGE_SIZE * LARGE_PAGE_SIZE;
    last.iova().last().raw() - base < geometry.data().len()
}

fn check_layout(
    geometry: &WindowGeometry,
    map: &IovaMap<u8>,
    previous: &WindowLayout<u8>,
    layout: &WindowLayout<u8>,
) -> Result<(), TestCaseError> {
    // Every range has a place, and nothing else has.
    prop_assert!(layout.iter().map(Placement::range).eq(map.iter()));
    let placements: Vec<_> = layout.iter().collect();
    for (index, placement) in placements.iter().enumerate() {
        let (iova, window) = (placement.range().iova(), placement.window());
        prop_assert_eq!(window.len(), iova.len());
        prop_assert!(geometry.data().contains_span(window) && window.is_aligned(PAGE));
        if iova.len() >= LARGE_PAGE_SIZE {
            let distance = window.start().raw().wrapping_sub(iova.start().raw());
            prop_assert_eq!(distance % LARGE_PAGE_SIZE, 0);
        }
        prop_assert!(placements[..index].iter().all(|other| !other.window().overlaps(window)));
        prop_assert_eq!(layout.translate(iova.start(), iova.len()), Ok(window.start()));
        prop_assert_eq!(layout.translate(iova.last(), 1), Ok(window.last()));
        prop_assert!(layout.translate(iova.last(), 2).is_err());
    }
    // What was there unchanged has not moved.
    let kept: Vec<_> = previous.iter().filter(|old| map.iter().any(|range| range == old.range())).collect();
    prop_assert!(kept.iter().all(|old| layout.has(old)));
    if kept.is_empty() && linear_fits(geometry, map) && !map.is_empty() {
        let first = layout.iter().next().unwrap();
        let ahead = first.range().iova().start().raw() % LARGE_PAGE_SIZE;
        prop_assert_eq!(first.offset().raw(), geometry.data().start().raw() + ahead);
        prop_assert!(layout.linear_delta().is_some());
    }
    if let Some(delta) = layout.linear_delta() {
        for placement in layout.iter() {
            let iova = placement.range().iova().start().raw();
            prop_assert_eq!(iova.wrapping_add(delta), placement.offset().raw());
        }
    }
    Ok(())
}

/// Carries the changes out on a plain list, as a VMM would.
fn check_changes(old: &WindowLayout<u8>, new: &WindowLayout<u8>) -> Result<(), TestCaseError> {
    let mut mapped: Vec<Placement<u8>> = old.iter().cloned().collect();
    let mut maps_began = false;
    for change in difference(old, new) {
        match change {
            Change::Unmap(placement) => {
                prop_assert!(!maps_began);
                prop_assert!(!new.has(&placement));
                let position = mapped.iter().position(|present| *present == placement);
                prop_assert!(position.is_some(), "unmap of what is not mapped");
                mapped.remove(position.unwrap());
            }
            Change::Map(placement) => {
                maps_began = true;
                prop_assert!(!old.has(&placement));
                prop_assert!(mapped.iter().all(|m| !m.window().overlaps(placement.window())));
                mapped.push(placement);
            }
        }
    }
    mapped.sort_by_key(|placement| placement.range().iova().start());
    prop_assert!(mapped.iter().eq(new.iter()));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_layout_keeps_the_rules_and_every_change_is_safe(
        steps in vec(step(), 1..30),
        pages in prop_oneof![1..64u64, 500..6000u64],
        at_top in proptest::bool::weighted(0.2),
    ) {
        let start = if at_top { u64::MAX - (8192 * PAGE - 1) } else { LARGE_PAGE_SIZE };
        let geometry = self::geometry(start, pages);
        let mut map = IovaMap::new();
        let mut layout = WindowLayout::new();
        for step in steps {
            let before = map.clone();
            apply(&mut map, step);
            match WindowLayout::plan(&geometry, &map, &layout) {
                Ok(next) => {
                    check_layout(&geometry, &map, &layout, &next)?;
                    check_changes(&layout, &next)?;
                    layout = next;
                }
                Err(LayoutError::TooMany { count, max }) => {
                    prop_assert_eq!((count, max), (MAX_MAPPINGS + 1, MAX_MAPPINGS));
                    map = before;
                }
                Err(LayoutError::TooSmall { needed, available, .. }) => {
                    prop_assert_eq!(available, geometry.data().len());
                    prop_assert!(needed > available);
                    // Linear is tried, unless something is in place.
                    prop_assert!(!linear_fits(&geometry, &map) || !layout.is_empty());
                    if needed < u64::MAX - start {
                        let larger = self::geometry(start, needed / PAGE);
                        let planned = WindowLayout::plan(&larger, &map, &layout);
                        check_layout(&larger, &map, &layout, &planned.unwrap())?;
                    }
                    map = before;
                }
            }
        }
    }

    #[test]
    fn changes_between_unrelated_layouts_are_safe(
        old in vec(range(), 0..8),
        new in vec(range(), 0..8),
    ) {
        let geometry = self::geometry(LARGE_PAGE_SIZE, 20_000);
        let plan = |ranges: Vec<Option<MappedRange<u8>>>| {
            let mut map = IovaMap::new();
            for range in ranges.into_iter().flatten() {
                let _ = map.insert(range);
            }
            WindowLayout::plan(&geometry, &map, &WindowLayout::new()).unwrap()
        };
        check_changes(&plan(old), &plan(new))?;
    }
}
