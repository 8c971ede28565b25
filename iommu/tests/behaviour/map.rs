//! The IOVA map.

use iommu::{
    Access, Backing, FrontendVa, Gpa, Iova, IovaMap, LookupError, MapError, MappedRange, MemoryTable,
    NewRegion, Piece, SpanError, TranslateError,
};

use crate::{TOP_PAGE, iova, range, try_range};

/// Two pages at 0x1000, one at 0x3000 right behind, and the top page.
fn map() -> IovaMap<char> {
    let mut map = IovaMap::new();
    map.insert(range(0x1000, 0x2000, 0)).unwrap();
    map.insert(range(0x3000, 0x1000, 0x2000)).unwrap();
    map.insert(range(TOP_PAGE, 0x1000, 0x8000)).unwrap();
    map
}

fn starts<'a>(ranges: impl IntoIterator<Item = &'a MappedRange<char>>) -> Vec<u64> {
    ranges.into_iter().map(|r| r.iova().start().raw()).collect()
}

#[test]
fn insert_of_an_overlap_changes_nothing() {
    for (start, len) in [(0x2000, 0x1000), (0, 0x2000), (0, 0x9000), (TOP_PAGE, 0x1000)] {
        let mut map = map();
        let error = map.insert(range(start, len, 0)).unwrap_err();
        assert!(matches!(error, MapError::Overlap { .. }), "{error}");
        assert_eq!(map, self::map());
    }
}

#[test]
fn a_range_that_is_not_whole_pages_is_refused() {
    for (start, len, offset) in [(0x10, 0x1000, 0), (0x1000, 0x10, 0), (0x1000, 0x1000, 0x10)] {
        let error = try_range(start, len, offset).unwrap_err();
        let iova = iova(start, len);
        assert_eq!(error, MapError::Unaligned { iova, offset });
    }
}

#[test]
fn a_range_that_wraps_in_its_file_is_refused() {
    let error = try_range(0x1000, 0x1000, TOP_PAGE).unwrap_err();
    let (iova, offset) = (iova(0x1000, 0x1000), TOP_PAGE);
    assert_eq!(error, MapError::FileWraps { iova, offset });
}

#[test]
fn unmap_of_a_partial_overlap_changes_nothing() {
    for (start, len) in [(0x2000, 0x2000), (0x1000, 0x1000), (0, 0x1001), (u64::MAX, 1)] {
        let mut map = map();
        let error = map.remove(iova(start, len)).unwrap_err();
        assert!(matches!(error, MapError::Split { .. }), "{error}");
        assert_eq!(map, self::map());
    }
}

#[test]
fn unmap_takes_every_whole_range() {
    let mut map = map();
    let removed = map.remove(iova(0, 0x10000)).unwrap();
    assert_eq!(starts(&removed), [0x1000, 0x3000]);
    assert_eq!(starts(map.iter()), [TOP_PAGE]);
    assert_eq!(map.remove(iova(0, 0x10000)).unwrap(), []);
}

#[test]
fn an_invalidation_takes_ranges_that_it_only_touches() {
    let mut map = map();
    let removed = map.remove_overlapping(iova(0x2fff, 2));
    assert_eq!(starts(&removed), [0x1000, 0x3000]);
    assert_eq!(map.remove_overlapping(iova(u64::MAX, 1)).len(), 1);
    assert!(map.is_empty());
}

#[test]
fn translation_stops_at_the_end_of_a_range() {
    let (map, handle) = (map(), 'A');
    let end = map.translate(Iova::new(0x2fff), 1, Access::Read).unwrap();
    assert_eq!(end, Backing { handle, offset: 0x1fff });
    let error = map.translate(Iova::new(0x2fff), 2, Access::Read).unwrap_err();
    let (span, entry) = (iova(0x2fff, 2), iova(0x1000, 0x2000));
    assert_eq!(error, LookupError::Crosses { span, entry }.into());
}

#[test]
fn pieces_go_over_neighbours_and_check_each() {
    let mut map = map();
    let read_only = MappedRange::new(iova(0x4000, 0x1000), Access::Read, Backing { handle: 'B', offset: 0 });
    map.insert(read_only.unwrap()).unwrap();
    let found = map.pieces(Iova::new(0x2ff0), 0x1020, Access::Read).unwrap();
    let piece = |handle, offset, len| Piece { backing: Backing { handle, offset }, len };
    assert_eq!(found, [piece('A', 0x1ff0, 0x10), piece('A', 0x2000, 0x1000), piece('B', 0, 0x10)]);
    let error = map.pieces(Iova::new(0x2ff0), 0x1020, Access::Write).unwrap_err();
    let (span, wanted, allowed) = (iova(0x4000, 0x10), Access::Write, Access::Read);
    assert_eq!(error, TranslateError::Access { span, wanted, allowed });
    let error = map.pieces(Iova::new(0x4ff0), 0x20, Access::Read).unwrap_err();
    assert_eq!(error, LookupError::Unknown { span: iova(0x5000, 0x10) }.into());
    assert_eq!(map.pieces(Iova::new(u64::MAX), 1, Access::Read).unwrap(), [piece('A', 0x8fff, 1)]);
    assert!(map.pieces(Iova::new(u64::MAX), 2, Access::Read).is_err());
    assert!(map.pieces(Iova::new(0x1000), 0, Access::Read).is_err());
}

#[test]
fn translation_of_what_is_not_mapped_is_refused() {
    let map = map();
    let error = map.translate(Iova::new(0x4000), 1, Access::Read).unwrap_err();
    let span = iova(0x4000, 1);
    assert_eq!(error, LookupError::Unknown { span }.into());
    let error = map.translate(Iova::new(u64::MAX), 2, Access::Read).unwrap_err();
    let wraps = SpanError::Wraps { start: u64::MAX, len: 2 };
    assert_eq!(error, TranslateError::Lookup(LookupError::Range(wraps)));
}

#[test]
fn translation_checks_access() {
    let all = [Access::Read, Access::Write, Access::ReadWrite];
    for allowed in all {
        let mut map = IovaMap::new();
        let backing = Backing { handle: 'A', offset: 0 };
        let span = iova(0x1000, 0x1000);
        map.insert(MappedRange::new(span, allowed, backing).unwrap()).unwrap();
        for wanted in all {
            let result = map.translate(span.start(), 0x1000, wanted);
            if allowed == Access::ReadWrite || allowed == wanted {
                assert!(result.is_ok());
            } else {
                let expected = TranslateError::Access { span, wanted, allowed };
                assert_eq!(result, Err(expected));
            }
        }
    }
}

#[test]
fn access_bits_are_found_again() {
    for bits in 1..4 {
        assert_eq!(Access::from_bits(bits).map(Access::bits), Some(bits));
    }
    assert_eq!(Access::from_bits(0), None);
    assert_eq!(Access::from_bits(4), None);
}

#[test]
fn merging_joins_only_what_is_one() {
    let mut map = map();
    // Behind 0x3000 in IOVA but not in the file, then in the file but another one.
    map.insert(range(0x4000, 0x1000, 0x9000)).unwrap();
    let other = Backing { handle: 'B', offset: 0xa000 };
    map.insert(MappedRange::new(iova(0x5000, 0x1000), Access::ReadWrite, other).unwrap()).unwrap();
    let read = Backing { handle: 'B', offset: 0xb000 };
    map.insert(MappedRange::new(iova(0x6000, 0x1000), Access::Read, read).unwrap()).unwrap();
    let merged = map.merged();
    assert_eq!(starts(merged.iter()), [0x1000, 0x4000, 0x5000, 0x6000, TOP_PAGE]);
    assert_eq!(merged.range_at(Iova::new(0x3fff)), Some(&range(0x1000, 0x3000, 0)));
    assert_eq!(merged.merged(), merged);
}

#[test]
fn without_an_iommu_the_map_is_the_memory() {
    let mut memory = MemoryTable::new(2);
    for (guest, offset) in [(0x10000, 0x4000), (0x1000, 0)] {
        let new = NewRegion {
            guest: Gpa::new(guest),
            frontend: FrontendVa::new(guest),
            len: 0x4000,
            handle: 'A',
            offset,
            file_len: 0x8000,
        };
        memory.add(new).unwrap();
    }
    let mut map = IovaMap::identity(&memory);
    let ranges: Vec<_> = map.iter().cloned().collect();
    assert_eq!(ranges, [range(0x1000, 0x4000, 0), range(0x10000, 0x4000, 0x4000)]);

    // The second region goes, and with it whatever needs it, and only that.
    map.insert(range(0x20000, 0x2000, 0x6000)).unwrap();
    map.insert(range(0x30000, 0x1000, 0x3000)).unwrap();
    assert_eq!(map.remove_unbacked(&memory), []);
    memory.remove(Gpa::new(0x10000), FrontendVa::new(0x10000), 0x4000).unwrap();
    assert_eq!(starts(&map.remove_unbacked(&memory)), [0x10000, 0x20000]);
    assert_eq!(starts(map.iter()), [0x1000, 0x30000]);
}
