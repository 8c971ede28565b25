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
    CHANNEL, FEATURES, FRONTEND, LOG_ALL, MEMORY, OWNER_PROTOCOL, PEER_PROTOCOL, PLATFORM, PUSH,
    STRICT_WIRING,
};
use vhost_pci_fuzz::input::Input;
use vhost_pci_switch::config::{LinkConfig, OneWay};
use vhost_pci_switch::kind;
use vhost_pci_switch::link::message::{
    CommandId, Content, MissId, OpId, PushEntry, RegionRequest, Request, WaitingEvent, WindowOp,
};
use vhost_pci_switch::link::wiring::WireId;
use vhost_pci_switch::link::{Effect, Event, Fault, Link, Side, report};

use crate::requests::{channel, eventfd, log, region, request};

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
        if input.is_empty() || bench.unplugged {
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

/// A VMM of the owner's side.
#[derive(Default)]
struct Owner {
    /// It waits for an answer.
    waits: bool,
    asked: VecDeque<MissId>,
    /// Its memory table: file, offset, length.
    regions: Vec<Region>,
}

struct Bench {
    link: Link,
    now: Instant,
    owner: Option<Owner>,
    /// Another one, which does not have the link.
    waiting: Option<Owner>,
    peer: bool,
    peer_asked: VecDeque<Asked>,
    watching: bool,
    doorbell: bool,
    next_command: u64,
    open: BTreeSet<CommandId>,
    generation: u64,
    /// Where the window has the owner's memory and its log.
    shown: Vec<(u64, u64)>,
    /// The link ends; it has ended.
    unplugs: bool,
    unplugged: bool,
}

#[derive(Clone, Copy)]
struct Region {
    guest: u64,
    frontend: u64,
    len: u64,
    offset: u64,
    file: (u64, u64),
}

impl Owner {
    /// Whether it asks this now: one question at a time.
    fn takes(&mut self, request: &Request) -> bool {
        if std::mem::replace(&mut self.waits, true) {
            return false;
        }
        self.note(request);
        if matches!(request, Request::SetBackendChannel(_)) {
            // What was asked on the one before, nobody answers.
            self.asked.clear();
        }
        true
    }

    /// What it shares, if this is taken. If not, it is gone.
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
}

impl Bench {
    fn new(config: LinkConfig) -> Self {
        let mut bench = Self {
            link: Link::new(config, TIMEOUT, 1000).expect("a configuration that can be run"),
            now: Instant::now(),
            owner: None,
            waiting: None,
            peer: false,
            peer_asked: VecDeque::new(),
            watching: false,
            doorbell: false,
            next_command: 0,
            open: BTreeSet::new(),
            generation: 998,
            shown: Vec::new(),
            unplugs: false,
            unplugged: false,
        };
        let first = bench.link.publication();
        bench.run(vec![first]);
        bench
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 20 {
            0 => self.connect(if input.coin() { Side::Owner } else { Side::Peer }),
            1 => match input.byte() {
                0..64 => self.leave(if input.coin() { Side::Owner } else { Side::Peer }, input.coin()),
                64..80 => self.waiting_leaves(input.coin()),
                80..84 => {
                    self.unplugs = true;
                    self.apply(Event::Unplug);
                }
                _ => {}
            },
            2..=5 => {
                let request = request(input);
                self.ask(Side::Owner, request);
            }
            6 => {
                let request = request(input);
                self.ask_waiting(request);
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
                if let Some(id) = self.owner.as_mut().and_then(|owner| owner.asked.pop_front()) {
                    self.apply(Event::MissDone(id, input.coin()));
                }
            }
            12 if input.byte() < 64 => self.apply(Event::Unserved),
            12 => self.witness_goes(),
            13 => self.doorbell(input),
            14 | 15 => self.command(input),
            16 => self.wait(Duration::from_millis(u64::from(input.byte()))),
            17 | 18 => self.bring_up(input),
            _ => self.apply(Event::ControlRingBroken("the fuzzer".into())),
        }
    }

    fn connect(&mut self, side: Side) {
        match side {
            Side::Owner if self.owner.is_some() && self.waiting.is_none() => {
                self.waiting = Some(Owner::default());
                return self.apply(Event::Waiting(WaitingEvent::Connected));
            }
            Side::Owner if self.owner.is_none() => self.owner = Some(Owner::default()),
            Side::Peer if !self.peer => self.peer = true,
            Side::Owner | Side::Peer => return self.apply(Event::TurnedAway(side)),
        }
        self.apply(Event::Connected(side));
    }

    fn leave(&mut self, side: Side, fault: bool) {
        if self.is_connected(side) {
            self.closed(side);
            self.apply(Event::Disconnected(side, fault.then(|| Fault::Message("the fuzzer".into()))));
        }
    }

    fn waiting_leaves(&mut self, fault: bool) {
        if self.waiting.take().is_some() {
            let fault = fault.then(|| Fault::Message("the fuzzer".into()));
            self.apply(Event::Waiting(WaitingEvent::Disconnected(fault)));
        }
    }

    fn is_connected(&self, side: Side) -> bool {
        match side {
            Side::Owner => self.owner.is_some(),
            Side::Peer => self.peer,
        }
    }

    fn closed(&mut self, side: Side) {
        match side {
            Side::Owner => self.owner = None,
            Side::Peer => {
                self.peer = false;
                self.peer_asked.clear();
                self.shown.clear();
            }
        }
    }

    fn ask(&mut self, side: Side, request: Request) {
        match side {
            Side::Owner if !self.owner.as_mut().is_some_and(|owner| owner.takes(&request)) => {}
            Side::Peer if !self.peer => {}
            Side::Owner | Side::Peer => self.apply(Event::Request(side, request)),
        }
    }

    fn ask_waiting(&mut self, request: Request) {
        if self.waiting.as_mut().is_some_and(|waiting| waiting.takes(&request)) {
            self.apply(Event::Waiting(WaitingEvent::Request(request)));
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
            flags: u32::from(input.byte() % 16).into(),
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
        // One that comes while another has the link, as in a migration.
        let waits = side == Side::Owner && choice & 0x40 != 0 && self.owner.is_some();
        if !self.is_connected(side) || waits && self.waiting.is_none() {
            self.connect(side);
        }
        let ask = |bench: &mut Self, request| match waits {
            true => bench.ask_waiting(request),
            false => bench.ask(side, request),
        };
        ask(self, Request::SetProtocolFeatures(protocol));
        if side == Side::Peer || features & PLATFORM != 0 {
            ask(self, Request::SetBackendChannel(channel()));
        }
        ask(self, Request::SetFeatures(features));
        if side == Side::Owner {
            ask(self, Request::SetMemTable(vec![region(0, 0)]));
            if protocol & PUSH != 0 {
                let all = PushEntry { iova: 0, size: MEMORY, frontend: FRONTEND, perm: 3 };
                ask(self, Request::IommuPush { reset: true, entries: vec![all] });
            }
        }
        let base = if features & PLATFORM == 0 { FRONTEND } else { 0 };
        for index in 0..if side == Side::Owner { 2 } else { 3 } {
            let page = base + 4096 * u64::from(index);
            ask(self, Request::SetVringNum { index, num: 64 });
            ask(self, Request::SetVringAddr { index, desc: page, avail: page + 0x400, used: page + 0x600 });
            ask(self, Request::SetVringCall { index, fd: Some(eventfd(index)) });
            ask(self, Request::SetVringKick { index, fd: Some(eventfd(index + 3)) });
            ask(self, Request::SetVringEnable { index, enable: true });
        }
        if side == Side::Owner && choice & 0x20 != 0 {
            ask(self, log(MEMORY / 4096 / 8));
            ask(self, Request::SetFeatures(features | LOG_ALL));
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
                    let owner = self.owner.as_mut().expect("an answer to nobody");
                    assert!(std::mem::take(&mut owner.waits), "an answer to no question");
                }
                Effect::ReplyWaiting(_) => {
                    let waiting = self.waiting.as_mut().expect("an answer to nobody");
                    assert!(std::mem::take(&mut waiting.waits), "an answer to no question");
                }
                Effect::SwapOwners => std::mem::swap(&mut self.owner, &mut self.waiting),
                Effect::DisconnectWaiting => self.waiting = None,
                Effect::Unplugged(_) => {
                    assert!(self.unplugs && !std::mem::replace(&mut self.unplugged, true));
                }
                Effect::Disconnect(side) => self.closed(side),
                Effect::Window(op, change) => {
                    assert!(self.peer, "{change:?} of nobody");
                    self.check_change(&change);
                    self.peer_asked.push_back(Asked::Window(op));
                }
                Effect::WirePeer(id, _) => {
                    assert!(self.peer);
                    self.peer_asked.push_back(Asked::Wire(id));
                }
                Effect::Miss(id, ..) => {
                    self.owner.as_mut().expect("a miss of nobody").asked.push_back(id);
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
    fn check_change(&mut self, change: &WindowOp) {
        let (WindowOp::Map(content) | WindowOp::Unmap(content)) = change;
        let (offset, len) = content.place(WINDOW);
        let end = offset.raw().checked_add(len).expect("inside the window");
        assert!(len > 0 && end <= 2 * WINDOW);
        match change {
            // The first of a window that has nothing.
            WindowOp::Map(Content::LinkArea) => self.shown.clear(),
            WindowOp::Map(Content::Owner(_) | Content::Log(_)) => {
                let apart = |(at, other): &(u64, u64)| *at >= end || at + other <= offset.raw();
                assert!(self.shown.iter().all(apart), "{change:?} over what is shown: {:?}", self.shown);
                self.shown.push((offset.raw(), len));
            }
            WindowOp::Unmap(Content::Owner(_) | Content::Log(_)) => {
                self.shown.retain(|shown| *shown != (offset.raw(), len));
            }
            _ => {}
        }
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
                let regions = &self.owner.as_ref().expect("memory of nobody").regions;
                let region = regions.iter().filter(of_file).find(holds);
                let region = region.unwrap_or_else(|| panic!("{placement:?} is mapped and not shared"));
                at = region.offset + region.len;
            }
        }
    }

    /// Everybody leaves, and nothing is left to wait for.
    fn end(&mut self) {
        self.waiting_leaves(false);
        self.leave(Side::Owner, false);
        self.leave(Side::Peer, false);
        for _ in 0..8 {
            self.witness_goes();
            self.wait(2 * TIMEOUT);
        }
        if self.doorbell {
            self.apply(Event::DoorbellGone);
        }
        assert_eq!(self.unplugs, self.unplugged, "a link that ends, without end");
        if self.unplugged {
            return;
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
