//! Spans against sets of bytes.

use std::collections::BTreeSet;

use iommu::{Gpa, Span};
use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::{prop_assert, prop_assert_eq, proptest};

use crate::units;

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![0..40u64, (0..40u64).prop_map(|below| u64::MAX - below)]
}

fn bytes(start: u64, len: u64) -> Option<BTreeSet<u128>> {
    units(start, len, 1).map(BTreeSet::from_iter)
}

proptest! {
    #[test]
    fn spans_are_sets_of_bytes(
        (start, len) in (address(), 0..24u64),
        (other_start, other_len) in (address(), 0..24u64),
        probe in address(),
    ) {
        let span = Span::new(Gpa::new(start), len);
        let model = bytes(start, len);
        prop_assert_eq!(span.is_ok(), model.is_some());
        let (Ok(span), Some(model)) = (span, model) else { return Ok(()) };
        prop_assert_eq!(u128::from(span.last().raw()), *model.last().unwrap());
        prop_assert_eq!(span.contains(Gpa::new(probe)), model.contains(&u128::from(probe)));
        let before = model.iter().filter(|byte| **byte < u128::from(probe)).count() as u64;
        let offset = span.contains(Gpa::new(probe)).then_some(before);
        prop_assert_eq!(span.offset_of(Gpa::new(probe)), offset);
        prop_assert_eq!(offset.and_then(|offset| span.at(offset)), offset.map(|_| Gpa::new(probe)));
        prop_assert!(span.at(len).is_none());

        let other = Span::new(Gpa::new(other_start), other_len);
        let Some(other_model) = bytes(other_start, other_len) else { return Ok(()) };
        let other = other.unwrap();
        let both: BTreeSet<_> = model.intersection(&other_model).copied().collect();
        prop_assert_eq!(span.overlaps(other), !both.is_empty());
        prop_assert_eq!(span.contains_span(other), both == other_model);
        let found = span.intersection(other).and_then(|s| bytes(s.start().raw(), s.len()));
        prop_assert_eq!(found.unwrap_or_default(), both);
    }

    #[test]
    fn a_span_is_refused_exactly_if_it_is_empty_or_wraps(
        start in any::<u64>(),
        len in prop_oneof![Just(0), any::<u64>()],
    ) {
        let good = len > 0 && u128::from(start) + u128::from(len) <= 1 << 64;
        prop_assert_eq!(Span::new(Gpa::new(start), len).is_ok(), good);
    }
}
