//! The device half of a split virtqueue (virtio 1.3, 2.7), over memory that the
//! driver's VM can rewrite at any moment.
//!
//! Owns: private copies of both indices and of the last used elements; each shared
//! field is fetched once, validated, and the copy is used. Never touches a buffer's
//! contents, never notifies anybody: it says whether to.
//!
//! A ring that breaks the rules yields a [`Fault`] and is dead until it is made anew.
//! Chains that were popped before the fault was met stay good and can be completed.

use std::fmt;

use vhost_pci_device::abi::FaultKind;
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::chain::{ChainBurst, Descriptor, Direction, Segment};
use super::index::{Consumer, Producer, Word};
use super::layout::{DESC_LEN, FLAGS_AT, INDEX_AT, RingConfig, SLOTS_AT};
use crate::shm::{SharedMemory, ShmError, Slots, Word16};
use crate::translate::{Access, Translation};

/// The most descriptors of one chain, in the ring and an indirect table together:
/// what Linux's vhost takes (UIO_MAXIOV). A ring smaller than that sets the limit
/// itself (virtio 1.3, 2.7.5.3.1).
pub const MAX_CHAIN: u16 = 1024;

/// What is wrong with a vring: its driver broke the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Fault {
    /// What rule it broke.
    pub kind: FaultKind,
    /// The owner's vring number.
    pub vring: u16,
    /// What was seen: an index, a length or an address, as the kind has it.
    pub value: u64,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vring {} is broken: {} ({:#x})", self.vring, self.kind.name(), self.value)
    }
}

/// A kind of fault with what was seen, before it is known which ring it is about.
type Broken = (FaultKind, u64);

/// The device half of one vring.
#[derive(Debug)]
pub struct DeviceRing {
    vring: u16,
    size: u16,
    /// Descriptors that one chain may have.
    chain_limit: u16,
    indirect_allowed: bool,
    desc: Slots<16>,
    avail: Slots<2>,
    used: Slots<8>,
    available: Consumer<Word16>,
    completed: Producer<Word16>,
    window: SharedMemory,
    translation: Translation,
    /// The used elements as this side last wrote them: a store that would change
    /// nothing would only take the cache line from the driver's CPU.
    used_shadow: Box<[[u32; 2]]>,
    /// The private copy of an indirect table.
    table: Vec<u8>,
    fault: Option<Fault>,
}

impl DeviceRing {
    /// Starts to serve vring number `vring`, at the used ring's own index
    /// (`docs/vhost-pci-device.md`, 8.2): what was available but not used before is
    /// popped again.
    ///
    /// `indirect_allowed`: the driver accepted VIRTIO_F_INDIRECT_DESC.
    /// Errors: [`FaultKind::Geometry`].
    pub fn new(
        vring: u16,
        config: &RingConfig,
        window: &SharedMemory,
        mut translation: Translation,
        indirect_allowed: bool,
    ) -> Result<Self, Fault> {
        let geometry = |value| Fault { kind: FaultKind::Geometry, vring, value };
        let places = config.place(&mut translation).map_err(|_| geometry(u64::from(config.size())))?;
        let outside = |error: ShmError| match error {
            ShmError::OutOfBounds { offset, .. } | ShmError::Misaligned { offset, .. } => geometry(offset),
        };
        let word = |offset| Word16::new(window, offset).map_err(outside);
        let used_index = word(places.used + INDEX_AT)?;
        // The one load of the used index: afterwards the private copy counts.
        let start = Word::load(&used_index);
        Ok(Self {
            vring,
            size: places.size,
            chain_limit: places.size.min(MAX_CHAIN),
            indirect_allowed,
            desc: Slots::new(window, places.desc, places.size).map_err(outside)?,
            avail: Slots::new(window, places.avail + SLOTS_AT, places.size).map_err(outside)?,
            used: Slots::new(window, places.used + SLOTS_AT, places.size).map_err(outside)?,
            available: Consumer::new(
                word(places.avail + INDEX_AT)?,
                word(places.used + FLAGS_AT)?,
                VRING_USED_F_NO_NOTIFY as u16,
                start,
            ),
            completed: Producer::new(
                used_index,
                word(places.avail + FLAGS_AT)?,
                VRING_AVAIL_F_NO_INTERRUPT as u16,
                start,
            ),
            window: window.clone(),
            translation,
            // No element has this id, so each slot's first element is stored.
            used_shadow: vec![[u32::MAX; 2]; usize::from(places.size)].into(),
            table: Vec::new(),
            fault: None,
        })
    }

    /// The owner's vring number.
    pub fn vring(&self) -> u16 {
        self.vring
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Why the ring is dead, if it is.
    pub fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// How many chains can be popped: one acquire load of the available index.
    /// Errors: [`FaultKind::AvailJump`].
    #[inline]
    pub fn poll_avail(&mut self) -> Result<u16, Fault> {
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

    /// Pops up to `budget` chains and appends them to `burst`. Returns how many.
    ///
    /// A broken chain ends the burst: the chains before it are returned first, and
    /// the fault by the next call.
    #[inline]
    pub fn pop_burst(
        &mut self,
        budget: usize,
        direction: Direction,
        burst: &mut ChainBurst,
    ) -> Result<usize, Fault> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let mut ready = usize::from(self.available.known());
        if ready < budget {
            ready = usize::from(self.poll_avail()?);
        }
        let wanted = ready.min(budget);
        for popped in 0..wanted {
            let head = self.avail.load(self.available.next());
            let mark = burst.mark();
            if let Err(broken) = self.pop_chain(head, direction, burst, mark) {
                burst.abandon(mark);
                let fault = self.broken(broken);
                return if popped == 0 { Err(fault) } else { Ok(popped) };
            }
            self.available.advance();
        }
        Ok(wanted)
    }

    /// Appends one chain (2.7.5, 2.7.5.3).
    #[inline]
    fn pop_chain(
        &mut self,
        head: u16,
        direction: Direction,
        burst: &mut ChainBurst,
        mark: usize,
    ) -> Result<(), Broken> {
        let mut walk = Walk { direction, writable_seen: false, len: 0 };
        let mut index = head;
        for walked in 0..self.chain_limit {
            if index >= self.size {
                return Err((FaultKind::DescriptorIndex, u64::from(index)));
            }
            // The one fetch of this descriptor.
            let descriptor = Descriptor::from_halves(self.desc.load(index));
            if descriptor.is_indirect() {
                self.pop_table(&descriptor, self.chain_limit - walked, &mut walk, burst)?;
                burst.finish(head, mark, walk.len);
                return Ok(());
            }
            walk.take(&descriptor, &mut self.translation, burst)?;
            match descriptor.next() {
                Some(next) => index = next,
                None => {
                    burst.finish(head, mark, walk.len);
                    return Ok(());
                }
            }
        }
        Err((FaultKind::ChainTooLong, u64::from(self.chain_limit)))
    }

    /// Appends the descriptors of an indirect table (2.7.5.3), which may have `limit`
    /// at most. The table is copied once; no byte of it is fetched again.
    fn pop_table(
        &mut self,
        descriptor: &Descriptor,
        limit: u16,
        walk: &mut Walk,
        burst: &mut ChainBurst,
    ) -> Result<(), Broken> {
        let wrong = (FaultKind::Indirect, u64::from(descriptor.len));
        let count = descriptor.len / DESC_LEN;
        if !self.indirect_allowed
            || descriptor.next().is_some()
            || count == 0
            || count > u32::from(limit)
            || !descriptor.len.is_multiple_of(DESC_LEN)
        {
            return Err(wrong);
        }
        // The descriptor's write flag means nothing here (2.7.5.3.2).
        let offset = self
            .translation
            .translate(descriptor.addr, descriptor.len, Access::READ)
            .map_err(|kind| (kind, descriptor.addr))?;
        // At most MAX_CHAIN descriptors: a bounded buffer, allocated once.
        self.table.resize(descriptor.len as usize, 0);
        self.window.read(offset, &mut self.table).map_err(|_| (FaultKind::Unmapped, descriptor.addr))?;
        let (entries, _) = self.table.as_chunks::<{ DESC_LEN as usize }>();
        let mut index = 0_u16;
        for _ in 0..count {
            // `index` is below `count`: the first is 0, and the others are checked.
            let Some(entry) = entries.get(usize::from(index)) else { break };
            let value = u128::from_le_bytes(*entry);
            let entry = Descriptor::from_halves([value as u64, (value >> 64) as u64]);
            if entry.is_indirect() {
                return Err(wrong);
            }
            walk.take(&entry, &mut self.translation, burst)?;
            match entry.next() {
                Some(next) if u32::from(next) >= count => {
                    return Err((FaultKind::DescriptorIndex, u64::from(next)));
                }
                Some(next) => index = next,
                None => return Ok(()),
            }
        }
        Err((FaultKind::ChainTooLong, u64::from(count)))
    }

    /// Gives a popped chain back with the number of bytes that were written to it.
    /// The driver sees it after [`Self::flush_used`].
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) {
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

    /// Shows all pushed elements to the driver, by one release store of the index.
    #[inline]
    pub fn flush_used(&mut self) {
        self.completed.publish();
    }

    /// Whether the driver wants a call for what was flushed since this was last
    /// asked (2.7.7.2, without EVENT_IDX). Linux drivers of network cards rely on calls of
    /// their transmit queues, too.
    #[inline]
    pub fn needs_call(&mut self) -> bool {
        self.completed.needs_notification()
    }

    /// Asks the driver for kicks, or not to kick (2.7.10). Returns whether chains are
    /// waiting already: after enabling, who gets `true` must pop, not sleep.
    pub fn set_kicks(&mut self, enabled: bool) -> Result<bool, Fault> {
        self.available.set_notifications(enabled);
        Ok(self.poll_avail()? > 0)
    }

    /// Marks the ring dead for a rule that only the user of its buffers can check,
    /// such as [`FaultKind::Length`].
    #[cold]
    pub fn fail(&mut self, kind: FaultKind, value: u64) -> Fault {
        self.broken((kind, value))
    }

    /// The first fault stays.
    #[cold]
    fn broken(&mut self, (kind, value): Broken) -> Fault {
        *self.fault.get_or_insert(Fault { kind, vring: self.vring, value })
    }
}

/// What has been seen of one chain.
struct Walk {
    direction: Direction,
    writable_seen: bool,
    len: u64,
}

impl Walk {
    #[inline]
    fn take(
        &mut self,
        descriptor: &Descriptor,
        translation: &mut Translation,
        burst: &mut ChainBurst,
    ) -> Result<(), Broken> {
        let writable = descriptor.is_writable();
        let fits = match self.direction {
            Direction::DeviceReads => !writable,
            Direction::DeviceWrites => writable,
            // 2.7.4.2: readable parts come first.
            Direction::Both => writable || !self.writable_seen,
        };
        if !fits {
            return Err((FaultKind::Direction, descriptor.addr));
        }
        self.writable_seen |= writable;
        let access = if writable { Access::WRITE } else { Access::READ };
        let offset = translation
            .translate(descriptor.addr, descriptor.len, access)
            .map_err(|kind| (kind, descriptor.addr))?;
        self.len += u64::from(descriptor.len);
        burst.push_segment(Segment { offset, len: descriptor.len, writable });
        Ok(())
    }
}
