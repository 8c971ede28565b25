//! The link page as a hostile or changing device would show it.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::time::{Duration, Instant};

use guest_driver_model::link::{Access, LinkError, LinkPage, Mapping, VringInfo};
use net_support::{Done, LinkWriter, TwoViews, device_config, link_page};
use vhost_pci_device::abi::{self, DeviceConfig};

const PAGE: u64 = abi::PAGE_SIZE;

fn views() -> TwoViews {
    TwoViews::new(1 << 20)
}

fn mapping(iova: u64, pages: u64) -> Mapping {
    Mapping { iova, len: pages * PAGE, window_offset: abi::DATA_OFFSET, access: Access::READ }
}

fn read(views: &TwoViews, writer: &LinkWriter) -> Result<(), LinkError> {
    writer.write(&views.window);
    link_page(&views.window).snapshot().map(drop)
}

#[test]
fn a_snapshot_holds_what_the_device_wrote() {
    let views = views();
    let vring = VringInfo { enabled: true, size: 256, desc: 1, avail: 2, used: 3, base: 4 };
    let mut writer = LinkWriter::new(1 << 32, vec![mapping(0, 2), mapping(8 * PAGE, 1)], vec![vring; 2]);
    writer.generation = 8;
    writer.write(&views.window);
    let page = link_page(&views.window);
    let snapshot = page.snapshot().unwrap();
    assert_eq!((snapshot.generation, page.generation()), (8, 8));
    assert_eq!((snapshot.owner, snapshot.up, snapshot.owner_device), (true, true, 1));
    assert!(snapshot.has_feature(32) && !snapshot.has_feature(31) && !snapshot.has_feature(64));
    assert_eq!(snapshot.mappings, writer.mappings);
    assert_eq!(snapshot.vrings, writer.vrings);
    assert_eq!((snapshot.table_generation, page.table_generation()), (2, 2));
    let bits = (abi::LINK_S_IOMMU, abi::LINK_S_COPY);
    for (status, iommu, copy) in [(0, false, false), (bits.0, true, false), (bits.0 | bits.1, true, true)] {
        LinkWriter { status, ..writer.clone() }.write(&views.window);
        let snapshot = page.snapshot().unwrap();
        assert_eq!((snapshot.up, snapshot.iommu, snapshot.copy), (false, iommu, copy));
    }
}

#[test]
fn the_table_alone_is_read_and_checked_as_in_a_snapshot() {
    let views = views();
    let good = LinkWriter::new(0, vec![mapping(0, 2), mapping(2 * PAGE, 1)], vec![]);
    let table = |writer: &LinkWriter| {
        writer.write(&views.window);
        link_page(&views.window).table()
    };
    let read = table(&LinkWriter { generation: 6, table_generation: 10, ..good.clone() }).unwrap();
    assert_eq!((read.generation, read.table_generation, read.mappings), (6, 10, good.mappings.clone()));
    for bad in [vec![mapping(1, 1)], vec![mapping(PAGE, 1), mapping(0, 1)]] {
        assert!(table(&LinkWriter { mappings: bad, ..good.clone() }).is_err());
    }
    let long = LinkWriter { mapping_count: Some(abi::MAX_MAPPINGS + 1), ..good.clone() };
    assert!(matches!(table(&long), Err(LinkError::Table { .. })));
    for (generation, table_generation) in [(2, 3), (3, 2)] {
        let changing = LinkWriter { generation, table_generation, ..good.clone() };
        assert_eq!(table(&changing), Err(LinkError::Changing));
        assert_eq!(link_page(&views.window).snapshot(), Err(LinkError::Changing));
    }
}

#[test]
fn an_unmapped_window_is_not_an_error_of_the_device() {
    assert_eq!(link_page(&views().window).snapshot(), Err(LinkError::NotMapped));
}

#[test]
fn a_link_area_outside_the_window_is_refused() {
    let window = views().window;
    let end = window.len();
    for (offset, len) in [(end - 64, 128), (end, 64), (u64::MAX, 64), (0, 63), (4, 4096)] {
        let config =
            DeviceConfig { link_offset: offset.into(), link_len: len.into(), ..device_config(&window) };
        assert!(matches!(LinkPage::new(&window, &config), Err(LinkError::Area(_))), "{offset} {len}");
    }
}

#[test]
fn a_link_area_has_no_more_room_than_the_specification_gives_it() {
    let views = views();
    let config = DeviceConfig { link_len: abi::DATA_OFFSET.into(), ..device_config(&views.window) };
    let long =
        LinkWriter { mapping_count: Some(abi::MAX_MAPPINGS + 1), ..LinkWriter::new(0, vec![], vec![]) };
    long.write(&views.window);
    let result = LinkPage::new(&views.window, &config).unwrap().snapshot();
    assert!(matches!(result, Err(LinkError::Table { .. })), "{result:?}");
}

#[test]
fn more_vrings_than_the_device_announces_are_refused() {
    let views = views();
    let most = usize::from(device_config(&views.window).max_vrings.value());
    let writer = |count| LinkWriter::new(0, vec![], vec![VringInfo::default(); count]);
    assert_eq!(read(&views, &writer(most)), Ok(()));
    assert_eq!(read(&views, &writer(most + 1)), Err(LinkError::Vrings { count: 9, most: 8 }));
}

#[test]
fn a_foreign_header_is_refused() {
    let views = views();
    let good = LinkWriter::new(0, vec![], vec![]);
    assert_eq!(read(&views, &LinkWriter { magic: 7, ..good.clone() }), Err(LinkError::Magic { found: 7 }));
    assert!(matches!(
        read(&views, &LinkWriter { version: 2, ..good.clone() }),
        Err(LinkError::Version { .. })
    ));
    assert!(matches!(read(&views, &LinkWriter { header_len: 32, ..good }), Err(LinkError::Version { .. })));
}

#[test]
fn the_owners_configuration_space_is_copied_or_refused() {
    let views = views();
    let good = LinkWriter { config: (0..60).collect(), ..LinkWriter::new(0, vec![], vec![]) };
    good.write(&views.window);
    assert_eq!(link_page(&views.window).snapshot().unwrap().config, good.config);
    let most = abi::MAX_OWNER_CONFIG;
    let last = abi::LINK_LEN as u32 - most;
    for (config_at, len, is_good) in [
        (last, most, true),
        (last, most + 1, false),
        (last + 1, most, false),
        (abi::OWNER_CONFIG, u32::MAX, false),
        (u32::MAX, 1, false),
    ] {
        let read = read(&views, &LinkWriter { config_at, config_len: Some(len), ..good.clone() });
        let refused = matches!(read, Err(LinkError::OwnerConfig { .. }));
        assert_eq!((read.is_ok(), refused), (is_good, !is_good), "{config_at:#x} {len}");
    }
}

#[test]
fn a_table_that_leaves_the_link_area_is_refused() {
    let views = views();
    let good = LinkWriter::new(0, vec![], vec![]);
    for bad in [
        LinkWriter { mapping_count: Some(u32::MAX), ..good.clone() },
        LinkWriter { mapping_count: Some(abi::MAX_MAPPINGS + 1), ..good.clone() },
        LinkWriter { mapping_table: u32::MAX, mapping_count: Some(1), ..good.clone() },
        LinkWriter { mapping_table: 8193, mapping_count: Some(1), ..good.clone() },
        LinkWriter { vring_table: u32::MAX - 7, vring_count: Some(8), ..good.clone() },
        LinkWriter { vring_table: abi::LINK_LEN as u32, vring_count: Some(1), ..good.clone() },
    ] {
        assert!(matches!(read(&views, &bad), Err(LinkError::Table { .. })));
    }
}

#[test]
fn a_mapping_that_cannot_be_is_refused() {
    let views = views();
    let end = views.window.len();
    for bad in [
        Mapping { len: 0, ..mapping(0, 1) },
        Mapping { len: 100, ..mapping(0, 1) },
        Mapping { iova: 1, ..mapping(0, 1) },
        Mapping { window_offset: abi::DATA_OFFSET + 8, ..mapping(0, 1) },
        Mapping { window_offset: end, ..mapping(0, 1) },
        Mapping { window_offset: end - PAGE, ..mapping(0, 2) },
        Mapping { window_offset: u64::MAX - PAGE + 1, ..mapping(0, 2) },
        Mapping { window_offset: 0, ..mapping(0, 1) },
        Mapping { window_offset: abi::LINK_LEN - PAGE, ..mapping(0, 2) },
        Mapping { window_offset: abi::CONTROL_OFFSET, ..mapping(0, 1) },
        Mapping { window_offset: abi::WITNESS_OFFSET, ..mapping(0, 2) },
        Mapping { window_offset: abi::DATA_OFFSET - PAGE, ..mapping(0, 2) },
        mapping(u64::MAX - PAGE + 1, 2),
    ] {
        let result = read(&views, &LinkWriter::new(0, vec![bad], vec![]));
        assert!(matches!(result, Err(LinkError::Mapping { index: 0, .. })), "{bad:?}: {result:?}");
    }
    assert_eq!(read(&views, &LinkWriter::new(0, vec![mapping(u64::MAX - PAGE + 1, 1)], vec![])), Ok(()));
}

#[test]
fn mappings_that_overlap_or_are_not_sorted_are_refused() {
    let views = views();
    for bad in [
        vec![mapping(0, 2), mapping(PAGE, 1)],
        vec![mapping(8 * PAGE, 1), mapping(0, 1)],
        vec![mapping(0, 1), mapping(0, 1)],
        vec![mapping(u64::MAX - PAGE + 1, 1), mapping(0, 1)],
    ] {
        let result = read(&views, &LinkWriter::new(0, bad, vec![]));
        assert!(matches!(result, Err(LinkError::Order { index: 1, .. })), "{result:?}");
    }
}

#[test]
fn a_page_that_always_changes_ends_the_attempts() {
    let views = views();
    let odd = LinkWriter { generation: 3, ..LinkWriter::new(0, vec![], vec![]) };
    assert_eq!(read(&views, &odd), Err(LinkError::Changing));
}

/// The device writes one of two pages under odd generations, or one of two tables under an odd
/// table generation; a reader must never see a mixture, nor an error that only a mixture
/// explains.
#[test]
fn what_is_read_is_never_a_mixture_of_two_generations() {
    let views = views();
    // Pages that differ in the features, of two tables each.
    let table = |n: u64| vec![mapping(n * PAGE, n), mapping((n + 8) * PAGE, 3 - n)];
    let done = Done::default();
    let write = |generation: u64, table_generation: u64| {
        let features = generation / 2 % 2;
        let mappings = table(1 + table_generation / 2 % 2);
        LinkWriter { generation, table_generation, ..LinkWriter::new(features, mappings, vec![]) }
            .write(&views.window);
    };
    write(2, 2);
    std::thread::scope(|scope| {
        let _at_end = done.at_end();
        scope.spawn(|| {
            let mut generation = 2;
            for table_generation in (2..).step_by(2) {
                if done.is_raised() {
                    return;
                }
                let all = table_generation % 6 == 0;
                if all {
                    views.window.store_u64(8, generation + 1).unwrap();
                    generation += 2;
                }
                views.window.store_u64(48, table_generation + 1).unwrap();
                std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
                write(generation, table_generation + 2);
            }
        });
        let page = link_page(&views.window);
        let mut good = [0, 0];
        let start = Instant::now();
        while good.iter().any(|count| *count < 100) || start.elapsed() < Duration::from_millis(300) {
            match page.snapshot() {
                Ok(snapshot) => {
                    assert_eq!(snapshot.features, snapshot.generation / 2 % 2);
                    assert_eq!(snapshot.mappings, table(1 + snapshot.table_generation / 2 % 2));
                    good[0] += 1;
                }
                Err(LinkError::Changing) => {}
                Err(error) => unreachable!("{error}"),
            }
            match page.table() {
                Ok(read) => {
                    assert_eq!(read.mappings, table(1 + read.table_generation / 2 % 2));
                    good[1] += 1;
                }
                Err(LinkError::Changing) => {}
                Err(error) => unreachable!("{error}"),
            }
        }
    });
}
