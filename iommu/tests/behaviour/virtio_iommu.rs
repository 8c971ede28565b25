//! The requests of virtio-iommu (virtio 1.3, 5.13.6): the specification's examples,
//! and each of its rules for a device.

use std::ops::RangeInclusive;

use iommu::virtio_iommu::{
    Change, DomainId, EndpointError, EndpointId, FaultReason, Iommu, Reserved, Settings, Status,
    Untranslated, parse_properties, wire,
};
use iommu::{Access, Gpa, Iova, Span};
use zerocopy::IntoBytes;

use crate::iova;

const READ: u32 = wire::VIRTIO_IOMMU_MAP_F_READ;
const WRITE: u32 = wire::VIRTIO_IOMMU_MAP_F_WRITE;
const MMIO: u32 = wire::VIRTIO_IOMMU_MAP_F_MMIO;
const BYPASS: u32 = wire::VIRTIO_IOMMU_ATTACH_F_BYPASS;
const DOMAIN: u32 = 1;
const CARD: EndpointId = EndpointId(8);
const OTHER: EndpointId = EndpointId(9);
const TAIL: usize = size_of::<wire::ReqTail>();

/// Two endpoints, of which the second has a doorbell; single bytes can be mapped.
fn device() -> Iommu {
    with(Settings { page_size_mask: 1, ..Settings::default() })
}

fn with(settings: Settings) -> Iommu {
    let mut iommu = Iommu::new(settings);
    assert_eq!(iommu.add_endpoint(CARD, Vec::new()), Ok(Vec::new()));
    let doorbell = Reserved { range: 0xfee0_0000..=0xfeef_ffff, msi: true };
    assert_eq!(iommu.add_endpoint(OTHER, vec![doorbell]), Ok(Vec::new()));
    iommu
}

/// With the card in the domain.
fn attached() -> Iommu {
    let mut iommu = device();
    attach(&mut iommu, CARD, DOMAIN, 0).unwrap();
    iommu
}

fn send(iommu: &mut Iommu, request: &[u8]) -> Result<Vec<Change>, Status> {
    let outcome = iommu.request(request, TAIL);
    assert_eq!(outcome.response.len(), TAIL);
    assert_eq!(outcome.response[1..], [0; 3]);
    match outcome.status().unwrap() {
        Status::Ok => Ok(outcome.changes),
        status => {
            assert_eq!(outcome.changes, []);
            Err(status)
        }
    }
}

fn attach(iommu: &mut Iommu, endpoint: EndpointId, domain: u32, flags: u32) -> Result<Vec<Change>, Status> {
    send(iommu, wire::ReqAttach::new(domain, endpoint.0, flags).as_bytes())
}

fn detach(iommu: &mut Iommu, endpoint: EndpointId, domain: u32) -> Result<Vec<Change>, Status> {
    send(iommu, wire::ReqDetach::new(domain, endpoint.0).as_bytes())
}

fn map_to(iommu: &mut Iommu, start: u64, end: u64, phys: u64, flags: u32) -> Result<Vec<Change>, Status> {
    send(iommu, wire::ReqMap::new(DOMAIN, start..=end, phys, flags).as_bytes())
}

fn map(iommu: &mut Iommu, start: u64, end: u64) -> Result<Vec<Change>, Status> {
    map_to(iommu, start, end, 0x1000 + start, READ)
}

fn unmap(iommu: &mut Iommu, start: u64, end: u64) -> Result<Vec<Change>, Status> {
    send(iommu, wire::ReqUnmap::new(DOMAIN, start..=end).as_bytes())
}

fn unmapped(start: u64, last: u64) -> Change {
    Change::Unmapped { endpoint: CARD, iova: iova(start, last - start + 1) }
}

/// First and last address of each mapping of the card's.
fn mapped(iommu: &Iommu) -> Vec<(u64, u64)> {
    iommu.mappings(CARD).map(|mapping| (mapping.iova.start().raw(), mapping.iova.last().raw())).collect()
}

// --- The examples of 5.13.6.6 -----------------------------------------------------

#[test]
fn example_1_unmap_of_nothing_succeeds() {
    let mut iommu = attached();
    assert_eq!(unmap(&mut iommu, 0, 4), Ok(vec![]));
}

#[test]
fn example_2_unmap_of_the_whole_mapping_unmaps_it() {
    let mut iommu = attached();
    map(&mut iommu, 0, 9).unwrap();
    assert_eq!(unmap(&mut iommu, 0, 9), Ok(vec![unmapped(0, 9)]));
    assert_eq!(mapped(&iommu), []);
}

#[test]
fn example_3_unmap_over_two_mappings_unmaps_both() {
    let mut iommu = attached();
    map(&mut iommu, 0, 4).unwrap();
    map(&mut iommu, 5, 9).unwrap();
    assert_eq!(unmap(&mut iommu, 0, 9), Ok(vec![unmapped(0, 4), unmapped(5, 9)]));
    assert_eq!(mapped(&iommu), []);
}

#[test]
fn example_4_unmap_of_a_part_fails_and_unmaps_nothing() {
    let mut iommu = attached();
    map(&mut iommu, 0, 9).unwrap();
    assert_eq!(unmap(&mut iommu, 0, 4), Err(Status::Range));
    assert_eq!(mapped(&iommu), [(0, 9)]);
}

#[test]
fn example_5_unmap_of_one_of_two_neighbours_leaves_the_other() {
    let mut iommu = attached();
    map(&mut iommu, 0, 4).unwrap();
    map(&mut iommu, 5, 9).unwrap();
    assert_eq!(unmap(&mut iommu, 0, 4), Ok(vec![unmapped(0, 4)]));
    assert_eq!(mapped(&iommu), [(5, 9)]);
}

#[test]
fn example_6_unmap_that_spills_over_unmaps_the_mapping() {
    let mut iommu = attached();
    map(&mut iommu, 0, 4).unwrap();
    assert_eq!(unmap(&mut iommu, 0, 9), Ok(vec![unmapped(0, 4)]));
    assert_eq!(mapped(&iommu), []);
}

#[test]
fn example_7_unmap_over_a_gap_unmaps_both_sides() {
    let mut iommu = attached();
    map(&mut iommu, 0, 4).unwrap();
    map(&mut iommu, 10, 14).unwrap();
    assert_eq!(unmap(&mut iommu, 0, 14), Ok(vec![unmapped(0, 4), unmapped(10, 14)]));
    assert_eq!(mapped(&iommu), []);
}

/// The sequence with which 5.13 begins.
#[test]
fn the_example_of_the_introduction() {
    let mut iommu = with(Settings::default());
    attach(&mut iommu, CARD, 1, 0).unwrap();
    let changes = map_to(&mut iommu, 0x1000, 0x1fff, 0xa000, READ).unwrap();
    let (range, gpa) = (iova(0x1000, 0x1000), Gpa::new(0xa000));
    assert_eq!(changes, [Change::Mapped { endpoint: CARD, iova: range, gpa, access: Access::Read }]);
    assert_eq!(unmap(&mut iommu, 0x1000, 0x1fff), Ok(vec![unmapped(0x1000, 0x1fff)]));
    assert_eq!(detach(&mut iommu, CARD, 1), Ok(vec![]));
    assert_eq!(map(&mut iommu, 0x1000, 0x1fff), Err(Status::NoEnt));
}

// --- Requests that cannot be parsed -------------------------------------------------

#[test]
fn what_cannot_be_parsed_is_given_back_unwritten_and_changes_nothing() {
    let mut iommu = attached();
    let whole = wire::ReqMap::new(DOMAIN, 0..=9, 0, READ);
    for len in 0..size_of::<wire::ReqMap>() {
        assert_eq!(iommu.request(&whole.as_bytes()[..len], TAIL).response, []);
    }
    for writable in 0..TAIL {
        let outcome = iommu.request(whole.as_bytes(), writable);
        assert_eq!((outcome.response, outcome.changes), (vec![], vec![]));
    }
    assert_eq!(iommu.request(&[6; 100], TAIL).response, []);
    assert_eq!(iommu.request(&[0; 100], 100).response, []);
    assert_eq!(mapped(&iommu), []);
}

#[test]
fn reserved_fields_are_ignored_or_refused_as_each_request_says() {
    let mut iommu = device();
    let mut request = wire::ReqAttach::new(DOMAIN, CARD.0, 0);
    request.head.reserved = [1; 3];
    assert!(send(&mut iommu, request.as_bytes()).is_ok());
    request.reserved = [0, 0, 0, 1];
    assert_eq!(send(&mut iommu, request.as_bytes()), Err(Status::Inval));
    map(&mut iommu, 0, 9).unwrap();
    let mut request = wire::ReqUnmap::new(DOMAIN, 0..=9);
    request.reserved = [1; 4];
    assert_eq!(send(&mut iommu, request.as_bytes()), Err(Status::Inval));
    assert_eq!(mapped(&iommu), [(0, 9)]);
    let mut request = wire::ReqDetach::new(DOMAIN, CARD.0);
    request.reserved = [1; 8];
    assert!(send(&mut iommu, request.as_bytes()).is_ok());
}

// --- ATTACH and DETACH --------------------------------------------------------------

#[test]
fn attach_of_unknown_endpoints_flags_and_domains_is_refused() {
    let mut iommu = with(Settings { domain_range: 1..=2, ..Settings::default() });
    assert_eq!(attach(&mut iommu, EndpointId(7), 1, 0), Err(Status::NoEnt));
    assert_eq!(attach(&mut iommu, CARD, 1, 2), Err(Status::Inval));
    assert_eq!(attach(&mut iommu, CARD, 0, 0), Err(Status::Range));
    assert_eq!(attach(&mut iommu, CARD, 3, 0), Err(Status::Range));
    assert_eq!(iommu.domain_of(CARD), None);
    assert_eq!(attach(&mut iommu, CARD, 2, 0), Ok(vec![]));
    assert_eq!(iommu.domain_of(CARD), Some(DomainId(2)));
}

#[test]
fn attach_moves_an_endpoint_and_a_domain_goes_with_its_last() {
    let mut iommu = attached();
    map(&mut iommu, 0, 9).unwrap();
    let change =
        Change::Mapped { endpoint: OTHER, iova: iova(0, 10), gpa: Gpa::new(0x1000), access: Access::Read };
    assert_eq!(attach(&mut iommu, OTHER, DOMAIN, 0), Ok(vec![change]));
    assert_eq!(attach(&mut iommu, CARD, 2, 0), Ok(vec![unmapped(0, 9)]));
    // The other one holds the domain and its mapping.
    assert_eq!(map(&mut iommu, 5, 6), Err(Status::Inval));
    assert!(iommu.translate(OTHER, Iova::new(0), 10, Access::Read).is_ok());
    assert!(iommu.translate(CARD, Iova::new(0), 10, Access::Read).is_err());
    let gone = Change::Unmapped { endpoint: OTHER, iova: iova(0, 10) };
    assert_eq!(attach(&mut iommu, OTHER, 2, 0), Ok(vec![gone]));
    assert_eq!(unmap(&mut iommu, 0, 9), Err(Status::NoEnt));
    // Made anew it is empty.
    assert_eq!(attach(&mut iommu, OTHER, DOMAIN, 0), Ok(vec![]));
}

#[test]
fn attach_to_the_same_domain_changes_nothing() {
    let mut iommu = attached();
    map(&mut iommu, 0, 9).unwrap();
    assert_eq!(attach(&mut iommu, CARD, DOMAIN, 0), Ok(vec![]));
    assert_eq!(mapped(&iommu), [(0, 9)]);
    assert_eq!(attach(&mut iommu, CARD, DOMAIN, BYPASS), Err(Status::Inval));
}

#[test]
fn detach_from_another_domain_is_refused() {
    let mut iommu = attached();
    map(&mut iommu, 0, 9).unwrap();
    assert_eq!(detach(&mut iommu, EndpointId(7), DOMAIN), Err(Status::NoEnt));
    assert_eq!(detach(&mut iommu, CARD, 2), Err(Status::Inval));
    assert_eq!(detach(&mut iommu, OTHER, DOMAIN), Err(Status::Inval));
    assert_eq!(detach(&mut iommu, CARD, DOMAIN), Ok(vec![unmapped(0, 9)]));
    assert_eq!(detach(&mut iommu, CARD, DOMAIN), Err(Status::Inval));
}

#[test]
fn a_reset_detaches_everybody() {
    let mut iommu = attached();
    map(&mut iommu, 0, 9).unwrap();
    assert_eq!(iommu.reset(), [unmapped(0, 9)]);
    assert_eq!(iommu.domain_of(CARD), None);
    assert_eq!(unmap(&mut iommu, 0, 9), Err(Status::NoEnt));
}

// --- Bypass -------------------------------------------------------------------------

#[test]
fn a_bypass_domain_reaches_everything_but_reserved_ranges() {
    let mut iommu = device();
    assert_eq!(attach(&mut iommu, OTHER, DOMAIN, BYPASS), Ok(vec![Change::BypassOn { endpoint: OTHER }]));
    assert_eq!(map(&mut iommu, 0, 9), Err(Status::Inval));
    assert_eq!(unmap(&mut iommu, 0, 9), Err(Status::Inval));
    let reached = iommu.translate(OTHER, Iova::new(0x1234), 100, Access::ReadWrite);
    assert_eq!(reached, Ok(vec![Span::new(Gpa::new(0x1234), 100).unwrap()]));
    let Err(Untranslated::Fault(fault)) =
        iommu.translate(OTHER, Iova::new(0xfed0_0000), 1 << 30, Access::Write)
    else {
        panic!("the doorbell was reached")
    };
    assert_eq!((fault.reason, fault.address), (FaultReason::Mapping, Iova::new(0xfee0_0000)));
    assert_eq!(attach(&mut iommu, CARD, DOMAIN, 0), Err(Status::Inval));
    assert_eq!(detach(&mut iommu, OTHER, DOMAIN), Ok(vec![Change::BypassOff { endpoint: OTHER }]));
}

#[test]
fn bypass_of_the_config_space_is_for_endpoints_in_no_domain() {
    let mut iommu = attached();
    assert_eq!(iommu.set_bypass(true), [Change::BypassOn { endpoint: OTHER }]);
    assert_eq!(iommu.set_bypass(true), []);
    assert_eq!(iommu.config().bypass, 1);
    assert!(!iommu.is_bypassed(CARD));
    map(&mut iommu, 0, 9).unwrap();
    let bypass = Change::BypassOn { endpoint: CARD };
    assert_eq!(detach(&mut iommu, CARD, DOMAIN), Ok(vec![unmapped(0, 9), bypass]));
    // From bypass to bypass nothing changes.
    assert_eq!(attach(&mut iommu, CARD, 5, BYPASS), Ok(vec![]));
    assert_eq!(iommu.set_bypass(false), [Change::BypassOff { endpoint: OTHER }]);
    assert!(iommu.is_bypassed(CARD));
}

// --- MAP ----------------------------------------------------------------------------

#[test]
fn map_of_an_overlap_is_refused_even_to_the_same_place() {
    let mut iommu = attached();
    map(&mut iommu, 10, 19).unwrap();
    for (start, end) in [(10, 19), (0, 10), (19, 30), (12, 13), (0, 40)] {
        assert_eq!(map(&mut iommu, start, end), Err(Status::Inval));
    }
    assert_eq!(mapped(&iommu), [(10, 19)]);
    assert!(map(&mut iommu, 0, 9).is_ok() && map(&mut iommu, 20, 20).is_ok());
}

#[test]
fn map_of_what_is_not_aligned_is_out_of_range() {
    let mut iommu = with(Settings::default());
    attach(&mut iommu, CARD, DOMAIN, 0).unwrap();
    for (start, end, phys) in [(0x1001, 0x1fff, 0), (0x1000, 0x1ffe, 0), (0x1000, 0x1fff, 0x800)] {
        assert_eq!(map_to(&mut iommu, start, end, phys, READ), Err(Status::Range));
    }
    assert!(map_to(&mut iommu, u64::MAX - 0xfff, u64::MAX, 0, READ).is_ok());
}

#[test]
fn map_outside_the_input_range_is_out_of_range() {
    let mut iommu = with(Settings { input_range: 0x1000..=0x4fff, ..Settings::default() });
    attach(&mut iommu, CARD, DOMAIN, 0).unwrap();
    for (start, end) in [(0, 0xfff), (0, 0x1fff), (0x4000, 0x5fff), (0x5000, 0x5fff)] {
        assert_eq!(map(&mut iommu, start, end), Err(Status::Range));
    }
    assert!(map(&mut iommu, 0x1000, 0x4fff).is_ok());
}

#[test]
fn map_of_ranges_that_are_none_is_refused() {
    let mut iommu = attached();
    // Not `..=`: the first is behind the last.
    let mut request = wire::ReqMap::new(DOMAIN, 9..=9, 0, READ);
    request.virt_end = 8.into();
    assert_eq!(send(&mut iommu, request.as_bytes()), Err(Status::Inval));
    assert_eq!(map_to(&mut iommu, 0, 9, u64::MAX - 8, READ), Err(Status::Range));
    assert_eq!(map_to(&mut iommu, 0, u64::MAX, 0, READ), Err(Status::Range));
    assert!(map_to(&mut iommu, 0, 9, u64::MAX - 9, READ).is_ok());
    let mut request = wire::ReqUnmap::new(DOMAIN, 9..=9);
    request.virt_end = 8.into();
    assert_eq!(send(&mut iommu, request.as_bytes()), Err(Status::Inval));
    assert_eq!(unmap(&mut iommu, 0, u64::MAX), Ok(vec![unmapped(0, 9)]));
}

#[test]
fn map_with_unknown_flags_is_refused() {
    let mut iommu = attached();
    assert_eq!(map_to(&mut iommu, 0, 9, 0, READ | 8), Err(Status::Inval));
    let mut iommu = with(Settings { mmio: false, ..Settings::default() });
    attach(&mut iommu, CARD, DOMAIN, 0).unwrap();
    assert_eq!(map_to(&mut iommu, 0, 0xfff, 0, WRITE | MMIO), Err(Status::Inval));
    assert_eq!(iommu.features() & 1 << wire::VIRTIO_IOMMU_F_MMIO, 0);
}

#[test]
fn a_mapping_of_registers_is_kept_and_gives_no_memory() {
    let mut iommu = attached();
    assert_eq!(map_to(&mut iommu, 0, 9, 0, READ | WRITE | MMIO), Ok(vec![]));
    assert_eq!(map_to(&mut iommu, 10, 19, 0, 0), Ok(vec![]));
    assert_eq!(map(&mut iommu, 5, 5), Err(Status::Inval));
    for wanted in [Access::Read, Access::Write, Access::ReadWrite] {
        assert!(iommu.translate(CARD, Iova::new(0), 1, wanted).is_err());
        assert!(iommu.translate(CARD, Iova::new(10), 1, wanted).is_err());
    }
    assert_eq!(unmap(&mut iommu, 0, 19), Ok(vec![]));
    assert!(map(&mut iommu, 5, 5).is_ok());
}

#[test]
fn mappings_are_limited() {
    let mut iommu = with(Settings { page_size_mask: 1, max_mappings: 2, ..Settings::default() });
    attach(&mut iommu, CARD, DOMAIN, 0).unwrap();
    map(&mut iommu, 0, 0).unwrap();
    map(&mut iommu, 1, 1).unwrap();
    assert_eq!(map(&mut iommu, 2, 2), Err(Status::NoMem));
    unmap(&mut iommu, 0, 0).unwrap();
    assert!(map(&mut iommu, 2, 2).is_ok());
}

// --- PROBE and reserved ranges ------------------------------------------------------

#[test]
fn probe_writes_the_properties_and_zeroes() {
    let mut iommu = device();
    let outcome = iommu.request(wire::ReqProbe::new(OTHER.0).as_bytes(), 512 + TAIL);
    assert_eq!(outcome.status(), Some(Status::Ok));
    assert_eq!(outcome.response.len(), 512 + TAIL);
    assert_eq!(outcome.response[..8], [1, 0, 20, 0, 1, 0, 0, 0]);
    assert!(outcome.response[24..].iter().all(|byte| *byte == 0));
    let found = parse_properties(&outcome.response[..512]);
    assert_eq!(found, [Reserved { range: 0xfee0_0000..=0xfeef_ffff, msi: true }]);
    let outcome = iommu.request(wire::ReqProbe::new(CARD.0).as_bytes(), 512 + TAIL);
    assert_eq!(parse_properties(&outcome.response[..512]), []);
}

#[test]
fn probe_of_an_unknown_endpoint_or_into_too_little_room_is_refused() {
    let mut iommu = device();
    let outcome = iommu.request(wire::ReqProbe::new(7).as_bytes(), 512 + TAIL);
    assert_eq!(outcome.status(), Some(Status::NoEnt));
    let outcome = iommu.request(wire::ReqProbe::new(OTHER.0).as_bytes(), 100);
    assert_eq!((outcome.status(), outcome.response.len()), (Some(Status::Inval), 100));
    assert!(outcome.response[..96].iter().all(|byte| *byte == 0));
    let mut iommu = with(Settings { probe_size: 0, ..Settings::default() });
    assert_eq!(iommu.request(wire::ReqProbe::new(OTHER.0).as_bytes(), 100).response, []);
}

#[test]
fn a_driver_skips_properties_that_it_does_not_know() {
    let known = [1, 0, 20, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
    let list = [&[5, 0, 2, 0, 9, 9][..], &[1, 0x10, 1, 0, 9], &known, &[0, 0, 0, 0], &known].concat();
    // An unknown subtype is reserved.
    assert_eq!(parse_properties(&list), [Reserved { range: 1..=2, msi: false }]);
    assert_eq!(parse_properties(&known[..23]), []);
    assert_eq!(parse_properties(&[1, 0, 0, 0]), []);
}

#[test]
fn a_reserved_range_cannot_be_mapped_nor_a_domain_with_it_entered() {
    let mut iommu = with(Settings::default());
    attach(&mut iommu, OTHER, DOMAIN, 0).unwrap();
    assert_eq!(map(&mut iommu, 0xfedf_f000, 0xfee0_0fff), Err(Status::Inval));
    detach(&mut iommu, OTHER, DOMAIN).unwrap();
    attach(&mut iommu, CARD, DOMAIN, 0).unwrap();
    map(&mut iommu, 0xfedf_f000, 0xfee0_0fff).unwrap();
    assert_eq!(attach(&mut iommu, OTHER, DOMAIN, 0), Err(Status::Unsupp));
    assert_eq!(iommu.domain_of(OTHER), None);
}

#[test]
fn impossible_endpoints_are_refused() {
    let mut iommu = with(Settings { probe_size: 24, ..Settings::default() });
    assert_eq!(iommu.add_endpoint(CARD, vec![]), Err(EndpointError::Exists(CARD)));
    let id = EndpointId(1);
    let range = |range, msi| Reserved { range, msi };
    for reserved in [
        vec![range(5..=9, false), range(9..=10, false)],
        vec![range(5..=9, true), range(19..=20, true)],
        vec![range(RangeInclusive::new(5, 4), true)],
    ] {
        assert_eq!(iommu.add_endpoint(id, reserved), Err(EndpointError::Reserved(id)));
    }
    let too_long = iommu.add_endpoint(id, vec![range(5..=9, false), range(19..=20, false)]);
    assert!(matches!(too_long, Err(EndpointError::ProbeSize { needed: 48, .. })));
}

// --- Translation ----------------------------------------------------------------------

#[test]
fn translation_goes_over_neighbours_and_checks_each() {
    let mut iommu = attached();
    map_to(&mut iommu, 0, 9, 1000, READ | WRITE).unwrap();
    map_to(&mut iommu, 10, 19, 500, READ).unwrap();
    map_to(&mut iommu, 21, 29, 600, READ | WRITE).unwrap();
    let reached = |start, len, wanted| iommu.translate(CARD, Iova::new(start), len, wanted);
    let gpa = |start, len| Span::new(Gpa::new(start), len).unwrap();
    assert_eq!(reached(8, 4, Access::Read), Ok(vec![gpa(1008, 2), gpa(500, 2)]));
    for (start, len, wanted, address) in [
        (8, 4, Access::Write, 10),
        (8, 4, Access::ReadWrite, 10),
        (8, 14, Access::Read, 20),
        (30, 1, Access::Read, 30),
        (29, 2, Access::Write, 30),
    ] {
        let Err(Untranslated::Fault(fault)) = reached(start, len, wanted) else { panic!("reached") };
        assert_eq!((fault.reason, fault.address), (FaultReason::Mapping, Iova::new(address)));
    }
    assert!(matches!(reached(5, 0, Access::Read), Err(Untranslated::Range(_))));
    assert!(matches!(reached(u64::MAX, 2, Access::Read), Err(Untranslated::Range(_))));
}

#[test]
fn a_fault_is_reported_as_the_event_queue_has_it() {
    let iommu = device();
    let Err(Untranslated::Fault(fault)) = iommu.translate(CARD, Iova::new(0x1234), 1, Access::Write) else {
        panic!("an endpoint in no domain reached memory")
    };
    assert_eq!(fault.to_string(), "endpoint 8: write access at 0x1234 faults: Domain");
    let report = fault.report();
    assert_eq!(report.as_bytes()[..12], [1, 0, 0, 0, 2, 1, 0, 0, 8, 0, 0, 0]);
    assert_eq!(report.address.get(), 0x1234);
}
