//! The peer's driver against an owner, and a device, that write what they like: link page, mapping
//! table, rings, descriptors and headers, between its calls and, by another thread, during them.
//! Packets are received, lent, transmitted, forwarded and copied; or the owner has a disk, and its requests
//! are served. Nothing is written but what a mapping lets the peer write, and the owner's dirty log; no packet
//! is longer than one can be, and a disk is not reached beyond its end.
#![no_main]

#[path = "guest_port/device.rs"]
mod device;
#[path = "guest_port/disk.rs"]
mod disk;

use std::cell::RefCell;
use std::mem::offset_of;
use std::ops::Range;
use std::time::Duration;

use guest_driver_model::blk::BlkPort;
use guest_driver_model::control::{Command, ControlExchange, ControlRing, Exchange, Nobody};
use guest_driver_model::link::{Access, LinkPage, Mapping};
use guest_driver_model::net::forward::End;
use guest_driver_model::net::{
    Lane, LentBurst, MAX_FRAME, PacketBurst, PeerPort, Pick, copy_lent, forward_burst, forward_burst_by,
    send_copies,
};
use guest_driver_model::port::Port;
use guest_driver_model::ring::RingPlaces;
use guest_driver_model::transport::check_config;
use libfuzzer_sys::fuzz_target;
use vhost_pci_device::abi::{self, DeviceConfig};
use vhost_pci_fuzz::input::Input;
use vhost_pci_fuzz::memory::Guarded;
use vhost_pci_fuzz::packets::{Spec, any_packet, packets, tcp};
use vhost_pci_fuzz::ring_writer::Writer;
use vhost_pci_fuzz::scribbler::{Scribbling, scribble, words};
use zerocopy::IntoBytes;

use crate::device::{Fake, Fuzzed, Stores, store};
use crate::disk::{CAPACITY, Disk};

/// The window: link area, control area, the owner's memory. Shorter than a real one.
const LINK: u64 = 0;
const LINK_LEN: u64 = 12 << 10;
const CONTROL: u64 = LINK + LINK_LEN;
const CONTROL_LEN: u64 = 20 << 10;
const DATA: u64 = CONTROL + CONTROL_LEN;
const DATA_LEN: u64 = 96 << 10;
const LEN: u64 = DATA + DATA_LEN;
const PAGE: u64 = 4096;
/// Where the owner's memory starts, as its driver names it.
const IOVA: u64 = 0x40_0000_0000;
/// Vrings: two pairs.
const VRINGS: usize = 4;
/// Entries of each.
const SIZES: [u16; VRINGS] = [16, 16, 8, 64];
/// Behind the rings.
const BUFFERS: u64 = DATA + (32 << 10);
/// Indirect tables.
const TABLES: u64 = DATA + (28 << 10);
/// VIRTIO_F_VERSION_1, and what else a port serves.
const VERSION_1: u64 = 1 << 32;
const FEATURES: [u64; 12] = [0, 1, 7, 8, 9, 11, 12, 13, 15, 28, 29, 34];
/// The same of a disk: SIZE_MAX, SEG_MAX, RO, BLK_SIZE, FLUSH, MQ.
const DISK_FEATURES: [u64; 12] = [1, 2, 5, 6, 9, 12, 9, 9, 12, 28, 29, 34];
/// Where the owner's dirty log is: in memory that it may have mapped as well.
const LOG: u64 = DATA + DATA_LEN - PAGE;
/// The device types of virtio 1.3, 5: a card, a disk.
const NET: u32 = 1;
const BLOCK: u32 = 2;
/// Where the mapping table's generation is.
const TABLE_GENERATION: u64 = LINK + offset_of!(abi::LinkHeader, table_generation) as u64;
const STEPS: usize = 200;
/// More than any burst brings: what is received, and what was left over of the burst before.
const MOST: usize = 300;

thread_local! {
    static WINDOW: RefCell<Guarded> = RefCell::new(Guarded::new(LEN as usize));
}

fuzz_target!(|bytes: &[u8]| {
    WINDOW.with_borrow_mut(|window| {
        window.clear();
        let mut input = Input::new(bytes);
        Hostile::new(&mut input, window).play(&mut input);
    });
});

/// A mapping as the page has it: pages from `IOVA` on, how many, where in the window, access.
type Entry = (u64, u64, u64, u32);

struct Hostile<'a> {
    window: &'a mut Guarded,
    config: DeviceConfig,
    features: u64,
    status: u32,
    device: u32,
    entries: Vec<Entry>,
    generation: u64,
    /// Of the mapping table: changes without the link's.
    table_generation: u64,
    /// Chains that were offered in each vring as a driver does.
    offered: [u16; VRINGS],
    writers: Vec<Writer>,
    /// What the driver may have written.
    writable: Vec<Range<u64>>,
    raced: bool,
}

impl<'a> Hostile<'a> {
    fn new(input: &mut Input<'_>, window: &'a mut Guarded) -> Self {
        let choice = input.byte();
        let mut features = VERSION_1;
        let bits = input.word();
        let device = if choice & 8 == 0 { NET } else { BLOCK };
        let known = if device == NET { &FEATURES } else { &DISK_FEATURES };
        known.iter().enumerate().for_each(|(at, bit)| features |= u64::from(bits >> at & 1) << bit);
        if bits & 0xf000 == 0xf000 {
            features |= 1 << 35;
        }
        let mut config = DeviceConfig {
            magic: abi::CONFIG_MAGIC.into(),
            version: abi::ABI_VERSION.into(),
            max_vrings: (VRINGS as u16).into(),
            window_len: LEN.into(),
            link_offset: LINK.into(),
            link_len: LINK_LEN.into(),
            control_offset: CONTROL.into(),
            control_len: CONTROL_LEN.into(),
            data_offset: DATA.into(),
            max_mappings: abi::MAX_MAPPINGS.into(),
            ..DeviceConfig::default()
        };
        if choice & 0xe0 == 0xe0 {
            config.max_vrings = input.word().into();
            config.window_len = input.field(LEN).into();
            config.link_offset = input.field(0).into();
            config.link_len = input.field(LINK_LEN).into();
            config.control_offset = input.field(CONTROL).into();
            config.control_len = input.field(0).into();
            config.data_offset = input.field(DATA).into();
        }
        let status = abi::LINK_S_OWNER
            | abi::LINK_S_UP
            | if choice & 1 == 0 { 0 } else { abi::LINK_S_IOMMU }
            | if choice & 2 == 0 { 0 } else { abi::LINK_S_COPY }
            | if choice & 4 == 0 { 0 } else { abi::LINK_S_LOG };
        if choice & 1 != 0 {
            features |= 1 << 33;
        }
        let mut at = DATA;
        let writers = SIZES.map(|size| {
            let (places, end) = RingPlaces::at(at, size);
            at = end.next_multiple_of(PAGE);
            Writer {
                places,
                base: IOVA.wrapping_sub(DATA),
                tables: TABLES,
                buffers: BUFFERS,
                is_packed: features & 1 << 34 != 0,
            }
        });
        let mut hostile = Self {
            window,
            config,
            features,
            status,
            device,
            entries: vec![(0, DATA_LEN / PAGE, 0, 3)],
            generation: 2,
            table_generation: 2,
            offered: [0; VRINGS],
            writers: writers.to_vec(),
            writable: Vec::new(),
            raced: false,
        };
        if choice & 0x10 != 0 {
            hostile.fresh_entries(input);
        }
        hostile
    }

    fn fresh_entries(&mut self, input: &mut Input<'_>) {
        let mut next = 0;
        self.entries.clear();
        for _ in 0..=input.below(8) {
            let choice = input.byte();
            let start = next + u64::from(choice & 3);
            let len = 1 + u64::from(choice >> 2 & 15);
            let place = if choice & 0x40 == 0 { start } else { input.below(24) };
            let access = if choice & 0x80 == 0 { 3 } else { u32::from(input.byte()) };
            self.entries.push((start, len, place, access));
            next = start + len;
        }
    }

    /// Writes the link page, as a device would, or nearly.
    fn publish(&mut self, input: &mut Input<'_>) {
        let wrong = input.byte();
        self.generation += if wrong & 0x80 == 0 { 2 } else { u64::from(input.byte()) };
        self.table_generation = self.generation.max(self.table_generation + 2);
        let header = abi::LinkHeader {
            magic: abi::LINK_MAGIC.into(),
            version: abi::ABI_VERSION.into(),
            header_len: (size_of::<abi::LinkHeader>() as u16).into(),
            generation: self.generation.into(),
            status: self.status.into(),
            owner_device: self.device.into(),
            features: self.features.into(),
            mapping_count: (self.entries.len() as u32).into(),
            mapping_table: abi::MAPPING_TABLE.into(),
            vring_count: (VRINGS as u32).into(),
            vring_table: abi::VRING_TABLE.into(),
            table_generation: self.table_generation.into(),
            config_len: 8.into(),
            config: abi::OWNER_CONFIG.into(),
            log: if self.logs() { LOG } else { 0 }.into(),
            log_len: if self.logs() { PAGE } else { 0 }.into(),
            ..Default::default()
        };
        self.window.put(LINK + u64::from(abi::OWNER_CONFIG), &(CAPACITY / 512).to_le_bytes());
        for (at, bytes) in self.table() {
            self.window.put(at, &bytes);
        }
        for (at, writer) in self.writers.iter().enumerate() {
            let info = writer.places.info(writer.base);
            let vring = abi::Vring {
                flags: abi::VRING_F_ENABLED.into(),
                size: info.size.into(),
                desc: info.desc.into(),
                avail: info.avail.into(),
                used: info.used.into(),
                ..Default::default()
            };
            self.window.put(LINK + u64::from(abi::VRING_TABLE) + 64 * at as u64, vring.as_bytes());
        }
        self.window.put(LINK, header.as_bytes());
        // Then anything, anywhere in the page's header and tables.
        for _ in 0..wrong & 3 {
            let table = input.pick(&[0, u64::from(abi::VRING_TABLE), u64::from(abi::MAPPING_TABLE)]);
            let at = LINK + table + u64::from(input.byte());
            let value = input.field(0).to_le_bytes();
            self.window.put(at, &value[..1 << (wrong >> 2 & 3)]);
        }
    }

    fn logs(&self) -> bool {
        self.status & abi::LINK_S_LOG != 0
    }

    /// The mapping table's bytes, and where they go.
    fn table(&self) -> Stores {
        let entries = self.entries.iter().enumerate().map(|(at, (start, len, place, access))| {
            let mapping = abi::Mapping {
                iova: (IOVA + start * PAGE).into(),
                len: (len * PAGE).into(),
                window_offset: (DATA + place * PAGE).into(),
                access: (*access).into(),
                log_page: (*start as u32).into(),
            };
            (LINK + u64::from(abi::MAPPING_TABLE) + 32 * at as u64, mapping.as_bytes().to_vec())
        });
        entries.collect()
    }

    /// Another mapping table of the same link, as a device publishes it: the stores in their order.
    fn fresh_table(&mut self, input: &mut Input<'_>) -> Stores {
        if input.coin() {
            self.fresh_entries(input);
        }
        self.table_generation += 2 * (1 + input.below(2));
        let mut stores = self.table();
        let count = (self.entries.len() as u32).to_le_bytes().to_vec();
        stores.push((LINK + offset_of!(abi::LinkHeader, mapping_count) as u64, count));
        stores.push((TABLE_GENERATION, self.table_generation.to_le_bytes().to_vec()));
        stores
    }

    /// A chain of one buffer as an honest driver makes it available: room, or a packet with a header.
    fn offer(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        let vring = usize::from(choice & 3);
        let writer = self.writers[vring];
        let size = writer.places.size;
        let slot = self.offered[vring] % size;
        let place = BUFFERS + PAGE * input.below(16);
        let mut len = [60, 76, 1526, PAGE, 9012, 30_000, 12, 0][usize::from(choice >> 2 & 7)];
        // The owner transmits by the odd ones.
        let is_room = vring & 1 == 0;
        if !is_room {
            let Spec { header, frame } = if choice & 0x20 == 0 { tcp(input) } else { any_packet(input) };
            len = (12 + frame.len() as u64).min(BUFFERS + DATA_LEN - place);
            self.window.put(place, &header.to_bytes());
            self.window.put(place + 12, &frame[..frame.len().min(8 << 10)]);
        }
        let address = place.wrapping_add(writer.base).to_le_bytes();
        let flags = u16::from(is_room) << 1;
        let head = [&address[..], &(len as u32).to_le_bytes()].concat();
        let at = writer.places.desc + 16 * u64::from(slot);
        let round = self.offered[vring] / size;
        self.offered[vring] = self.offered[vring].wrapping_add(1);
        if writer.is_packed {
            let flags = flags | if round & 1 == 0 { 1 << 7 } else { 1 << 15 };
            self.window.put(at, &[&head[..], &slot.to_le_bytes(), &flags.to_le_bytes()].concat());
            return;
        }
        self.window.put(at, &[&head[..], &flags.to_le_bytes(), &[0; 2]].concat());
        self.window.put(writer.places.avail + 4 + 2 * u64::from(slot), &slot.to_le_bytes());
        self.window.put(writer.places.avail + 2, &self.offered[vring].to_le_bytes());
    }

    /// A request of a disk's driver: header, data and status, each a descriptor.
    fn ask(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        let vring = usize::from(choice & 3);
        let writer = self.writers[vring];
        let size = writer.places.size;
        // Read, write, flush, name; and what there is not.
        let kind = [0_u32, 1, 0, 1, 4, 8, 2, 99][usize::from(choice >> 2 & 7)];
        let len = if choice & 0x20 == 0 { 512 * (1 + input.below(4)) } else { input.below(9000) };
        let place = BUFFERS + PAGE * input.below(12);
        let sector = input.below(CAPACITY / 512 + 2);
        self.window.put(place, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
        let (next, write) = (1_u16, 2_u16);
        let room = if kind == 0 || kind == 8 { write } else { 0 };
        let parts = [(place, 16, next), (place + 64, len, next | room), (place + 64 + len, 1, write)];
        let first = if writer.is_packed { self.offered[vring] } else { self.offered[vring].wrapping_mul(3) };
        for (number, (place, len, flags)) in (0..).zip(parts) {
            let position = first.wrapping_add(number);
            let at = writer.places.desc + 16 * u64::from(position % size);
            let address = place.wrapping_add(writer.base).to_le_bytes();
            let head = [&address[..], &(len as u32).to_le_bytes()].concat();
            let wrap = if position / size & 1 == 0 { 1 << 7 } else { 1 << 15 };
            let (third, fourth) = match writer.is_packed {
                true => (first % size, flags | wrap),
                false => (flags, position.wrapping_add(1) % size),
            };
            self.window.put(at, &[&head[..], &third.to_le_bytes(), &fourth.to_le_bytes()].concat());
        }
        let chains = self.offered[vring];
        self.offered[vring] = chains.wrapping_add(if writer.is_packed { 3 } else { 1 });
        if !writer.is_packed {
            let entry = writer.places.avail + 4 + 2 * u64::from(chains % size);
            self.window.put(entry, &(first % size).to_le_bytes());
            self.window.put(writer.places.avail + 2, &self.offered[vring].to_le_bytes());
        }
    }

    /// Anything may be written where a mapping of the snapshot allows it.
    fn note(&mut self, mappings: &[Mapping]) {
        for mapping in mappings {
            assert!(mapping.window_offset >= self.config.data_offset.value() && mapping.len > 0);
            assert!(mapping.window_offset.checked_add(mapping.len).is_some_and(|end| end <= LEN));
            if mapping.access.allows(Access::WRITE) {
                self.writable.push(mapping.window_offset..mapping.window_offset + mapping.len);
            }
        }
    }

    fn play(&mut self, input: &mut Input<'_>) {
        if check_config(&self.config, LEN).is_err() {
            // A driver goes no further; a page over a config space like that does not panic either.
            drop(LinkPage::new(self.window.memory(), &self.config).map(|page| page.snapshot()));
            return;
        }
        let control = self.config.control_offset.value();
        self.writable.push(control..control + self.config.control_len.value());
        // The fuzzer's own device has room there.
        self.writable.push(CONTROL..CONTROL + CONTROL_LEN);
        self.publish(input);
        for _ in 0..input.below(48) {
            self.write(input);
        }
        let transport = Fake { config: self.config, window: self.window.memory().clone() };
        let Ok(page) = LinkPage::new(self.window.memory(), &self.config) else { return };
        let mut driver = Driver::new(&transport);
        for _ in 0..3 {
            let Ok(snapshot) = page.snapshot() else { return self.check() };
            self.note(&snapshot.mappings);
            if let Some(log) = &snapshot.log {
                assert!(log.offset.checked_add(log.len).is_some_and(|end| end <= LEN));
                self.writable.push(log.offset..log.offset + log.len);
            }
            if self.device == BLOCK {
                let port = BlkPort::open(self.window.memory(), &page, &snapshot);
                let Ok(port) = port else { return self.check() };
                driver.disk = Some((port, Disk::default()));
            } else {
                let port = PeerPort::new(self.window.memory(), &page, &snapshot);
                let Ok(port) = port else { return self.check() };
                driver.port = Some(port);
            }
            for _ in 0..STEPS {
                if input.is_empty() {
                    return self.check();
                }
                let mut scribbling: Option<Scribbling> = None;
                match input.byte() % 16 {
                    0..=3 => self.write(input),
                    4 => {
                        self.fresh_entries(input);
                        self.publish(input);
                    }
                    5 => match input.byte() {
                        0..0x40 => self.publish(input),
                        few @ 0x40..0xa0 => {
                            let stores = self.fresh_table(input);
                            // While the driver waits for the device, or between two calls.
                            if few & 1 != 0 {
                                let mut fuzzed = Fuzzed::new(input.byte());
                                fuzzed.meanwhile = Some((self.window.memory().clone(), stores.clone()));
                                driver.step(input, &mut fuzzed);
                            }
                            stores.iter().for_each(|(at, bytes)| self.window.put(*at, bytes));
                        }
                        count => (0..=count & 3).for_each(|_| self.offer(input)),
                    },
                    6 => break,
                    7 => {
                        self.raced = true;
                        let mut words = words(input, LEN);
                        // Also a table that changes while it is gone by.
                        if input.coin() {
                            let now = self.table_generation as u16;
                            words.extend([now, now + 2, now, now + 4].map(|word| (TABLE_GENERATION, word)));
                        }
                        scribbling = Some(scribble(self.window.memory(), words));
                        (0..4).for_each(|_| driver.step(input, &mut Fuzzed::default()));
                    }
                    _ => {
                        let mut fuzzed = Fuzzed::new(input.byte());
                        driver.step(input, &mut fuzzed);
                    }
                }
                drop(scribbling);
                // The port has followed a table that it found by itself.
                if let Ok(table) = page.table() {
                    self.note(&table.mappings);
                }
            }
        }
        self.check();
    }

    fn write(&mut self, input: &mut Input<'_>) {
        let writer = self.writers[input.below(VRINGS as u64) as usize];
        match input.byte() % 8 {
            // What the device answers on the control ring.
            0 if self.device == BLOCK && input.coin() => self.ask(input),
            0 => {
                let at = CONTROL + abi::CONTROL_USED + u64::from(input.byte());
                let value = input.double().to_le_bytes();
                self.window.put(at & !1, &value[..2 << (at & 1)]);
            }
            // A header, and what is behind it.
            1 => {
                let at = BUFFERS + 64 * u64::from(input.byte());
                self.window.put(at, input.bytes(80));
            }
            _ => writer.write(self.window, input),
        }
    }

    fn check(&mut self) {
        if !self.raced {
            let writable = std::mem::take(&mut self.writable);
            writable.into_iter().for_each(|range| self.window.accept(range));
            self.window.check_unchanged();
        }
    }
}

/// What is under test.
struct Driver<'t> {
    transport: &'t Fake,
    port: Option<PeerPort>,
    disk: Option<(BlkPort, Disk)>,
    control: Option<ControlRing>,
    burst: PacketBurst,
    pieces: PacketBurst,
    lent: LentBurst,
    lane: Lane,
}

impl<'t> Driver<'t> {
    fn new(transport: &'t Fake) -> Self {
        let control = ControlRing::new(transport).ok();
        let (burst, lent, lane) = Default::default();
        Self { transport, port: None, disk: None, control, burst, pieces: PacketBurst::default(), lent, lane }
    }

    fn step(&mut self, input: &mut Input<'_>, fuzzed: &mut Fuzzed) {
        let choice = input.byte();
        let pair = u16::from(choice >> 4 & 1);
        let budget = usize::from(input.byte());
        // The device stores between two packets, or when it is asked.
        let mut between = if budget & 1 == 0 { None } else { fuzzed.meanwhile.take() };
        // The device by the control ring, by the fuzzer's choice, or not at all.
        let mut by_ring = self
            .control
            .as_mut()
            .map(|ring| ControlExchange::new(ring, self.transport, false).patience(Duration::ZERO));
        let exchange: &mut dyn Exchange = match choice >> 5 {
            0..=2 => fuzzed,
            3 => &mut by_ring,
            _ => &mut Nobody,
        };
        if let Some((port, disk)) = &mut self.disk {
            return disk::step(port, disk, exchange, choice, budget);
        }
        let Some(port) = &mut self.port else { return };
        match choice % 16 {
            0..=3 => {
                self.burst.clear();
                let before = port.counters().rx_packets;
                if let Ok(count) = port.rx_burst_by(exchange, pair, &mut self.burst, budget) {
                    assert!(count == self.burst.len() && count <= budget);
                    assert_eq!(port.counters().rx_packets, before + count as u64);
                }
                assert!(
                    self.burst.len() <= MOST && self.burst.frames().all(|frame| frame.len() <= MAX_FRAME)
                );
            }
            4..=6 => {
                let packets = packets(input);
                let each = packets.iter().enumerate().map(|(at, spec)| {
                    if at > 0 {
                        store(&mut between);
                    }
                    spec.packet()
                });
                if let Ok(count) = port.tx_burst_by(exchange, pair, each) {
                    assert!(count <= packets.len());
                }
            }
            // What was received, to the other pair, headers and all; or what was lent, as a bridge does.
            7 if budget & 2 == 0 => {
                let _ = port.tx_burst_by(exchange, 1 - pair, self.burst.iter());
            }
            7 => {
                let [first, second] = port.queues_mut() else { return };
                let (from, to) = if pair == 0 { (first, second) } else { (second, first) };
                let count = self.lent.len().min(budget);
                let picks: Vec<_> = (0..count).map(|at| Pick { at, header: Default::default() }).collect();
                let end = End { queue: &mut *to, exchange: &mut *exchange };
                let copied = copy_lent(&self.lent, &picks, from, end);
                assert!(copied.is_ok_and(|copied| copied.done <= count) || copied.is_err());
                // And what was received before, from private memory.
                let picks: Vec<_> = picks.into_iter().filter(|pick| pick.at < self.burst.len()).collect();
                let end = End { queue: to, exchange };
                let sent = send_copies(&self.burst, &picks, end, &mut self.pieces);
                assert!(sent.is_ok_and(|sent| sent.done <= picks.len()) || sent.is_err());
            }
            8 | 9 => {
                if let Ok(count) = port.rx_lend_by(exchange, pair, &mut self.lent, budget) {
                    // Where nothing can be lent, the burst stays what it was.
                    assert!(count <= budget && (count == 0 || count == self.lent.len()));
                }
            }
            10 => {
                let mut bytes = [0; 200];
                for packet in self.lent.iter() {
                    assert!(packet.len() <= MAX_FRAME);
                    let _ = (packet.header(), packet.head::<64>());
                    assert!(packet.read(budget, &mut bytes) <= packet.len());
                }
                let _ = port.is_in_place(&self.lent);
            }
            11 => {
                let _ = port.rx_return(&mut self.lent);
            }
            12 => {
                let [first, second] = port.queues_mut() else { return };
                let (from, to) = if pair == 0 { (first, second) } else { (second, first) };
                let result = match choice >> 5 {
                    0..=2 => {
                        let mut other = fuzzed.clone();
                        let from = End { queue: from, exchange: fuzzed };
                        let to = End { queue: to, exchange: &mut other };
                        forward_burst_by(&mut self.lane, from, to, budget)
                    }
                    _ => forward_burst(from, to, &mut self.lane, budget),
                };
                if let Ok(forwarded) = result {
                    assert!(forwarded.taken <= budget);
                }
            }
            13 => {
                let _ = port.set_kicks(u16::from(choice >> 4), budget & 1 != 0);
            }
            14 => {
                let _ = port.needs_call(u16::from(choice >> 4));
            }
            _ => {
                if let Some(ring) = &mut self.control {
                    let command = Command::Attach {
                        generation: 2,
                        interrupt: choice & 0x40 != 0,
                        doorbell: None,
                        quiesce: false,
                        says_served: false,
                    };
                    let _ = ring.send(self.transport, command);
                    // A ring that is broken gives none.
                    let answers = ring.answers().unwrap_or_default();
                    assert!(answers.len() <= usize::from(abi::CONTROL_RING_SIZE) / 2);
                }
            }
        }
        assert!(port.faults().count() <= VRINGS);
    }
}
