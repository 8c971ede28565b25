//! The driver half of a packed virtqueue (virtio 1.3, 2.8), over memory in which the
//! device's VM can rewrite the ring at any moment.
//!
//! Owns: private copies of everything it put into the ring; what the device may have
//! overwritten is never read back. Never touches a buffer's contents, never notifies anybody:
//! it says whether to.

use std::sync::atomic::Ordering;

use super::event::{Area, Notifying, Waiting};
use super::layout::{EVENT_AT, EVENT_LEN, FLAGS_AT, desc_len};
use super::position::{Position, observe, publish};
use crate::ring::chain::Descriptor;
use crate::ring::driver::{
    AddError, Buffer, Completion, DriverFault, DriverFaultKind, IndirectTables, writable_len,
};
use crate::ring::features::RingFeatures;
use crate::ring::layout::{DESC_LEN, MAX_SIZE, RingPlaces};
use crate::shm::{PackedSlots, SharedMemory, ShmError, Word16};

/// What is known of a buffer id in flight. `slots` is 0 for all others.
#[derive(Clone, Copy, Debug, Default)]
struct InFlight {
    token: u64,
    writable_len: u32,
    slots: u16,
}

/// Numbers in the order in which they came; never more than it has places.
#[derive(Debug)]
struct Ids {
    places: Box<[u16]>,
    first: u16,
    count: u16,
}

impl Ids {
    fn new(size: u16) -> Self {
        Self { places: vec![0; usize::from(size)].into(), first: 0, count: 0 }
    }

    #[inline]
    fn add(&mut self, id: u16) {
        let size = self.places.len();
        let at = usize::from(self.first) + usize::from(self.count);
        if let Some(place) = self.places.get_mut(if at < size { at } else { at - size }) {
            *place = id;
            self.count += 1;
        }
    }

    #[inline]
    fn first(&self) -> Option<u16> {
        let first = self.places.get(usize::from(self.first)).copied();
        first.filter(|_| self.count > 0)
    }

    #[inline]
    fn take(&mut self) -> Option<u16> {
        let id = self.first()?;
        self.first = if usize::from(self.first) + 1 < self.places.len() { self.first + 1 } else { 0 };
        self.count -= 1;
        Some(id)
    }
}

/// Buffers that were added and not published.
#[derive(Clone, Copy, Debug)]
struct Unpublished {
    /// The first one's first slot, whose flags are still to be stored, and these.
    slot: u16,
    flags: u16,
    /// Slots of all.
    slots: u16,
}

/// The driver half of one packed vring.
#[derive(Debug)]
pub struct PackedDriver {
    vring: u16,
    size: u16,
    memory: SharedMemory,
    iova_base: u64,
    indirect: Option<IndirectTables>,
    in_order: bool,
    by_event: bool,
    slots: PackedSlots,
    /// Of the next descriptor to be made available.
    next: Position,
    /// Of the next used descriptor.
    used: Position,
    free: u16,
    unpublished: Option<Unpublished>,
    kicks: Notifying<Word16>,
    calls: Waiting<Word16>,
    /// By buffer id.
    in_flight: Box<[InFlight]>,
    in_flight_count: u16,
    free_ids: Ids,
    /// Those in flight, where the device uses them in this order.
    order: Ids,
    /// The device said by one used descriptor that it is done with all up to this id, and that
    /// it wrote so many bytes there.
    done_up_to: Option<(u16, u32)>,
    fault: Option<DriverFault>,
}

impl PackedDriver {
    // What is not described here is as `DriverRing` has it.

    pub(crate) fn new(
        vring: u16,
        places: &RingPlaces,
        memory: &SharedMemory,
        iova_base: u64,
        indirect: Option<IndirectTables>,
        features: RingFeatures,
    ) -> Result<Self, ShmError> {
        let size = places.size.clamp(1, MAX_SIZE);
        memory.zero(places.desc, u64::from(desc_len(size)))?;
        memory.zero(places.avail, u64::from(EVENT_LEN))?;
        memory.zero(places.used, u64::from(EVENT_LEN))?;
        if let Some(tables) = indirect {
            memory.zero(tables.offset, IndirectTables::len(tables.entries, size))?;
        }
        let area = |offset| {
            let word = |offset| Word16::new(memory, offset);
            Ok(Area { event: word(offset + EVENT_AT)?, flags: word(offset + FLAGS_AT)? })
        };
        let mut free_ids = Ids::new(size);
        (0..size).for_each(|id| free_ids.add(id));
        Ok(Self {
            vring,
            size,
            memory: memory.clone(),
            iova_base,
            indirect,
            in_order: features.in_order,
            by_event: features.event_idx,
            slots: PackedSlots::new(memory, places.desc, size)?,
            next: Position::START,
            used: Position::START,
            free: size,
            unpublished: None,
            kicks: Notifying::new(area(places.used)?, features.event_idx),
            calls: Waiting::new(area(places.avail)?),
            in_flight: vec![InFlight::default(); usize::from(size)].into(),
            in_flight_count: 0,
            free_ids,
            order: Ids::new(size),
            done_up_to: None,
            fault: None,
        })
    }

    pub(crate) fn vring(&self) -> u16 {
        self.vring
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    #[inline]
    pub(crate) fn free(&self) -> u16 {
        self.free
    }

    #[inline]
    pub(crate) fn in_flight(&self) -> u16 {
        self.in_flight_count
    }

    /// [`Self::add`] of a buffer in one piece.
    #[inline]
    pub(crate) fn add_one(&mut self, piece: Buffer, token: u64) -> Result<(), AddError> {
        if piece.len == 0 {
            return Err(AddError::Invalid);
        }
        // There are as many ids as slots.
        let Some(id) = self.free_ids.first().filter(|_| self.free > 0) else { return Err(AddError::Full) };
        let first = self.next;
        self.put(first, self.describe(&piece, false), id, true);
        let writable_len = if piece.writable { piece.len } else { 0 };
        self.offer(first, InFlight { token, writable_len, slots: 1 });
        Ok(())
    }

    #[inline]
    pub(crate) fn add(&mut self, pieces: &[Buffer], token: u64) -> Result<(), AddError> {
        let writable_len = writable_len(pieces, self.size)?;
        let table =
            self.indirect.filter(|tables| pieces.len() > 1 && pieces.len() <= usize::from(tables.entries));
        let slots = if table.is_some() { 1 } else { pieces.len() as u16 };
        if slots > self.free {
            return Err(AddError::Full);
        }
        // There are as many ids as slots.
        let Some(id) = self.free_ids.first() else { return Err(AddError::Full) };
        let first = self.next;
        match table {
            Some(tables) => {
                let descriptor = self.fill_table(&tables, id, pieces)?;
                self.put(first, descriptor, id, true);
            }
            None => {
                let mut at = first;
                for (number, piece) in pieces.iter().enumerate() {
                    let descriptor = self.describe(piece, number + 1 < pieces.len());
                    self.put(at, descriptor, id, number == 0);
                    at = at.advanced(1, self.size);
                }
            }
        }
        self.offer(first, InFlight { token, writable_len, slots });
        Ok(())
    }

    /// The slots from `first` on are filled, and have the first free id.
    #[inline]
    fn offer(&mut self, first: Position, buffer: InFlight) {
        self.next = first.advanced(buffer.slots, self.size);
        self.free -= buffer.slots;
        if let Some(unpublished) = &mut self.unpublished {
            unpublished.slots += buffer.slots;
        }
        let Some(id) = self.free_ids.take() else { return };
        if self.in_order {
            self.order.add(id);
        }
        if let Some(known) = self.in_flight.get_mut(usize::from(id)) {
            *known = buffer;
        }
        self.in_flight_count += 1;
    }

    /// Fills a slot. The device goes from slot to slot, so that only the first one since the
    /// last publication is held back.
    #[inline]
    fn put(&mut self, at: Position, (addr, len, flags): (u64, u32, u16), id: u16, is_first: bool) {
        let flags = flags | at.avail_flags();
        let slot = at.slot();
        self.slots.store_addr(slot, addr);
        if is_first && self.unpublished.is_none() {
            self.unpublished = Some(Unpublished { slot, flags, slots: 0 });
            // The slot stays the driver's: these flags are of the lap before.
            self.slots.store_rest(slot, len, id, at.not_yet_flags(), Ordering::Relaxed);
        } else {
            self.slots.store_rest(slot, len, id, flags, Ordering::Relaxed);
        }
    }

    #[inline]
    fn describe(&self, piece: &Buffer, goes_on: bool) -> (u64, u32, u16) {
        let flags =
            if piece.writable { Descriptor::WRITE } else { 0 } | if goes_on { Descriptor::NEXT } else { 0 };
        (self.iova_base.wrapping_add(piece.offset), piece.len, flags)
    }

    fn fill_table(
        &self,
        tables: &IndirectTables,
        id: u16,
        pieces: &[Buffer],
    ) -> Result<(u64, u32, u16), AddError> {
        let offset = tables.offset + IndirectTables::len(tables.entries, id);
        for (at, piece) in (0_u64..).zip(pieces) {
            let (addr, len, flags) = self.describe(piece, false);
            let place = offset + at * u64::from(DESC_LEN);
            let rest = u64::from(len) | u64::from(flags) << 48;
            let stored = self.memory.store_u64(place, addr).and(self.memory.store_u64(place + 8, rest));
            stored.map_err(|_| AddError::Invalid)?;
        }
        let len = DESC_LEN * pieces.len() as u32;
        Ok((self.iova_base.wrapping_add(offset), len, Descriptor::INDIRECT))
    }

    #[inline]
    pub(crate) fn publish(&mut self) {
        if let Some(Unpublished { slot, flags, slots }) = self.unpublished.take() {
            publish(&self.slots.flags(slot), flags);
            self.kicks.published(slots);
        }
    }

    #[inline]
    pub(crate) fn needs_kick(&mut self) -> bool {
        // What was added since is not the device's yet, and no reason for a kick.
        let unpublished = self.unpublished.map_or(0, |unpublished| unpublished.slots);
        self.kicks.needs_notification(self.next.put_back(unpublished, self.size), self.size)
    }

    pub(crate) fn set_calls(&mut self, enabled: bool) -> Result<bool, DriverFault> {
        if enabled {
            return self.set_calls_after(1);
        }
        self.calls.ask_for_none();
        Ok(self.poll_used()? > 0)
    }

    /// Whether *one* is waiting already: how many there are, a packed ring does not say.
    pub(crate) fn set_calls_after(&mut self, count: u16) -> Result<bool, DriverFault> {
        if self.by_event {
            // Where the slots say so that only one buffer has each, else earlier.
            let slots = count.clamp(1, (self.size - self.free).max(1)) - 1;
            self.calls.ask_for(self.used.advanced(slots, self.size));
        } else {
            self.calls.ask_for_all();
        }
        Ok(self.poll_used()? > 0)
    }

    /// 1 if the device has given a buffer back, else 0: a packed ring does not say how many.
    #[inline]
    pub(crate) fn poll_used(&mut self) -> Result<u16, DriverFault> {
        match self.fault {
            Some(fault) => Err(fault),
            None => Ok(u16::from(self.done_up_to.is_some() || self.is_used())),
        }
    }

    #[inline]
    fn is_used(&self) -> bool {
        self.in_flight_count > 0 && self.used.is_used(observe(&self.slots.flags(self.used.slot())))
    }

    #[inline]
    pub(crate) fn reap(
        &mut self,
        budget: usize,
        completions: &mut Vec<Completion>,
    ) -> Result<usize, DriverFault> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        for reaped in 0..budget {
            match self.reap_one() {
                Ok(Some(completion)) => completions.push(completion),
                Ok(None) => return Ok(reaped),
                Err(fault) => return if reaped == 0 { Err(fault) } else { Ok(reaped) },
            }
        }
        Ok(budget)
    }

    #[inline]
    fn reap_one(&mut self) -> Result<Option<Completion>, DriverFault> {
        let (id, len) = match self.done_up_to {
            Some(said) => said,
            None if !self.is_used() => return Ok(None),
            None => {
                // The one fetch of this descriptor.
                let (_, len, id) = self.slots.load(self.used.slot());
                let known = self.in_flight.get(usize::from(id)).filter(|known| known.slots > 0);
                let Some(known) = known else {
                    return Err(self.broken(DriverFaultKind::UsedId, id.into()));
                };
                if len > known.writable_len {
                    return Err(self.broken(DriverFaultKind::UsedLength, len));
                }
                (id, len)
            }
        };
        let mut completed = (id, len);
        if self.in_order {
            // All before it are done with, too, and wholly (2.8.8).
            let first = self.order.take().unwrap_or(id);
            self.done_up_to = (first != id).then_some((id, len));
            if first != id {
                let writable = self.in_flight.get(usize::from(first)).map_or(0, |known| known.writable_len);
                completed = (first, writable);
            }
        }
        let (id, len) = completed;
        let known = self.in_flight.get_mut(usize::from(id)).map(std::mem::take).unwrap_or_default();
        self.used = self.used.advanced(known.slots, self.size);
        self.free += known.slots;
        self.in_flight_count -= 1;
        self.free_ids.add(id);
        Ok(Some(Completion { token: known.token, len }))
    }

    /// The first fault stays.
    #[cold]
    fn broken(&mut self, kind: DriverFaultKind, value: u32) -> DriverFault {
        *self.fault.get_or_insert(DriverFault { kind, vring: self.vring, value })
    }
}
