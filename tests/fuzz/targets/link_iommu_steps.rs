//! As `link-steps`, of an owner with an IOMMU: what its guest maps and unmaps, what its VMM answers or
//! pushes, and what the peer's driver asks for. A naive page table is the judge.
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
#[path = "../../../switch/tests/link_states/vmm.rs"]
mod vmm;
#[path = "../../../switch/tests/link_states/wirer.rs"]
mod wirer;

use libfuzzer_sys::fuzz_target;
use vhost_pci_device::abi;
use vhost_pci_fuzz::input::Input;
use vhost_pci_switch::config::OneWay;

use crate::iommu_owner::owner_vmm::Kind;
use crate::iommu_owner::random::{self, PAGES, Step};
use crate::vmm::Manner;

/// Steps of one input at most.
const STEPS: usize = 100;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let choice = input.byte();
    let kind = if choice & 1 == 0 { Kind::Pushes } else { Kind::Asked };
    let one_way = if choice & 12 == 12 { OneWay::Widen } else { OneWay::Refuse };
    let max_mappings = [1, 2, 3, 5, 16][usize::from(choice >> 4) % 5];
    let mut steps = Vec::new();
    while !input.is_empty() && steps.len() < STEPS {
        steps.push(step(&mut input));
    }
    random::run(kind, choice & 2 != 0, one_way, max_mappings, steps);
});

fn manner(choice: u8) -> Manner {
    match choice % 8 {
        0..=4 => Manner::Honest,
        5 | 6 => Manner::AnswersFirst,
        _ => Manner::Refuses,
    }
}

fn step(input: &mut Input<'_>) -> Step {
    let choice = input.byte();
    let (ring, on) = (u32::from(choice >> 7), choice >> 6 & 1 != 0);
    let page = |input: &mut Input<'_>| input.below(PAGES);
    match choice % 32 {
        0 | 1 => Step::OwnerUp,
        2 => match input.byte() {
            0..64 => Step::OwnerLeaves,
            64..128 => Step::Channel,
            128..192 => Step::OldVmmsDie,
            _ => Step::GuestUnmapsAll,
        },
        3 => Step::Kick(ring),
        4 => Step::Enable(ring, on),
        5 => Step::Stop(ring),
        6 => Step::RingAt(ring, page(input)),
        7 => Step::Region(on),
        8..=10 => {
            let (page, behind) = (page(input), input.below(32));
            let more = input.byte();
            Step::GuestMaps(page, 1 + u64::from(more % 3), behind, [3, 1, 2, 3][usize::from(more >> 6)])
        }
        11 | 12 => Step::GuestUnmaps(page(input), 1 + input.below(4)),
        13 => Step::Invalidates(page(input), 1 + input.below(4)),
        14 => Step::Updates(page(input), input.below(32), input.below(5) as u8),
        15 => Step::PushesNonsense(page(input), input.below(4), input.below(6) as u8, on),
        16 => Step::Tells,
        17 | 18 => Step::AnswersMiss,
        19 => Step::AnswersWrongly(input.below(20), on),
        20 => Step::PeerUp,
        21 => match input.byte() {
            0..64 => Step::PeerLeaves,
            64..128 => Step::PeerStarts,
            choice => Step::PeerStops { reset: choice & 1 != 0 },
        },
        22 => {
            let choice = input.byte();
            Step::Vmm(manner(choice), 1 + (choice >> 4))
        }
        23 => Step::VmmActs(manner(input.byte())),
        24 if ring == 1 => Step::Lends,
        24 => Step::AnswerArrives,
        25 if ring == 1 => Step::Releases,
        25 => Step::VmmCatchesUp,
        26 => Step::Settle,
        27 => Step::Wait(input.pick(&[1, 20, 100, 260, 499, 500, 1000])),
        28 | 29 => {
            let command = input.pick(&[abi::CTRL_MAP, abi::CTRL_MAP, abi::CTRL_FETCH, abi::CTRL_STORE]);
            let (page, more) = (page(input), input.byte());
            let into = [0, 16, 4000][usize::from(more) % 3];
            let len = [1, 64, 4096, 5000, 3 * abi::PAGE_SIZE][usize::from(more) / 3 % 5];
            Step::Command(command, page, into, len, 1 + u32::from(more >> 6) % 3)
        }
        _ => {
            let command = input.pick(&[abi::CTRL_FETCH, abi::CTRL_STORE]);
            Step::Copies(command, page(input), 1 + input.below(11) as u8)
        }
    }
}
