//! Batches over the control ring, against a device that answers from within the doorbell or
//! later, in any order.
#![allow(clippy::unwrap_used)]

use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost_pci_device::abi::DeviceConfig;

use super::*;
use crate::control::{Command, ControlError};
use crate::shm::SharedMemory;
use crate::translate::Access;
use crate::transport::TransportError;

const AREA: u64 = abi::CONTROL_OFFSET;
/// What FETCH reads and STORE writes; IOVAs are offsets into it.
const OWNER_LEN: usize = 256 << 10;

/// Command, flags, value, len.
type Seen = (u16, u32, u64, u64);

/// What the device does with a request. `None`: it does not answer.
type Rule = Box<dyn FnMut(&Seen) -> Option<u32> + Send>;

struct State {
    served: u16,
    used: u16,
    rule: Rule,
    owner: Vec<u8>,
    seen: Vec<Seen>,
    doorbells: usize,
    /// Answers the newest command first.
    reversed: bool,
    /// Answers when it is looked after, and not from within the doorbell.
    at_look: bool,
    /// Bytes that a FETCH says it wrote too few.
    short: u32,
}

struct Fake {
    config: DeviceConfig,
    window: SharedMemory,
    state: Mutex<State>,
    over: AtomicBool,
}

impl Fake {
    fn new(rule: impl FnMut(&Seen) -> Option<u32> + Send + 'static) -> Self {
        let window = SharedMemory::private(1 << 20).unwrap();
        let config = DeviceConfig {
            control_offset: AREA.into(),
            control_len: abi::CONTROL_LEN.into(),
            ..DeviceConfig::default()
        };
        let state = State {
            served: 0,
            used: 0,
            rule: Box::new(rule),
            owner: (0..OWNER_LEN).map(|at| (at / 7) as u8).collect(),
            seen: Vec::new(),
            doorbells: 0,
            reversed: false,
            at_look: false,
            short: 0,
        };
        Self { config, window, state: Mutex::new(state), over: AtomicBool::new(false) }
    }

    /// The readable and the writable bytes of a chain, as addresses and lengths.
    fn chain(&self, head: u16) -> [Vec<(u64, u64)>; 2] {
        let mut parts = [Vec::new(), Vec::new()];
        let mut next = Some(head);
        while let Some(index) = next {
            let at = AREA + abi::CONTROL_DESC + 16 * u64::from(index);
            let flags = self.window.load_u16(at + 12).unwrap();
            let range = (self.window.load_u64(at).unwrap(), self.window.load_u32(at + 8).unwrap().into());
            assert!(
                range.0 >= AREA + abi::CONTROL_BUFFERS && range.0 + range.1 <= AREA + abi::CONTROL_LEN - 8
            );
            parts[usize::from(flags & 2 != 0)].push(range);
            next = (flags & 1 != 0).then(|| self.window.load_u16(at + 14).unwrap());
        }
        parts
    }

    fn gather(&self, parts: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (at, len) in parts {
            let start = bytes.len();
            bytes.resize(start + *len as usize, 0);
            self.window.read(*at, &mut bytes[start..]).unwrap();
        }
        bytes
    }

    fn scatter(&self, parts: &[(u64, u64)], mut bytes: &[u8]) {
        for (at, len) in parts {
            let (now, later) = bytes.split_at(bytes.len().min(*len as usize));
            self.window.write(*at, now).unwrap();
            bytes = later;
        }
        assert!(bytes.is_empty(), "no room for the response");
    }

    /// Answers what is in the ring, as far as the rule does.
    fn answer(&self) {
        let mut state = self.state.lock().unwrap();
        let state = &mut *state;
        let word = |at| self.window.load_u16(AREA + at).unwrap();
        let mut heads = Vec::new();
        while state.served != word(abi::CONTROL_AVAIL + 2) {
            let slot = u64::from(state.served % abi::CONTROL_RING_SIZE);
            heads.push(word(abi::CONTROL_AVAIL + 4 + 2 * slot));
            state.served = state.served.wrapping_add(1);
        }
        if state.reversed {
            heads.reverse();
        }
        for head in heads {
            let [readable, writable] = self.chain(head);
            let request = self.gather(&readable);
            let number = |at: usize, len: usize| {
                let mut bytes = [0; 8];
                bytes[..len].copy_from_slice(&request[at..at + len]);
                u64::from_le_bytes(bytes)
            };
            assert_eq!((number(2, 2), number(12, 4)), (0, 0));
            let seen = (number(0, 2) as u16, number(4, 4) as u32, number(16, 8), number(24, 8));
            let Some(status) = (state.rule)(&seen) else { continue };
            let mut response = [status.to_le_bytes(), [0; 4]].concat();
            let range = seen.2 as usize..(seen.2 + seen.3) as usize;
            match seen.0 {
                abi::CTRL_FETCH if status == 0 => {
                    response.extend(&state.owner[range]);
                    response.truncate(response.len() - state.short as usize);
                }
                abi::CTRL_STORE if status == 0 => {
                    state.owner[range].copy_from_slice(&request[32..32 + seen.3 as usize]);
                }
                _ => {}
            }
            self.scatter(&writable, &response);
            state.seen.push(seen);
            let used = AREA + abi::CONTROL_USED;
            let slot = u64::from(state.used % abi::CONTROL_RING_SIZE);
            self.window.store_u32(used + 4 + 8 * slot, head.into()).unwrap();
            self.window.store_u32(used + 8 + 8 * slot, response.len() as u32).unwrap();
            state.used = state.used.wrapping_add(1);
            self.window.store_u16_release(used + 2, state.used).unwrap();
        }
    }
}

impl Transport for Fake {
    fn name(&self) -> &str {
        "fake"
    }
    fn config(&self) -> &DeviceConfig {
        &self.config
    }
    fn window(&self) -> &SharedMemory {
        &self.window
    }
    fn doorbell(&self, queue: u16) {
        assert_eq!(queue, abi::QUEUE_CONTROL);
        let at_look = {
            let mut state = self.state.lock().unwrap();
            state.doorbells += 1;
            state.at_look
        };
        if !at_look {
            self.answer();
        }
    }
    fn interrupt_fd(&self, _: u16) -> Option<BorrowedFd<'_>> {
        None
    }
    fn is_over(&self) -> bool {
        if self.state.lock().unwrap().at_look {
            self.answer();
        }
        self.over.load(Ordering::Relaxed)
    }
    fn check(&self) -> Result<(), TransportError> {
        Ok(())
    }
}

/// Jobs with room; fewer if there is none.
fn jobs(exchange: &mut dyn Exchange, requests: impl IntoIterator<Item = Request>) -> Vec<Job> {
    let carried = |request: &Request| match *request {
        Request::Map { .. } => 0,
        Request::Fetch { len, .. } | Request::Store { len, .. } => len,
    };
    let requests = requests.into_iter();
    requests.map_while(|request| Some(Job::new(request, exchange.reserve(carried(&request))?))).collect()
}

#[test]
fn a_batch_larger_than_the_ring_is_carried_out_in_any_order() {
    for reversed in [false, true] {
        let device = Fake::new(|_| Some(abi::CTRL_OK));
        device.state.lock().unwrap().reversed = reversed;
        let mut ring = ControlRing::new(&device).unwrap();
        let mut exchange = ControlExchange::new(&mut ring, &device, false);
        for round in 0..20 {
            exchange.clear();
            let request = |n: u64| match n % 3 {
                0 => Request::Fetch { iova: 1000 * n + 3, len: 700 + n as u32 },
                1 => Request::Store { iova: 1000 * n, len: 1 + n as u32 },
                _ => Request::Map { iova: n << 12, len: 4096, access: Access::WRITE },
            };
            let mut jobs = jobs(&mut exchange, (0..100).map(request));
            assert_eq!(jobs.len(), 100);
            for job in &jobs {
                if let Request::Store { iova, len } = job.request {
                    device.window.write(job.data, &vec![iova as u8 ^ round; len as usize]).unwrap();
                }
            }
            exchange.carry_out(&mut jobs);
            let state = device.state.lock().unwrap();
            for job in &jobs {
                assert_eq!(job.outcome, Outcome::Done);
                let mut bytes = Vec::new();
                if let Request::Fetch { iova, len } = job.request {
                    bytes.resize(len as usize, 0);
                    device.window.read(job.data, &mut bytes).unwrap();
                    assert_eq!(bytes, state.owner[iova as usize..][..len as usize]);
                }
                if let Request::Store { iova, len } = job.request {
                    assert!(
                        state.owner[iova as usize..][..len as usize]
                            .iter()
                            .all(|byte| *byte == iova as u8 ^ round)
                    );
                }
            }
        }
        let state = device.state.lock().unwrap();
        assert_eq!(state.seen.len(), 2000);
        // 32 commands of two descriptors fit the ring.
        assert_eq!(state.doorbells, 20 * 4);
        assert_eq!(state.seen.iter().filter(|seen| seen.0 == abi::CTRL_MAP).count(), 20 * 33);
        assert!(state.seen.contains(&(abi::CTRL_MAP, abi::ACCESS_WRITE, 2 << 12, 4096)));
        assert!(ring.is_current(), "jobs do not touch the mark");
    }
}

#[test]
fn the_room_ends_and_is_given_back() {
    let device = Fake::new(|_| Some(abi::CTRL_OK));
    let mut ring = ControlRing::new(&device).unwrap();
    let mut exchange = ControlExchange::new(&mut ring, &device, false);
    let largest = Request::Fetch { iova: 0, len: abi::MAX_COPY };
    for _ in 0..3 {
        exchange.clear();
        let mut jobs = jobs(&mut exchange, [largest; 10]);
        assert_eq!(jobs.len(), 3);
        assert_eq!(exchange.reserve(u32::MAX), None);
        exchange.carry_out(&mut jobs);
        assert!(jobs.iter().all(|job| job.outcome == Outcome::Done));
    }
}

#[test]
fn each_status_has_its_outcome_and_a_short_fetch_is_none() {
    let statuses = [
        (abi::CTRL_OK, Outcome::Done),
        (abi::CTRL_UNKNOWN, Outcome::Later),
        (abi::CTRL_INVALID, Outcome::Later),
        (abi::CTRL_STALE, Outcome::Later),
        (abi::CTRL_DENIED, Outcome::Denied),
        (abi::CTRL_COPY, Outcome::Copy),
        (abi::CTRL_BUSY, Outcome::Later),
        (abi::CTRL_NO_ROOM, Outcome::Copy),
        (abi::CTRL_FAILED, Outcome::Later),
        (99, Outcome::Later),
    ];
    for (status, outcome) in statuses {
        let device = Fake::new(move |_| Some(status));
        let mut ring = ControlRing::new(&device).unwrap();
        let mut exchange = ControlExchange::new(&mut ring, &device, false);
        let mut jobs = jobs(&mut exchange, [Request::Fetch { iova: 0, len: 100 }]);
        exchange.carry_out(&mut jobs);
        assert_eq!(jobs[0].outcome, outcome, "{status}");
    }
    let device = Fake::new(|_| Some(abi::CTRL_OK));
    device.state.lock().unwrap().short = 1;
    let mut ring = ControlRing::new(&device).unwrap();
    let mut exchange = ControlExchange::new(&mut ring, &device, false);
    let mut jobs = jobs(&mut exchange, [Request::Fetch { iova: 0, len: 100 }]);
    exchange.carry_out(&mut jobs);
    assert_eq!(jobs[0].outcome, Outcome::Later);
}

/// The device answers the first two of three jobs, and the third only later: its room is not
/// used before that, and commands go on.
#[test]
fn a_batch_that_is_not_answered_is_given_up_and_its_room_kept() {
    let mut count = 0;
    let device = Fake::new(move |seen| {
        count += 1;
        (count != 3 || seen.0 == abi::CTRL_DETACH).then_some(abi::CTRL_OK)
    });
    let mut ring = ControlRing::new(&device).unwrap();
    let short = Duration::from_millis(1);
    let mut exchange = ControlExchange::new(&mut ring, &device, false).patience(short);
    let fetch = Request::Fetch { iova: 0, len: 100 };
    let mut first = jobs(&mut exchange, [fetch; 3]);
    exchange.carry_out(&mut first);
    let outcomes: Vec<_> = first.iter().map(|job| job.outcome).collect();
    assert_eq!(outcomes, [Outcome::Done, Outcome::Done, Outcome::Later]);
    for _ in 0..3 {
        exchange.clear();
        assert_eq!(exchange.reserve(0), None);
        let mut job = [Job { outcome: Outcome::Done, ..first[0] }];
        exchange.carry_out(&mut job);
        assert_eq!(job[0].outcome, Outcome::Later);
    }
    ring.call(&device, Command::Detach, Duration::from_secs(2)).unwrap();
    // The device comes round to it: the head of the third chain.
    let used = AREA + abi::CONTROL_USED;
    let mut state = device.state.lock().unwrap();
    let slot = u64::from(state.used % abi::CONTROL_RING_SIZE);
    device.window.store_u32(used + 4 + 8 * slot, 4).unwrap();
    device.window.store_u32(used + 8 + 8 * slot, 8).unwrap();
    state.used += 1;
    device.window.store_u16_release(used + 2, state.used).unwrap();
    drop(state);
    let mut exchange = ControlExchange::new(&mut ring, &device, false).patience(short);
    exchange.clear();
    let mut jobs = jobs(&mut exchange, [fetch]);
    exchange.carry_out(&mut jobs);
    assert_eq!(jobs[0].outcome, Outcome::Done);
}

#[test]
fn what_was_waited_is_counted_for_all_batches_together() {
    let device = Fake::new(|_| {
        std::thread::sleep(Duration::from_millis(2));
        Some(abi::CTRL_OK)
    });
    let mut ring = ControlRing::new(&device).unwrap();
    let mut waited = Duration::ZERO;
    let mut exchange = ControlExchange::new(&mut ring, &device, false).counting(&mut waited);
    for _ in 0..2 {
        exchange.clear();
        let mut jobs = jobs(&mut exchange, [Request::Fetch { iova: 0, len: 100 }]);
        exchange.carry_out(&mut jobs);
        assert_eq!(jobs[0].outcome, Outcome::Done);
    }
    let left = exchange.patience;
    assert!(waited >= Duration::from_millis(4), "{waited:?}");
    assert_eq!(left, PATIENCE - waited);
}

/// Nothing else would end it: the broker that was asked has been killed.
#[test]
fn a_link_page_of_another_generation_ends_the_wait() {
    let device = Fake::new(|_| None);
    let at = offset_of!(abi::LinkHeader, generation) as u64;
    device.window.store_u64(at, 6).unwrap();
    let mut ring = ControlRing::new(&device).unwrap();
    let ever = Duration::from_secs(1 << 20);
    let mut exchange = ControlExchange::new(&mut ring, &device, false).patience(ever).of_link(4);
    let mut jobs = jobs(&mut exchange, [Request::Fetch { iova: 0, len: 100 }]);
    exchange.carry_out(&mut jobs);
    assert_eq!(jobs[0].outcome, Outcome::Later);
    assert_eq!(device.state.lock().unwrap().doorbells, 1, "it was asked");
}

/// It waits for what a device of the driver's was lent: the driver has to let go of that first (9.5).
#[test]
fn a_table_that_is_not_the_one_that_was_lent_ends_the_wait_once_no_more_answers_come() {
    let at = offset_of!(abi::LinkHeader, table_generation) as u64;
    // Three of five are answered while the table changes.
    let mut count = 0;
    let device = Fake::new(move |_| {
        count += 1;
        (count <= 3).then_some(abi::CTRL_OK)
    });
    device.window.store_u64(at, 8).unwrap();
    let mut ring = ControlRing::new(&device).unwrap();
    let ever = Duration::from_secs(1 << 20);
    let mut exchange = ControlExchange::new(&mut ring, &device, false).patience(ever);
    exchange.follow(6);
    let mut jobs = jobs(&mut exchange, [Request::Fetch { iova: 0, len: 100 }; 5]);
    exchange.carry_out(&mut jobs);
    let outcomes: Vec<_> = jobs.iter().map(|job| job.outcome).collect();
    assert_eq!(outcomes, [Outcome::Done, Outcome::Done, Outcome::Done, Outcome::Later, Outcome::Later]);
}

/// What is mapped for an answer is in the table before the answer comes.
#[test]
fn an_answer_that_comes_behind_its_table_is_waited_for() {
    let device = Fake::new(|_| Some(abi::CTRL_OK));
    device.window.store_u64(offset_of!(abi::LinkHeader, table_generation) as u64, 8).unwrap();
    device.state.lock().unwrap().at_look = true;
    let mut ring = ControlRing::new(&device).unwrap();
    let mut exchange = ControlExchange::new(&mut ring, &device, false);
    exchange.follow(6);
    let mut jobs = jobs(&mut exchange, [Request::Fetch { iova: 0, len: 100 }]);
    exchange.carry_out(&mut jobs);
    assert_eq!(jobs[0].outcome, Outcome::Done);
}

#[test]
fn a_control_area_that_begins_anew_ends_the_wait() {
    let device = Fake::new(|_| None);
    let mut ring = ControlRing::new(&device).unwrap();
    let start = Instant::now();
    let patience = Duration::from_secs(20);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            device.window.zero(AREA, abi::CONTROL_LEN).unwrap();
        });
        let mut exchange = ControlExchange::new(&mut ring, &device, false).patience(patience);
        let mut jobs = jobs(&mut exchange, [Request::Fetch { iova: 0, len: 100 }]);
        exchange.carry_out(&mut jobs);
        assert_eq!(jobs[0].outcome, Outcome::Later);
    });
    assert!(start.elapsed() < patience / 2);
}

#[test]
fn a_device_that_is_gone_ends_the_wait() {
    let device = Fake::new(|_| None);
    let mut ring = ControlRing::new(&device).unwrap();
    let start = Instant::now();
    let patience = Duration::from_secs(20);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            device.over.store(true, Ordering::Relaxed);
        });
        let mut exchange = ControlExchange::new(&mut ring, &device, false).patience(patience);
        let mut jobs = jobs(&mut exchange, [Request::Fetch { iova: 0, len: 100 }]);
        exchange.carry_out(&mut jobs);
        assert_eq!(jobs[0].outcome, Outcome::Later);
    });
    assert!(start.elapsed() < patience / 2);
}

#[test]
fn a_device_that_breaks_the_ring_carries_out_nothing() {
    let device = Fake::new(|_| Some(abi::CTRL_OK));
    let mut ring = ControlRing::new(&device).unwrap();
    // One used element too many.
    device.window.store_u16_release(AREA + abi::CONTROL_USED + 2, 1).unwrap();
    let mut exchange = ControlExchange::new(&mut ring, &device, false);
    exchange.clear();
    let mut jobs = jobs(&mut exchange, [Request::Fetch { iova: 0, len: 100 }]);
    exchange.carry_out(&mut jobs);
    assert!(jobs.iter().all(|job| job.outcome == Outcome::Later));
    assert!(matches!(ring.answers(), Err(ControlError::Ring(_))));
}
