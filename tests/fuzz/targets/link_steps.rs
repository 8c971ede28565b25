//! The link as a state machine, judged by the bench of its own tests: what both front-ends, their
//! VMMs, the kernel and the clock may do, in the order that the fuzzer chooses. What is answered as
//! taken back, no peer has; nobody waits for ever; a fresh start works.
#![no_main]
#![allow(unused, missing_docs)]

#[path = "../../../switch/tests/link_states/bench.rs"]
mod bench;
#[path = "../../../switch/tests/link_states/front_end.rs"]
mod front_end;
#[path = "../../../switch/tests/link_states/iommu.rs"]
mod iommu_owner;
#[path = "../../../switch/tests/link_states/lent.rs"]
mod lent;
#[path = "../../../switch/tests/link_states/random.rs"]
mod random;
#[path = "../../../switch/tests/link_states/vmm.rs"]
mod vmm;
#[path = "../../../switch/tests/link_states/wirer.rs"]
mod wirer;

use libfuzzer_sys::fuzz_target;
use vhost_pci_fuzz::input::Input;

use crate::bench::REGIONS;
use crate::front_end::{Ask, FEATURES, Region};
use crate::random::Step;
use crate::vmm::Manner;

/// Steps of one input at most.
const STEPS: usize = 80;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let wiring = input.coin();
    let mut steps = Vec::new();
    while !input.is_empty() && steps.len() < STEPS {
        steps.push(step(&mut input));
    }
    random::run(wiring, steps);
});

fn region(input: &mut Input<'_>) -> Region {
    let choice = u64::from(input.byte());
    let (slot, len) = (choice % 5, 1 + choice / 5 % 3);
    let (file, offset) = (choice / 15 % 3, choice / 45 % 2);
    Region::new(slot << 20, len << 20 >> 1, file as usize, offset << 20)
}

fn regions(input: &mut Input<'_>) -> Vec<Region> {
    (0..=input.below(2)).map(|_| region(input)).collect()
}

fn ask(input: &mut Input<'_>) -> Ask {
    let choice = input.byte();
    let (ring, on) = (u32::from(choice >> 6 & 1), choice >> 7 != 0);
    match choice % 12 {
        0 => Ask::MemTable(regions(input)),
        1 | 2 => Ask::AddRegion(region(input)),
        3 => Ask::Num(ring, input.pick(&[2, 64, 128, 3])),
        4 => Ask::Addr(ring, input.below(4) << 12),
        5 => Ask::Kick(ring),
        6 => Ask::Call(ring),
        7 => Ask::Enable(ring, on),
        8 | 9 => Ask::Stop(ring),
        10 => Ask::ResetOwner,
        _ => Ask::Features(input.pick(&[FEATURES, 1 << 32, 1 << 5])),
    }
}

fn manner(choice: u8) -> Manner {
    match choice % 8 {
        0..=4 => Manner::Honest,
        5 | 6 => Manner::AnswersFirst,
        _ => Manner::Refuses,
    }
}

fn step(input: &mut Input<'_>) -> Step {
    match input.byte() % 26 {
        0 => Step::OwnerUp(REGIONS.to_vec()),
        1 => Step::OwnerUp(regions(input)),
        2 => Step::OwnerLeaves,
        3..=6 => Step::Owner(ask(input)),
        7 => Step::OwnerRemoves(input.below(3) as usize),
        8 => Step::PeerUp,
        9 => Step::PeerLeaves,
        10 => Step::PeerStarts,
        11 => Step::PeerStops { reset: input.coin() },
        12 => Step::PeerEnables(input.below(3) as u32, input.coin()),
        13 => Step::PeerCall(input.below(3) as u32),
        14 => Step::PeerChannelAgain,
        15 => Step::OldVmmsDie,
        16 | 17 => {
            let choice = input.byte();
            Step::Vmm(manner(choice), 1 + (choice >> 4))
        }
        18 => Step::VmmActs(manner(input.byte())),
        19 => Step::AnswerArrives,
        20 => Step::VmmCatchesUp,
        21 => Step::Wait(input.pick(&[1, 100, 260, 499, 500, 1000])),
        22 => match input.below(8) {
            6 => Step::Lends,
            7 => Step::Releases,
            vectors => Step::Attach(vectors),
        },
        23 => Step::DoorbellConnects,
        24 if input.coin() => Step::DoorbellReads,
        24 => Step::DoorbellLeaves,
        _ => {
            let choice = u32::from(input.byte());
            Step::Control((choice % 8) as u16, (choice / 4 % 4) as u16, choice / 16 % 12, input.coin())
        }
    }
}
