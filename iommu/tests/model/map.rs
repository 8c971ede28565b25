//! The IOVA map against a map of single pages.

use std::collections::BTreeMap;

use iommu::{Access, Backing, Iova, IovaMap, MappedRange, Span};
use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::{collection::vec, prop_assert, prop_assert_eq, proptest};

use crate::{PAGE, page, units};

#[derive(Clone, Copy, Debug)]
enum Step {
    Insert(Access, u8, u64),
    Remove,
    Invalidate,
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![Just(Access::Read), Just(Access::Write), Just(Access::ReadWrite)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (access(), 0..2u8, 0..8u64).prop_map(|(a, file, page)| Step::Insert(a, file, page)),
        1 => Just(Step::Remove),
        1 => Just(Step::Invalidate),
    ]
}

/// What the model knows of a page: which insertion it came with, and its backing.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Page {
    insertion: usize,
    access: Access,
    file: u8,
    offset: u64,
}

type Model = BTreeMap<u128, Page>;

fn model_of(map: &IovaMap<u8>) -> BTreeMap<u128, (Access, u8, u64)> {
    let mut pages = BTreeMap::new();
    for range in map.iter() {
        let (iova, backing) = (range.iova(), range.backing());
        for (count, number) in units(iova.start().raw(), iova.len(), PAGE).unwrap().into_iter().enumerate() {
            let offset = backing.offset + count as u64 * PAGE;
            assert!(pages.insert(number, (range.access(), backing.handle, offset)).is_none());
        }
    }
    pages
}

proptest! {
    #[test]
    fn the_map_is_a_map_of_pages(
        steps in vec((step(), page(), 1..5u64), 1..40),
        lookups in vec((page(), 0..PAGE, 0..4 * PAGE, access()), 8),
    ) {
        let mut map = IovaMap::new();
        let mut model = Model::new();
        for (number, (step, start, pages)) in steps.into_iter().enumerate() {
            let Ok(span) = Span::new(Iova::new(start), pages * PAGE) else { continue };
            let span_pages = units(start, pages * PAGE, PAGE).unwrap();
            // Insertions with a page in the span, and whether all their pages are.
            let touched: Vec<usize> =
                span_pages.iter().filter_map(|p| Some(model.get(p)?.insertion)).collect();
            let whole = model
                .iter()
                .all(|(p, page)| !touched.contains(&page.insertion) || span_pages.contains(p));
            let overlapping = map.overlapping(span).count();
            let mut distinct = touched.clone();
            distinct.dedup();
            prop_assert_eq!(overlapping, distinct.len());
            let before = map.clone();
            match step {
                Step::Insert(access, file, first) => {
                    let backing = Backing { handle: file, offset: first * PAGE };
                    let inserted = map.insert(MappedRange::new(span, access, backing).unwrap());
                    prop_assert_eq!(inserted.is_ok(), touched.is_empty());
                    if touched.is_empty() {
                        for (count, p) in span_pages.iter().enumerate() {
                            let offset = (first + count as u64) * PAGE;
                            model.insert(*p, Page { insertion: number, access, file, offset });
                        }
                    }
                }
                Step::Remove => {
                    let removed = map.remove(span);
                    prop_assert_eq!(removed.is_ok(), whole);
                    if let Ok(removed) = removed {
                        prop_assert_eq!(removed.len(), distinct.len());
                        model.retain(|_, page| !touched.contains(&page.insertion));
                    } else {
                        prop_assert_eq!(&map, &before);
                    }
                }
                Step::Invalidate => {
                    prop_assert_eq!(map.remove_overlapping(span).len(), distinct.len());
                    model.retain(|_, page| !touched.contains(&page.insertion));
                }
            }
            let pages = model.iter().map(|(p, page)| (*p, (page.access, page.file, page.offset)));
            prop_assert_eq!(model_of(&map), pages.collect());
        }
        for (start, within, len, wanted) in lookups {
            let start = start + within;
            let touched = units(start, len, PAGE).unwrap_or_default();
            let first = touched.first().and_then(|p| model.get(p)).copied();
            let one = touched.iter().all(|p| {
                model.get(p).map(|page| page.insertion) == first.map(|page| page.insertion)
            });
            let expected = first
                .filter(|page| one && page.access.allows(wanted))
                .map(|page| Backing { handle: page.file, offset: page.offset + within });
            prop_assert_eq!(map.translate(Iova::new(start), len, wanted).ok(), expected);
            // The same access as pieces: each page by itself, whatever it came with.
            let found = map.pieces(Iova::new(start), len, wanted).ok().map(|pieces| {
                let bytes = pieces.iter().flat_map(|piece| {
                    (0..piece.len).map(|at| (piece.backing.handle, piece.backing.offset + at))
                });
                bytes.collect::<Vec<_>>()
            });
            let byte = |at: u128| {
                let page = model.get(&(at / u128::from(PAGE)))?;
                let within = u64::try_from(at % u128::from(PAGE)).unwrap();
                page.access.allows(wanted).then_some((page.file, page.offset + within))
            };
            let bytes = units(start, len, 1);
            prop_assert_eq!(found, bytes.and_then(|bytes| bytes.into_iter().map(byte).collect()));
            prop_assert_eq!(
                map.range_at(Iova::new(start)).is_some(),
                model.contains_key(&u128::from(start / PAGE))
            );
        }
    }

    #[test]
    fn merging_keeps_every_page_and_leaves_nothing_to_merge(
        inserts in vec((page(), any::<bool>(), proptest::bool::weighted(0.9)), 1..40),
    ) {
        let mut map = IovaMap::new();
        for (start, file, identity) in inserts {
            let span = Span::new(Iova::new(start), PAGE).unwrap();
            let offset = if identity { start % (1 << 30) } else { 0 };
            let backing = Backing { handle: u8::from(file), offset };
            let _ = map.insert(MappedRange::new(span, Access::ReadWrite, backing).unwrap());
        }
        let merged = map.merged();
        prop_assert_eq!(model_of(&merged), model_of(&map));
        let ranges: Vec<_> = merged.iter().collect();
        for pair in ranges.windows(2) {
            let (low, high) = (pair[0], pair[1]);
            let touch = low.iova().last().raw() + 1 == high.iova().start().raw();
            let follow = low.backing().offset + low.iova().len() == high.backing().offset;
            let same = low.backing().handle == high.backing().handle;
            prop_assert!(!(touch && follow && same));
        }
    }
}
