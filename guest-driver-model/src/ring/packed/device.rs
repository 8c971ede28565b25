//! The device half of a packed virtqueue (virtio 1.3, 2.8), over memory that the
//! driver's VM can rewrite at any moment.
//!
//! Owns: its place in the ring, and private copies of the chains that it took; each shared
//! field is fetched once, validated, and the copy is used. Never touches a buffer's
//! contents, never notifies anybody: it says whether to.
//!
//! # How it goes on after a device half that died
//!
//! After each flush the place is left in the device's event suppression area, in the field
//! that names a descriptor: drivers do not look at it unless the flags say so, which they
//! never do here. A flush is stored from its last used descriptor to its first, for which the
//! driver waits, and each of them says in its unused `addr` how far the next is: an address
//! that is no such number stays, and stands for the next slot. So a successor that comes upon
//! slots that are used already, since its predecessor died in the middle of a flush, or before
//! it left its place, knows to step over them; and what is not used yet still has its address.
//!
//! A ring that breaks the rules yields a [`Fault`] and is dead until it is made anew.
//! Chains that were popped before the fault was met stay good and can be completed.

use std::sync::atomic::Ordering;

use vhost_pci_device::abi::FaultKind;

use super::event::{Area, Notifying, Waiting};
use super::layout::{EVENT_AT, FLAGS_AT};
use super::popped::{Popped, PoppedChains};
use super::position::{Position, observe};
use crate::ring::chain::{ChainBurst, Descriptor, Direction};
use crate::ring::device::{Fault, MAX_CHAIN};
use crate::ring::features::RingFeatures;
use crate::ring::layout::RingConfig;
use crate::ring::miss::{Finding, Miss, OnMiss};
use crate::ring::table::{open_table, wrong};
use crate::ring::walk::{Broken, Lookup, Stop, Usual, Walk};
use crate::ring::word::Word;
use crate::shm::{PackedSlots, SharedMemory, ShmError, Word16};
use crate::translate::Translation;

/// A used descriptor that is not in the ring yet.
#[derive(Clone, Copy, Debug)]
struct Used {
    at: Position,
    id: u16,
    written: u32,
    /// Slots to the next one.
    slots: u16,
    /// The next chain may be reported instead of this one, and this one with it.
    open: bool,
}

/// Addresses up to here can be taken for a number of slots.
const NEAR: u64 = u16::MAX as u64;

/// What a burst of usual chains ended for.
enum Ended {
    /// It is as long as it may be.
    Full,
    /// The next slot has these flags, and is not available.
    Empty(u16),
    /// The next chain starts with this descriptor.
    Unusual(Descriptor),
}

/// The device half of one packed vring.
#[derive(Debug)]
pub struct PackedDevice {
    vring: u16,
    size: u16,
    /// Descriptors that one chain may have.
    chain_limit: u16,
    indirect: bool,
    in_order: bool,
    slots: PackedSlots,
    /// Of the next chain.
    next: Position,
    /// Of the next used descriptor.
    completed: Position,
    /// The same, as the driver can know it.
    flushed: Position,
    /// Slots from `flushed` to `next`.
    taken: u16,
    popped: PoppedChains,
    used: Vec<Used>,
    /// A chain had an address that is a number of slots: from then on each used descriptor says
    /// how far the next one is, instead of leaving its address as it was.
    near: bool,
    /// Slots that may be stepped over, since a predecessor used them.
    steps: u16,
    kicks: Waiting<Word16>,
    calls: Notifying<Word16>,
    window: SharedMemory,
    lookup: Lookup,
    /// For chains that are only looked at.
    ahead: ChainBurst,
    /// The private copy of an indirect table.
    table: Vec<u8>,
    fault: Option<Fault>,
}

impl PackedDevice {
    /// Starts to serve vring number `vring` where the device half before it left off
    /// (`docs/vhost-pci-device.md`, 8.2).
    ///
    /// `features`: what the driver accepted.
    /// Errors: [`FaultKind::Geometry`].
    pub(crate) fn new(
        vring: u16,
        config: &RingConfig,
        window: &SharedMemory,
        translation: Translation,
        features: RingFeatures,
    ) -> Result<Self, Fault> {
        let geometry = |value| Fault { kind: FaultKind::Geometry, vring, value };
        let places = config.place(&translation).map_err(|_| geometry(u64::from(config.size())))?;
        let outside = |error: ShmError| match error {
            ShmError::OutOfBounds { offset, .. } | ShmError::Misaligned { offset, .. } => geometry(offset),
        };
        let area = |offset| {
            let word = |offset| Word16::new(window, offset).map_err(outside);
            Ok(Area { event: word(offset + EVENT_AT)?, flags: word(offset + FLAGS_AT)? })
        };
        let kicks = Waiting::new(area(places.used)?);
        // The one load of the place that was left: afterwards the private copy counts.
        let left = Word::load(kicks.unused_event());
        let start = Position::of_left(left, places.size).ok_or_else(|| geometry(u64::from(left)))?;
        Ok(Self {
            vring,
            size: places.size,
            chain_limit: places.size.min(MAX_CHAIN),
            indirect: features.indirect,
            in_order: features.in_order,
            slots: PackedSlots::new(window, places.desc, places.size).map_err(outside)?,
            next: start,
            completed: start,
            flushed: start,
            taken: 0,
            popped: PoppedChains::new(places.size),
            used: Vec::new(),
            near: false,
            steps: places.size,
            kicks,
            calls: Notifying::new(area(places.avail)?, features.event_idx),
            window: window.clone(),
            lookup: Lookup::new(translation),
            ahead: ChainBurst::default(),
            table: Vec::new(),
            fault: None,
        })
    }

    // What is not described here is as `DeviceRing` has it.

    pub(crate) fn on_miss(mut self, on_miss: OnMiss) -> Self {
        self.lookup.on_miss = on_miss;
        self
    }

    #[inline]
    pub(crate) fn miss_policy(&self) -> OnMiss {
        self.lookup.on_miss
    }

    pub(crate) fn searches(&self) -> u64 {
        self.lookup.translation.searches()
    }

    pub(crate) fn set_translation(&mut self, translation: Translation) {
        self.lookup.translation = translation;
    }

    pub(crate) fn vring(&self) -> u16 {
        self.vring
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    pub(crate) fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// 1 if a chain can be popped, else 0: a packed ring does not say how many there are.
    #[inline]
    pub(crate) fn poll_avail(&mut self) -> Result<u16, Fault> {
        match self.fault {
            Some(fault) => Err(fault),
            None => Ok(u16::from(self.next_flags().is_some())),
        }
    }

    /// The flags of the next chain's first slot, if it is available. Slots that were taken and
    /// not given back are the device's own, whatever their flags say.
    #[inline]
    fn next_flags(&mut self) -> Option<u16> {
        if self.taken >= self.size {
            return None;
        }
        let flags = observe(&self.slots.flags(self.next.slot()));
        match self.next.is_available(flags) {
            true => Some(flags),
            false => self.step_over(flags),
        }
    }

    /// Goes on behind what a predecessor used. What the slots say about that is the owner's
    /// to say, so it is done for as many slots as the ring has, and no more.
    #[inline]
    fn step_over(&mut self, flags: u16) -> Option<u16> {
        if self.steps == 0 || self.taken > 0 || !self.next.is_used(flags) {
            return None;
        }
        self.step_over_used()
    }

    #[cold]
    fn step_over_used(&mut self) -> Option<u16> {
        loop {
            let (distance, ..) = self.slots.load(self.next.slot());
            let distance = u16::try_from(distance).ok().filter(|distance| (1..=self.size).contains(distance));
            let distance = distance.unwrap_or(1);
            self.next = self.next.advanced(distance, self.size);
            self.steps = self.steps.saturating_sub(distance);
            (self.completed, self.flushed) = (self.next, self.next);
            self.leave_place();
            // The driver may have not been told.
            self.calls.published(distance);
            let flags = observe(&self.slots.flags(self.next.slot()));
            if self.next.is_available(flags) {
                return Some(flags);
            }
            if self.steps == 0 || !self.next.is_used(flags) {
                return None;
            }
        }
    }

    #[inline]
    pub(crate) fn pop_burst(
        &mut self,
        budget: usize,
        direction: Direction,
        burst: &mut ChainBurst,
    ) -> Result<usize, Fault> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        self.lookup.misses.clear();
        let usual = Usual::of(direction);
        let mut popped = 0;
        loop {
            let (count, ended) = self.pop_usual(budget - popped, &usual, burst);
            popped += count;
            let first = match ended {
                Ended::Full => return Ok(popped),
                Ended::Unusual(first) => first,
                Ended::Empty(flags) => match self.step_over(flags) {
                    Some(flags) => self.load(self.next.slot(), flags),
                    None => return Ok(popped),
                },
            };
            let mark = burst.mark();
            let (at, room) = (self.next, self.size - self.taken);
            let mut slots = 0;
            match self.pop_chain((at, first), room, direction, burst, mark, &mut slots) {
                Ok(id) => {
                    let read_only = direction == Direction::DeviceReads;
                    self.popped.add(Popped { id, slots, read_only });
                    self.near |= first.addr <= NEAR;
                    self.next = at.advanced(slots, self.size);
                    self.taken += slots;
                    popped += 1;
                }
                Err(Stop::Broken(broken)) => {
                    burst.abandon(mark);
                    let fault = self.broken(broken);
                    return if popped == 0 { Err(fault) } else { Ok(popped) };
                }
                Err(Stop::Missing) => {
                    burst.abandon(mark);
                    self.look_ahead(slots, budget - popped, direction);
                    return Ok(popped);
                }
            }
        }
    }

    /// Pops chains as nearly all of a network card's are: one buffer, in the mapping of the one
    /// before. Returns how many, and what they ended for.
    #[inline]
    fn pop_usual(&mut self, budget: usize, usual: &Usual, burst: &mut ChainBurst) -> (usize, Ended) {
        let (mut next, mut taken, mut near) = (self.next, self.taken, self.near);
        let mut popped = 0;
        let ended = loop {
            if popped == budget {
                break Ended::Full;
            }
            if taken >= self.size {
                break Ended::Empty(next.not_yet_flags());
            }
            let flags = observe(&self.slots.flags(next.slot()));
            if !next.is_available(flags) {
                break Ended::Empty(flags);
            }
            let first = self.load(next.slot(), flags);
            let Descriptor { addr, len, next: id, .. } = first;
            let segment = match usual.segment(addr, len, &self.lookup.translation) {
                Some(segment) if first.is_usual(usual) && id < self.size => segment,
                _ => break Ended::Unusual(first),
            };
            near |= addr <= NEAR;
            burst.push_one(id, segment);
            self.popped.add(Popped { id, slots: 1, read_only: !segment.writable });
            next = next.advanced(1, self.size);
            taken += 1;
            popped += 1;
        };
        (self.next, self.taken, self.near) = (next, taken, near);
        (popped, ended)
    }

    /// Notes what the chains behind the next one, which takes `slots`, lack, so that it can be
    /// asked for in one go. They are popped, and checked, later.
    #[cold]
    fn look_ahead(&mut self, mut slots: u16, count: usize, direction: Direction) {
        let mut ahead = std::mem::take(&mut self.ahead);
        for _ in 1..count {
            let room = (self.size - self.taken).saturating_sub(slots);
            if room == 0 || self.lookup.misses.is_full() {
                break;
            }
            let at = self.next.advanced(slots, self.size);
            let flags = observe(&self.slots.flags(at.slot()));
            if !at.is_available(flags) {
                break;
            }
            ahead.clear();
            let first = self.load(at.slot(), flags);
            let result = self.pop_chain((at, first), room, direction, &mut ahead, 0, &mut slots);
            if matches!(result, Err(Stop::Broken(_))) {
                break;
            }
        }
        self.ahead = ahead;
    }

    #[inline]
    pub(crate) fn misses(&self) -> &[Miss] {
        self.lookup.misses.noted()
    }

    pub(crate) fn found(&mut self, miss: Miss, finding: Finding) {
        self.lookup.misses.found(miss, finding);
    }

    pub(crate) fn forget_findings(&mut self) {
        self.lookup.misses.forget();
    }

    pub(crate) fn put_back(&mut self, count: usize) {
        debug_assert!(count <= self.popped.len());
        let slots = self.popped.put_back(count);
        self.next = self.next.put_back(slots, self.size);
        self.taken -= slots;
    }

    pub(crate) fn take_back_used(&mut self) {
        self.used.clear();
        self.popped.take_back_used();
        self.completed = self.flushed;
    }

    /// The one fetch of a descriptor whose flags were fetched before.
    #[inline]
    fn load(&self, slot: u16, flags: u16) -> Descriptor {
        let (addr, len, id) = self.slots.load(slot);
        Descriptor::new(addr, len, flags, id)
    }

    /// Appends the chain at a position (2.8.6, 2.8.7), whose first descriptor was fetched, in at
    /// most `room` slots. Adds those that it takes to `slots`. Returns the chain's id.
    fn pop_chain(
        &mut self,
        (at, first): (Position, Descriptor),
        room: u16,
        direction: Direction,
        burst: &mut ChainBurst,
        mark: usize,
        slots: &mut u16,
    ) -> Result<u16, Stop> {
        let mut walk = Walk::new(at.event(), direction, mark);
        let limit = self.chain_limit.min(room);
        let (mut slot, mut descriptor) = (at.slot(), first);
        for walked in 0..limit {
            *slots += 1;
            let is_last = if descriptor.is_indirect() {
                self.pop_table(&descriptor, self.chain_limit - walked, &mut walk, burst)?;
                true
            } else {
                walk.take(&descriptor, &mut self.lookup, burst)?;
                descriptor.next().is_none()
            };
            if is_last {
                // Not where the next one is, which is the next slot, but the chain's id.
                let id = descriptor.next;
                if id >= self.size {
                    return Err(Stop::Broken((FaultKind::DescriptorIndex, u64::from(id))));
                }
                walk.finish(id, burst)?;
                return Ok(id);
            }
            if walked + 1 < limit {
                slot = if slot + 1 < self.size { slot + 1 } else { 0 };
                // Those behind the first are the device's with it (2.8.6).
                descriptor = self.load(slot, observe(&self.slots.flags(slot)));
            }
        }
        Err(Stop::Broken((FaultKind::ChainTooLong, u64::from(limit))))
    }

    /// Appends the descriptors of an indirect table (2.8.7), which may have `limit` at most:
    /// one after the other, whatever their NEXT flags say.
    fn pop_table(
        &mut self,
        descriptor: &Descriptor,
        limit: u16,
        walk: &mut Walk,
        burst: &mut ChainBurst,
    ) -> Result<(), Stop> {
        let limit = if self.indirect { limit } else { 0 };
        let entries =
            open_table(&mut self.table, &self.window, &mut self.lookup, descriptor, limit, walk.at)?;
        for entry in entries {
            let value = u128::from_le_bytes(*entry);
            let entry = Descriptor::new(value as u64, (value >> 64) as u32, (value >> 112) as u16, 0);
            if entry.is_indirect() {
                return Err(wrong(descriptor));
            }
            walk.take(&entry, &mut self.lookup, burst)?;
        }
        Ok(())
    }

    #[inline]
    pub(crate) fn push_used(&mut self, head: u16, written: u32) {
        let Some(Popped { slots, read_only, .. }) = self.popped.push_used(head) else {
            debug_assert!(false, "a chain completed that was not popped");
            return;
        };
        // A chain that is wholly done needs no word of its own if the next one has one
        // (VIRTIO_F_IN_ORDER, 2.8.8).
        let open = self.in_order && read_only && written == 0;
        match self.used.last_mut() {
            Some(last) if last.open => {
                *last = Used { id: head, written, slots: last.slots + slots, open, ..*last };
            }
            _ => self.used.push(Used { at: self.completed, id: head, written, slots, open }),
        }
        self.completed = self.completed.advanced(slots, self.size);
    }

    /// Shows all pushed chains to the driver, by the release store of the first used
    /// descriptor.
    #[inline]
    pub(crate) fn flush_used(&mut self) {
        let Some((first, rest)) = self.used.split_first() else { return };
        for used in rest.iter().rev() {
            // Relaxed: the driver looks at these behind the first one only.
            self.store_used(used, Ordering::Relaxed);
        }
        // Release: pairs with the driver's acquire load of these flags.
        self.store_used(first, Ordering::Release);
        let slots: u16 = self.used.iter().map(|used| used.slots).sum();
        self.used.clear();
        self.popped.flush();
        self.flushed = self.completed;
        self.taken -= slots;
        self.calls.published(slots);
        self.leave_place();
    }

    #[inline]
    fn store_used(&self, used: &Used, order: Ordering) {
        let Used { at, id, written, slots, .. } = *used;
        let flags = at.used_flags() | if written > 0 { Descriptor::WRITE } else { 0 };
        // The address is for a successor only: 2.8.4 has it unused. Never before the flags: a
        // slot that is available still has the address that its driver gave it.
        match slots == 1 && !self.near {
            true => self.slots.store_rest(at.slot(), written, id, flags, order),
            false => self.slots.store_whole(at.slot(), slots.into(), (written, id, flags), order),
        }
    }

    #[inline]
    fn leave_place(&self) {
        // After what was flushed: a successor steps over that, but cannot step back.
        self.kicks.unused_event().store_release(self.flushed.left());
    }

    #[inline]
    pub(crate) fn needs_call(&mut self) -> bool {
        self.calls.needs_notification(self.flushed, self.size)
    }

    pub(crate) fn set_kicks(&mut self, enabled: bool) -> Result<bool, Fault> {
        match enabled {
            true => self.kicks.ask_for_all(),
            false => self.kicks.ask_for_none(),
        }
        Ok(self.poll_avail()? > 0)
    }

    #[cold]
    pub(crate) fn fail(&mut self, kind: FaultKind, value: u64) -> Fault {
        self.broken((kind, value))
    }

    /// The first fault stays.
    #[cold]
    fn broken(&mut self, (kind, value): Broken) -> Fault {
        *self.fault.get_or_insert(Fault { kind, vring: self.vring, value })
    }
}
