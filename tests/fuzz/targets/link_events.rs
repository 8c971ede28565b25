//! The link as a state machine, with anything that a runtime may bring it: requests that make no
//! sense, numbers of any size, answers yes and no. Wilder than `link-steps`, and judged by less: what
//! is mapped is memory that the owner shares now, what is published is in order, work is bounded,
//! and everything comes to an end.
#![no_main]

#[path = "link_events/requests.rs"]
mod requests;

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use vhost_pci_device::abi;
use vhost_pci_fuzz::broker::{TIMEOUT, WINDOW, config};
use vhost_pci_fuzz::front::{
    CHANNEL, FEATURES, FRONTEND, MEMORY, OWNER_PROTOCOL, PEER_PROTOCOL, PLATFORM, PUSH, STRICT_WIRING,
};
use vhost_pci_fuzz::input::Input;
use vhost_pci_switch::config::{LinkConfig, OneWay};
use vhost_pci_switch::kind;
use vhost_pci_switch::link::message::{
    CommandId, Content, MissId, OpId, PushEntry, RegionRequest, Request, WindowOp,
};
use vhost_pci_switch::link::wiring::WireId;
use vhost_pci_switch::link::{Effect, Event, Fault, Link, Side, report};

use crate::requests::{channel, eventfd, region, request};

/// Steps of one input at most.
const STEPS: usize = 400;
/// Effects of one event at most: all that a window shows taken out, and put in elsewhere.
const EFFECTS: usize = 3 * abi::MAX_MAPPINGS as usize;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let choice = input.byte();
    let mut bench = Bench::new(LinkConfig {
        device: match choice >> 4 & 2 | choice & 1 {
            0 => kind::net::device(1, false),
            1 => kind::net::device(4, false),
            _ => kind::block::device(1 << 20, 2, false),
        },
        one_way: if choice & 6 == 6 { OneWay::Widen } else { OneWay::Refuse },
        max_mappings: [1, 3, 16, 256][usize::from(choice >> 3 & 3)],
        ..config()
    });
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        bench.step(&mut input);
    }
    bench.end();
});

/// What is open with the peer's VMM.
enum Asked {
    Window(OpId),
    Wire(WireId),
}

struct Bench {
    link: Link,
    now: Instant,
    connected: [bool; 2],
    /// The owner's front-end waits for an answer.
    waits: bool,
    peer_asked: VecDeque<Asked>,
    owner_asked: VecDeque<MissId>,
    watching: bool,
    doorbell: bool,
    next_command: u64,
    open: BTreeSet<CommandId>,
    /// The owner's memory table: file, offset, length.
    regions: Vec<Region>,
    generation: u64,
}

#[derive(Clone, Copy)]
struct Region {
    guest: u64,
    frontend: u64,
    len: u64,
    offset: u64,
    file: (u64, u64),
}

impl Bench {
    fn new(config: LinkConfig) -> Self {
        let mut bench = Self {
            link: Link::new(config, TIMEOUT, 1000).expect("a configuration that can be run"),
            now: Instant::now(),
            connected: [false; 2],
            waits: false,
            peer_asked: VecDeque::new(),
            owner_asked: VecDeque::new(),
            watching: false,
            doorbell: false,
            next_command: 0,
            open: BTreeSet::new(),
            regions: Vec::new(),
            generation: 998,
        };
        let first = bench.link.publication();
        bench.run(vec![first]);
        bench
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 20 {
            0 => self.connect(if input.coin() { Side::Owner } else { Side::Peer }),
            1 if input.byte() < 64 => {
                self.leave(if input.coin() { Side::Owner } else { Side::Peer }, input.coin());
            }
            2..=6 => {
                let request = request(input);
                self.ask(Side::Owner, request);
            }
            7 | 8 => {
                let request = request(input);
                self.ask(Side::Peer, request);
            }
            9 | 10 => {
                let choice = input.byte();
                (0..=choice >> 2).for_each(|_| self.peer_answers(choice & 3 != 3));
            }
            11 => {
                if let Some(id) = self.owner_asked.pop_front() {
                    self.apply(Event::MissDone(id, input.coin()));
                }
            }
            12 => self.witness_goes(),
            13 => self.doorbell(input),
            14 | 15 => self.command(input),
            16 => self.wait(Duration::from_millis(u64::from(input.byte()))),
            17 | 18 => self.bring_up(input),
            _ => self.apply(Event::ControlRingBroken("the fuzzer".into())),
        }
    }

    fn connect(&mut self, side: Side) {
        if std::mem::replace(&mut self.connected[side as usize], true) {
            return self.apply(Event::TurnedAway(side));
        }
        self.apply(Event::Connected(side));
    }

    fn leave(&mut self, side: Side, fault: bool) {
        if self.connected[side as usize] {
            self.closed(side);
            self.apply(Event::Disconnected(side, fault.then(|| Fault::Message("the fuzzer".into()))));
        }
    }

    fn closed(&mut self, side: Side) {
        self.connected[side as usize] = false;
        match side {
            Side::Owner => {
                self.waits = false;
                self.owner_asked.clear();
                self.regions.clear();
            }
            Side::Peer => self.peer_asked.clear(),
        }
    }

    fn ask(&mut self, side: Side, request: Request) {
        if !self.connected[side as usize] || (side == Side::Owner && self.waits) {
            return;
        }
        if side == Side::Owner {
            self.waits = true;
            self.note(&request);
        }
        if matches!(request, Request::SetBackendChannel(_)) {
            // What the one before was asked, nobody answers.
            match side {
                Side::Owner => self.owner_asked.clear(),
                Side::Peer => {}
            }
        }
        self.apply(Event::Request(side, request));
    }

    /// What the owner shares, if this is taken. If not, the owner is gone.
    fn note(&mut self, request: &Request) {
        let region = |request: &RegionRequest| Region {
            guest: request.guest,
            frontend: request.frontend,
            len: request.len,
            offset: request.offset,
            file: request.file.identity(),
        };
        match request {
            Request::SetMemTable(table) => self.regions = table.iter().map(region).collect(),
            Request::AddMemReg(added) => self.regions.push(region(added)),
            Request::RemMemReg { guest, frontend, len } => self
                .regions
                .retain(|region| (region.guest, region.frontend, region.len) != (*guest, *frontend, *len)),
            _ => {}
        }
    }

    fn peer_answers(&mut self, done: bool) {
        let result = if done { Ok(()) } else { Err("the fuzzer says no".to_owned()) };
        match self.peer_asked.pop_front() {
            Some(Asked::Window(op)) => self.apply(Event::WindowDone(op, result)),
            Some(Asked::Wire(id)) => self.apply(Event::WireDone(id, result)),
            None => {}
        }
    }

    fn witness_goes(&mut self) {
        if std::mem::take(&mut self.watching) {
            self.apply(Event::WitnessGone);
        }
    }

    fn doorbell(&mut self, input: &mut Input<'_>) {
        match (input.byte() % 4, self.doorbell) {
            (0 | 1, false) => {
                self.doorbell = true;
                self.apply(Event::DoorbellConnected);
            }
            (0, true) => self.apply(Event::DoorbellTurnedAway),
            (1, true) => self.apply(Event::DoorbellSpoke),
            (2, true) => self.apply(Event::DoorbellRead),
            (_, true) => {
                self.doorbell = false;
                self.apply(Event::DoorbellGone);
            }
            _ => {}
        }
    }

    fn command(&mut self, input: &mut Input<'_>) {
        // As many as the ring has, and no more.
        if self.open.len() >= abi::CONTROL_RING_SIZE.into() {
            return;
        }
        let choice = input.byte();
        let value = match choice >> 6 {
            0 => self.generation,
            1 => u64::from(input.byte()) << 12,
            _ => input.field(0),
        };
        let len = if choice & 0x20 == 0 { u64::from(input.word()) } else { input.field(0) };
        let request = abi::ControlRequest {
            command: u16::from(choice & 7).into(),
            vring: u16::from(input.byte() % 12).into(),
            kind: u32::from(input.byte() % 12).into(),
            flags: u32::from(input.byte() % 8).into(),
            value: value.into(),
            len: len.into(),
            ..Default::default()
        };
        let (readable, writable) =
            if choice & 8 == 0 { (len, len) } else { (input.field(0), input.field(0)) };
        self.next_command += 1;
        let id = CommandId(self.next_command);
        self.open.insert(id);
        self.apply(Event::Command(id, request, readable, writable));
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        for _ in 0..200 {
            match self.link.deadline() {
                Some(deadline) if deadline <= self.now => self.apply(Event::Tick),
                _ => return,
            }
        }
        panic!("a tick does not move the deadline");
    }

    /// All that makes one side work, in a row.
    fn bring_up(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        let (side, protocol, features) = match choice % 6 {
            0 => (Side::Owner, OWNER_PROTOCOL, FEATURES),
            1 => (Side::Owner, OWNER_PROTOCOL | CHANNEL, FEATURES | PLATFORM),
            2 => (Side::Owner, OWNER_PROTOCOL | CHANNEL | PUSH, FEATURES | PLATFORM),
            3 | 4 => (Side::Peer, PEER_PROTOCOL, FEATURES),
            _ => (Side::Peer, PEER_PROTOCOL | STRICT_WIRING, FEATURES),
        };
        if !self.connected[side as usize] {
            self.connect(side);
        }
        self.ask(side, Request::SetProtocolFeatures(protocol));
        if side == Side::Peer || features & PLATFORM != 0 {
            self.ask(side, Request::SetBackendChannel(channel()));
        }
        self.ask(side, Request::SetFeatures(features));
        if side == Side::Owner {
            self.ask(side, Request::SetMemTable(vec![region(0, 0)]));
            if protocol & PUSH != 0 {
                let all = PushEntry { iova: 0, size: MEMORY, frontend: FRONTEND, perm: 3 };
                self.ask(side, Request::IommuPush { reset: true, entries: vec![all] });
            }
        }
        let base = if features & PLATFORM == 0 { FRONTEND } else { 0 };
        for index in 0..if side == Side::Owner { 2 } else { 3 } {
            let page = base + 4096 * u64::from(index);
            self.ask(side, Request::SetVringNum { index, num: 64 });
            self.ask(
                side,
                Request::SetVringAddr { index, desc: page, avail: page + 0x400, used: page + 0x600 },
            );
            self.ask(side, Request::SetVringCall { index, fd: Some(eventfd(index)) });
            self.ask(side, Request::SetVringKick { index, fd: Some(eventfd(index + 3)) });
            self.ask(side, Request::SetVringEnable { index, enable: true });
        }
        if choice & 0x80 != 0 {
            for _ in 0..30 {
                self.peer_answers(true);
            }
        }
    }

    fn apply(&mut self, event: Event) {
        let effects = self.link.apply(event, self.now);
        assert!(effects.len() <= EFFECTS, "{} effects of one event", effects.len());
        self.run(effects);
    }

    fn run(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Reply(Side::Owner, _) => {
                    assert!(std::mem::take(&mut self.waits), "an answer to no question");
                }
                Effect::Disconnect(side) => self.closed(side),
                Effect::Window(op, change) => {
                    assert!(self.connected[Side::Peer as usize], "{change:?} of nobody");
                    self.check_change(&change);
                    self.peer_asked.push_back(Asked::Window(op));
                }
                Effect::WirePeer(id, _) => {
                    assert!(self.connected[Side::Peer as usize]);
                    self.peer_asked.push_back(Asked::Wire(id));
                }
                Effect::Miss(id, ..) => {
                    assert!(self.connected[Side::Owner as usize]);
                    self.owner_asked.push_back(id);
                }
                Effect::WatchWitness => self.watching = true,
                Effect::StopWatching => self.watching = false,
                Effect::Answer(id, ..) | Effect::Copy(id, ..) => {
                    assert!(self.open.remove(&id), "{id:?} is answered and was not open");
                }
                Effect::ResetControlRing => self.open.clear(),
                Effect::Publish(contents, generations) => {
                    assert!(generations.link.is_multiple_of(2) && generations.table.is_multiple_of(2));
                    assert!(generations.link >= self.generation);
                    self.generation = generations.link;
                    assert!(contents.vrings.len() <= abi::MAX_VRINGS.into());
                    check_table(&contents.mappings);
                }
                Effect::PublishTable(mappings, _) => check_table(&mappings),
                Effect::Wire(wires) => assert!(self.link.is_up() || wires.is_empty()),
                _ => {}
            }
        }
    }

    /// Only what the owner shares at this moment is mapped, and where there is room for it.
    fn check_change(&self, change: &WindowOp) {
        let (WindowOp::Map(content) | WindowOp::Unmap(content)) = change;
        let (offset, len) = content.place(WINDOW);
        let end = offset.raw().checked_add(len).expect("inside the window");
        assert!(len > 0 && end <= 2 * WINDOW);
        if let (WindowOp::Map(_), Content::Owner(placement)) = (change, content) {
            assert!(offset.raw() >= abi::DATA_OFFSET);
            let backing = placement.range().backing();
            // Regions that touch, in memory and in their file, may appear as one.
            let (mut at, end) = (backing.offset, backing.offset + len);
            while at < end {
                let of_file = |region: &&Region| region.file == backing.handle.identity();
                let holds = |region: &&Region| {
                    (region.offset..region.offset.saturating_add(region.len)).contains(&at)
                };
                let region = self.regions.iter().filter(of_file).find(holds);
                let region = region.unwrap_or_else(|| panic!("{placement:?} is mapped and not shared"));
                at = region.offset + region.len;
            }
        }
    }

    /// Everybody leaves, and nothing is left to wait for.
    fn end(&mut self) {
        self.leave(Side::Owner, false);
        self.leave(Side::Peer, false);
        for _ in 0..8 {
            self.witness_goes();
            self.wait(2 * TIMEOUT);
        }
        if self.doorbell {
            self.apply(Event::DoorbellGone);
        }
        let report = report::of(&self.link);
        assert_eq!((report.window.phase.as_str(), self.link.deadline()), ("closed", None));
    }
}

/// Sorted, apart, and inside the window.
fn check_table(mappings: &[abi::Mapping]) {
    assert!(mappings.len() <= abi::MAX_MAPPINGS as usize);
    let mut free = Some(0);
    for mapping in mappings {
        let (iova, len, at) = (mapping.iova.value(), mapping.len.value(), mapping.window_offset.value());
        assert!(len > 0 && (iova | len | at).is_multiple_of(abi::PAGE_SIZE));
        assert!(free.is_some_and(|free| free <= iova) && iova.checked_add(len - 1).is_some());
        assert!(at >= abi::DATA_OFFSET && at.checked_add(len).is_some_and(|end| end <= 2 * WINDOW));
        assert!((1..=3).contains(&mapping.access.value()));
        free = iova.checked_add(len);
    }
}
