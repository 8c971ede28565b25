//! The memory table against a list of pages.

use iommu::{Backing, FrontendVa, Gpa, MemoryTable, NewRegion};
use proptest::prelude::{Strategy, any};
use proptest::{collection::vec, prop_assert_eq, proptest};

use crate::{PAGE, page, units};

const MAX_REGIONS: usize = 5;

/// One page of the owner: its number in guest and front-end space, its file and its
/// number there.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Page {
    guest: u128,
    frontend: u128,
    file: u8,
    number: u128,
}

type Numbers = (u64, u64, u64, u8, u64);

#[derive(Clone, Debug)]
struct Step {
    numbers: Numbers,
    remove: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let numbers = (page(), page(), 0..5u64, 0..2u8, 0..6u64);
    (numbers, proptest::bool::weighted(0.3)).prop_map(|(numbers, remove)| {
        let (guest, frontend, pages, file, offset) = numbers;
        Step { numbers: (guest, frontend, pages * PAGE, file, offset * PAGE), remove }
    })
}

/// A file has 8 pages.
const FILE_LEN: u64 = 8 * PAGE;

fn pages((guest, frontend, len, file, offset): Numbers) -> Option<Vec<Page>> {
    let guest = units(guest, len, PAGE)?;
    let frontend = units(frontend, len, PAGE)?;
    let numbers = units(offset, len, PAGE)?;
    (offset + len <= FILE_LEN).then(|| {
        let triples = guest.into_iter().zip(frontend).zip(numbers);
        triples.map(|((guest, frontend), number)| Page { guest, frontend, file, number }).collect()
    })
}

fn new_region((guest, frontend, len, handle, offset): Numbers) -> NewRegion<u8> {
    NewRegion {
        guest: Gpa::new(guest),
        frontend: FrontendVa::new(frontend),
        len,
        handle,
        offset,
        file_len: FILE_LEN,
    }
}

proptest! {
    #[test]
    fn the_table_is_a_list_of_regions_of_pages(
        steps in vec((step(), any::<proptest::sample::Index>()), 1..14),
        lookups in vec((page(), 0..PAGE, 0..3 * PAGE), 8),
    ) {
        let mut table = MemoryTable::new(MAX_REGIONS);
        let mut model: Vec<(Numbers, Vec<Page>)> = Vec::new();
        for (step, pick) in steps {
            let before = table.clone();
            // A removal names a region that is there, or whatever was drawn.
            let numbers = match step.remove && step.numbers.3 == 0 && !model.is_empty() {
                true => model[pick.index(model.len())].0,
                false => step.numbers,
            };
            let (guest, frontend, len, ..) = numbers;
            let ok = if step.remove {
                let found = model.iter().position(|(n, _)| (n.0, n.1, n.2) == (guest, frontend, len));
                let result = table.remove(Gpa::new(guest), FrontendVa::new(frontend), len);
                prop_assert_eq!(result.is_ok(), found.is_some());
                found.map(|found| model.remove(found)).is_some()
            } else {
                let new = pages(numbers).filter(|pages| {
                    model.len() < MAX_REGIONS && !model.iter().flat_map(|(_, p)| p).any(|old| {
                        pages.iter().any(|p| p.guest == old.guest || p.frontend == old.frontend)
                    })
                });
                prop_assert_eq!(table.add(new_region(numbers)).is_ok(), new.is_some());
                new.map(|new| model.push((numbers, new))).is_some()
            };
            if !ok {
                prop_assert_eq!(&table, &before);
            }
        }
        let all = model.iter().map(|(numbers, _)| new_region(*numbers)).collect();
        prop_assert_eq!(&MemoryTable::new(MAX_REGIONS).replace(all).unwrap(), &table);

        for (start, within, len) in lookups {
            let start = start + within;
            let touched = units(start, len, PAGE);
            // All pages touched, in one region: index and the first page.
            let inside = |space: fn(&Page) -> u128| {
                let touched = touched.as_ref()?;
                model.iter().enumerate().find_map(|(index, (_, pages))| {
                    let has = |number: &u128| pages.iter().find(|p| space(p) == *number);
                    let first = has(&touched[0])?;
                    touched.iter().all(|number| has(number).is_some()).then_some((index, *first))
                })
            };
            let place = |(index, first): (usize, Page)| iommu::Place {
                region: index,
                guest: Gpa::new(first.guest as u64 * PAGE + within),
                backing: Backing { handle: first.file, offset: first.number as u64 * PAGE + within },
            };
            let found = table.by_guest(Gpa::new(start), len).ok();
            prop_assert_eq!(found, inside(|p| p.guest).map(place));
            let found = table.by_frontend(FrontendVa::new(start), len).ok();
            prop_assert_eq!(found, inside(|p| p.frontend).map(place));

            // The same numbers as a piece of a file.
            let (file, offset) = ((start % 2) as u8, start % FILE_LEN);
            let backed = units(offset, len.max(1), PAGE).is_some_and(|numbers| {
                model.iter().any(|(_, pages)| numbers.iter().all(|number| {
                    pages.iter().any(|p| p.file == file && p.number == *number)
                }))
            });
            prop_assert_eq!(table.backs(&Backing { handle: file, offset }, len.max(1)), backed);
        }
    }
}
