//! The device half of a split virtqueue (virtio 1.3, 2.7), over memory that the
//! driver's VM can rewrite at any moment.
//!
//! Owns: private copies of both indices and of the last used elements; each shared
//! field is fetched once, validated, and the copy is used. Never touches a buffer's
//! contents, never notifies anybody: it says whether to.
//!
//! A ring that breaks the rules yields a [`Fault`] and is dead until it is made anew.
//! Chains that were popped before the fault was met stay good and can be completed.
//!
//! What the mapping table does not show is no fault where the owner has an IOMMU: see
//! [`OnMiss`].

use vhost_pci_device::abi::FaultKind;
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::index::{Consumer, Producer, Wish};
use super::layout::{FLAGS_AT, INDEX_AT, SLOTS_AT, avail_event, used_event};
use crate::ring::chain::{ChainBurst, Descriptor, Direction};
use crate::ring::device::{Fault, MAX_CHAIN};
use crate::ring::features::RingFeatures;
use crate::ring::layout::RingConfig;
use crate::ring::miss::{Finding, Miss, OnMiss};
use crate::ring::table::{open_table, wrong};
use crate::ring::walk::{Broken, Lookup, Stop, Usual, Walk};
use crate::ring::word::Word;
use crate::shm::{SharedMemory, ShmError, Slots, Word16};
use crate::translate::Translation;

/// The device half of one split vring.
#[derive(Debug)]
pub struct SplitDevice {
    vring: u16,
    size: u16,
    /// Descriptors that one chain may have.
    chain_limit: u16,
    indirect: bool,
    desc: Slots<16>,
    avail: Slots<2>,
    used: Slots<8>,
    available: Consumer<Word16>,
    completed: Producer<Word16>,
    window: SharedMemory,
    lookup: Lookup,
    /// For chains that are only looked at.
    ahead: ChainBurst,
    /// The used elements as this side last wrote them: a store that would change
    /// nothing would only take the cache line from the driver's CPU.
    used_shadow: Box<[[u32; 2]]>,
    /// The private copy of an indirect table.
    table: Vec<u8>,
    fault: Option<Fault>,
}

impl SplitDevice {
    /// Starts to serve vring number `vring`, at the used ring's own index
    /// (`docs/vhost-pci-device.md`, 8.2): what was available but not used before is
    /// popped again.
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
        let word = |offset| Word16::new(window, offset).map_err(outside);
        let used_index = word(places.used + INDEX_AT)?;
        // The one load of the used index: afterwards the private copy counts.
        let start = Word::load(&used_index);
        let (kicks, calls) = match features.event_idx {
            true => (
                Wish::Event { word: word(avail_event(&places))? },
                Wish::Event { word: word(used_event(&places))? },
            ),
            false => (
                Wish::Flag { word: word(places.used + FLAGS_AT)?, bit: VRING_USED_F_NO_NOTIFY as u16 },
                Wish::Flag { word: word(places.avail + FLAGS_AT)?, bit: VRING_AVAIL_F_NO_INTERRUPT as u16 },
            ),
        };
        Ok(Self {
            vring,
            size: places.size,
            chain_limit: places.size.min(MAX_CHAIN),
            indirect: features.indirect,
            desc: Slots::new(window, places.desc, places.size).map_err(outside)?,
            avail: Slots::new(window, places.avail + SLOTS_AT, places.size).map_err(outside)?,
            used: Slots::new(window, places.used + SLOTS_AT, places.size).map_err(outside)?,
            available: Consumer::new(word(places.avail + INDEX_AT)?, kicks, start),
            completed: Producer::new(used_index, calls, start),
            window: window.clone(),
            lookup: Lookup::new(translation),
            ahead: ChainBurst::default(),
            // No element has this id, so each slot's first element is stored.
            used_shadow: vec![[u32::MAX; 2]; usize::from(places.size)].into(),
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

    #[inline]
    pub(crate) fn poll_avail(&mut self) -> Result<u16, Fault> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let index = self.available.observe();
        // The driver owns `size` slots, of which those after the used index that it
        // can know may be filled. It never takes one back.
        let outstanding = index.wrapping_sub(self.completed.published());
        let new = index.wrapping_sub(self.available.next());
        if outstanding > self.size || new > self.size {
            return Err(self.broken((FaultKind::AvailJump, u64::from(index))));
        }
        self.available.accept(index);
        Ok(new)
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
        let mut ready = usize::from(self.available.known());
        if ready < budget {
            ready = usize::from(self.poll_avail()?);
        }
        let wanted = ready.min(budget);
        let usual = Usual::of(direction);
        for popped in 0..wanted {
            let at = self.available.next();
            let mark = burst.mark();
            // The one fetch of this slot.
            let head = self.avail.load(at);
            match self.pop_chain(at, head, &usual, direction, burst, mark) {
                Ok(()) => self.available.advance(),
                Err(Stop::Broken(broken)) => {
                    burst.abandon(mark);
                    let fault = self.broken(broken);
                    return if popped == 0 { Err(fault) } else { Ok(popped) };
                }
                Err(Stop::Missing) => {
                    burst.abandon(mark);
                    self.look_ahead(wanted - popped, direction);
                    return Ok(popped);
                }
            }
        }
        Ok(wanted)
    }

    /// Notes what the chains behind the next one lack, so that it can be asked for in one
    /// go. They are popped, and checked, later.
    #[cold]
    fn look_ahead(&mut self, count: usize, direction: Direction) {
        let mut ahead = std::mem::take(&mut self.ahead);
        for step in 1..count {
            ahead.clear();
            // `count` is at most the ring's size.
            let at = self.available.next().wrapping_add(step as u16);
            let head = self.avail.load(at);
            let result = self.pop_chain(at, head, &Usual::of(direction), direction, &mut ahead, 0);
            if self.lookup.misses.is_full() || matches!(result, Err(Stop::Broken(_))) {
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
        debug_assert!(count <= usize::from(self.available.next().wrapping_sub(self.completed.next())));
        self.available.put_back(count as u16);
    }

    pub(crate) fn take_back_used(&mut self) {
        self.completed.take_back();
    }

    /// Appends the chain at an index of the available ring (2.7.5, 2.7.5.3), whose slot
    /// says `head`.
    #[inline]
    fn pop_chain(
        &mut self,
        at: u16,
        head: u16,
        usual: &Usual,
        direction: Direction,
        burst: &mut ChainBurst,
        mark: usize,
    ) -> Result<(), Stop> {
        if head >= self.size {
            return Err(Stop::Broken((FaultKind::DescriptorIndex, u64::from(head))));
        }
        // The one fetch of this descriptor.
        let first = Descriptor::from_halves(self.desc.load(head));
        // Nearly all chains of a network card: one buffer, in the mapping of the one before.
        if first.is_usual(usual)
            && let Some(segment) = usual.segment(first.addr, first.len, &self.lookup.translation)
        {
            burst.push_one(head, segment);
            return Ok(());
        }
        self.pop_walking(Walk::new(at, direction, mark), head, first, burst)
    }

    /// The same, descriptor by descriptor.
    fn pop_walking(
        &mut self,
        mut walk: Walk,
        head: u16,
        first: Descriptor,
        burst: &mut ChainBurst,
    ) -> Result<(), Stop> {
        let mut descriptor = first;
        for walked in 1..=self.chain_limit {
            if descriptor.is_indirect() {
                self.pop_table(&descriptor, self.chain_limit + 1 - walked, &mut walk, burst)?;
                return walk.finish(head, burst);
            }
            walk.take(&descriptor, &mut self.lookup, burst)?;
            let Some(index) = descriptor.next() else {
                return walk.finish(head, burst);
            };
            if walked == self.chain_limit {
                break;
            }
            if index >= self.size {
                return Err(Stop::Broken((FaultKind::DescriptorIndex, u64::from(index))));
            }
            // The one fetch of this descriptor.
            descriptor = Descriptor::from_halves(self.desc.load(index));
        }
        Err(Stop::Broken((FaultKind::ChainTooLong, u64::from(self.chain_limit))))
    }

    /// Appends the descriptors of an indirect table (2.7.5.3), which may have `limit` at most.
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
        let mut index = 0_u16;
        for _ in 0..entries.len() {
            // `index` is below their number: the first is 0, and the others are checked.
            let Some(entry) = entries.get(usize::from(index)) else { break };
            let value = u128::from_le_bytes(*entry);
            let entry = Descriptor::from_halves([value as u64, (value >> 64) as u64]);
            if entry.is_indirect() {
                return Err(wrong(descriptor));
            }
            walk.take(&entry, &mut self.lookup, burst)?;
            match entry.next() {
                Some(next) if usize::from(next) >= entries.len() => {
                    return Err(Stop::Broken((FaultKind::DescriptorIndex, u64::from(next))));
                }
                Some(next) => index = next,
                None => return Ok(()),
            }
        }
        Err(Stop::Broken((FaultKind::ChainTooLong, entries.len() as u64)))
    }

    #[inline]
    pub(crate) fn push_used(&mut self, head: u16, written: u32) {
        let next = self.completed.next();
        debug_assert_ne!(next, self.available.next(), "more chains completed than popped");
        let element = [u32::from(head), written];
        let slot = usize::from(next & (self.size - 1));
        if let Some(shadow) = self.used_shadow.get_mut(slot)
            && *shadow != element
        {
            *shadow = element;
            self.used.store(next, element);
        }
        self.completed.advance();
    }

    #[inline]
    pub(crate) fn flush_used(&mut self) {
        self.completed.publish();
    }

    #[inline]
    pub(crate) fn needs_call(&mut self) -> bool {
        self.completed.needs_notification()
    }

    pub(crate) fn set_kicks(&mut self, enabled: bool) -> Result<bool, Fault> {
        if enabled {
            self.available.ask_for(1);
        } else {
            self.available.ask_for_none();
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
