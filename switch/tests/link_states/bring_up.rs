//! Either side may come first; what the peer's VMM is asked to map, in which order,
//! and when the link page says that the vrings may be used.

use vhost_pci_device::abi;
use vhost_pci_switch::link::message::{Content, Reply, Request, WindowOp};
use vhost_pci_switch::link::vring::Format;
use vhost_pci_switch::link::{Effect, Side};

use crate::bench::{Bench, QUEUES, REGIONS, WINDOW_LEN};
use crate::front_end::{Ask, FEATURES, FRONTEND, Region, owner_protocol_features, peer_set_up};
use crate::vmm::{Kind, Manner, kind};

/// What the VMM was asked to map, as kind and place.
fn asked_maps(bench: &Bench) -> Vec<(Kind, u64, u64)> {
    let maps = bench.trace.iter().filter_map(|effect| match effect {
        Effect::Window(_, WindowOp::Map(content) | WindowOp::Unmap(content))
            if kind(content) == Kind::Fence =>
        {
            None
        }
        Effect::Window(_, WindowOp::Map(content)) => Some(content),
        Effect::Window(_, WindowOp::Unmap(content)) => panic!("unmap of {content:?}"),
        _ => None,
    });
    maps.map(|content| (kind(content), content.place(WINDOW_LEN).0.raw(), content.place(WINDOW_LEN).1))
        .collect()
}

fn expected_maps() -> Vec<(Kind, u64, u64)> {
    let base = abi::WITNESS_OFFSET;
    let mut maps = vec![
        (Kind::LinkArea, abi::LINK_OFFSET, abi::LINK_LEN),
        (Kind::ControlArea, abi::CONTROL_OFFSET, abi::CONTROL_LEN),
        (Kind::Witness, base, abi::PAGE_SIZE),
    ];
    for region in REGIONS {
        maps.push((Kind::Owner, abi::DATA_OFFSET + region.guest, region.len));
    }
    maps
}

#[test]
fn the_owner_first_and_then_the_peer_brings_the_link_up() {
    let mut bench = Bench::new();
    bench.connect(Side::Owner);
    bench.owner_up(&REGIONS);
    assert!(asked_maps(&bench).is_empty());
    assert_eq!(bench.report().state, "waiting");
    bench.peer_up();
    bench.work();
    assert_eq!(asked_maps(&bench), expected_maps());
    assert!(bench.is_up());
    assert_eq!(bench.report().state, "up");
}

#[test]
fn the_peer_first_and_then_the_owner_brings_the_link_up() {
    let mut bench = Bench::new();
    bench.peer_up();
    bench.work();
    assert_eq!(asked_maps(&bench).len(), 3);
    bench.connect(Side::Owner);
    bench.owner_up(&REGIONS);
    assert!(!bench.is_up(), "up before the VMM has the owner's memory");
    bench.work();
    assert_eq!(asked_maps(&bench), expected_maps());
    assert!(bench.is_up());
}

#[test]
fn both_at_once_in_any_interleaving_bring_the_link_up_with_the_same_maps() {
    for peer_starts_after in 0..Ask::bring_up(&REGIONS).len() {
        let mut bench = Bench::new();
        bench.connect(Side::Owner);
        for (index, ask) in Ask::bring_up(&REGIONS).into_iter().enumerate() {
            bench.owner(ask);
            if index == peer_starts_after {
                bench.peer_up();
            }
            bench.step(Manner::Honest);
        }
        bench.work();
        assert_eq!(asked_maps(&bench), expected_maps(), "{peer_starts_after}");
        assert!(bench.is_up());
    }
}

#[test]
fn the_link_is_up_only_when_the_last_range_was_confirmed() {
    let mut bench = Bench::new();
    bench.connect(Side::Owner);
    bench.owner_up(&REGIONS);
    bench.peer_up();
    while bench.vmm.owner_ranges().count() < REGIONS.len() {
        assert!(!bench.is_up());
        assert!(bench.vmm.act(Manner::Honest));
        if bench.vmm.owner_ranges().count() < REGIONS.len() {
            assert!(bench.deliver());
        }
    }
    assert!(!bench.is_up(), "up before the VMM answered");
    bench.deliver();
    assert!(!bench.is_up(), "up on the word of a VMM that answers before it acts");
    assert!(bench.step(Manner::Honest));
    assert!(bench.is_up());
}

#[test]
fn the_published_page_has_the_mappings_the_vrings_and_the_features() {
    let bench = Bench::up();
    let contents = &bench.published.0;
    assert_eq!(contents.status, abi::LINK_S_OWNER | abi::LINK_S_UP);
    assert_eq!((contents.owner_device, contents.features), (1, 1 << 32));
    let mappings: Vec<_> = contents
        .mappings
        .iter()
        .map(|entry| {
            (entry.iova.value(), entry.len.value(), entry.window_offset.value(), entry.access.value())
        })
        .collect();
    let access = abi::ACCESS_READ | abi::ACCESS_WRITE;
    assert_eq!(
        mappings,
        REGIONS.map(|region| (region.guest, region.len, abi::DATA_OFFSET + region.guest, access))
    );
    for (index, ring) in (0u64..).zip(&contents.vrings) {
        assert_eq!((ring.flags.value(), ring.size.value(), ring.base.value()), (abi::VRING_F_ENABLED, 64, 0));
        let page = 0x1000 * index;
        assert_eq!(
            (ring.desc.value(), ring.avail.value(), ring.used.value()),
            (page, page + 0x400, page + 0x600)
        );
    }
    assert_eq!(contents.vrings.len(), 2);
}

#[test]
fn a_range_is_mapped_from_its_file_at_its_offset_with_its_handle() {
    let bench = Bench::up();
    for (range, region) in bench.vmm.owner_ranges().zip(REGIONS) {
        assert!(bench.shared.allows(range, &bench.files, 0), "{range:?} is not {region:?}");
    }
    assert_eq!(bench.vmm.owner_ranges().count(), 2);
}

#[test]
fn an_owner_whose_device_does_not_run_shows_no_memory() {
    for missing in [Ask::Kick(0), Ask::Enable(0, true)] {
        let mut bench = Bench::new();
        bench.peer_up();
        bench.connect(Side::Owner);
        for ask in Ask::bring_up(&REGIONS) {
            let is_other_ring = matches!(ask, Ask::Kick(1) | Ask::Enable(1, _));
            if !is_other_ring && format!("{ask:?}") != format!("{missing:?}") {
                bench.owner(ask);
            }
        }
        bench.work();
        assert_eq!(bench.vmm.owner_ranges().count(), 0);
        assert!(!bench.is_up());
        assert!(bench.report().reason.unwrap().contains("owner's driver"));
    }
}

#[test]
fn one_vring_that_runs_is_enough() {
    let mut bench = Bench::new();
    bench.peer_up();
    bench.connect(Side::Owner);
    for ask in Ask::bring_up(&REGIONS) {
        if !matches!(ask, Ask::Kick(1)) {
            bench.owner(ask);
        }
    }
    bench.work();
    assert!(bench.is_up());
    assert_eq!(bench.published.0.vrings[1], abi::Vring::default());
}

#[test]
fn without_the_protocol_feature_bit_vrings_start_enabled() {
    let mut bench = Bench::new();
    bench.peer_up();
    bench.connect(Side::Owner);
    for ask in Ask::bring_up(&REGIONS) {
        match ask {
            Ask::Features(_) => bench.owner(Ask::Features(1 << 32)),
            Ask::Enable(..) => {}
            ask => bench.owner(ask),
        }
    }
    bench.work();
    assert!(bench.is_up());
}

#[test]
fn a_region_that_is_added_later_is_mapped_beside_the_others() {
    let mut bench = Bench::up();
    let more = Region::new(8 << 20, 1 << 20, 2, 0);
    bench.owner(Ask::AddRegion(more));
    assert!(matches!(bench.owner_reply, Some(Reply::Done)), "an added region takes nothing away");
    bench.work();
    assert_eq!(asked_maps(&bench), [(Kind::Owner, abi::DATA_OFFSET + more.guest, more.len)]);
    assert!(bench.is_up());
    assert_eq!(bench.published.0.mappings.len(), 3);
}

#[test]
fn a_peer_without_the_window_features_or_the_channel_is_refused_at_its_start() {
    let set_up = |skip: fn(&Request) -> bool| {
        let mut bench = Bench::new();
        bench.connect(Side::Peer);
        for request in peer_set_up(QUEUES, false, false).into_iter().filter(|request| !skip(request)) {
            bench.peer(request);
        }
        bench.peer(Request::SetVringEnable { index: 0, enable: true });
        assert!(matches!(&bench.peer_reply, Some(Reply::Refused(reason)) if reason.contains("without")));
        assert!(!bench.is_connected(Side::Peer));
        assert_eq!(bench.faults("out_of_order"), 1);
    };
    set_up(|request| matches!(request, Request::SetBackendChannel(_)));
    set_up(|request| matches!(request, Request::SetProtocolFeatures(_) | Request::SetBackendChannel(_)));
}

#[test]
fn the_owner_is_told_what_the_link_can_do() {
    let mut bench = Bench::new();
    bench.connect(Side::Owner);
    let mut number = |request: Request| {
        bench.owner_raw(request);
        match bench.owner_reply.take() {
            Some(Reply::Number(number)) => number,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(number(Request::GetFeatures) & FEATURES, FEATURES);
    assert_eq!(number(Request::GetProtocolFeatures), owner_protocol_features());
    assert_eq!(number(Request::GetQueueNum), 1);
    assert_eq!(number(Request::GetMaxMemSlots), 64);
}

#[test]
fn a_stopped_vring_goes_on_at_its_used_index_or_where_it_was_set() {
    let mut bench = Bench::up();
    bench.owner(Ask::Stop(1));
    bench.work();
    let Some(Reply::VringBase(base)) = bench.owner_reply.take() else { panic!() };
    let (file, offset) = base.place.unwrap();
    assert_eq!((base.index, offset), (1, 0x1000 + 0x600 + 2));
    assert_eq!(file, bench.files.request(REGIONS[0]).file);

    let mut bench = Bench::new();
    bench.connect(Side::Owner);
    bench.owner_raw(Request::SetVringBase { index: 0, base: 77 });
    bench.owner(Ask::Stop(0));
    let Some(Reply::VringBase(base)) = bench.owner_reply.take() else { panic!() };
    assert!(base.place.is_none());
    assert_eq!(base.fallback, 77);
}

#[test]
fn a_stopped_packed_vring_goes_on_where_its_event_area_says() {
    let mut bench = Bench::new();
    bench.peer_up();
    bench.connect(Side::Owner);
    let packed = vhost_pci_switch::link::features::RING_PACKED;
    for ask in Ask::bring_up(&REGIONS) {
        bench.owner(match ask {
            Ask::Features(features) => Ask::Features(features | packed),
            ask => ask,
        });
    }
    bench.work();
    assert!(bench.is_up());
    assert_eq!(bench.published.0.features & packed, packed);
    bench.owner(Ask::Stop(1));
    bench.work();
    let Some(Reply::VringBase(base)) = bench.owner_reply.take() else { panic!() };
    let (_, offset) = base.place.unwrap();
    assert_eq!((offset, base.format, base.size), (0x1000 + 0x600, Format::Packed, 64));
    assert_eq!(base.fallback, 0x8000_8000, "the start of the first lap");
}

#[test]
fn ring_addresses_are_front_end_virtual_and_published_as_the_drivers() {
    let mut bench = Bench::new();
    bench.peer_up();
    bench.connect(Side::Owner);
    let high = Region::new(0x1_0000_0000, 1 << 20, 0, 0);
    for ask in Ask::bring_up(&[high]) {
        bench.owner(ask);
    }
    bench.work();
    assert!(bench.is_up());
    assert_eq!(bench.published.0.vrings[0].desc.value(), high.guest);
    assert_ne!(bench.published.0.vrings[0].desc.value(), FRONTEND + high.guest);
    let maps: Vec<_> = bench
        .vmm
        .owner_ranges()
        .map(|range| Content::Owner(range.clone()).place(WINDOW_LEN).0.raw())
        .collect();
    assert_eq!(maps, [abi::DATA_OFFSET], "offset = IOVA - base");
}

#[test]
fn memory_that_the_owner_has_in_a_window_is_not_shown() {
    let mut bench = Bench::new();
    bench.files.make_foreign(1);
    bench.connect(Side::Owner);
    bench.owner_up(&REGIONS);
    bench.peer_up();
    bench.work();
    assert!(bench.is_up());
    let ranges: Vec<_> = bench.vmm.owner_ranges().collect();
    assert_eq!(ranges.len(), 1);
    assert!(!ranges[0].range().backing().handle.is_foreign());
}

#[test]
fn a_vring_in_memory_that_the_owner_has_in_a_window_is_a_fault() {
    let mut bench = Bench::new();
    bench.files.make_foreign(0);
    bench.connect(Side::Owner);
    for ask in Ask::bring_up(&REGIONS) {
        if bench.report().owner.state != "absent" {
            bench.owner(ask);
        }
    }
    bench.peer_up();
    bench.work();
    assert_eq!(bench.report().counters.faults.get("vring"), Some(&1), "{:?}", bench.report());
    assert_eq!(bench.vmm.owner_ranges().count(), 0);
}
