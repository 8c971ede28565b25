//! The owner's memory table.

use iommu::{
    Backing, FrontendVa, Gpa, LookupError, MemoryError, MemoryTable, NewRegion, RegionField, Span, SpanError,
};

use crate::TOP_PAGE;

const VA: u64 = 0x7f00_0000_0000;

/// `len` bytes at `guest`, at VA + `guest` in the front-end and at `guest` in file 'A'.
fn region(guest: u64, len: u64) -> NewRegion<char> {
    NewRegion {
        guest: Gpa::new(guest),
        frontend: FrontendVa::new(VA + guest),
        len,
        handle: 'A',
        offset: guest,
        file_len: 1 << 30,
    }
}

/// Three pages at 0x1000, then, with no gap in any space, one page of another file.
fn table() -> MemoryTable<char> {
    let next = NewRegion { handle: 'B', ..region(0x4000, 0x1000) };
    let empty = MemoryTable::new(3);
    empty.replace(vec![region(0x1000, 0x3000), next]).unwrap()
}

/// The error of an add, which must leave the table as it was.
fn refused(new: NewRegion<char>) -> MemoryError {
    let mut table = table();
    let error = table.add(new).unwrap_err();
    assert_eq!(table, self::table());
    assert!(!error.to_string().is_empty());
    error
}

#[test]
fn add_of_a_region_that_overlaps_in_guest_space_changes_nothing() {
    let new = NewRegion { frontend: FrontendVa::new(0x1000), ..region(0x3000, 0x1000) };
    let span = Span::new(new.guest, new.len).unwrap();
    let (index, other) = (2, 0);
    assert_eq!(refused(new), MemoryError::GuestOverlap { index, span, other });
}

#[test]
fn add_of_a_region_that_overlaps_in_frontend_space_changes_nothing() {
    let new = NewRegion { guest: Gpa::new(0x9000), ..region(0x4000, 0x1000) };
    let span = Span::new(new.frontend, new.len).unwrap();
    let (index, other) = (2, 1);
    assert_eq!(refused(new), MemoryError::FrontendOverlap { index, span, other });
}

#[test]
fn add_of_an_empty_region_changes_nothing() {
    let expected = MemoryError::GuestRange { index: 2, source: SpanError::Empty { start: 0x8000 } };
    assert_eq!(refused(region(0x8000, 0)), expected);
}

#[test]
fn add_of_a_region_that_wraps_in_guest_space_changes_nothing() {
    let new = NewRegion { guest: Gpa::new(TOP_PAGE), ..region(0x8000, 0x2000) };
    let source = SpanError::Wraps { start: TOP_PAGE, len: 0x2000 };
    assert_eq!(refused(new), MemoryError::GuestRange { index: 2, source });
}

#[test]
fn add_of_a_region_that_wraps_in_frontend_space_changes_nothing() {
    let new = NewRegion { frontend: FrontendVa::new(TOP_PAGE), ..region(0x8000, 0x2000) };
    let source = SpanError::Wraps { start: TOP_PAGE, len: 0x2000 };
    assert_eq!(refused(new), MemoryError::FrontendRange { index: 2, source });
}

#[test]
fn add_of_an_unaligned_region_changes_nothing() {
    let good = || region(0x8000, 0x1000);
    let cases = [
        (RegionField::Guest, 0x8010, NewRegion { guest: Gpa::new(0x8010), ..good() }),
        (RegionField::Frontend, 0x20, NewRegion { frontend: FrontendVa::new(0x20), ..good() }),
        (RegionField::Len, 0x1001, NewRegion { len: 0x1001, ..good() }),
        (RegionField::Offset, 0x800, NewRegion { offset: 0x800, ..good() }),
    ];
    for (field, value, new) in cases {
        let index = 2;
        assert_eq!(refused(new), MemoryError::Unaligned { index, field, value });
    }
}

#[test]
fn add_of_a_region_outside_its_file_changes_nothing() {
    for (offset, file_len) in [(0x8000, 0x8fff), (0x8000, 0), (TOP_PAGE, u64::MAX)] {
        let new = NewRegion { offset, file_len, ..region(0x8000, 0x1000) };
        let expected = MemoryError::OutsideFile { index: 2, offset, len: 0x1000, file_len };
        assert_eq!(refused(new), expected);
    }
}

#[test]
fn add_beyond_the_limit_changes_nothing() {
    let mut table = table();
    table.add(region(0x8000, 0x1000)).unwrap();
    let before = table.clone();
    let error = table.add(region(0x9000, 0x1000)).unwrap_err();
    assert_eq!(error, MemoryError::TooMany { count: 4, max: 3 });
    assert_eq!(table, before);
}

#[test]
fn replace_names_the_region_that_is_wrong() {
    let table = table();
    let list = vec![region(0, 0x1000), region(0x1000, 0x1000), region(0x1000, 0x1000)];
    let error = table.replace(list).unwrap_err();
    assert!(matches!(error, MemoryError::GuestOverlap { index: 2, other: 1, .. }));
    let long = (0..4).map(|page| region(page << 12, 0x1000)).collect();
    let error = table.replace(long).unwrap_err();
    assert_eq!(error, MemoryError::TooMany { count: 4, max: 3 });
}

#[test]
fn remove_takes_only_an_exact_match() {
    let mut table = table();
    let before = table.clone();
    let (guest, frontend) = (Gpa::new(0x1000), FrontendVa::new(VA + 0x1000));
    let wrong = [
        (Gpa::new(0x2000), frontend, 0x3000),
        (guest, FrontendVa::new(VA), 0x3000),
        (guest, frontend, 0x2000),
    ];
    for (guest, frontend, len) in wrong {
        let error = table.remove(guest, frontend, len).unwrap_err();
        let expected = MemoryError::NoSuchRegion { guest, frontend, len };
        assert_eq!(error, expected);
        assert_eq!(table, before);
    }
    let removed = table.remove(guest, frontend, 0x3000).unwrap();
    assert_eq!(removed, before.regions()[0]);
    assert_eq!(table.regions(), &before.regions()[1..]);
}

#[test]
fn an_address_is_found_in_its_region() {
    let table = table();
    let place = table.by_frontend(FrontendVa::new(VA + 0x1800), 0x2800).unwrap();
    let handle = 'A';
    assert_eq!(place.region, 0);
    assert_eq!(place.guest, Gpa::new(0x1800));
    assert_eq!(place.backing, Backing { handle, offset: 0x1800 });
    assert_eq!(table.by_guest(Gpa::new(0x1800), 0x2800).unwrap(), place);
}

#[test]
fn a_lookup_never_crosses_into_the_next_region() {
    let table = table();
    let span = Span::new(Gpa::new(0x3fff), 2).unwrap();
    let entry = table.regions()[0].guest();
    let error = table.by_guest(span.start(), 2).unwrap_err();
    assert_eq!(error, LookupError::Crosses { span, entry });
    let error = table.by_frontend(FrontendVa::new(VA + 0x3fff), 2).unwrap_err();
    assert!(matches!(error, LookupError::Crosses { .. }));
}

#[test]
fn a_lookup_outside_every_region_is_refused() {
    let span = Span::new(Gpa::new(0xfff), 2).unwrap();
    let error = table().by_guest(span.start(), 2).unwrap_err();
    assert_eq!(error, LookupError::Unknown { span });
    let error = table().by_guest(Gpa::new(u64::MAX), 2).unwrap_err();
    assert!(matches!(error, LookupError::Range(SpanError::Wraps { .. })));
    let error = table().by_frontend(FrontendVa::new(VA), 0).unwrap_err();
    assert!(matches!(error, LookupError::Range(SpanError::Empty { .. })));
}

#[test]
fn a_region_may_end_at_the_top_of_both_spaces() {
    let mut table = MemoryTable::new(1);
    let top =
        NewRegion { guest: Gpa::new(TOP_PAGE), frontend: FrontendVa::new(TOP_PAGE), ..region(0, 0x1000) };
    table.add(top).unwrap();
    let place = table.by_frontend(FrontendVa::new(u64::MAX), 1).unwrap();
    assert_eq!(place.guest, Gpa::new(u64::MAX));
    assert_eq!(place.backing.offset, 0xfff);
}
