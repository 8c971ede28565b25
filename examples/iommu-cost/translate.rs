//! The cost of finding an address, by the peer's driver: of one in the range that was hit
//! last, and of addresses at random.

use std::hint::black_box;
use std::ops::Range;
use std::time::Instant;

use guest_driver_model::translate::{Access, Mapping, Translation};

const PAGE: u64 = 4096;
/// Addresses in a list: more than any branch predictor remembers.
const ADDRESSES: usize = 1 << 18;
/// Translations that are timed together.
const BATCH: usize = 1 << 16;
/// A length as of a packet.
const LEN: u32 = 1500;

/// A table with its addresses.
#[derive(Debug)]
pub struct Case {
    translation: Translation,
    /// Addresses at random, each inside a mapping.
    random: Vec<u64>,
    /// Their mappings' places in the table.
    places: Vec<u32>,
    /// An array as large as the mappings.
    array: Vec<[u64; MAPPING_WORDS]>,
    /// Where in the lists the next batch begins.
    at: usize,
}

const MAPPING_WORDS: usize = size_of::<Mapping>() / size_of::<u64>();

/// Nanoseconds each.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// A translation of an address in the range that was hit last.
    pub hit: f64,
    /// A translation of an address at random; the next does not wait for its result.
    pub random: f64,
    /// The same, where the next address is not known before its result.
    pub chained: f64,
    /// A load from the array, where the next address is not known before its result.
    pub load: f64,
}

impl Case {
    /// `mappings` pages with gaps between them of 1 to 7 pages, or, if `apart`, half of them far
    /// from the others.
    pub fn new(mappings: usize, apart: bool) -> Self {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut iova = 1 << 20;
        let mut table = Vec::with_capacity(mappings);
        for index in 0..mappings {
            if apart && index == mappings / 2 {
                iova += 1 << 38;
            }
            let window_offset = (index as u64 + 512) * PAGE;
            table.push(Mapping { iova, len: PAGE, window_offset, access: Access::READ_WRITE });
            iova += PAGE * (2 + random.below(7));
        }
        let places: Vec<u32> = (0..ADDRESSES).map(|_| random.below(mappings as u64) as u32).collect();
        let address = |place: &u32| {
            let mapping = table.get(*place as usize).copied().unwrap_or_default();
            mapping.iova + random.below(PAGE - u64::from(LEN))
        };
        let addresses = places.iter().map(address).collect();
        // Written, so that it is memory and not the kernel's one page of zeros.
        let array = (0..mappings as u64).map(|index| [index; MAPPING_WORDS]).collect();
        Self { translation: Translation::new(&table), random: addresses, places, array, at: 0 }
    }

    /// One batch of each, of other addresses, after as much as brings the table
    /// into the caches that it fits in.
    pub fn measure(&mut self) -> Times {
        // Not known to the compiler, and so in the way of each translation.
        let zero = black_box(0);
        let each = |start: Instant| start.elapsed().as_nanos() as f64 / BATCH as f64;

        for _ in 0..ADDRESSES / BATCH {
            self.independent();
        }
        let start = Instant::now();
        self.independent();
        let random = each(start);

        let batch = self.range();
        let mut found = 0;
        let start = Instant::now();
        for address in self.random.get(batch).unwrap_or_default() {
            let address = *address + (found & zero);
            found = self.translation.translate(address, LEN, Access::READ).unwrap_or(0);
        }
        let chained = each(start);

        let first = self.random.first().copied().unwrap_or_default() & !(PAGE - 1);
        let start = Instant::now();
        for index in 0..BATCH as u64 {
            let address = black_box(first + index % 2048);
            found += self.translation.translate(address, LEN, Access::READ).unwrap_or(0);
        }
        let hit = each(start);
        black_box(found);

        for _ in 0..ADDRESSES / BATCH {
            self.loads(zero);
        }
        let start = Instant::now();
        self.loads(zero);
        let load = each(start);
        Times { hit, random, chained, load }
    }

    /// The places of the next batch in the list.
    fn range(&mut self) -> Range<usize> {
        let start = self.at;
        self.at = (self.at + BATCH) % ADDRESSES;
        start..start + BATCH
    }

    fn independent(&mut self) {
        let batch = self.range();
        let mut sum = 0_u64;
        for address in self.random.get(batch).unwrap_or_default() {
            let found = self.translation.translate(*address, LEN, Access::READ);
            sum = sum.wrapping_add(found.unwrap_or(0));
        }
        black_box(sum);
    }

    fn loads(&mut self, zero: u64) {
        let batch = self.range();
        let mut value = 0;
        for place in self.places.get(batch).unwrap_or_default() {
            let place = u64::from(*place) + (value & zero);
            value = self.array.get(place as usize).map_or(0, |element| element[0]);
        }
        black_box(value);
    }

    /// Whether every address is found.
    pub fn is_sound(&mut self) -> bool {
        let Self { translation, random, .. } = self;
        random.iter().all(|address| translation.translate(*address, LEN, Access::READ).is_ok())
    }
}

/// Xorshift: the same numbers in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}
