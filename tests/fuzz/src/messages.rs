//! What front-ends send: messages with the fuzzer's numbers in them, and the rows of messages by which
//! an honest one comes up.

use std::os::fd::{AsFd, BorrowedFd};

use crate::front::{
    CHANNEL, FEATURES, FRONTEND, Front, LOG_ALL, MEMORY, NEED_REPLY, OWNER_PROTOCOL, PEER_PROTOCOL, PLATFORM,
    PUSH, Pool, STRICT_WIRING, longs, message, request as r, words,
};
use crate::input::Input;

/// How an owner tells its IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// It has none.
    Plain,
    /// It answers misses.
    Asked,
    /// It pushes.
    Pushes,
}

/// From nothing to the features.
pub fn negotiate(front: &mut Front, protocol: u64, features: u64) {
    front.send(&message(r::GET_FEATURES, 0, &[]), &[]);
    front.send(&message(r::GET_PROTOCOL_FEATURES, 0, &[]), &[]);
    front.send(&message(r::SET_PROTOCOL_FEATURES, 0, &longs(&[protocol])), &[]);
    front.send(&message(r::SET_OWNER, 0, &[]), &[]);
    front.send(&message(r::SET_FEATURES, 0, &longs(&[features])), &[]);
}

/// A back-end channel more, up to four.
pub fn open_channel(front: &mut Front) {
    if front.channels().len() < 4 {
        let channel = front.open_channel();
        front.send(&message(r::SET_BACKEND_REQ_FD, NEED_REPLY, &[]), &[channel.as_fd()]);
    }
}

/// A memory table of one region.
pub fn memory(front: &mut Front) {
    let mut table = words(&[1, 0]);
    table.extend(longs(&[0, MEMORY, FRONTEND, 0]));
    front.send(&message(r::SET_MEM_TABLE, NEED_REPLY, &table), &[Pool::of_process().memory[0].as_fd()]);
}

/// Eventfds for so many virtqueues, which are enabled.
pub fn start(front: &mut Front, queues: u32) {
    let eventfd = |number: u32| Pool::of_process().eventfds[number as usize % 6].as_fd();
    for index in 0..queues {
        let payload = longs(&[index.into()]);
        front.send(&message(r::SET_VRING_CALL, 0, &payload), &[eventfd(2 * index)]);
        front.send(&message(r::SET_VRING_KICK, 0, &payload), &[eventfd(2 * index + 1)]);
        front.send(&message(r::SET_VRING_ENABLE, NEED_REPLY, &words(&[index, 1])), &[]);
    }
}

/// All that an owner's front-end says until its vrings run.
pub fn owner_up(front: &mut Front, owner: Owner) {
    let (protocol, features) = match owner {
        Owner::Plain => (OWNER_PROTOCOL, FEATURES),
        Owner::Asked => (OWNER_PROTOCOL | CHANNEL, FEATURES | PLATFORM),
        Owner::Pushes => (OWNER_PROTOCOL | CHANNEL | PUSH, FEATURES | PLATFORM),
    };
    negotiate(front, protocol, features);
    memory(front);
    if owner != Owner::Plain {
        open_channel(front);
    }
    if owner == Owner::Pushes {
        let mut push = words(&[1, 1]);
        push.extend(longs(&[0, 16 * 4096, FRONTEND, 3]));
        front.send(&message(r::IOMMU_PUSH, NEED_REPLY, &push), &[]);
    }
    // With an IOMMU the addresses are its own.
    let base = if owner == Owner::Plain { FRONTEND } else { 0 };
    for index in 0..2_u32 {
        let page = base + 4096 * u64::from(index);
        let addr = [words(&[index, 0]), longs(&[page, page + 0x600, page + 0x400, 0])].concat();
        front.send(&message(r::SET_VRING_NUM, 0, &words(&[index, 64])), &[]);
        front.send(&message(r::SET_VRING_BASE, 0, &words(&[index, 0])), &[]);
        front.send(&message(r::SET_VRING_ADDR, 0, &addr), &[]);
    }
    start(front, 2);
}

/// All that a peer's front-end says until its device is started.
pub fn peer_up(front: &mut Front, more: u64) {
    negotiate(front, PEER_PROTOCOL | more, FEATURES);
    open_channel(front);
    front.send(&message(r::GET_SHMEM_CONFIG, 0, &[]), &[]);
    start(front, 3);
}

/// What front-ends send; those that matter more than once.
pub const REQUESTS: &[u32] = &[
    r::GET_FEATURES,
    r::SET_FEATURES,
    r::SET_OWNER,
    r::RESET_OWNER,
    r::SET_MEM_TABLE,
    r::SET_MEM_TABLE,
    r::SET_LOG_BASE,
    r::SET_VRING_NUM,
    r::SET_VRING_ADDR,
    r::SET_VRING_ADDR,
    r::SET_VRING_BASE,
    r::GET_VRING_BASE,
    r::GET_VRING_BASE,
    r::SET_VRING_KICK,
    r::SET_VRING_KICK,
    r::SET_VRING_CALL,
    r::SET_VRING_ERR,
    r::GET_PROTOCOL_FEATURES,
    r::SET_PROTOCOL_FEATURES,
    r::GET_QUEUE_NUM,
    r::SET_VRING_ENABLE,
    r::SET_VRING_ENABLE,
    r::SET_BACKEND_REQ_FD,
    r::IOTLB_MSG,
    r::IOTLB_MSG,
    r::GET_CONFIG,
    r::SET_CONFIG,
    r::GET_MAX_MEM_SLOTS,
    r::ADD_MEM_REG,
    r::ADD_MEM_REG,
    r::REM_MEM_REG,
    r::REM_MEM_REG,
    r::GET_SHMEM_CONFIG,
    r::IOMMU_PUSH,
    r::IOMMU_PUSH,
];

/// What a message of this number has to bring, with the fuzzer's numbers in it.
pub fn natural(number: u32, input: &mut Input<'_>) -> (Vec<u8>, Vec<BorrowedFd<'static>>) {
    let pool = Pool::of_process();
    let none = Vec::new;
    let region = |input: &mut Input<'_>| match input.byte() {
        slot @ 0..128 => {
            let at = u64::from(slot % 8) * 2 * MEMORY;
            [at, MEMORY, FRONTEND + at, 0]
        }
        _ => [input.field(0), input.field(0), input.field(FRONTEND), input.field(0)],
    };
    let index = |input: &mut Input<'_>| match input.byte() {
        few @ 0..0xf0 => u32::from(few % 4),
        _ => input.double(),
    };
    let file = |input: &mut Input<'_>| pool.memory[usize::from(input.byte() % 3)].as_fd();
    match number {
        r::SET_FEATURES => {
            let packed = 1 << 34 | 1 << 35;
            let known = [
                FEATURES,
                FEATURES | PLATFORM,
                FEATURES | packed,
                FEATURES | PLATFORM | packed,
                1 << 32,
                FEATURES | LOG_ALL,
                FEATURES | PLATFORM | LOG_ALL,
            ];
            let features = if input.byte() < 0xe0 { input.pick(&known) } else { input.quad() };
            (longs(&[features]), none())
        }
        r::SET_PROTOCOL_FEATURES => {
            let known = [
                OWNER_PROTOCOL,
                OWNER_PROTOCOL | CHANNEL,
                OWNER_PROTOCOL | CHANNEL | PUSH,
                PEER_PROTOCOL,
                PEER_PROTOCOL | STRICT_WIRING,
                PEER_PROTOCOL | 1 << 60,
            ];
            let features = if input.byte() < 0xe0 { input.pick(&known) } else { input.quad() };
            (longs(&[features]), none())
        }
        r::SET_MEM_TABLE => {
            let regions: Vec<_> = (0..input.below(10)).map(|_| region(input)).collect();
            let mut payload = words(&[regions.len() as u32, 0]);
            regions.iter().for_each(|region| payload.extend(longs(region)));
            (payload, regions.iter().map(|_| file(input)).collect())
        }
        r::ADD_MEM_REG | r::REM_MEM_REG => {
            let payload = [longs(&[0]), longs(&region(input))].concat();
            (payload, if number == r::ADD_MEM_REG { vec![file(input)] } else { none() })
        }
        r::SET_VRING_NUM | r::SET_VRING_BASE | r::GET_VRING_BASE => {
            let index = index(input);
            let known = [0, 64, 128, 2, 3, 256, 1 << 15, 1 << 16, 0x8000_0000, u32::MAX];
            let value = if input.byte() < 0xe0 { input.pick(&known) } else { input.double() };
            (words(&[index, value]), none())
        }
        r::SET_VRING_ENABLE => (words(&[index(input), u32::from(input.byte() % 3)]), none()),
        r::SET_VRING_ADDR => {
            let (index, flags) = (index(input), u32::from(input.byte() & 1));
            let places = match input.byte() {
                page @ 0..128 => {
                    let page = FRONTEND + 4096 * u64::from(page % 16);
                    [page, page + 0x600, page + 0x400, 0]
                }
                _ => [input.field(FRONTEND), input.field(FRONTEND), input.field(FRONTEND), 0],
            };
            ([words(&[index, flags]), longs(&places)].concat(), none())
        }
        r::SET_VRING_KICK | r::SET_VRING_CALL | r::SET_VRING_ERR => {
            let index = u64::from(index(input));
            match input.byte() {
                none @ 0..32 => (longs(&[index | u64::from(none & 1) << 8]), Vec::new()),
                other => (longs(&[index]), vec![pool.eventfds[usize::from(other % 6)].as_fd()]),
            }
        }
        r::IOTLB_MSG => {
            let fields = match input.byte() {
                page @ 0..128 => {
                    let page = 4096 * u64::from(page % 16);
                    [page, 4096 * (1 + input.below(4)), FRONTEND + page]
                }
                _ => [input.field(0), input.field(0), input.field(FRONTEND)],
            };
            let mut payload = longs(&fields);
            payload.extend([input.byte() % 5, input.byte() % 6, 0, 0, 0, 0, 0, 0]);
            (payload, none())
        }
        r::IOMMU_PUSH => {
            let count = input.below(6) as u32;
            let mut payload = words(&[count, u32::from(input.byte() & 1)]);
            for _ in 0..count {
                payload.extend(match input.byte() {
                    page @ 0..192 => {
                        let page = 4096 * u64::from(page % 16);
                        longs(&[page, 4096, FRONTEND + page])
                    }
                    _ => longs(&[input.field(0), input.field(0), input.field(FRONTEND)]),
                });
                payload.extend([input.byte() % 5, 0, 0, 0, 0, 0, 0, 0]);
            }
            (payload, none())
        }
        r::GET_CONFIG | r::SET_CONFIG => {
            let len = input.byte();
            let mut payload = words(&[input.field(0) as u32, u32::from(len), 0]);
            payload.extend(std::iter::repeat_n(0, len.into()));
            (payload, none())
        }
        r::SET_LOG_BASE => {
            let (len, offset) =
                if input.byte() < 0xe0 { (4096, 0) } else { (input.field(0), input.field(0)) };
            (longs(&[len, offset]), vec![file(input)])
        }
        _ => (Vec::new(), none()),
    }
}
