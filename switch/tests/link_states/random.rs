//! Random sequences of what both sides, the kernel and the clock may do. What must
//! always hold is checked by the bench at every step; here is what must hold at the
//! end: nobody waits for ever, and a fresh start works.

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use vhost_pci_device::abi;
use vhost_pci_switch::link::message::Request;
use vhost_pci_switch::link::{Event, Side};

use crate::bench::{Bench, QUEUES, REGIONS, TIMEOUT};
use crate::front_end::{Ask, FEATURES, Region, eventfd, peer_set_up, peer_start};
use crate::vmm::Manner;

/// What may happen. (`tests/fuzz` chooses from it, too.)
#[derive(Clone, Debug)]
pub enum Step {
    OwnerUp(Vec<Region>),
    OwnerLeaves,
    Owner(Ask),
    /// Takes a region of the present table away, if there is one.
    OwnerRemoves(usize),
    PeerUp,
    PeerLeaves,
    PeerStarts,
    PeerStops {
        reset: bool,
    },
    PeerEnables(u32, bool),
    PeerCall(u32),
    PeerChannelAgain,
    OldVmmsDie,
    /// The VMM takes up to so many changes, and each answer arrives.
    Vmm(Manner, u8),
    /// It takes one; the answer is on its way.
    VmmActs(Manner),
    AnswerArrives,
    VmmCatchesUp,
    Wait(u64),
    Control(u16, u16, u32, bool),
    /// The peer's driver attaches, with so many vectors of a doorbell function.
    Attach(u64),
    /// It attaches, and lends a device all that the link page shows.
    Lends,
    /// The device lets go of what it does not show any more.
    Releases,
    DoorbellConnects,
    DoorbellReads,
    DoorbellLeaves,
}

fn region() -> impl Strategy<Value = Region> {
    (0u64..5, 1u64..4, 0usize..3, 0u64..2)
        .prop_map(|(slot, len, file, offset)| Region::new(slot << 20, len << 20 >> 1, file, offset << 20))
}

fn ask() -> impl Strategy<Value = Ask> {
    let ring = 0u32..2;
    prop_oneof![
        3 => vec(region(), 1..3).prop_map(Ask::MemTable),
        3 => region().prop_map(Ask::AddRegion),
        1 => (ring.clone(), prop::sample::select(vec![2u32, 64, 128, 3])).prop_map(|(i, n)| Ask::Num(i, n)),
        1 => (ring.clone(), 0u64..4).prop_map(|(i, page)| Ask::Addr(i, page << 12)),
        3 => ring.clone().prop_map(Ask::Kick),
        1 => ring.clone().prop_map(Ask::Call),
        4 => (ring.clone(), any::<bool>()).prop_map(|(i, on)| Ask::Enable(i, on)),
        4 => ring.prop_map(Ask::Stop),
        1 => Just(Ask::ResetOwner),
        1 => prop::sample::select(vec![FEATURES, 1 << 32, 1 << 5]).prop_map(Ask::Features),
    ]
}

fn manner() -> impl Strategy<Value = Manner> {
    prop_oneof![20 => Just(Manner::Honest), 1 => Just(Manner::Refuses), 4 => Just(Manner::AnswersFirst)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => prop_oneof![Just(REGIONS.to_vec()), vec(region(), 1..3)].prop_map(Step::OwnerUp),
        1 => Just(Step::OwnerLeaves),
        6 => ask().prop_map(Step::Owner),
        4 => (0usize..3).prop_map(Step::OwnerRemoves),
        4 => Just(Step::PeerUp),
        1 => Just(Step::PeerLeaves),
        3 => Just(Step::PeerStarts),
        3 => any::<bool>().prop_map(|reset| Step::PeerStops { reset }),
        1 => (0..QUEUES, any::<bool>()).prop_map(|(queue, on)| Step::PeerEnables(queue, on)),
        1 => (0..QUEUES).prop_map(Step::PeerCall),
        1 => Just(Step::PeerChannelAgain),
        2 => Just(Step::OldVmmsDie),
        10 => (manner(), 1u8..9).prop_map(|(manner, count)| Step::Vmm(manner, count)),
        4 => manner().prop_map(Step::VmmActs),
        4 => Just(Step::AnswerArrives),
        3 => Just(Step::VmmCatchesUp),
        3 => prop::sample::select(vec![1u64, 100, 260, 499, 500, 1000]).prop_map(Step::Wait),
        2 => (0u64..6).prop_map(Step::Attach),
        3 => Just(Step::Lends),
        3 => Just(Step::Releases),
        2 => Just(Step::DoorbellConnects),
        2 => Just(Step::DoorbellReads),
        1 => Just(Step::DoorbellLeaves),
        1 => (0u16..9, 0u16..4, 0u32..12, any::<bool>()).prop_map(|(c, v, k, current)| Step::Control(c, v, k, current)),
    ]
}

fn owner_may_ask(bench: &Bench) -> bool {
    bench.is_connected(Side::Owner) && bench.question.is_none()
}

/// Asks unless the owner still waits, or left by an earlier request.
fn ask_all(bench: &mut Bench, asks: impl IntoIterator<Item = Ask>) {
    for ask in asks {
        if owner_may_ask(bench) {
            bench.owner(ask);
        }
    }
}

fn peer_all(bench: &mut Bench, requests: impl IntoIterator<Item = Request>) {
    for request in requests {
        if bench.is_connected(Side::Peer) {
            bench.peer(request);
        }
    }
}

fn take(bench: &mut Bench, step: Step) {
    match step {
        Step::OwnerUp(regions) => {
            if !bench.is_connected(Side::Owner) {
                bench.connect(Side::Owner);
            }
            ask_all(bench, Ask::bring_up(&regions));
        }
        Step::OwnerLeaves => bench.leave(Side::Owner),
        Step::Owner(ask) => ask_all(bench, [ask]),
        Step::OwnerRemoves(index) => {
            let region = bench.shared.regions().get(index).copied();
            ask_all(bench, region.map(Ask::RemoveRegion));
        }
        Step::PeerUp => {
            if !bench.is_connected(Side::Peer) {
                bench.connect(Side::Peer);
                peer_all(bench, peer_set_up(QUEUES, false, bench.wiring));
                peer_all(bench, peer_start(QUEUES));
            }
        }
        Step::PeerLeaves => bench.leave(Side::Peer),
        Step::PeerStarts => peer_all(bench, peer_start(QUEUES)),
        Step::PeerStops { reset } => {
            if bench.is_connected(Side::Peer) {
                if reset {
                    bench.vmm.reset();
                }
                peer_all(bench, (0..QUEUES).map(|index| Request::GetVringBase { index }));
            }
        }
        Step::PeerEnables(index, enable) => peer_all(bench, [Request::SetVringEnable { index, enable }]),
        Step::PeerCall(index) => peer_all(bench, [Request::SetVringCall { index, fd: Some(eventfd()) }]),
        Step::PeerChannelAgain => {
            // Only while nothing is on its way: what was sent on the old one is lost.
            if bench.vmm.is_idle() && bench.wirer.is_idle() {
                let (stream, _) = std::os::unix::net::UnixStream::pair().unwrap();
                peer_all(bench, [Request::SetBackendChannel(stream)]);
            }
        }
        Step::OldVmmsDie => bench.vmm.dies(),
        Step::Vmm(manner, count) => {
            for _ in 0..count {
                bench.step(manner);
            }
        }
        Step::VmmActs(manner) => drop(bench.vmm.act(manner) | bench.wirer.act(manner)),
        Step::AnswerArrives => drop(bench.deliver()),
        Step::VmmCatchesUp => bench.vmm.catch_up(),
        Step::Wait(ms) => bench.wait(Duration::from_millis(ms)),
        Step::Control(command, vring, kind, current) => {
            let generation = if current { bench.published.1 } else { 4 };
            let request = abi::ControlRequest {
                command: command.into(),
                vring: vring.into(),
                kind: kind.into(),
                value: generation.into(),
                ..Default::default()
            };
            // Of a driver that lies the device is its own.
            if command == abi::CTRL_RELEASE {
                bench.lets_go();
            }
            let (_, effects) = bench.command(&request);
            bench.run(effects);
        }
        Step::Attach(vectors) => attach(bench, vectors),
        Step::Lends => drop(bench.lends()),
        Step::Releases => drop(bench.releases()),
        Step::DoorbellConnects if bench.doorbell => bench.apply(Event::DoorbellTurnedAway),
        Step::DoorbellConnects => {
            bench.doorbell = true;
            bench.apply(Event::DoorbellConnected);
        }
        Step::DoorbellReads if bench.doorbell => bench.apply(Event::DoorbellRead),
        Step::DoorbellLeaves if bench.doorbell => {
            bench.doorbell = false;
            bench.apply(Event::DoorbellGone);
        }
        Step::DoorbellReads | Step::DoorbellLeaves => {}
    }
    bench.look();
}

fn attach(bench: &mut Bench, vectors: u64) {
    let doorbell = if vectors > 0 { abi::ATTACH_F_DOORBELL } else { 0 };
    // And now and then it is always in the middle of a burst.
    let served = if vectors & 1 == 0 { 0 } else { abi::ATTACH_F_SERVED };
    bench.serves_on = vectors & 2 != 0;
    let flags = abi::ATTACH_F_INTERRUPT | doorbell | served;
    let request = abi::ControlRequest {
        command: abi::CTRL_ATTACH.into(),
        flags: flags.into(),
        value: bench.published.1.into(),
        len: vectors.into(),
        ..Default::default()
    };
    let (_, effects) = bench.command(&request);
    bench.run(effects);
}

/// Lets time pass and everybody do what is left to do.
fn calm_down(bench: &mut Bench) {
    bench.vmm.dies();
    for _ in 0..8 {
        bench.work();
        bench.wait(TIMEOUT);
    }
    bench.work();
}

pub fn run(wiring: bool, steps: Vec<Step>) {
    let mut bench = Bench::new();
    bench.wiring = wiring;
    for step in steps {
        take(&mut bench, step);
    }
    calm_down(&mut bench);
    assert!(bench.question.is_none(), "the owner waits for ever for {:?}", bench.question);
    let counters = bench.report().counters;
    assert!(
        counters.mappings_revoked
            <= counters.mappings_made + bench.report().window.mappings.len() as u64 + 64
    );

    bench.leave(Side::Owner);
    bench.leave(Side::Peer);
    calm_down(&mut bench);
    assert_eq!(bench.report().window.phase, "closed");
    assert_eq!(bench.link.deadline(), None);
    bench.connect(Side::Owner);
    bench.owner_up(&REGIONS);
    bench.peer_up();
    bench.work();
    assert!(bench.is_up(), "{:?}", bench.report());
    assert_eq!(bench.report().state, "up");
    assert_eq!(bench.wirer.count(), if wiring { 4 } else { 0 });
    attach(&mut bench, 2);
    if bench.doorbell {
        bench.apply(Event::DoorbellRead);
    }
    for vring in bench.report().vrings {
        assert!(vring.kicks != "none" && vring.calls != "none", "{vring:?}");
        assert!(!wiring || vring.kicks == "direct", "{vring:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_no_promise_is_broken_and_a_fresh_start_works(
        wiring in any::<bool>(),
        steps in vec(step(), 1..60),
    ) {
        run(wiring, steps);
    }
}
