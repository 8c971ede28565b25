//! One type for each address space, and ranges of them. This file owns the check
//! that a range is neither empty nor wraps; it never knows what an address refers to.

use std::fmt;
use std::hash::Hash;

use thiserror::Error;

/// The unit, in bytes, in which memory is shared: every region, mapping and
/// placement starts and ends on a multiple of it.
pub const PAGE_SIZE: u64 = 4096;

/// An address in one of the address spaces of a link. Addresses of different
/// spaces are different types and never mix.
pub trait Address: Copy + Ord + Hash + fmt::Debug + fmt::Display {
    /// The address with this number.
    fn new(raw: u64) -> Self;

    /// The address as a number.
    fn raw(self) -> u64;
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// The address with this number.
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The address as a number.
            pub const fn raw(self) -> u64 {
                self.0
            }
        }

        impl Address for $name {
            fn new(raw: u64) -> Self {
                Self(raw)
            }

            fn raw(self) -> u64 {
                self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// A physical address of the owner's guest.
    Gpa
}
address! {
    /// An address as the owner's driver gives it to its device: through the
    /// owner's IOMMU if it has one, else equal to the [`Gpa`].
    Iova
}
address! {
    /// An address in the process of the owner's VMM (vhost-user's "user address").
    FrontendVa
}
address! {
    /// Bytes from the start of the peer's window.
    WindowOffset
}

/// Why a start and a length are not a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SpanError {
    /// The length is 0.
    #[error("the range at {start:#x} is empty")]
    Empty {
        /// First address.
        start: u64,
    },
    /// The last byte would be past the top of the address space.
    #[error("the range of {len:#x} bytes at {start:#x} wraps")]
    Wraps {
        /// First address.
        start: u64,
        /// Length, bytes.
        len: u64,
    },
}

/// A range of addresses, never empty, whose last byte is an address too: a span
/// may end at the very top of the address space. There is no exclusive end, since
/// that need not be representable; compare with [`Span::last`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Span<A> {
    start: A,
    len: u64,
}

impl<A: Address> Span<A> {
    /// The range of `len` bytes from `start` on. Refuses an empty range and one
    /// whose last byte would wrap.
    pub fn new(start: A, len: u64) -> Result<Self, SpanError> {
        let raw = start.raw();
        let Some(reach) = len.checked_sub(1) else {
            return Err(SpanError::Empty { start: raw });
        };
        match raw.checked_add(reach) {
            Some(_) => Ok(Self { start, len }),
            None => Err(SpanError::Wraps { start: raw, len }),
        }
    }

    /// First address.
    pub fn start(self) -> A {
        self.start
    }

    /// Last address, inclusive.
    pub fn last(self) -> A {
        A::new(self.start.raw() + (self.len - 1))
    }

    /// Length, bytes; never 0.
    #[expect(clippy::len_without_is_empty, reason = "a span is never empty")]
    pub fn len(self) -> u64 {
        self.len
    }

    /// Whether `address` is in the range.
    pub fn contains(self, address: A) -> bool {
        self.start <= address && address <= self.last()
    }

    /// Whether all of `other` is in the range.
    pub fn contains_span(self, other: Self) -> bool {
        self.start <= other.start && other.last() <= self.last()
    }

    /// Whether any address is in both ranges.
    pub fn overlaps(self, other: Self) -> bool {
        self.start <= other.last() && other.start <= self.last()
    }

    /// The addresses that are in both ranges, if any.
    pub fn intersection(self, other: Self) -> Option<Self> {
        self.overlaps(other).then(|| {
            let start = self.start.max(other.start);
            let last = self.last().min(other.last());
            Self { start, len: last.raw() - start.raw() + 1 }
        })
    }

    /// Bytes from the start of the range to `address`, if it is in the range.
    pub fn offset_of(self, address: A) -> Option<u64> {
        self.contains(address).then(|| address.raw() - self.start.raw())
    }

    /// The address `offset` bytes into the range, if it is in the range.
    pub fn at(self, offset: u64) -> Option<A> {
        (offset < self.len).then(|| A::new(self.start.raw() + offset))
    }

    /// Whether the start and the length are multiples of `page` bytes.
    pub fn is_aligned(self, page: u64) -> bool {
        self.start.raw().is_multiple_of(page) && self.len.is_multiple_of(page)
    }

    /// The same numbers in another address space. Right only where two spaces are
    /// equal by definition, as [`Gpa`] and [`Iova`] without a virtual IOMMU.
    pub fn identity<B: Address>(self) -> Span<B> {
        Span { start: B::new(self.start.raw()), len: self.len }
    }
}

impl<A: Address> fmt::Display for Span<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..={}", self.start, self.last())
    }
}

impl<A: Address> fmt::Debug for Span<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}..={}", self.start, self.last())
    }
}

/// Why a range cannot be translated by a table of ranges. A translation never
/// goes from one entry of a table into the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LookupError<A: Address> {
    /// The start and length are not a range.
    #[error(transparent)]
    Range(#[from] SpanError),
    /// The range starts in no entry.
    #[error("nothing is known at the start of {span}")]
    Unknown {
        /// The range asked for.
        span: Span<A>,
    },
    /// The range starts in an entry and goes on past its end.
    #[error("{span} goes past the end of {entry}")]
    Crosses {
        /// The range asked for.
        span: Span<A>,
        /// The entry it starts in.
        entry: Span<A>,
    },
}

/// Bytes from the start of `entry` to the start of `span`: the one place that
/// decides whether a range is inside an entry of a table.
pub(crate) fn offset_in<A: Address>(entry: Span<A>, span: Span<A>) -> Result<u64, LookupError<A>> {
    match entry.offset_of(span.start) {
        Some(offset) if entry.contains_span(span) => Ok(offset),
        Some(_) => Err(LookupError::Crosses { span, entry }),
        None => Err(LookupError::Unknown { span }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn span(start: u64, len: u64) -> Span<Gpa> {
        Span::new(Gpa::new(start), len).unwrap()
    }

    #[test]
    fn an_empty_span_is_refused() {
        let error = Span::new(Gpa::new(5), 0).unwrap_err();
        assert_eq!(error, SpanError::Empty { start: 5 });
    }

    #[test]
    fn a_wrapping_span_is_refused() {
        let error = Span::new(Gpa::new(u64::MAX), 2).unwrap_err();
        let expected = SpanError::Wraps { start: u64::MAX, len: 2 };
        assert_eq!(error, expected);
        assert!(Span::new(Gpa::new(2), u64::MAX).is_err());
    }

    #[test]
    fn a_span_may_end_at_the_top() {
        assert_eq!(span(u64::MAX, 1).last(), Gpa::new(u64::MAX));
        assert_eq!(span(1, u64::MAX).last(), Gpa::new(u64::MAX));
        assert!(span(1, u64::MAX).contains(Gpa::new(u64::MAX)));
        assert!(!span(1, u64::MAX).contains(Gpa::new(0)));
    }

    #[test]
    fn neighbours_do_not_overlap() {
        let (low, high) = (span(0x1000, 0x1000), span(0x2000, 0x1000));
        assert!(!low.overlaps(high));
        assert_eq!(low.intersection(high), None);
    }

    #[test]
    fn alignment_needs_start_and_length() {
        assert!(span(0x1000, 0x3000).is_aligned(PAGE_SIZE));
        assert!(!span(0x1001, 0x3000).is_aligned(PAGE_SIZE));
        assert!(!span(0x1000, 0x3001).is_aligned(PAGE_SIZE));
    }

    #[test]
    fn addresses_print_as_hex() {
        assert_eq!(format!("{:?} {}", Iova::new(255), Iova::new(16)), "Iova(0xff) 0x10");
        assert_eq!(format!("{}", span(16, 16)), "0x10..=0x1f");
        assert_eq!(format!("{:?}", span(16, 16)), "Gpa(0x10)..=0x1f");
    }
}
