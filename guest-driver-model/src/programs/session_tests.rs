//! Sessions on a device made of memory: what they tell it of the doorbell function, and when
//! they look after that.
#![allow(clippy::unwrap_used)]

use std::mem::offset_of;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use vhost_pci_device::abi::DeviceConfig;

use super::*;
use crate::programs::peer_loop::{PeerArgs, PeerProgram, run_on};
use crate::programs::stop::Stop;
use crate::programs::traffic::Traffic;
use crate::programs::wire::Wire;
use crate::shm::SharedMemory;
use crate::transport::TransportError;

const LINK_ID: u64 = 7;

#[derive(Default)]
struct State {
    /// What is paired.
    pairing: Option<Pairing>,
    /// The links that a pairing was asked for.
    asked: Vec<u64>,
    /// How often the doorbell page was followed.
    followed: usize,
    /// Whether commands are answered, and how many were.
    answers: bool,
    answered: u16,
    /// What the ATTACH commands said: flags, vectors.
    attached: Vec<(u32, u64)>,
}

/// A device with a link that has no vrings.
struct Fake {
    config: DeviceConfig,
    window: SharedMemory,
    state: Mutex<State>,
}

impl Fake {
    fn new() -> Self {
        let window = SharedMemory::private(4 << 20).unwrap();
        let config = crate::transport::parse_config(&crate::transport::tests::config_bytes(4 << 20, 2));
        let state = State { answers: true, ..State::default() };
        Self { config, window, state: Mutex::new(state) }
    }

    /// Changes the link page.
    fn link(&self, generation: u64, status: u32) {
        let at = |field: usize| abi::LINK_OFFSET + field as u64;
        let window = &self.window;
        window.store_u16(at(offset_of!(abi::LinkHeader, version)), abi::ABI_VERSION).unwrap();
        let header_len = size_of::<abi::LinkHeader>() as u16;
        window.store_u16(at(offset_of!(abi::LinkHeader, header_len)), header_len).unwrap();
        window.store_u32(at(offset_of!(abi::LinkHeader, status)), status).unwrap();
        window.store_u32(at(offset_of!(abi::LinkHeader, owner_device)), 1).unwrap();
        window.store_u64(at(offset_of!(abi::LinkHeader, features)), 1 << 32).unwrap();
        window.store_u64(at(offset_of!(abi::LinkHeader, link_id)), LINK_ID).unwrap();
        window.store_u64(at(offset_of!(abi::LinkHeader, table_generation)), generation).unwrap();
        window.store_u64(at(offset_of!(abi::LinkHeader, generation)), generation).unwrap();
        window.store_u32(at(offset_of!(abi::LinkHeader, magic)), abi::LINK_MAGIC).unwrap();
    }

    fn pair_with(&self, number: u32) {
        self.state.lock().unwrap().pairing = Some(Pairing { vectors: 8, number });
    }

    /// Answers the commands in the ring, if it does.
    fn answer(&self) {
        let mut state = self.state.lock().unwrap();
        let area = abi::CONTROL_OFFSET;
        let word = |at| self.window.load_u16(area + at).unwrap();
        while state.answers && state.answered != word(abi::CONTROL_AVAIL + 2) {
            let slot = u64::from(state.answered % abi::CONTROL_RING_SIZE);
            let head = word(abi::CONTROL_AVAIL + 4 + 2 * slot);
            let at = area + abi::CONTROL_DESC + 16 * u64::from(head);
            let request = self.window.load_u64(at).unwrap();
            if self.window.load_u16(request).unwrap() == abi::CTRL_ATTACH {
                let flags = self.window.load_u32(request + 4).unwrap();
                state.attached.push((flags, self.window.load_u64(request + 24).unwrap()));
            }
            let used = area + abi::CONTROL_USED;
            self.window.store_u32(used + 4 + 8 * slot, head.into()).unwrap();
            self.window.store_u32(used + 8 + 8 * slot, 8).unwrap();
            state.answered += 1;
            self.window.store_u16_release(used + 2, state.answered).unwrap();
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
    fn doorbell(&self, _: u16) {
        self.answer();
    }
    fn interrupt_fd(&self, _: u16) -> Option<BorrowedFd<'_>> {
        None
    }
    fn pair(&self, link_id: u64) -> Option<Pairing> {
        let mut state = self.state.lock().unwrap();
        state.asked.push(link_id);
        state.pairing
    }
    fn follow_doorbell(&self) {
        self.state.lock().unwrap().followed += 1;
    }
    fn check(&self) -> Result<(), TransportError> {
        Ok(())
    }
}

/// Moves nothing.
struct Idle;

impl PeerProgram for Idle {
    fn poll(&mut self, _: &mut Wire<'_>) -> usize {
        0
    }
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}

#[test]
fn the_doorbell_function_is_looked_after_while_the_link_is_down() {
    let device = Fake::new();
    let mut session = Session::new(&device, false).unwrap();
    for (generation, status) in [(2, abi::LINK_S_OWNER | abi::LINK_S_UP), (4, 0)] {
        device.pair_with(1);
        device.link(generation, status);
        session.round(&mut Idle).unwrap();
    }
    assert!(!session.is_live());
    let told = device.state.lock().unwrap().attached.len();
    device.state.lock().unwrap().asked.clear();
    // It is unplugged.
    device.state.lock().unwrap().pairing = None;
    session.check().unwrap();
    assert_eq!(device.state.lock().unwrap().asked, [LINK_ID]);
    // Nobody attaches to a link that is down.
    assert_eq!(device.state.lock().unwrap().attached.len(), told);
    device.link(6, abi::LINK_S_OWNER | abi::LINK_S_UP);
    session.round(&mut Idle).unwrap();
    assert_eq!(device.state.lock().unwrap().attached.last(), Some(&(abi::ATTACH_F_SERVED, 0)));
}

#[test]
fn an_attachment_that_the_ring_had_no_room_for_is_made_up_for() {
    let device = Fake::new();
    device.pair_with(1);
    device.link(2, abi::LINK_S_OWNER | abi::LINK_S_UP);
    let mut session = Session::new(&device, false).unwrap();
    session.round(&mut Idle).unwrap();
    let with = (abi::ATTACH_F_DOORBELL | abi::ATTACH_F_SERVED, 8);
    assert_eq!(device.state.lock().unwrap().attached, [with]);
    // The device answers nothing while the ring is filled, and while the pairing changes.
    device.state.lock().unwrap().answers = false;
    for number in 0..abi::CONTROL_RING_SIZE.into() {
        device.pair_with(2 + number);
        session.check().unwrap();
    }
    device.state.lock().unwrap().pairing = None;
    session.check().unwrap();
    device.state.lock().unwrap().answers = true;
    device.answer();
    assert_eq!(device.state.lock().unwrap().attached.last(), Some(&with), "as many as the ring took");
    session.check().unwrap();
    assert_eq!(device.state.lock().unwrap().attached.last(), Some(&(abi::ATTACH_F_SERVED, 0)));
    let told = device.state.lock().unwrap().attached.len();
    session.check().unwrap();
    assert_eq!(device.state.lock().unwrap().attached.len(), told, "once");
}

/// Always has packets, so it never sleeps.
struct Busy<'a> {
    device: &'a Fake,
    rounds: u64,
    /// By round: how often the page had been followed.
    followed: Vec<usize>,
}

impl PeerProgram for Busy<'_> {
    fn poll(&mut self, _: &mut Wire<'_>) -> usize {
        self.rounds += 1;
        self.followed.push(self.device.state.lock().unwrap().followed);
        1
    }
    fn traffic(&self) -> Traffic {
        Traffic { rx_packets: self.rounds, ..Traffic::default() }
    }
}

#[test]
fn a_program_that_never_sleeps_follows_the_doorbell_page_every_few_rounds() {
    let device = Fake::new();
    device.pair_with(1);
    device.link(2, abi::LINK_S_OWNER | abi::LINK_S_UP);
    let mut program = Busy { device: &device, rounds: 0, followed: Vec::new() };
    let args = PeerArgs { packets: Some(1000), ..PeerArgs::default() };
    run_on(&device, &args, "test", &mut program, &Stop::default()).unwrap();
    let rounds = program.followed.windows(65);
    assert!(rounds.len() > 900);
    for rounds in rounds {
        assert!(rounds[0] < rounds[64], "{:?}", program.followed);
    }
}
