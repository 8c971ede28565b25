//! A link's buffers, lent to a network card: a model of one reads and writes the window where it was let,
//! gives buffers back in any order, fails, and is stopped; the owner's driver sees each packet once and in
//! order, and nothing that the card holds ever leaves its reach.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use allocation_counter::measure;
use guest_driver_model::control::{Exchange, Job, Nobody, Outcome};
use guest_driver_model::link::{Access, LinkPage, Mapping};
use guest_driver_model::net::{HEADER_LEN, OwnerConfig, OwnerLayout, OwnerPort, PacketBurst};
use guest_driver_model::nic::{Lent, Nic, NicError, Pass, PassError, Piece, Round, Way};
use guest_driver_model::port::PortError;
use guest_driver_model::ring::{Completion, RingPlaces};
use guest_driver_model::shm::SharedMemory;
use guest_driver_model::transport::TransportError;
use net_support::{HandRing, INDIRECT, IOVA, LinkWriter, NEXT, TwoViews, frame, link_page};
use vhost_pci_device::abi::{self, FaultKind};

/// Where the card finds the window.
const BUS: u64 = 1 << 32;

/// A buffer that the card has.
struct Held {
    pieces: Vec<Piece>,
    token: u64,
}

/// A card that does nothing by itself.
struct Card {
    window: SharedMemory,
    reached: Vec<Mapping>,
    held: [Vec<Held>; 2],
    back: [Vec<Completion>; 2],
    /// What it sent.
    sent: Vec<Vec<u8>>,
    room: usize,
    fails: bool,
    is_wanted_back: bool,
    starts: usize,
    running: bool,
}

impl Card {
    fn new(window: &SharedMemory) -> Self {
        Self {
            window: window.clone(),
            reached: Vec::new(),
            held: [Vec::new(), Vec::new()],
            back: [Vec::new(), Vec::new()],
            sent: Vec::new(),
            room: 64,
            fails: false,
            is_wanted_back: false,
            starts: 0,
            running: false,
        }
    }

    fn queue(&mut self, way: Way) -> (&mut Vec<Held>, &mut Vec<Completion>) {
        let at = usize::from(way == Way::Send);
        (&mut self.held[at], &mut self.back[at])
    }

    /// The window offset of a piece, which has to be where the card was let.
    fn place(&self, piece: &Piece, access: Access) -> u64 {
        let offset = piece.bus - BUS;
        let inside = |range: &&Mapping| {
            range.window_offset <= offset
                && offset + u64::from(piece.len) <= range.window_offset + range.len
                && range.access.allows(access)
        };
        assert!(self.reached.iter().any(|range| inside(&range)), "a buffer is lent that cannot be reached");
        offset
    }

    /// Sends the packet at a place in its queue.
    fn sends(&mut self, at: usize) {
        let held = self.held[1].remove(at);
        let mut bytes = Vec::new();
        for piece in &held.pieces {
            let mut part = vec![0; piece.len as usize];
            self.window.read(self.place(piece, Access::READ), &mut part).unwrap();
            bytes.extend(part);
        }
        self.sent.push(bytes);
        self.back[1].push(Completion { token: held.token, len: 0 });
    }

    /// Receives a frame into the buffer at a place in its queue.
    fn receives(&mut self, at: usize, frame: &[u8]) {
        let held = self.held[0].remove(at);
        // `num_buffers` is the driver's to write.
        let mut bytes = vec![0; HEADER_LEN];
        bytes.extend(frame);
        let mut rest = &bytes[..];
        for piece in &held.pieces {
            let (now, later) = rest.split_at(rest.len().min(piece.len as usize));
            self.window.write(self.place(piece, Access::WRITE), now).unwrap();
            rest = later;
        }
        assert!(rest.is_empty());
        self.back[0].push(Completion { token: held.token, len: bytes.len() as u32 });
    }
}

impl Nic for Card {
    fn name(&self) -> &str {
        "model"
    }

    fn reach(&mut self, _: &SharedMemory, range: &Mapping) -> Result<(), NicError> {
        self.reached.push(*range);
        Ok(())
    }

    fn forget(&mut self, range: &Mapping) -> Result<(), NicError> {
        self.reached.retain(|other| other != range);
        // What it holds it can reach.
        for piece in self.held.iter().flatten().flat_map(|held| &held.pieces) {
            self.place(piece, Access::NONE);
        }
        Ok(())
    }

    fn bus(&self, window_offset: u64) -> u64 {
        BUS + window_offset
    }

    fn start(&mut self, _: bool) -> Result<(), NicError> {
        assert!(!self.running && self.held.iter().all(Vec::is_empty));
        (self.running, self.fails) = (true, false);
        self.starts += 1;
        Ok(())
    }

    fn is_mergeable(&self) -> bool {
        false
    }

    fn lend(&mut self, way: Way, pieces: &[Piece], token: u64) -> Lent {
        let access = if way == Way::Send { Access::READ } else { Access::WRITE };
        for piece in pieces {
            self.place(piece, access);
        }
        let room = self.room;
        let (held, _) = self.queue(way);
        if held.len() == room {
            return Lent::NoRoom;
        }
        if pieces.len() > 8 {
            return Lent::Never;
        }
        held.push(Held { pieces: pieces.to_vec(), token });
        Lent::Yes
    }

    fn publish(&mut self, _: Way) {}

    fn collect(&mut self, way: Way, into: &mut Vec<Completion>) -> Result<(), NicError> {
        into.append(self.queue(way).1);
        match self.fails && self.running {
            true => Err(NicError::Failed { name: "model".into(), why: "it was told to" }),
            false => Ok(()),
        }
    }

    fn held(&self) -> usize {
        self.held.iter().map(Vec::len).sum()
    }

    fn stop(&mut self) -> Result<(), NicError> {
        self.running = false;
        self.held = [Vec::new(), Vec::new()];
        Ok(())
    }

    fn check(&self) -> Result<(), NicError> {
        match self.is_wanted_back {
            true => Err(TransportError::Gone { device: "model".into(), why: "it was told to" }.into()),
            false => Ok(()),
        }
    }

    fn interrupts(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn set_interrupts(&mut self, _: bool) -> Result<bool, NicError> {
        Ok(false)
    }
}

/// An owner, its link page, and a card behind it.
struct Bed {
    views: TwoViews,
    layout: OwnerLayout,
    owner: OwnerPort,
    writer: LinkWriter,
    page: LinkPage,
    card: Card,
    pass: Pass,
    received: PacketBurst,
}

impl Bed {
    fn new(config: OwnerConfig) -> Self {
        Self::with_status(config, 0)
    }

    /// Of a link with more in its status than that it is up.
    fn with_status(config: OwnerConfig, status: u32) -> Self {
        let len = OwnerLayout::new(config, 0, u64::MAX >> 8).unwrap().end();
        // Twice the memory: the second half is mapped, and nobody's.
        let views = TwoViews::new(2 * len);
        let layout = OwnerLayout::new(config, 0, len).unwrap();
        let owner = OwnerPort::new(&views.owner, &layout, IOVA).unwrap();
        let halves = [0, len].map(|at| Mapping {
            iova: IOVA + at,
            len,
            window_offset: abi::DATA_OFFSET + at,
            access: Access::READ_WRITE,
        });
        let mut writer = LinkWriter::new(config.features(), halves.to_vec(), layout.infos(IOVA));
        writer.status |= status;
        writer.write(&views.window);
        let page = link_page(&views.window);
        let mut card = Card::new(&views.window);
        let pass = Pass::start(&views.window.counted(), &page, &page.snapshot().unwrap(), &mut card).unwrap();
        let received = PacketBurst::with_capacity(64, 2048);
        Self { views, layout, owner, writer, page, card, pass, received }
    }

    /// Of an owner that has sent so many frames; the card has them.
    fn with_sent(config: OwnerConfig, count: u64) -> (Self, Vec<Vec<u8>>) {
        let mut bed = Self::new(config);
        let sent = frames(count);
        assert_eq!(bed.owner.tx_burst(0, sent.iter().map(Vec::as_slice)), Ok(sent.len()));
        bed.round();
        (bed, sent)
    }

    /// The card sends all that it has, and the owner has it back. Whether that is all.
    fn sends_all(&mut self) -> bool {
        while !self.card.held[1].is_empty() {
            self.card.sends(0);
        }
        self.round();
        self.owner.reap_transmitted(0) == Ok(0)
    }

    fn round(&mut self) -> Round {
        self.round_by(&mut Nobody)
    }

    fn round_by(&mut self, exchange: &mut dyn Exchange) -> Round {
        self.pass.round(&mut self.card, exchange).unwrap()
    }

    /// All of the owner's memory in three mappings: the page in which the card's buffer to receive into at a
    /// place in its queue starts, with what is before and behind it.
    fn apart(&self, buffer: usize) -> [Mapping; 3] {
        let start = self.card.held[0][buffer].pieces[0].bus - BUS - abi::DATA_OFFSET;
        let at = start / abi::PAGE_SIZE * abi::PAGE_SIZE;
        let end = self.views.owner.len();
        let part = |range: std::ops::Range<u64>| Mapping {
            iova: IOVA + range.start,
            len: range.end - range.start,
            window_offset: abi::DATA_OFFSET + range.start,
            access: Access::READ_WRITE,
        };
        let behind = at + abi::PAGE_SIZE;
        [part(0..at), part(at..behind), part(behind..end)]
    }

    /// The device shows these mappings from now on.
    fn shows(&mut self, mappings: Vec<Mapping>) {
        self.writer.mappings = mappings;
        self.writer.table_generation += 2;
        self.writer.write(&self.views.window);
    }

    fn receive(&mut self) -> Vec<Vec<u8>> {
        self.received.clear();
        self.owner.rx_burst(0, &mut self.received, 64).unwrap();
        self.received.frames().map(<[u8]>::to_vec).collect()
    }
}

/// A device that does not do yet what it is asked for.
#[derive(Default)]
struct Later {
    asked: usize,
    /// The generation of the table that is gone by.
    followed: Option<u64>,
    /// It may not be asked.
    is_deaf: bool,
}

impl Exchange for Later {
    fn clear(&mut self) {}

    fn reserve(&mut self, _: u32) -> Option<u64> {
        Some(0)
    }

    fn carry_out(&mut self, jobs: &mut [Job]) {
        assert!(!self.is_deaf, "the device was asked for {jobs:?} before it was told of the release");
        self.asked += jobs.len();
        jobs.iter_mut().for_each(|job| job.outcome = Outcome::Later);
    }

    fn follow(&mut self, table_generation: u64) {
        self.followed = Some(table_generation);
    }
}

fn kinds() -> impl Iterator<Item = OwnerConfig> {
    [(false, false), (true, false), (false, true)].into_iter().map(|(indirect, packed)| OwnerConfig {
        ring_size: 64,
        indirect,
        packed,
        ..OwnerConfig::default()
    })
}

fn frames(count: u64) -> Vec<Vec<u8>> {
    (0..count).map(|seed| frame(seed, 60 + 37 * seed as usize)).collect()
}

#[test]
fn what_the_card_gives_back_in_any_order_the_owner_gets_in_its_own() {
    for config in kinds() {
        let copied = SharedMemory::counted_bytes();
        let (mut bed, sent) = Bed::with_sent(config, 20);
        assert_eq!(bed.card.held[1].len(), 20);
        // The last one first: nothing is complete before the first.
        for at in (1..20).rev() {
            bed.card.sends(at);
        }
        bed.round();
        assert_eq!((bed.owner.reap_transmitted(0), bed.pass.counts().tx_packets), (Ok(20), 0));
        bed.card.sends(0);
        bed.round();
        assert_eq!((bed.owner.reap_transmitted(0), bed.pass.counts().tx_packets), (Ok(0), 20));
        let mut seen = bed.card.sent.clone();
        seen.sort();
        let mut expected = sent.clone();
        expected.sort();
        assert_eq!(seen, expected, "a frame without its header, each byte");

        for (at, frame) in sent.iter().enumerate().rev() {
            bed.card.receives(at, frame);
        }
        bed.round();
        assert_eq!(bed.receive(), sent);
        assert_eq!(bed.pass.counts().rx_packets, 20);
        let bytes: usize = sent.iter().map(Vec::len).sum();
        assert_eq!(bed.pass.counts().rx_bytes, bytes as u64);
        // What the card copies is not counted: its window is another one.
        assert_eq!(SharedMemory::counted_bytes(), copied);
    }
}

#[test]
fn a_range_that_nobody_uses_goes_without_stopping_the_card() {
    for config in kinds() {
        let (mut bed, _) = Bed::with_sent(config, 3);
        let kept = bed.writer.mappings[0];
        bed.shows(vec![kept]);
        let round = bed.round();
        assert_eq!((round.release, bed.card.reached.clone()), (Some(4), vec![kept]));
        assert_eq!((bed.card.starts, bed.card.held[1].len(), bed.pass.counts().quiesced), (1, 3, 0));
        // And what comes is reached.
        let halves =
            [kept, Mapping { iova: IOVA + kept.len, window_offset: abi::DATA_OFFSET + kept.len, ..kept }];
        bed.shows(halves.to_vec());
        bed.round();
        assert_eq!((bed.card.reached.len(), bed.card.starts), (2, 1));
    }
}

#[test]
fn a_range_that_the_card_uses_goes_when_it_has_stopped_and_the_rest_is_lent_anew() {
    for config in kinds() {
        let (mut bed, sent) = Bed::with_sent(config, 10);
        // Done before, but not collected.
        bed.card.sends(0);
        let whole = bed.writer.mappings[0];
        // The same memory in another piece: all of it goes and comes.
        bed.shows(vec![Mapping { len: 2 * whole.len, ..whole }]);
        let round = bed.round();
        assert_eq!(round.release, Some(4));
        let counts = bed.pass.counts();
        assert_eq!((bed.card.starts, counts.quiesced, counts.tx_packets), (2, 1, 1));
        assert!(counts.given_back >= 9);
        bed.round();
        assert!(bed.sends_all());
        assert_eq!(bed.card.sent, sent, "each once, in order");
    }
}

#[test]
fn the_card_stops_for_a_range_that_is_just_a_buffer_and_for_none_beside_it() {
    for (lost, stops) in [(0, 0), (1, 1), (2, 1)] {
        let mut bed = Bed::new(OwnerConfig { ring_size: 64, buffer_len: 4096, ..OwnerConfig::default() });
        bed.round();
        let mut parts = bed.apart(0).to_vec();
        bed.shows(parts.clone());
        bed.round();
        bed.round();
        let before = bed.pass.counts().quiesced;
        parts.remove(lost);
        bed.shows(parts);
        assert_eq!(bed.round().release, Some(6));
        assert_eq!(bed.pass.counts().quiesced - before, stops, "without range {lost}");
    }
}

/// The device maps nothing before it was told, so nobody may wait for that.
#[test]
fn the_device_is_told_of_a_release_before_it_is_asked_for_anything() {
    let statuses = [abi::LINK_S_IOMMU, abi::LINK_S_IOMMU | abi::LINK_S_COPY];
    for (config, status) in kinds().flat_map(|config| statuses.map(|status| (config, status))) {
        let mut bed = Bed::with_status(config, status);
        bed.round();
        let [before, _, behind] = bed.apart(0);
        bed.shows(vec![before, behind]);
        let mut device = Later { is_deaf: true, ..Later::default() };
        let round = bed.round_by(&mut device);
        assert_eq!((round.release, round.moved > 0), (Some(4), true), "and nobody sleeps now");
        device.is_deaf = false;
        let round = bed.round_by(&mut device);
        assert_eq!((round.release, device.asked > 0), (None, true));
        assert_eq!(device.followed, Some(4), "nor waits for what a later table needs");
        assert!(bed.card.held[0].is_empty(), "each in its turn");
    }
}

#[test]
fn a_card_that_fails_is_started_again_and_what_it_had_is_lent_anew() {
    for config in kinds() {
        let (mut bed, sent) = Bed::with_sent(config, 10);
        bed.card.sends(0);
        bed.card.fails = true;
        bed.round();
        assert_eq!((bed.card.starts, bed.pass.counts().nic_resets), (2, 1));
        assert!(bed.sends_all());
        assert_eq!(bed.card.sent, sent);
    }
}

#[test]
fn a_card_that_is_full_gets_the_rest_later() {
    for config in kinds() {
        let mut bed = Bed::new(config);
        bed.card.room = 4;
        let sent = frames(20);
        assert_eq!(bed.owner.tx_burst(0, sent.iter().map(Vec::as_slice)), Ok(20));
        while bed.pass.counts().tx_packets < 20 {
            bed.round();
            assert!(bed.card.held[1].len() <= 4);
            if !bed.card.held[1].is_empty() {
                bed.card.sends(0);
            }
        }
        assert_eq!(bed.card.sent, sent);
    }
}

#[test]
fn of_a_link_that_is_another_one_nothing_is_completed_and_nothing_stays_reached() {
    for config in kinds() {
        let (mut bed, _) = Bed::with_sent(config, 5);
        bed.card.sends(0);
        bed.writer.generation += 2;
        bed.shows(Vec::new());
        let round = bed.round();
        assert_eq!((round.moved, round.release), (0, None));
        assert_eq!(bed.owner.reap_transmitted(0), Ok(5));
        bed.pass.end(&mut bed.card).unwrap();
        assert!(bed.card.reached.is_empty() && !bed.card.running);
        assert_eq!(bed.pass.lent(), [0, 0]);
    }
}

#[test]
fn an_owner_that_a_card_cannot_serve_is_refused_and_nothing_is_reached() {
    let bed = Bed::new(OwnerConfig::default());
    let start = |change: &dyn Fn(&mut LinkWriter)| {
        let mut writer = bed.writer.clone();
        change(&mut writer);
        writer.write(&bed.views.window);
        let mut card = Card::new(&bed.views.window);
        let error = Pass::start(&bed.views.window, &bed.page, &bed.page.snapshot().unwrap(), &mut card).err();
        assert!(card.reached.is_empty() && !card.running);
        error.unwrap()
    };
    let disk = start(&|writer| writer.owner_device = 2);
    assert!(matches!(disk, PassError::Port(PortError::OtherKind { device: 2, .. })), "{disk}");
    assert!(matches!(start(&|writer| writer.features |= 1), PassError::Features { features: 1 }));
    assert!(matches!(start(&|writer| writer.vrings.truncate(1)), PassError::Queues));
    assert!(matches!(start(&|writer| writer.vrings[1].enabled = false), PassError::Queues));
    assert!(matches!(start(&|writer| writer.vrings[0].size = 3), PassError::Vring(_)));
    assert!(matches!(start(&set_log), PassError::Logged));
}

/// The owner's VMM wants to know of each page that is written.
fn set_log(writer: &mut LinkWriter) {
    writer.status |= abi::LINK_S_LOG;
    writer.log = (abi::LOG_OFFSET, abi::MAX_LOW_LOG, 77);
}

#[test]
fn an_owner_that_is_migrated_from_now_on_gets_its_buffers_back() {
    for config in kinds() {
        let (mut bed, _) = Bed::with_sent(config, 5);
        set_log(&mut bed.writer);
        let same = bed.writer.mappings.clone();
        bed.shows(same);
        assert!(matches!(bed.pass.round(&mut bed.card, &mut Nobody), Err(PassError::Logged)));
        bed.pass.end(&mut bed.card).unwrap();
        assert!(bed.card.reached.is_empty() && bed.card.held.iter().all(Vec::is_empty));
        assert_eq!(bed.pass.lent(), [0, 0]);
    }
}

/// The device is told of one whose buffers the card had had all before, though one before it is still out.
#[test]
fn what_the_card_wrote_into_is_written_to_no_more_when_it_has_left_the_window() {
    for config in kinds() {
        let mut bed = Bed::new(config);
        bed.round();
        let last = bed.card.held[0].len() - 1;
        let [before, page, behind] = bed.apart(last);
        bed.shows(vec![before, page, behind]);
        bed.round();
        bed.round();
        let received: Vec<_> = (0..=last as u64).map(|seed| frame(seed, 300)).collect();
        for at in (1..=last).rev() {
            bed.card.receives(at, &received[at]);
        }
        bed.round();
        assert_eq!((bed.pass.counts().rx_packets, bed.pass.lent()[0]), (0, last + 1));
        // Its place in the window is another range's from now on.
        bed.shows(vec![before, behind, Mapping { iova: behind.iova + behind.len, ..page }]);
        assert_eq!((bed.round().release, bed.card.starts), (Some(6), 2), "the card has nothing there");
        let content = |bed: &Bed| {
            let mut bytes = vec![0; abi::PAGE_SIZE as usize];
            bed.views.window.read(page.window_offset, &mut bytes).unwrap();
            bytes
        };
        let there = content(&bed);
        bed.card.receives(0, &received[0]);
        bed.round();
        assert_eq!(bed.pass.counts().rx_packets, last as u64 + 1);
        assert!(content(&bed) == there, "something was written to a range that nobody was lent");
        assert_eq!(bed.receive(), received);
    }
}

#[test]
fn what_waits_for_the_device_to_be_asked_again_is_no_work() {
    let mut bed =
        Bed::with_status(OwnerConfig { ring_size: 64, ..OwnerConfig::default() }, abi::LINK_S_IOMMU);
    bed.round();
    let [before, _, behind] = bed.apart(0);
    bed.shows(vec![before, behind]);
    bed.round();
    let mut device = Later::default();
    // It is asked after 0, 1, 3, 7 ... 127 ms.
    let (start, mut rounds) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_millis(100) {
        assert_eq!(bed.round_by(&mut device).moved, 0);
        rounds += 1;
        if !bed.pass.set_notified(&mut bed.card, true).unwrap() {
            std::thread::sleep(bed.pass.pause().unwrap_or_default());
        }
    }
    // One that is slow makes fewer.
    assert!((1..=20).contains(&rounds), "{rounds} rounds");
}

#[test]
fn each_of_two_vrings_that_are_broken_at_once_is_told_of_and_once() {
    let mut bed = Bed::new(OwnerConfig { ring_size: 64, ..OwnerConfig::default() });
    bed.round();
    for vring in bed.layout.vrings() {
        bed.views.owner.store_u16_release(vring.places.avail + 2, 10_000).unwrap();
    }
    let faults = bed.round().faults.map(|fault| fault.map(|fault| (fault.vring, fault.kind)));
    assert_eq!(faults, [0, 1].map(|vring| Some((vring, FaultKind::AvailJump))));
    assert_eq!(bed.round().faults, [None, None]);
}

#[test]
fn what_the_card_can_never_take_goes_back_in_its_turn_and_counts_as_dropped_alone() {
    // The longest one is in more pieces than it takes.
    let mut bed = Bed::new(OwnerConfig { ring_size: 64, buffer_len: 256, ..OwnerConfig::default() });
    let sent = [frame(1, 100), frame(2, 3000), frame(3, 200)];
    assert_eq!(bed.owner.tx_burst(0, sent.iter().map(Vec::as_slice)), Ok(3));
    bed.round();
    assert_eq!((bed.card.held[1].len(), bed.pass.lent()[1]), (2, 3));
    assert!(bed.sends_all());
    assert_eq!(bed.card.sent, [sent[0].clone(), sent[2].clone()]);
    let counts = bed.pass.counts();
    assert_eq!((counts.tx_packets, counts.tx_bytes, counts.dropped), (2, 300, 1));
}

#[test]
fn a_card_that_the_system_wants_back_is_not_started_again() {
    let (mut bed, _) = Bed::with_sent(OwnerConfig::default(), 5);
    assert!(bed.pass.check(&mut bed.card).is_ok());
    bed.card.is_wanted_back = true;
    let error = bed.pass.check(&mut bed.card);
    assert!(matches!(error, Err(PassError::Nic(NicError::Transport(TransportError::Gone { .. })))));
    assert_eq!((bed.card.starts, bed.pass.counts().nic_resets), (1, 0));
}

#[test]
fn a_change_of_the_table_is_read_once() {
    let mut bed = Bed::with_status(OwnerConfig::default(), abi::LINK_S_IOMMU);
    bed.round();
    let kept = bed.writer.mappings[0];
    for change in 1..=3 {
        bed.shows(vec![kept]);
        bed.round();
        bed.round();
        assert_eq!(bed.pass.demand().table_reads, change);
    }
    let counts = bed.pass.counts();
    assert_eq!((counts.reached, counts.forgotten), (2, 1), "what is in both tables stays reached");
}

/// An owner that posts one buffer which the card keeps, and then as many as its ring has room for which no card
/// takes, each in as many pieces as there can be.
#[test]
fn what_no_card_takes_costs_no_memory() {
    const ENTRIES: u16 = 2048;
    const PIECES: u16 = 1000;
    let ring = HandRing::new(ENTRIES);
    // Behind the ring that it transmits by.
    let (receive, end) = RingPlaces::at(64 << 10, 16);
    let (table, buffer) = (end.next_multiple_of(4096), 1 << 20);
    for piece in 0..PIECES {
        let flags = if piece + 1 < PIECES { NEXT } else { 0 };
        ring.descriptor_at(table + 16 * u64::from(piece), IOVA + buffer, 60, flags, piece + 1);
    }
    ring.descriptor(0, buffer, 60, 0, 0);
    ring.avail_slot(0, 0);
    for slot in 1..ENTRIES {
        ring.descriptor(slot, table, 16 * u32::from(PIECES), INDIRECT, 0);
        ring.avail_slot(slot, slot);
    }
    ring.avail_index(ENTRIES);
    let config = OwnerConfig { indirect: true, ..OwnerConfig::default() };
    let infos = vec![receive.info(IOVA), ring.places.info(IOVA)];
    LinkWriter::new(config.features(), ring.mappings.clone(), infos).write(&ring.views.window);
    let page = link_page(&ring.views.window);
    let mut card = Card::new(&ring.views.window);
    let mut pass = Pass::start(&ring.views.window, &page, &page.snapshot().unwrap(), &mut card).unwrap();
    let mut posted = 0;
    let allocated = measure(|| {
        while posted < usize::from(ENTRIES) {
            posted += pass.round(&mut card, &mut Nobody).unwrap().moved;
        }
    });
    assert_eq!((card.held[1].len(), pass.lent()[1]), (1, usize::from(ENTRIES)));
    // A burst of such chains is kept as a whole. Lists of all their pieces would be 31 MiB.
    assert!(allocated.bytes_current < 8 << 20, "{allocated:?}");
    card.sends(0);
    pass.round(&mut card, &mut Nobody).unwrap();
    assert_eq!((pass.counts().dropped, ring.used_index()), (u64::from(ENTRIES) - 1, ENTRIES));
}
