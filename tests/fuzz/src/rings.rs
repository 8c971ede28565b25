//! The device half of a ring over memory that its driver writes as it likes, between the
//! device's calls and during them.
//!
//! Owns: what must hold whatever the driver does. Bursts stay within their budget; what is popped
//! lies in mappings that allow it; nothing is written but what is the device's to write.

use std::cell::RefCell;
use std::ops::Range;

use guest_driver_model::ring::split::layout::used_len;
use guest_driver_model::ring::walk::MAX_SEGMENTS;
use guest_driver_model::ring::{
    Chain, ChainBurst, DeviceRing, Direction, Finding, OnMiss, Place, RingConfig, RingFeatures, RingPlaces,
    packed,
};
use guest_driver_model::translate::{Access, Mapping, Translation};
use vhost_pci_device::abi::FaultKind;

use crate::input::Input;
use crate::memory::Guarded;
use crate::ring_writer::Writer;
use crate::scribbler::{scribble, words};

/// Length of the window, bytes.
const LEN: usize = 64 << 10;
const PAGE: u64 = 4096;
/// Where the owner's memory starts, as its driver names it.
const BASES: [u64; 4] = [0x40_0000_0000, 0, u64::MAX - (LEN as u64 - 1), 1 << 32];
/// Steps of one input at most.
const STEPS: usize = 200;
/// Rings of one input at most: each allocates by its size.
const RINGS: usize = 8;

thread_local! {
    static WINDOW: RefCell<Guarded> = RefCell::new(Guarded::new(LEN));
}

/// Runs one input.
///
/// # Panics
/// When something does not hold.
pub fn run(bytes: &[u8], is_packed: bool) {
    WINDOW.with_borrow_mut(|window| {
        window.clear();
        let mut input = Input::new(bytes);
        let mut driver = Driver::new(&mut input, window, is_packed);
        for _ in 0..RINGS {
            if input.is_empty() || !driver.serve(&mut input) {
                break;
            }
        }
        driver.check_memory();
    });
}

/// A chain that the device has popped.
#[derive(Clone, Copy, Debug)]
struct Taken {
    head: u16,
    /// Pushed and not flushed.
    is_pushed: bool,
}

/// What the fuzzer plays.
struct Driver<'a> {
    window: &'a mut Guarded,
    features: RingFeatures,
    base: u64,
    config: Option<RingConfig>,
    /// Writes as if the ring were where it usually is.
    writer: Writer,
    mappings: Vec<Mapping>,
    on_miss: OnMiss,
    /// Another thread has written: who wrote what nobody knows.
    raced: bool,
    /// What a device half may have written.
    written: Vec<Range<u64>>,
}

impl<'a> Driver<'a> {
    fn new(input: &mut Input<'_>, window: &'a mut Guarded, is_packed: bool) -> Self {
        let bits = input.byte();
        let features = RingFeatures {
            indirect: bits & 1 != 0,
            event_idx: bits & 2 != 0,
            packed: is_packed,
            in_order: bits & 4 != 0,
        };
        let base = BASES[usize::from(bits >> 3 & 3)];
        let size = match input.byte() {
            few @ 0..=200 => u32::from(few) % 65,
            power @ 201..=216 => 1 << (power - 201),
            _ => input.double(),
        };
        // Split rings are mostly powers of two.
        let size =
            if is_packed || bits & 0x80 != 0 { size } else { size.checked_next_power_of_two().unwrap_or(0) };
        let (places, _) = RingPlaces::at(0, size.clamp(1, 1 << 15) as u16);
        let mut info = places.info(base);
        info.size = size;
        if bits & 0x20 != 0 {
            info.desc = input.field(base);
            info.avail = input.field(base);
            info.used = input.field(base);
        }
        let mut driver = Self {
            window,
            features,
            base,
            config: RingConfig::new(&info, features).ok(),
            writer: Writer { places, base, tables: TABLES, buffers: 0, is_packed },
            mappings: Vec::new(),
            on_miss: OnMiss::Fault,
            raced: false,
            written: Vec::new(),
        };
        driver.mappings = match bits & 0x40 {
            0 => vec![driver.whole()],
            _ => driver.fresh_mappings(input),
        };
        driver
    }

    fn whole(&self) -> Mapping {
        Mapping { iova: self.base, len: LEN as u64, window_offset: 0, access: Access::READ_WRITE }
    }

    /// As the link page may have them: sorted, apart, and inside the window.
    fn fresh_mappings(&self, input: &mut Input<'_>) -> Vec<Mapping> {
        let mut mappings = Vec::new();
        let mut next = Some(self.base);
        for _ in 0..=input.below(12) {
            let choice = input.byte();
            let gap = u64::from(choice & 3) * PAGE;
            let len = (1 + u64::from(choice >> 2 & 15)) * PAGE;
            let Some(iova) = next.and_then(|next| next.checked_add(gap)) else { break };
            if iova.checked_add(len - 1).is_none() {
                break;
            }
            // Mostly where it would be in one piece.
            let straight = iova.wrapping_sub(self.base);
            let place = if choice & 0x40 == 0 { straight } else { input.below(16) * PAGE };
            if place.checked_add(len).is_none_or(|end| end > LEN as u64) {
                break;
            }
            let access = if choice & 0x80 == 0 { 3 } else { u32::from(input.byte()) };
            mappings.push(Mapping { iova, len, window_offset: place, access: Access::from_bits(access) });
            next = iova.checked_add(len);
        }
        mappings
    }

    /// Lets one device half serve the ring. False if it cannot be served.
    fn serve(&mut self, input: &mut Input<'_>) -> bool {
        // What the driver writes before the device looks.
        for _ in 0..input.below(64) {
            self.writer.write(self.window, input);
        }
        let Some(config) = self.config else { return false };
        let translation = Translation::new(&self.mappings);
        // No further than the device can: a place outside the window is none of a device's.
        if let Ok(places) = config.place(&translation) {
            self.note_places(&places);
        }
        let Ok(ring) = DeviceRing::new(5, &config, self.window.memory(), translation, self.features) else {
            return false;
        };
        let mut device = Device {
            ring: ring.on_miss(self.on_miss),
            burst: ChainBurst::default(),
            taken: Vec::new(),
            may_reorder: !self.features.in_order,
            reordered: false,
        };
        for _ in 0..STEPS {
            if input.is_empty() {
                return false;
            }
            match input.byte() {
                // Another device half, after this one died.
                0xff => return true,
                0xf0..0xff => {
                    self.raced = true;
                    let words = words(input, LEN as u64);
                    let scribbling = scribble(self.window.memory(), words);
                    for _ in 0..8 {
                        device.pop(self, input);
                        device.complete(input);
                        device.ring.flush_used();
                        device.flushed();
                    }
                    drop(scribbling);
                }
                choice => self.step(choice, &mut device, input),
            }
        }
        true
    }

    /// What a device half may write of a ring at these places.
    fn note_places(&mut self, places: &RingPlaces) {
        match self.features.packed {
            false => self.written.push(places.used..places.used + u64::from(used_len(places.size))),
            true => {
                let ring = u64::from(packed::layout::desc_len(places.size));
                self.written.push(places.desc..places.desc + ring);
                self.written.push(places.used..places.used + u64::from(packed::layout::EVENT_LEN));
            }
        }
    }

    fn step(&mut self, choice: u8, device: &mut Device, input: &mut Input<'_>) {
        match choice % 24 {
            0..=8 => self.writer.write(self.window, input),
            9..=13 => device.pop(self, input),
            14 | 15 => device.complete(input),
            16 | 17 => {
                device.ring.flush_used();
                device.flushed();
            }
            18 => {
                let _ = device.ring.needs_call();
            }
            19 => {
                let _ = device.ring.set_kicks(input.coin());
            }
            20 => device.put_back(input),
            21 => {
                device.ring.take_back_used();
                device.taken.iter_mut().for_each(|taken| taken.is_pushed = false);
            }
            22 => device.find(input),
            _ => match input.byte() % 8 {
                0..=2 => {
                    self.mappings = self.fresh_mappings(input);
                    device.ring.set_translation(Translation::new(&self.mappings));
                }
                3 | 4 => {
                    self.on_miss = input.pick(&[OnMiss::Map, OnMiss::Copy, OnMiss::Fault]);
                }
                5 => device.ring.forget_findings(),
                6 => {
                    let _ = device.ring.poll_avail();
                }
                _ => {
                    let _ = device.ring.fail(FaultKind::Length, 7);
                }
            },
        }
    }

    /// Nothing was written but what is the device's to write.
    fn check_memory(&mut self) {
        if !self.raced {
            for range in self.written.drain(..) {
                self.window.accept(range);
            }
            self.window.check_unchanged();
        }
    }

    /// Whether a segment is what the table says of its addresses.
    fn check_chain(&self, chain: &Chain<'_>, direction: Direction, on_miss: OnMiss) {
        assert!((1..=MAX_SEGMENTS).contains(&chain.segments.len()));
        assert_eq!(chain.segments.iter().map(|segment| u64::from(segment.len)).sum::<u64>(), chain.len);
        assert!(chain.segments.is_sorted_by_key(|segment| segment.writable));
        for segment in chain.segments {
            assert!(segment.len > 0);
            match direction {
                Direction::DeviceReads => assert!(!segment.writable),
                Direction::DeviceWrites => assert!(segment.writable),
                Direction::Both => {}
            }
            let wanted = if segment.writable { Access::WRITE } else { Access::READ };
            match segment.place {
                Place::Owner => assert!(on_miss != OnMiss::Fault),
                Place::Window(offset) => {
                    let right = self.mappings.iter().any(|mapping| {
                        let into = segment.iova.wrapping_sub(mapping.iova);
                        into < mapping.len
                            && u64::from(segment.len) <= mapping.len - into
                            && mapping.window_offset + into == offset
                            && mapping.access.allows(wanted)
                    });
                    assert!(right, "{segment:?} is in none of {:?}", self.mappings);
                }
            }
        }
    }
}

/// Where entries of indirect tables are written.
const TABLES: u64 = 56 << 10;
/// What is under test, and what it has to remember.
struct Device {
    ring: DeviceRing,
    burst: ChainBurst,
    /// In the order in which they were popped.
    taken: Vec<Taken>,
    may_reorder: bool,
    /// Some were completed out of order: none of the others can be put back.
    reordered: bool,
}

impl Device {
    fn pop(&mut self, driver: &Driver<'_>, input: &mut Input<'_>) {
        let budget = usize::from(input.byte() % 40);
        let direction = input.pick(&[Direction::Both, Direction::DeviceReads, Direction::DeviceWrites]);
        self.burst.clear();
        let fault = self.ring.fault();
        let result = self.ring.pop_burst(budget, direction, &mut self.burst);
        match result {
            Ok(count) => {
                assert!(fault.is_none() && count <= budget && count == self.burst.len());
            }
            Err(found) => {
                assert!(self.burst.is_empty());
                assert!(self.ring.fault() == Some(found) && fault.is_none_or(|before| before == found));
            }
        }
        for chain in self.burst.iter() {
            driver.check_chain(&chain, direction, self.ring.miss_policy());
            assert!(chain.head < self.ring.size());
            self.taken.push(Taken { head: chain.head, is_pushed: false });
        }
        assert!(self.taken.len() <= usize::from(self.ring.size()), "more chains than the ring has");
        for miss in self.ring.misses() {
            assert!(miss.len > 0 && miss.iova.checked_add(miss.len - 1).is_some());
        }
    }

    /// Gives some of the chains back, in any order, as far as the format and what was
    /// negotiated have one.
    fn complete(&mut self, input: &mut Input<'_>) {
        let any_order = input.coin() && self.may_reorder;
        for _ in 0..input.below(16) {
            let open: Vec<_> = (0..self.taken.len()).filter(|at| !self.taken[*at].is_pushed).collect();
            let Some(first) = open.first() else { return };
            let at = if any_order { open[usize::from(input.byte()) % open.len()] } else { *first };
            self.reordered |= at != *first;
            self.taken[at].is_pushed = true;
            self.ring.push_used(self.taken[at].head, u32::from(input.byte()));
        }
    }

    fn flushed(&mut self) {
        self.taken.retain(|taken| !taken.is_pushed);
        self.reordered &= !self.taken.is_empty();
    }

    fn put_back(&mut self, input: &mut Input<'_>) {
        if self.reordered {
            return;
        }
        let last = self.taken.iter().rev().take_while(|taken| !taken.is_pushed).count();
        let count = if last == 0 { 0 } else { usize::from(input.byte()) % (last + 1) };
        self.ring.put_back(count);
        self.taken.truncate(self.taken.len() - count);
    }

    /// Finds something out about what the last burst ended for.
    fn find(&mut self, input: &mut Input<'_>) {
        let misses = self.ring.misses();
        let Some(miss) = misses.get(usize::from(input.byte()) % misses.len().max(1)).copied() else { return };
        let finding = match input.byte() % 3 {
            0 => Finding::Copy,
            1 => Finding::Denied,
            _ => Finding::Fetched(u64::from(input.word()) * 2),
        };
        self.ring.found(miss, finding);
    }
}
