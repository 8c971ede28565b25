//! Random sequences with an owner that has an IOMMU. The bench judges each step by the
//! guest's page table; here is what must hold at the end.

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use vhost_pci_device::abi;
use vhost_pci_switch::config::{LinkConfig, OneWay};
use vhost_pci_switch::link::message::{MissId, Request};
use vhost_pci_switch::link::{Event, Side};

use super::owner_vmm::{BEHIND, BUFFERS, Kind, RINGS, ring_in};
use super::page_table::PAGE;
use crate::bench::{Bench, QUEUES, REGIONS, TIMEOUT, config};
use crate::front_end::{Ask, peer_set_up, peer_start};
use crate::vmm::Manner;

/// What may happen. (`tests/fuzz` chooses from it, too.)
#[derive(Clone, Debug)]
pub enum Step {
    OwnerUp,
    OwnerLeaves,
    Kick(u32),
    Enable(u32, bool),
    Stop(u32),
    /// The vring's page is one of the buffers' pages.
    RingAt(u32, u64),
    Channel,
    Region(bool),
    /// So many pages from this one on, with memory of that page on, and this access.
    GuestMaps(u64, u64, u64, u8),
    GuestUnmaps(u64, u64),
    GuestUnmapsAll,
    Invalidates(u64, u64),
    /// Not in answer to anything.
    Updates(u64, u64, u8),
    PushesNonsense(u64, u64, u8, bool),
    /// The owner's VMM tells the translation of the open miss, and does not answer yet.
    Tells,
    AnswersMiss,
    AnswersWrongly(u64, bool),
    PeerUp,
    PeerLeaves,
    PeerStarts,
    PeerStops {
        reset: bool,
    },
    OldVmmsDie,
    Vmm(Manner, u8),
    VmmActs(Manner),
    AnswerArrives,
    VmmCatchesUp,
    Settle,
    Wait(u64),
    /// Command, page, bytes into it, length, flags.
    Command(u16, u64, u64, u64, u32),
    /// So many times the same copy.
    Copies(u16, u64, u8),
    /// A device of the peer's VM gets all that the link page shows.
    Lends,
    /// It lets go of what that does not show any more.
    Releases,
}

pub const PAGES: u64 = 12;

fn page() -> std::ops::Range<u64> {
    0..PAGES
}

fn manner() -> impl Strategy<Value = Manner> {
    prop_oneof![20 => Just(Manner::Honest), 1 => Just(Manner::Refuses), 4 => Just(Manner::AnswersFirst)]
}

fn step() -> impl Strategy<Value = Step> {
    let copy = || prop::sample::select(vec![abi::CTRL_FETCH, abi::CTRL_STORE]);
    let command = prop::sample::select(vec![abi::CTRL_MAP, abi::CTRL_MAP, abi::CTRL_FETCH, abi::CTRL_STORE]);
    let len = prop::sample::select(vec![1, 64, 4096, 5000, 3 * PAGE]);
    prop_oneof![
        6 => Just(Step::OwnerUp),
        1 => Just(Step::OwnerLeaves),
        2 => (0u32..2).prop_map(Step::Kick),
        2 => (0u32..2, any::<bool>()).prop_map(|(ring, on)| Step::Enable(ring, on)),
        2 => (0u32..2).prop_map(Step::Stop),
        1 => (0u32..2, page()).prop_map(|(ring, page)| Step::RingAt(ring, page)),
        1 => Just(Step::Channel),
        1 => any::<bool>().prop_map(Step::Region),
        10 => (page(), 1u64..4, 0u64..32, prop::sample::select(vec![1u8, 2, 3, 3, 3])).prop_map(|(p, n, b, a)| Step::GuestMaps(p, n, b, a)),
        6 => (page(), 1u64..5).prop_map(|(page, count)| Step::GuestUnmaps(page, count)),
        1 => Just(Step::GuestUnmapsAll),
        2 => (page(), 1u64..5).prop_map(|(page, count)| Step::Invalidates(page, count)),
        1 => (page(), 0u64..32, 0u8..5).prop_map(|(page, behind, perm)| Step::Updates(page, behind, perm)),
        1 => (page(), 0u64..4, 0u8..6, any::<bool>()).prop_map(|(page, n, perm, reset)| Step::PushesNonsense(page, n, perm, reset)),
        3 => Just(Step::Tells),
        10 => Just(Step::AnswersMiss),
        1 => (0u64..20, any::<bool>()).prop_map(|(id, told)| Step::AnswersWrongly(id, told)),
        4 => Just(Step::PeerUp),
        1 => Just(Step::PeerLeaves),
        2 => Just(Step::PeerStarts),
        2 => any::<bool>().prop_map(|reset| Step::PeerStops { reset }),
        1 => Just(Step::OldVmmsDie),
        8 => (manner(), 1u8..9).prop_map(|(manner, count)| Step::Vmm(manner, count)),
        3 => manner().prop_map(Step::VmmActs),
        3 => Just(Step::AnswerArrives),
        3 => Just(Step::VmmCatchesUp),
        6 => Just(Step::Settle),
        3 => prop::sample::select(vec![1u64, 20, 100, 260, 499, 500, 1000]).prop_map(Step::Wait),
        12 => (command, page(), prop::sample::select(vec![0u64, 16, 4000]), len, 1u32..4).prop_map(|(c, p, o, l, f)| Step::Command(c, p, o, l, f)),
        3 => Just(Step::Lends),
        5 => Just(Step::Releases),
        6 => (copy(), page(), 1u8..12).prop_map(|(command, page, times)| Step::Copies(command, page, times)),
    ]
}

fn may_ask(bench: &Bench) -> bool {
    bench.is_connected(Side::Owner) && bench.question.is_none()
}

fn ask(bench: &mut Bench, ask: Ask) {
    if may_ask(bench) {
        bench.owner(ask);
    }
}

fn peer_all(bench: &mut Bench, requests: impl IntoIterator<Item = Request>) {
    for request in requests {
        if bench.is_connected(Side::Peer) {
            bench.peer(request);
        }
    }
}

fn owner_up(bench: &mut Bench, kind: Kind) {
    if !bench.is_connected(Side::Owner) {
        bench.connect(Side::Owner);
    }
    // By steps, each of which may have to wait.
    let running = bench.shared.has_iommu() && bench.shared.runs();
    if !may_ask(bench) || running {
        return;
    }
    if bench.shared.regions().is_empty() {
        let without = match kind {
            Kind::Pushes => 0,
            Kind::Asked => vhost_pci_switch::link::features::PROTOCOL_IOMMU_PUSH,
        };
        ask(bench, Ask::Protocol(crate::front_end::owner_protocol_features() & !without));
        ask(bench, Ask::Channel);
        let platform = vhost_pci_switch::link::features::ACCESS_PLATFORM;
        ask(bench, Ask::Features(crate::front_end::FEATURES | platform));
        ask(bench, Ask::MemTable(REGIONS.to_vec()));
    }
    for index in 0..2 {
        let page = RINGS + PAGE * u64::from(index);
        if may_ask(bench) && !bench.shared.table.touches(page, PAGE) {
            guest_maps(bench, page, PAGE, PAGE * u64::from(index), 3);
        }
        if may_ask(bench) && !bench.shared.is_started(index) {
            for step in [Ask::Num(index, 64), Ask::AddrIova(index, ring_in(page)), Ask::Kick(index)] {
                ask(bench, step);
            }
        }
        ask(bench, Ask::Enable(index, true));
    }
}

fn guest_maps(bench: &mut Bench, iova: u64, len: u64, guest: u64, perm: u8) {
    if bench.shared.table.touches(iova, len) || !bench.shared.has_iommu() {
        return;
    }
    match bench.shared.pushes() {
        true => ask(bench, Ask::Push(false, vec![(iova, len, guest, perm)])),
        false => bench.shared.table.map(iova, len, guest, perm),
    }
}

fn take(bench: &mut Bench, kind: Kind, step: Step) {
    let at = |page: u64| BUFFERS + page * PAGE;
    match step {
        Step::OwnerUp => owner_up(bench, kind),
        Step::OwnerLeaves => bench.leave(Side::Owner),
        Step::Kick(ring) => ask(bench, Ask::Kick(ring)),
        Step::Enable(ring, on) => ask(bench, Ask::Enable(ring, on)),
        Step::Stop(ring) => ask(bench, Ask::Stop(ring)),
        Step::RingAt(ring, page) if !bench.shared.is_started(ring) => {
            ask(bench, Ask::AddrIova(ring, ring_in(at(page))));
        }
        // The old one's answers are lost.
        Step::Channel if may_ask(bench) && bench.shared.has_iommu() => {
            bench.miss = None;
            ask(bench, Ask::Channel);
        }
        Step::Region(there) => {
            let has = bench.shared.regions().contains(&REGIONS[1]);
            if bench.shared.has_iommu() && has != there && may_ask(bench) {
                ask(bench, if there { Ask::AddRegion(REGIONS[1]) } else { Ask::RemoveRegion(REGIONS[1]) });
            }
        }
        Step::GuestMaps(page, count, behind, perm) => {
            // Some of it in the second region, in one piece or apart.
            let guest = if behind < 24 { BEHIND + behind * PAGE } else { (4 << 20) + (behind - 24) * PAGE };
            guest_maps(bench, at(page), count * PAGE, guest, perm);
        }
        Step::GuestUnmaps(page, count) if may_ask(bench) && bench.shared.has_iommu() => {
            let (mut iova, mut end) = (at(page), at(page + count));
            // The guest unmaps what it mapped, as a whole.
            if let Some((start, ..)) = bench.shared.table.at(iova) {
                iova = start;
            }
            if let Some((start, len, ..)) = bench.shared.table.at(end - 1) {
                end = start + len;
            }
            bench.guest_unmaps(iova, end - iova);
        }
        Step::GuestUnmapsAll if may_ask(bench) && bench.shared.has_iommu() => {
            bench.guest_unmaps(0, u64::MAX - PAGE + 1);
        }
        Step::Invalidates(page, count) if bench.shared.has_iommu() && !bench.shared.pushes() => {
            ask(bench, Ask::Invalidate(at(page), count * PAGE));
        }
        // What nobody asked for, and so proves nothing. Of the page that is asked about it
        // would lie.
        Step::Updates(page, behind, perm)
            if bench.shared.has_iommu()
                && !bench.shared.pushes()
                && bench.miss.is_none_or(|(_, asked, _)| asked.raw() != at(page)) =>
        {
            ask(bench, Ask::Update(at(page), PAGE, BEHIND + behind * PAGE, perm));
        }
        Step::PushesNonsense(page, count, perm, reset)
            if bench.shared.pushes() && bench.shared.has_iommu() =>
        {
            let again = (at(page), count * PAGE, BEHIND, perm);
            ask(bench, Ask::Push(reset, vec![(at(page) + 2 * PAGE, PAGE, 0, 0), again, again]));
        }
        Step::Tells => {
            if let Some((_, page, access)) = bench.miss
                && let Some((iova, len, guest, perm)) = bench.shared.table.at(page.raw())
                && u32::from(perm) & access.bits() != 0
            {
                ask(bench, Ask::Update(iova, len, guest, 3));
            }
        }
        Step::AnswersMiss => drop(bench.try_answer_miss()),
        Step::AnswersWrongly(id, told) if bench.miss.is_none_or(|miss| miss.0.0 != id) => {
            bench.apply(Event::MissDone(MissId(id), told));
        }
        Step::PeerUp if !bench.is_connected(Side::Peer) => {
            bench.connect(Side::Peer);
            peer_all(bench, peer_set_up(QUEUES, bench.strict, bench.wiring));
            peer_all(bench, peer_start(QUEUES));
        }
        Step::PeerLeaves => bench.leave(Side::Peer),
        Step::PeerStarts => peer_all(bench, peer_start(QUEUES)),
        Step::PeerStops { reset } if bench.is_connected(Side::Peer) => {
            if reset {
                bench.vmm.reset();
            }
            peer_all(bench, (0..QUEUES).map(|index| Request::GetVringBase { index }));
        }
        Step::OldVmmsDie => bench.vmm.dies(),
        Step::Vmm(manner, count) => {
            for _ in 0..count {
                bench.step(kept(bench, manner));
            }
        }
        Step::VmmActs(manner) => drop(bench.vmm.act(kept(bench, manner))),
        Step::AnswerArrives => drop(bench.deliver()),
        Step::VmmCatchesUp => bench.vmm.catch_up(),
        Step::Settle => settle(bench),
        Step::Lends => drop(bench.lends()),
        Step::Releases => drop(bench.releases()),
        Step::Wait(ms) => bench.wait(Duration::from_millis(ms)),
        Step::Command(command, page, into, len, flags)
            if bench.is_connected(Side::Peer) && bench.commands.open() < 64 =>
        {
            bench.gives(command, at(page) + into, len, flags);
        }
        Step::Copies(command, page, times) => {
            for _ in 0..times {
                if bench.is_connected(Side::Peer) && bench.commands.open() < 64 {
                    bench.gives(command, at(page), 64, 0);
                    bench.try_answer_miss();
                }
            }
        }
        _ => {}
    }
    bench.look();
}

/// A strict VMM keeps its word.
fn kept(bench: &Bench, manner: Manner) -> Manner {
    match manner {
        Manner::AnswersFirst if bench.strict => Manner::Honest,
        manner => manner,
    }
}

fn settle(bench: &mut Bench) {
    bench.work();
    while bench.try_answer_miss() {
        bench.work();
    }
}

fn calm_down(bench: &mut Bench) {
    bench.vmm.dies();
    for _ in 0..8 {
        settle(bench);
        bench.wait(TIMEOUT);
    }
    settle(bench);
}

pub fn run(kind: Kind, strict: bool, one_way: OneWay, max_mappings: usize, steps: Vec<Step>) {
    let mut bench = Bench::with(LinkConfig { one_way, max_mappings, ..config() });
    bench.strict = strict;
    for step in steps {
        take(&mut bench, kind, step);
    }
    calm_down(&mut bench);
    assert!(bench.question.is_none(), "the owner waits for ever for {:?}", bench.question);
    if bench.report().peer.state == "started" {
        assert_eq!(bench.commands.open(), 0, "commands wait for ever");
    }
    assert!(bench.shown().len() <= max_mappings);

    bench.leave(Side::Owner);
    bench.leave(Side::Peer);
    calm_down(&mut bench);
    assert_eq!(bench.report().window.phase, "closed");
    assert_eq!(bench.link.deadline(), None);
    bench.iommu_owner(kind);
    bench.iommu_rings(kind);
    bench.peer_up();
    settle(&mut bench);
    assert!(bench.is_up(), "{:?}", bench.report());
}

/// More by PROPTEST_CASES.
fn cases() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(300);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn whatever_happens_the_peer_holds_what_the_guest_maps(
        pushes in any::<bool>(),
        strict in any::<bool>(),
        widen in prop::bool::weighted(0.2),
        max in prop::sample::select(vec![1usize, 2, 3, 5, 16]),
        steps in vec(step(), 1..80),
    ) {
        let kind = if pushes { Kind::Pushes } else { Kind::Asked };
        run(kind, strict, if widen { OneWay::Widen } else { OneWay::Refuse }, max, steps);
    }
}
