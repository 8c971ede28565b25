//! Runs a link's effects as the runtime does, and checks after each event what must
//! hold whatever happens.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use iommu::{Access, Iova};
use vhost_pci_device::abi;
use vhost_pci_switch::config::{LinkConfig, OneWay, Rates, WiringPolicy};
use vhost_pci_switch::kind;
use vhost_pci_switch::link::descriptor::MemoryFile;
use vhost_pci_switch::link::message::{
    CommandId, Content, Generations, LinkContents, MissId, OpId, Reply, Request, WindowOp, Wire,
};
use vhost_pci_switch::link::report::{self, LinkReport};
use vhost_pci_switch::link::{Effect, Event, Link, Side};

use crate::front_end::{Ask, Files, Region, Shared, peer_set_up, peer_start};
use crate::iommu_owner::peer_driver::Commands;
use crate::lent::Lent;
use crate::vmm::{Kind, Manner, Vmm, kind};
use crate::wirer::Wirer;

pub const TIMEOUT: Duration = Duration::from_millis(500);
/// Of the link.
pub const WINDOW_LEN: u64 = 64 << 20;
/// Queues of the peer's device: control and two vrings.
pub const QUEUES: u32 = 3;
/// Two regions, as a machine with memory below and above a hole has.
pub const REGIONS: [Region; 2] = [Region::new(0, 2 << 20, 0, 0), Region::new(4 << 20, 1 << 20, 1, 1 << 20)];

pub struct Bench {
    pub link: Link,
    pub now: Instant,
    pub vmm: Vmm,
    pub wirer: Wirer,
    pub files: Files,
    pub shared: Shared,
    /// Every effect since [`Self::forget`], in order.
    pub trace: Vec<Effect>,
    pub published: (LinkContents, u64),
    pub table_generation: u64,
    next_command: u64,
    /// What the peer's driver has asked for by MAP, FETCH and STORE.
    pub commands: Commands,
    /// The miss that the owner's VMM was told of and has not answered.
    pub miss: Option<(MissId, Iova, Access)>,
    /// Whether the peer's VMM negotiates SHMEM_STRICT.
    pub strict: bool,
    /// Whether it negotiates WIRING.
    pub wiring: bool,
    pub one_way: OneWay,
    pub wires: Vec<Wire>,
    /// What a device of the peer's VM has of the window.
    pub lent: Lent,
    /// Whether a doorbell function is connected.
    pub doorbell: bool,
    watching: bool,
    /// The runtime looks whether the peer's driver serves an earlier link.
    pub looks_for_served: bool,
    /// It does, and does not stop.
    pub serves_on: bool,
    /// Witness pages in the window, the oldest first, by number.
    witnesses: VecDeque<u64>,
    next_witness: u64,
    connected: [bool; 2],
    /// The owner's question that has no answer yet.
    pub question: Option<Ask>,
    pub owner_reply: Option<Reply>,
    pub peer_reply: Option<Reply>,
}

pub fn config() -> LinkConfig {
    LinkConfig {
        name: "bench".into(),
        owner_socket: "/nowhere/owner".into(),
        peer_socket: "/nowhere/peer".into(),
        window_len: WINDOW_LEN,
        device: kind::net::device(1, false),
        one_way: OneWay::Refuse,
        max_mappings: 16,
        memory_regions: 64,
        unsealed_memory: false,
        migration: true,
        rates: Rates::default(),
        wiring: WiringPolicy::Direct,
        doorbell_socket: None,
        owner_admission: Default::default(),
        peer_admission: Default::default(),
    }
}

impl Bench {
    pub fn new() -> Self {
        Self::with(config())
    }

    pub fn with(config: LinkConfig) -> Self {
        let one_way = config.one_way;
        let link = Link::new(config, TIMEOUT, 1000).unwrap();
        let mut bench = Self {
            link,
            now: Instant::now(),
            vmm: Vmm::default(),
            wirer: Wirer::default(),
            files: Files::new(),
            shared: Shared::default(),
            trace: Vec::new(),
            published: (LinkContents::default(), 998),
            table_generation: 998,
            next_command: 0,
            commands: Commands::default(),
            miss: None,
            strict: false,
            wiring: false,
            one_way,
            wires: Vec::new(),
            lent: Lent::default(),
            doorbell: false,
            watching: false,
            looks_for_served: false,
            serves_on: false,
            witnesses: VecDeque::new(),
            next_witness: 0,
            connected: [false; 2],
            question: None,
            owner_reply: None,
            peer_reply: None,
        };
        let first = bench.link.publication();
        bench.run(vec![first]);
        bench
    }

    /// Both sides up, the owner with [`REGIONS`], and nothing on its way.
    pub fn up() -> Self {
        let mut bench = Self::new();
        bench.connect(Side::Owner);
        bench.owner_up(&REGIONS);
        bench.peer_up();
        bench.work();
        assert!(bench.is_up());
        bench.forget();
        bench
    }

    pub fn forget(&mut self) {
        self.trace.clear();
        self.owner_reply = None;
        self.peer_reply = None;
    }

    pub fn connect(&mut self, side: Side) {
        assert!(!self.connected[side as usize]);
        self.connected[side as usize] = true;
        self.apply(Event::Connected(side));
    }

    pub fn is_connected(&self, side: Side) -> bool {
        self.connected[side as usize]
    }

    /// The front-end closes its connection.
    pub fn leave(&mut self, side: Side) {
        if self.connected[side as usize] {
            self.closed(side);
            self.apply(Event::Disconnected(side, None));
        }
    }

    fn closed(&mut self, side: Side) {
        self.connected[side as usize] = false;
        match side {
            Side::Owner => {
                self.wirer.owner_leaves();
                self.shared = Shared::default();
                self.question = None;
                self.miss = None;
            }
            Side::Peer => {
                self.vmm.leaves();
                self.wirer.leaves();
            }
        }
    }

    /// The owner's front-end asks; it has to wait for an answer before it asks more.
    pub fn owner(&mut self, ask: Ask) {
        assert!(self.question.is_none(), "the owner is still waiting for {:?}", self.question);
        let request = ask.request(&self.files);
        self.wirer.owner_asks(&request);
        self.shared.takes(&ask);
        self.question = Some(ask);
        self.owner_reply = None;
        self.apply(Event::Request(Side::Owner, request));
    }

    /// A request of the owner's that is not in [`Ask`].
    pub fn owner_raw(&mut self, request: Request) {
        self.wirer.owner_asks(&request);
        self.owner_reply = None;
        self.question = Some(Ask::Features(0));
        self.apply(Event::Request(Side::Owner, request));
    }

    pub fn peer(&mut self, request: Request) {
        self.wirer.tells(&request);
        self.peer_reply = None;
        self.apply(Event::Request(Side::Peer, request));
        assert!(self.peer_reply.is_some(), "the peer's front-end is always answered at once");
    }

    pub fn owner_up(&mut self, regions: &[Region]) {
        for ask in Ask::bring_up(regions) {
            self.owner(ask);
        }
    }

    pub fn peer_up(&mut self) {
        self.connect(Side::Peer);
        for request in peer_set_up(QUEUES, self.strict, self.wiring) {
            self.peer(request);
        }
        self.peer_starts();
    }

    pub fn peer_starts(&mut self) {
        for request in peer_start(QUEUES) {
            self.peer(request);
        }
    }

    /// The peer's VMM stops the device: it was reset, or the guest was paused.
    pub fn peer_stops(&mut self, reset: bool) {
        if reset {
            self.vmm.reset();
        }
        for index in 0..QUEUES {
            self.peer(Request::GetVringBase { index });
        }
    }

    /// The VMM takes one change and its answer arrives.
    pub fn step(&mut self, manner: Manner) -> bool {
        let acted = self.vmm.act(manner) | self.wirer.act(manner);
        self.look();
        acted | self.deliver()
    }

    pub fn deliver(&mut self) -> bool {
        let (window, wired) = (self.vmm.deliver(), self.wirer.deliver());
        let any = window.is_some() || wired.is_some();
        if let Some((op, result)) = window {
            self.apply(Event::WindowDone(op, result));
        }
        if let Some((id, result)) = wired {
            self.apply(Event::WireDone(id, result));
        }
        any
    }

    /// A command of the peer's driver: its status, and what happened besides.
    pub fn command(&mut self, request: &abi::ControlRequest) -> (u32, Vec<Effect>) {
        let id = self.next_command();
        let mut effects = self.link.apply(Event::Command(id, *request, 0, 0), self.now);
        let answer = effects.iter().position(|effect| matches!(effect, Effect::Answer(..)));
        let answer = effects.remove(answer.expect("the command is answered at once"));
        let Effect::Answer(answered, status, _) = answer else { unreachable!() };
        assert_eq!(answered, id);
        (status, effects)
    }

    pub fn next_command(&mut self) -> CommandId {
        self.next_command += 1;
        CommandId(self.next_command)
    }

    /// Everything that the VMM was asked is done and answered.
    pub fn work(&mut self) {
        let mut steps = 0;
        while self.step(Manner::Honest) {
            steps += 1;
            assert!(steps < 10_000, "the window is changed for ever: {:?}", self.report());
        }
        self.vmm.catch_up();
        self.look();
    }

    /// The runtime asks the kernel about the oldest witness, if the link wants that.
    pub fn look(&mut self) {
        if !self.serves_on && std::mem::take(&mut self.looks_for_served) {
            let effects = self.link.apply(Event::Unserved, self.now);
            self.run(effects);
        }
        while self.watching {
            let gone = self.witnesses.front().is_none_or(|witness| self.vmm.seal(*witness));
            if !gone {
                return;
            }
            self.watching = false;
            self.witnesses.pop_front();
            let effects = self.link.apply(Event::WitnessGone, self.now);
            self.run(effects);
        }
    }

    /// Time passes; the runtime ticks when the link wants that.
    pub fn wait(&mut self, time: Duration) {
        self.now += time;
        for _ in 0..100 {
            match self.link.deadline() {
                Some(deadline) if deadline <= self.now => self.apply(Event::Tick),
                _ => return,
            }
        }
        panic!("a tick does not move the deadline");
    }

    pub fn report(&self) -> LinkReport {
        report::of(&self.link)
    }

    pub fn faults(&self, kind: &str) -> u64 {
        self.report().counters.faults.get(kind).copied().unwrap_or(0)
    }

    pub fn is_up(&self) -> bool {
        self.published.0.status & abi::LINK_S_UP != 0
    }

    pub fn apply(&mut self, event: Event) {
        let effects = self.link.apply(event, self.now);
        self.run(effects);
        // As the runtime does: a page that is gone needs no wait.
        self.look();
    }

    pub fn run(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            self.run_one(&effect);
            self.trace.push(effect);
        }
        assert_eq!(self.is_up(), self.link.is_up());
        if !self.is_up() {
            assert!(self.wires.is_empty(), "wires outlive the link");
        }
    }

    fn run_one(&mut self, effect: &Effect) {
        match effect {
            Effect::Reply(Side::Owner, Reply::Refused(reason)) => {
                self.question = None;
                self.owner_reply = Some(Reply::Refused(reason.clone()));
            }
            Effect::Reply(Side::Owner, reply) => {
                let ask = self.question.take().expect("an answer to no question");
                self.shared.answered(&ask, matches!(reply, Reply::Declined));
                if ask.revokes() {
                    self.check_revoked(&ask);
                }
                if ask.waits_for_wiring() {
                    self.wirer.check_answered();
                }
                self.owner_reply = Some(copy(reply));
            }
            Effect::Reply(Side::Peer, reply) => self.peer_reply = Some(copy(reply)),
            Effect::Disconnect(side) => self.closed(*side),
            Effect::Window(op, change) => self.window(*op, change),
            Effect::WirePeer(id, request) => self.wirer.ask(*id, request.clone()),
            Effect::WatchWitness => self.watching = true,
            Effect::WatchServed(generation) => {
                assert_eq!(*generation, self.published.1, "the page says it before the driver is looked at");
                self.looks_for_served = true;
            }
            Effect::StopWatching => self.watching = false,
            Effect::Publish(contents, generations) => self.publish(contents, *generations),
            Effect::PublishTable(mappings, generation) => {
                let contents = LinkContents { mappings: mappings.clone(), ..self.published.0.clone() };
                let generations = Generations { link: self.published.1, table: *generation };
                self.check_published(&contents, generations);
                self.published.0 = contents;
            }
            Effect::Wire(wires) => self.wires.clone_from(wires),
            Effect::Miss(id, page, access) => {
                assert!(self.miss.is_none(), "a second miss while {:?} is open", self.miss);
                assert!(!self.shared.pushes(), "a front-end that pushes is asked");
                assert!(*access != Access::ReadWrite, "a miss that proves nothing");
                self.miss = Some((*id, *page, *access));
            }
            Effect::Answer(id, status, _) => self.commands.answered(*id, *status),
            Effect::Copy(id, task, pieces, _) => {
                let (iova, len) = self.commands.copied(*id, *task, pieces);
                self.shared.check_copy(*task, iova, len, pieces, &self.files);
            }
            Effect::ResetControlRing => self.commands.reset(),
            Effect::SwapOwners => self.swapped(),
            _ => {}
        }
    }

    fn window(&mut self, op: OpId, change: &WindowOp) {
        let (WindowOp::Map(content) | WindowOp::Unmap(content)) = change;
        let mut witness = None;
        if matches!(change, WindowOp::Map(_)) && kind(content) == Kind::Witness {
            self.next_witness += 1;
            witness = Some(self.next_witness);
            self.witnesses.push_back(self.next_witness);
        }
        if let (WindowOp::Unmap(_), Content::Owner(placement)) = (change, content) {
            let start = placement.range().iova().start().raw();
            let shown = self.published.0.mappings.iter().any(|entry| entry.iova.value() == start);
            assert!(!shown, "{placement:?} is unmapped while the link page still shows it");
            self.check_released(placement);
        }
        if let (WindowOp::Map(_), Content::Owner(placement)) = (change, content) {
            let allowed = self.shared.allows(placement, &self.files, self.wanted_bits(placement));
            assert!(allowed, "{placement:?} is mapped, and the owner does not allow it");
        }
        let lenient = matches!(self.report().window.phase.as_str(), "residue" | "reopening");
        self.vmm.ask(op, change.clone(), witness, lenient);
    }

    /// The access that the owner has to allow for a range to be mapped like this.
    fn wanted_bits(&self, placement: &iommu::Placement<MemoryFile>) -> u8 {
        match (self.one_way, self.strict) {
            (OneWay::Widen, _) => 0,
            (OneWay::Refuse, true) => placement.range().access().bits() as u8,
            (OneWay::Refuse, false) => 3,
        }
    }

    fn publish(&mut self, contents: &LinkContents, generations: Generations) {
        let generation = generations.link;
        assert!(generation > self.published.1 && generation.is_multiple_of(2), "generation {generation}");
        self.check_published(contents, generations);
        self.published = (contents.clone(), generation);
    }

    fn check_published(&mut self, contents: &LinkContents, generations: Generations) {
        let table = generations.table;
        assert!(table > self.table_generation && table.is_multiple_of(2), "table generation {table}");
        self.table_generation = table;
        if contents.status & abi::LINK_S_UP != 0 {
            for entry in &contents.mappings {
                assert!(self.vmm.shows(entry), "{entry:?} is published and not mapped");
            }
            for ring in contents.vrings.iter().filter(|ring| ring.flags.value() != 0) {
                for part in [ring.desc, ring.avail, ring.used] {
                    let inside = |entry: &&abi::Mapping| {
                        (entry.iova.value()..entry.iova.value() + entry.len.value()).contains(&part.value())
                    };
                    let entry = contents.mappings.iter().find(inside);
                    assert!(entry.is_some(), "{ring:?} is in no mapping");
                    assert_eq!(entry.unwrap().access.value(), 3, "{ring:?} cannot be served");
                }
            }
        } else {
            assert!(contents.mappings.is_empty() && contents.vrings.is_empty());
        }
    }

    /// Another VMM has the owner's place; what it has said is not asked here.
    fn swapped(&mut self) {
        assert!(self.question.is_none(), "a VMM that waits for an answer has lost the link");
        self.shared = Shared::default();
        for ask in Ask::bring_up(&REGIONS) {
            self.shared.takes(&ask);
        }
    }

    /// The promise of the whole project: what is answered as revoked is revoked.
    fn check_revoked(&self, ask: &Ask) {
        for range in self.vmm.owner_ranges() {
            assert!(
                self.shared.allows(range, &self.files, self.wanted_bits(range)),
                "{ask:?} was answered while a peer still holds {range:?}"
            );
        }
    }
}

/// Replies hold no descriptor that a test would need.
fn copy(reply: &Reply) -> Reply {
    match reply {
        Reply::Done => Reply::Done,
        Reply::Number(number) => Reply::Number(*number),
        Reply::VringBase(base) => Reply::VringBase(vhost_pci_switch::link::message::VringBase {
            index: base.index,
            place: base.place.clone(),
            format: base.format,
            size: base.size,
            fallback: base.fallback,
            marks: base.marks.clone(),
        }),
        Reply::Config(bytes) => Reply::Config(bytes.clone()),
        Reply::ShmemLen(len) => Reply::ShmemLen(*len),
        Reply::Declined => Reply::Declined,
        Reply::Refused(reason) => Reply::Refused(reason.clone()),
    }
}
