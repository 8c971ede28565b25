//! The driver half of a split virtqueue (virtio 1.3, 2.7), over memory in which the
//! device's VM can rewrite the ring at any moment.
//!
//! Owns: private copies of everything it put into the ring, and the free list; what
//! the device may have overwritten is never read back. Never touches a buffer's
//! contents, never notifies anybody: it says whether to.

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::index::{Consumer, Producer, Wish};
use super::layout::{FLAGS_AT, INDEX_AT, SLOTS_AT, avail_event, avail_len, desc_len, used_event, used_len};
use crate::ring::chain::Descriptor;
use crate::ring::driver::{
    AddError, Buffer, Completion, DriverFault, DriverFaultKind, IndirectTables, writable_len,
};
use crate::ring::features::RingFeatures;
use crate::ring::layout::{DESC_LEN, MAX_SIZE, RingPlaces};
use crate::shm::{SharedMemory, ShmError, Slots, Word16};

/// What is known of a head in flight. `descriptors` is 0 for all others.
#[derive(Clone, Copy, Debug, Default)]
struct InFlight {
    token: u64,
    writable_len: u32,
    descriptors: u16,
    last: u16,
}

/// The driver half of one split vring.
#[derive(Debug)]
pub struct SplitDriver {
    vring: u16,
    size: u16,
    memory: SharedMemory,
    iova_base: u64,
    indirect: Option<IndirectTables>,
    desc: Slots<16>,
    avail: Slots<2>,
    used: Slots<8>,
    made_available: Producer<Word16>,
    completed: Consumer<Word16>,
    in_order: bool,
    /// The device said by one used element that it is done with all buffers up to this one, and
    /// that it wrote so many bytes there (2.7.9).
    done_up_to: Option<(u32, u32)>,
    /// What this side last wrote: a store that would change nothing would only take
    /// the cache line from the device's CPU.
    desc_shadow: Box<[[u64; 2]]>,
    avail_shadow: Box<[u16]>,
    /// By head.
    in_flight: Box<[InFlight]>,
    in_flight_count: u16,
    /// The free list, first in first out, so that in steady state each slot gets the
    /// descriptor that it had before.
    free_next: Box<[u16]>,
    free_first: u16,
    free_last: u16,
    free_count: u16,
    fault: Option<DriverFault>,
}

impl SplitDriver {
    pub(crate) fn new(
        vring: u16,
        places: &RingPlaces,
        memory: &SharedMemory,
        iova_base: u64,
        indirect: Option<IndirectTables>,
        features: RingFeatures,
    ) -> Result<Self, ShmError> {
        let word = |offset| Word16::new(memory, offset);
        let (kicks, calls) = match features.event_idx {
            true => (
                Wish::Event { word: word(avail_event(places))? },
                Wish::Event { word: word(used_event(places))? },
            ),
            false => (
                Wish::Flag { word: word(places.used + FLAGS_AT)?, bit: VRING_USED_F_NO_NOTIFY as u16 },
                Wish::Flag { word: word(places.avail + FLAGS_AT)?, bit: VRING_AVAIL_F_NO_INTERRUPT as u16 },
            ),
        };
        // One slot at least, so that no slice below is empty; others than powers of
        // two are rounded down, as `Slots` does.
        let size = 1_u16 << places.size.clamp(1, MAX_SIZE).ilog2();
        memory.zero(places.desc, u64::from(desc_len(size)))?;
        memory.zero(places.avail, u64::from(avail_len(size)))?;
        memory.zero(places.used, u64::from(used_len(size)))?;
        if let Some(tables) = indirect {
            memory.zero(tables.offset, IndirectTables::len(tables.entries, size))?;
        }
        let entries = usize::from(size);
        Ok(Self {
            vring,
            size,
            memory: memory.clone(),
            iova_base,
            indirect,
            desc: Slots::new(memory, places.desc, size)?,
            avail: Slots::new(memory, places.avail + SLOTS_AT, size)?,
            used: Slots::new(memory, places.used + SLOTS_AT, size)?,
            made_available: Producer::new(Word16::new(memory, places.avail + INDEX_AT)?, kicks, 0),
            completed: Consumer::new(Word16::new(memory, places.used + INDEX_AT)?, calls, 0),
            in_order: features.in_order,
            done_up_to: None,
            // Neither value is ever written: each slot's first store takes place.
            desc_shadow: vec![[u64::MAX; 2]; entries].into(),
            avail_shadow: vec![u16::MAX; entries].into(),
            in_flight: vec![InFlight::default(); entries].into(),
            in_flight_count: 0,
            free_next: (1..=size).collect(),
            free_first: 0,
            free_last: size - 1,
            free_count: size,
            fault: None,
        })
    }

    // What is not described here is as `DriverRing` has it.

    pub(crate) fn vring(&self) -> u16 {
        self.vring
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    #[inline]
    pub(crate) fn free(&self) -> u16 {
        self.free_count
    }

    #[inline]
    pub(crate) fn in_flight(&self) -> u16 {
        self.in_flight_count
    }

    #[inline]
    pub(crate) fn add(&mut self, pieces: &[Buffer], token: u64) -> Result<(), AddError> {
        let writable_len = writable_len(pieces, self.size)?;
        let head = self.free_first;
        let table =
            self.indirect.filter(|tables| pieces.len() > 1 && pieces.len() <= usize::from(tables.entries));
        let last = match table {
            _ if self.free_count == 0 => return Err(AddError::Full),
            Some(tables) => {
                let descriptor = self.fill_table(&tables, head, pieces)?;
                self.put_descriptor(head, descriptor);
                head
            }
            None if pieces.len() > usize::from(self.free_count) => return Err(AddError::Full),
            None => self.chain(head, pieces),
        };
        let descriptors = if table.is_some() { 1 } else { pieces.len() as u16 };
        self.offer(head, InFlight { token, writable_len, descriptors, last });
        Ok(())
    }

    #[inline]
    pub(crate) fn add_one(&mut self, piece: Buffer, token: u64) -> Result<(), AddError> {
        if piece.len == 0 {
            return Err(AddError::Invalid);
        }
        if self.free_count == 0 {
            return Err(AddError::Full);
        }
        let head = self.free_first;
        self.put_descriptor(head, self.describe(&piece, None));
        let writable_len = if piece.writable { piece.len } else { 0 };
        self.offer(head, InFlight { token, writable_len, descriptors: 1, last: head });
        Ok(())
    }

    /// Takes a described chain out of the free list and puts it into the available ring.
    #[inline]
    fn offer(&mut self, head: u16, chain: InFlight) {
        self.free_first = self.free_next.get(usize::from(chain.last)).copied().unwrap_or(0);
        self.free_count -= chain.descriptors;
        if let Some(slot) = self.in_flight.get_mut(usize::from(head)) {
            *slot = chain;
        }
        self.in_flight_count += 1;
        let next = self.made_available.next();
        if let Some(shadow) = self.avail_shadow.get_mut(usize::from(next & (self.size - 1)))
            && *shadow != head
        {
            *shadow = head;
            self.avail.store(next, head);
        }
        self.made_available.advance();
    }

    /// Describes the pieces by free descriptors from `head` on, in the order of the
    /// free list. Returns the last one.
    #[inline]
    fn chain(&mut self, head: u16, pieces: &[Buffer]) -> u16 {
        let mut index = head;
        for (at, piece) in pieces.iter().enumerate() {
            if at + 1 == pieces.len() {
                self.put_descriptor(index, self.describe(piece, None));
                break;
            }
            let next = self.free_next.get(usize::from(index)).copied().unwrap_or(0);
            self.put_descriptor(index, self.describe(piece, Some(next)));
            index = next;
        }
        index
    }

    fn fill_table(
        &self,
        tables: &IndirectTables,
        head: u16,
        pieces: &[Buffer],
    ) -> Result<Descriptor, AddError> {
        let offset = tables.offset + IndirectTables::len(tables.entries, head);
        for (at, piece) in (0_u16..).zip(pieces) {
            let next = (usize::from(at) + 1 < pieces.len()).then_some(at + 1);
            let halves = self.describe(piece, next).halves();
            let place = offset + u64::from(at) * u64::from(DESC_LEN);
            let stored =
                self.memory.store_u64(place, halves[0]).and(self.memory.store_u64(place + 8, halves[1]));
            stored.map_err(|_| AddError::Invalid)?;
        }
        let len = DESC_LEN * pieces.len() as u32;
        Ok(Descriptor::new(self.iova_base.wrapping_add(offset), len, Descriptor::INDIRECT, 0))
    }

    #[inline]
    fn describe(&self, piece: &Buffer, next: Option<u16>) -> Descriptor {
        let flags = if piece.writable { Descriptor::WRITE } else { 0 }
            | if next.is_some() { Descriptor::NEXT } else { 0 };
        Descriptor::new(self.iova_base.wrapping_add(piece.offset), piece.len, flags, next.unwrap_or(0))
    }

    #[inline]
    fn put_descriptor(&mut self, index: u16, descriptor: Descriptor) {
        let halves = descriptor.halves();
        if let Some(shadow) = self.desc_shadow.get_mut(usize::from(index))
            && *shadow != halves
        {
            *shadow = halves;
            self.desc.store(index, halves);
        }
    }

    #[inline]
    pub(crate) fn publish(&mut self) {
        self.made_available.publish();
    }

    #[inline]
    pub(crate) fn needs_kick(&mut self) -> bool {
        self.made_available.needs_notification()
    }

    pub(crate) fn set_calls(&mut self, enabled: bool) -> Result<bool, DriverFault> {
        if enabled {
            return self.set_calls_after(1);
        }
        self.completed.ask_for_none();
        Ok(self.poll_used()? > 0)
    }

    pub(crate) fn set_calls_after(&mut self, count: u16) -> Result<bool, DriverFault> {
        let asked = self.completed.ask_for(count);
        Ok(self.poll_used()? >= asked)
    }

    #[inline]
    pub(crate) fn poll_used(&mut self) -> Result<u16, DriverFault> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let index = self.completed.observe();
        let new = index.wrapping_sub(self.completed.next());
        if new > self.in_flight_count {
            return Err(self.broken(DriverFaultKind::UsedJump, u32::from(index)));
        }
        self.completed.accept(index);
        Ok(new)
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
        let mut ready = usize::from(self.completed.known());
        if ready < budget {
            ready = usize::from(self.poll_used()?);
        }
        let wanted = ready.min(budget);
        for reaped in 0..wanted {
            let taken = match self.in_order {
                // The one fetch of this element.
                false => {
                    let [id, len] = self.used.load(self.completed.next());
                    self.take_back(id, len)
                }
                true => self.take_back_in_order(),
            };
            match taken {
                Ok(completion) => completions.push(completion),
                Err(fault) => return if reaped == 0 { Err(fault) } else { Ok(reaped) },
            }
            self.completed.advance();
        }
        Ok(wanted)
    }

    /// Takes back the buffer that has been with the device for longest.
    fn take_back_in_order(&mut self) -> Result<Completion, DriverFault> {
        let next = self.completed.next();
        let (id, len) = match self.done_up_to {
            Some(said) => said,
            None => {
                // The one fetch of this element.
                let [id, len] = self.used.load(next);
                match self.in_flight.get(id as usize) {
                    Some(slot) if slot.descriptors > 0 => (id, len),
                    _ => return Err(self.broken(DriverFaultKind::UsedId, id)),
                }
            }
        };
        // It was made available at the index at which it is used.
        let head = self.avail_shadow.get(usize::from(next & (self.size - 1))).copied().unwrap_or(0);
        if u32::from(head) == id {
            self.done_up_to = None;
            return self.take_back(id, len);
        }
        // It is wholly done with, and nothing was said of it.
        self.done_up_to = Some((id, len));
        let whole = self.in_flight.get(usize::from(head)).map_or(0, |slot| slot.writable_len);
        self.take_back(head.into(), whole)
    }

    #[inline]
    fn take_back(&mut self, id: u32, len: u32) -> Result<Completion, DriverFault> {
        let slot = self.in_flight.get_mut(id as usize).filter(|slot| slot.descriptors > 0);
        let Some(slot) = slot else {
            return Err(self.broken(DriverFaultKind::UsedId, id));
        };
        if len > slot.writable_len {
            return Err(self.broken(DriverFaultKind::UsedLength, len));
        }
        let InFlight { token, descriptors, last, .. } = std::mem::take(slot);
        // The chain's descriptors are linked in the free list's own order already.
        let head = id as u16;
        if self.free_count == 0 {
            self.free_first = head;
        } else if let Some(link) = self.free_next.get_mut(usize::from(self.free_last)) {
            *link = head;
        }
        self.free_last = last;
        self.free_count += descriptors;
        self.in_flight_count -= 1;
        Ok(Completion { token, len })
    }

    /// The first fault stays.
    #[cold]
    fn broken(&mut self, kind: DriverFaultKind, value: u32) -> DriverFault {
        *self.fault.get_or_insert(DriverFault { kind, vring: self.vring, value })
    }
}
