//! The owner is migrated: logging begins and ends while its rings run, and a second VMM of its side takes the
//! link over.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use iommu::LARGE_PAGE_SIZE;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_pci_device::abi;
use vhost_pci_switch::config::LinkConfig;
use vhost_pci_switch::link::descriptor::MemoryFile;
use vhost_pci_switch::link::features::{ACCESS_PLATFORM, LOG_ALL};
use vhost_pci_switch::link::message::{Reply, Request, WaitingEvent, WindowOp};
use vhost_pci_switch::link::{Effect, Event, Side};

use crate::bench::{Bench, REGIONS, WINDOW_LEN, config};
use crate::front_end::{Ask, FEATURES};
use crate::iommu_owner::owner_vmm::{self, BEHIND, RINGS, RW};
use crate::iommu_owner::page_table::PAGE;
use crate::vmm::{Kind, Manner, kind};

const REPLY_ACK: u64 = 1 << 3;
/// [`REGIONS`] end at 5 MiB: 1280 pages.
const LOG_LEN: u64 = 160;
/// What the linear layout of an owner with an IOMMU begins with.
const BASE: u64 = RINGS - RINGS % LARGE_PAGE_SIZE;

fn log_of(len: u64) -> Request {
    let file = File::from(memfd_create(c"log", MFdFlags::MFD_CLOEXEC).unwrap());
    let file_len = len.next_multiple_of(4096);
    file.set_len(file_len).unwrap();
    let metadata = file.metadata().unwrap();
    let file = MemoryFile::new(OwnedFd::from(file), metadata.dev(), metadata.ino());
    Request::SetLogBase { file, file_len, offset: 0, len }
}

/// Up, with a driver in the peer's guest if `driver`.
fn up(driver: bool) -> Bench {
    let mut bench = Bench::up();
    bench.owner(Ask::Protocol(REPLY_ACK));
    if driver {
        attach(&mut bench);
    }
    bench.forget();
    bench
}

fn attach(bench: &mut Bench) {
    let request = abi::ControlRequest {
        command: abi::CTRL_ATTACH.into(),
        value: bench.published.1.into(),
        ..Default::default()
    };
    let (status, effects) = bench.command(&request);
    assert_eq!(status, abi::CTRL_OK);
    bench.run(effects);
}

fn is_done(bench: &Bench) -> bool {
    matches!(bench.owner_reply, Some(Reply::Done))
}

/// The log is given and used; what is open then is the answer to that.
fn begin(bench: &mut Bench) {
    bench.owner_raw(log_of(LOG_LEN));
    assert!(is_done(bench) && bench.is_up(), "a log that is not used yet changes nothing");
    bench.owner(Ask::Features(FEATURES | LOG_ALL));
}

fn logs(bench: &Bench) -> bool {
    bench.published.0.status & abi::LINK_S_LOG != 0
}

#[test]
fn logging_begins_when_nothing_that_was_mapped_before_is_left_and_the_driver_has_attached_anew() {
    let mut bench = up(true);
    begin(&mut bench);
    assert!(!bench.is_up() && bench.owner_reply.is_none());
    // The VMM's word is not enough: it unmaps later than it says.
    while bench.step(Manner::AnswersFirst) {}
    let maps = |effect: &Effect| matches!(effect, Effect::Window(_, WindowOp::Map(content)) if kind(content) == Kind::Owner);
    assert!(!bench.trace.iter().any(maps), "mapped again before it had gone");
    bench.vmm.catch_up();
    assert_eq!(bench.vmm.owner_ranges().count(), 0);
    bench.look();
    bench.work();
    assert!(bench.is_up() && logs(&bench));
    assert_eq!(bench.published.0.log, (abi::LOG_OFFSET, LOG_LEN));
    assert_eq!(bench.published.0.features & LOG_ALL, 0, "it is no feature of the owner's driver");
    let pages: Vec<u32> = bench.published.0.mappings.iter().map(|entry| entry.log_page.value()).collect();
    assert_eq!(pages, [0, 1024]);
    assert!(bench.owner_reply.is_none(), "no driver has said that it marks what it writes");
    attach(&mut bench);
    assert!(is_done(&bench));
    // What QEMU says then, which changes nothing.
    bench.owner(Ask::Addr(0, 0));
    assert!(is_done(&bench) && bench.is_up());
}

#[test]
fn a_driver_that_never_comes_holds_nobody_up_for_long_and_none_is_not_waited_for() {
    let mut bench = up(true);
    begin(&mut bench);
    bench.work();
    bench.wait(Duration::from_millis(499));
    assert!(bench.owner_reply.is_none());
    bench.wait(Duration::from_millis(1));
    assert!(is_done(&bench) && bench.is_connected(Side::Owner) && bench.is_connected(Side::Peer));

    let mut bench = up(false);
    begin(&mut bench);
    bench.work();
    assert!(is_done(&bench) && logs(&bench));
}

#[test]
fn a_peer_that_does_not_let_go_gets_no_log_and_the_owner_no_answer() {
    let mut bench = up(true);
    begin(&mut bench);
    bench.wait(Duration::from_millis(400));
    assert!(bench.owner_reply.is_none());
    bench.wait(Duration::from_secs(2));
    assert!(bench.owner_reply.is_none() && !bench.is_connected(Side::Owner));
}

#[test]
fn the_log_leaves_the_window_behind_the_memory_and_before_the_last_vring_has_stopped() {
    let mut bench = up(false);
    begin(&mut bench);
    bench.work();
    bench.forget();
    bench.owner(Ask::Stop(0));
    let order: Vec<Kind> = bench
        .trace
        .iter()
        .filter_map(|effect| match effect {
            Effect::Window(_, WindowOp::Unmap(content)) => Some(kind(content)),
            _ => None,
        })
        .collect();
    assert_eq!(order, [Kind::Owner, Kind::Owner, Kind::Log]);
    bench.work();
    // The used ring of vring 0 is in page 0.
    let Some(Reply::VringBase(base)) = &bench.owner_reply else { panic!("{:?}", bench.owner_reply) };
    let marks = base.marks.as_ref().unwrap();
    assert_eq!(marks.pages.iter().map(|pages| (pages.first, pages.count)).collect::<Vec<_>>(), [(0, 1)]);
    assert!(!bench.vmm.kinds().contains(&Kind::Log));
}

#[test]
fn logging_ends_while_the_rings_run() {
    let mut bench = up(true);
    begin(&mut bench);
    bench.work();
    attach(&mut bench);
    bench.owner(Ask::Features(FEATURES));
    assert!(!bench.is_up());
    bench.work();
    assert!(is_done(&bench) && bench.is_up() && !logs(&bench));
    assert!(!bench.vmm.kinds().contains(&Kind::Log));
    assert!(bench.published.0.mappings.iter().all(|entry| entry.log_page.value() == 0));
}

#[test]
fn a_log_that_is_too_small_is_declined_and_the_link_works_on() {
    let mut bench = up(true);
    bench.owner_raw(log_of(LOG_LEN - 1));
    assert!(is_done(&bench), "it has no other answer");
    bench.owner(Ask::Features(FEATURES | LOG_ALL));
    assert!(matches!(bench.owner_reply, Some(Reply::Declined)));
    assert!(bench.is_up() && bench.faults("dirty_log") == 2);
    // The next one will do.
    begin(&mut bench);
    bench.work();
    attach(&mut bench);
    assert!(is_done(&bench) && logs(&bench));
    // In the middle of a migration there is no way to say so.
    bench.owner_raw(log_of(LOG_LEN - 1));
    assert!(!bench.is_connected(Side::Owner));
}

#[test]
fn memory_that_a_log_has_no_bits_for_cannot_come() {
    let mut bench = up(false);
    begin(&mut bench);
    bench.work();
    bench.owner(Ask::AddRegion(crate::front_end::Region::new(64 << 20, 1 << 20, 2, 0)));
    assert!(!bench.is_connected(Side::Owner) && bench.faults("dirty_log") == 1);
}

#[test]
fn a_device_that_starts_in_the_middle_of_a_migration_is_not_served_before_the_log_is_there() {
    let mut bench = Bench::new();
    bench.connect(Side::Owner);
    let mut asks = Ask::bring_up(&REGIONS);
    asks[0] = Ask::Features(FEATURES | LOG_ALL);
    asks.into_iter().for_each(|ask| bench.owner(ask));
    bench.peer_up();
    bench.work();
    assert!(!bench.is_up());
    bench.owner_raw(log_of(LOG_LEN));
    bench.work();
    assert!(bench.is_up() && logs(&bench));
}

/// The window's end, where such a log is, has been the memory's until then.
#[test]
fn a_long_log_and_the_memory_of_an_owner_with_an_iommu_have_each_their_own_place() {
    for strict in [false, true] {
        let mut bench = Bench::iommu_with(config(), owner_vmm::Kind::Pushes, strict);
        // On one line with the vrings, and near the window's end.
        let last = BASE + (WINDOW_LEN - abi::DATA_OFFSET) - (1 << 20);
        bench.owner(Ask::Push(false, vec![(last, PAGE, BEHIND, RW)]));
        let map = bench.map(last, PAGE, 3);
        assert_eq!(bench.status(map), abi::CTRL_OK);
        let place = |bench: &Bench| {
            let entry = bench.published.0.mappings.iter().find(|entry| entry.iova.value() == last);
            entry.map(|entry| entry.window_offset.value())
        };
        let log_at = WINDOW_LEN - (2 << 20);
        assert!(place(&bench).unwrap() >= log_at, "{:x?}", place(&bench));
        bench.owner_raw(log_of(abi::MAX_LOW_LOG + 1));
        assert!(
            place(&bench).unwrap() >= log_at && bench.is_up(),
            "a log that is not used yet changes nothing"
        );
        // The model of the VMM takes nothing over anything else.
        bench.owner(Ask::Features(FEATURES | ACCESS_PLATFORM | LOG_ALL));
        bench.settle();
        bench.attaches();
        assert!(bench.is_up() && is_done(&bench));
        assert_eq!(bench.published.0.log, (log_at, abi::MAX_LOW_LOG + 1));
        assert!(place(&bench).unwrap() < log_at && bench.shows(RINGS) && bench.shows(RINGS + PAGE));
        assert_eq!(bench.report().counters.mappings_evicted, 0);
        bench.owner(Ask::Features(FEATURES | ACCESS_PLATFORM));
        bench.settle();
        assert!(bench.is_up() && is_done(&bench) && place(&bench).unwrap() >= log_at);
    }
}

#[test]
fn what_has_no_room_beside_a_long_log_goes_and_the_vrings_stay() {
    let many = LinkConfig { max_mappings: 64, ..config() };
    let mut bench = Bench::iommu_with(many, owner_vmm::Kind::Pushes, false);
    // As much as there is room for behind the vrings, all of it the same memory.
    let ranges: Vec<u64> = (1..=30).map(|index| BASE + index * LARGE_PAGE_SIZE).collect();
    for iova in &ranges {
        bench.owner(Ask::Push(false, vec![(*iova, LARGE_PAGE_SIZE, 0, RW)]));
        let map = bench.map(*iova, PAGE, 3);
        assert_eq!(bench.status(map), abi::CTRL_OK);
    }
    bench.owner_raw(log_of(abi::MAX_LOW_LOG + 1));
    bench.owner(Ask::Features(FEATURES | ACCESS_PLATFORM | LOG_ALL));
    bench.settle();
    let gone: Vec<u64> = ranges.into_iter().filter(|iova| !bench.shows(*iova)).collect();
    assert_eq!((gone, bench.is_up()), (vec![BASE + LARGE_PAGE_SIZE], true));
    assert!(bench.shows(RINGS) && bench.shows(RINGS + PAGE));
    assert_eq!(bench.report().counters.mappings_evicted, 1);
}

#[test]
fn an_operator_can_say_that_an_owner_is_not_migrated() {
    let mut bench = Bench::with(LinkConfig { migration: false, ..config() });
    bench.connect(Side::Owner);
    bench.owner_raw(Request::GetFeatures);
    assert!(matches!(bench.owner_reply, Some(Reply::Number(bits)) if bits & LOG_ALL == 0));
    bench.owner_raw(Request::SetProtocolFeatures(1 << 1));
    assert!(!bench.is_connected(Side::Owner));
}

// Of the VMM that waits:

fn waits(bench: &mut Bench) {
    bench.apply(Event::Waiting(WaitingEvent::Connected));
}

fn says(bench: &mut Bench, ask: &Ask) -> Option<bool> {
    let request = ask.request(&bench.files);
    bench.trace.clear();
    bench.apply(Event::Waiting(WaitingEvent::Request(request)));
    bench.trace.iter().find_map(|effect| match effect {
        Effect::ReplyWaiting(reply) => Some(!matches!(reply, Reply::Refused(_))),
        _ => None,
    })
}

fn swapped(bench: &Bench) -> bool {
    bench.trace.iter().any(|effect| matches!(effect, Effect::SwapOwners))
}

#[test]
fn one_that_waits_changes_nothing_while_a_vring_of_the_other_runs() {
    let mut bench = up(true);
    let before = bench.published.clone();
    waits(&mut bench);
    for ask in Ask::bring_up(&REGIONS) {
        assert_eq!(says(&mut bench, &ask), Some(true), "{ask:?}");
        assert!(!swapped(&bench) && bench.published == before);
        assert!(!bench.trace.iter().any(|effect| matches!(effect, Effect::Window(..) | Effect::Wire(_))));
    }
    assert_eq!(bench.report().waiting_owner.unwrap().state, "started");
    bench.owner(Ask::Enable(0, false));
    assert!(!swapped(&bench), "vring 1 runs");
    bench.work();
    bench.forget();
    bench.owner(Ask::Stop(0));
    bench.work();
    assert!(matches!(bench.owner_reply, Some(Reply::VringBase(_))) && !swapped(&bench));
    bench.owner(Ask::Stop(1));
    assert!(swapped(&bench), "nobody's vring runs but that of the one that waits");
}

#[test]
fn one_that_waits_has_the_link_when_it_starts_and_the_other_has_stopped_and_may_get_it_back() {
    let mut bench = up(true);
    waits(&mut bench);
    let asks = Ask::bring_up(&REGIONS);
    let (set_up, starts) = asks.split_at(asks.iter().position(|ask| matches!(ask, Ask::Kick(_))).unwrap());
    for ask in set_up {
        says(&mut bench, ask);
    }
    bench.owner(Ask::Stop(0));
    bench.work();
    bench.owner(Ask::Stop(1));
    bench.work();
    assert!(!swapped(&bench), "it has started nothing");
    for ask in &starts[..2] {
        says(&mut bench, ask);
    }
    assert!(swapped(&bench));
    bench.work();
    assert!(bench.is_up());
    assert_eq!(bench.report().counters.takeovers, 1);
    // The destination fails: the source, which waits now, goes on.
    bench.apply(Event::Disconnected(Side::Owner, None));
    bench.work();
    assert!(!bench.is_up() && bench.vmm.owner_ranges().count() == 0);
    let report = bench.report();
    assert!(report.waiting_owner.is_none() && report.owner.state == "connected");
    for index in 0..2 {
        bench.owner(Ask::Kick(index));
    }
    bench.work();
    assert!(bench.is_up());
}

#[test]
fn what_one_that_waits_does_wrong_ends_its_own_session_only() {
    let mut bench = up(true);
    waits(&mut bench);
    assert_eq!(says(&mut bench, &Ask::Features(1 << 63)), Some(false));
    assert!(bench.trace.iter().any(|effect| matches!(effect, Effect::DisconnectWaiting)));
    assert!(bench.is_up() && bench.report().waiting_owner.is_none() && bench.faults("features") == 1);
    // It leaves by itself.
    waits(&mut bench);
    bench.apply(Event::Waiting(WaitingEvent::Disconnected(None)));
    assert!(bench.is_up() && bench.report().waiting_owner.is_none());
}

#[test]
fn the_owner_that_leaves_makes_room_for_the_one_that_waits() {
    let mut bench = up(true);
    waits(&mut bench);
    for ask in Ask::bring_up(&REGIONS) {
        says(&mut bench, &ask);
    }
    bench.trace.clear();
    bench.apply(Event::Disconnected(Side::Owner, None));
    assert!(swapped(&bench));
    bench.work();
    assert!(bench.is_up());
}
