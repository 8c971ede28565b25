//! The IOMMU of the owner's VM: the device whose requests its guest makes, and what
//! the front-end says of it to the broker. One lock is around both, as QEMU's is: an
//! answer to the broker never tells of a mapping that was taken away before.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu::virtio_iommu::{Change, EndpointId, Iommu, Outcome, Reached, Reserved, Settings, Untranslated};
use iommu::{Access, Gpa, Iova, Span};
use zerocopy::IntoBytes;

use super::OwnerMemory;
use super::iotlb::{
    IOMMU_PUSH_MAX, IOMMU_PUSH_RESET, IotlbMessage, PushEntry, PushHead, VHOST_IOTLB_INVALIDATE,
    VHOST_IOTLB_UPDATE, VHOST_USER_IOMMU_PUSH, VHOST_USER_IOTLB_MSG,
};
use super::vmm::Wire;

/// The owner's network card, as the IOMMU numbers it: PCI 00:01.0.
pub const ENDPOINT: EndpointId = EndpointId(8);
/// The doorbell of message-signalled interrupts on x86, which no address may be in.
const MSI_DOORBELL: std::ops::RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;
/// The pages that page tables have, bytes: what a translation covers like QEMU's.
const PAGE_SIZES: [u64; 3] = [1 << 30, 2 << 20, 4 << 10];

/// How a front-end tells the broker of its IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IommuProtocol {
    /// vhost-user's IOTLB messages, with the access that mappings really allow, and
    /// whole mappings at once.
    Iotlb,
    /// vhost-user's IOTLB messages as QEMU 11.1 sends them: an update covers one page
    /// (4 KiB, 2 MiB or 1 GiB) and says read-write whatever the mapping allows; only
    /// the direction that was asked for is checked. At start, the used rings' pages
    /// come unasked.
    IotlbLikeQemu,
    /// The extension `VHOST_USER_PROTOCOL_F_IOMMU_PUSH`.
    Push,
}

/// Why the broker does not follow the IOMMU. What the guest asked for is done.
#[derive(Debug, thiserror::Error)]
pub enum TellError {
    /// The connection is broken, and is closed.
    #[error("telling the broker of the IOMMU: {0}")]
    Broken(#[from] io::Error),
    /// The broker did not carry it out.
    #[error("the broker answered {answer} when told of the IOMMU")]
    Refused {
        /// What it answered.
        answer: u64,
    },
}

/// What has passed between the front-end and the broker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IommuCounts {
    /// Misses that were answered with an update.
    pub misses: u64,
    /// Misses of what is not mapped, or not for that access.
    pub faults: u64,
    /// Accesses that the broker reported for not being allowed.
    pub denied: u64,
    /// Invalidations that were answered.
    pub invalidations: u64,
    /// Entries pushed.
    pub pushed: u64,
    /// Times that the broker refused, or could not be told.
    pub failures: u64,
}

/// The IOMMU, to be shared between the guest's driver and the front-end.
#[derive(Clone, Debug)]
pub struct OwnerIommu {
    state: Arc<Mutex<State>>,
}

/// The IOMMU, and where the memory is that its guest-physical addresses lead to.
#[derive(Debug)]
pub(super) struct State {
    device: Iommu,
    memory: Span<Gpa>,
    front_end_address: u64,
    /// While a device is started.
    told: Option<(Arc<Mutex<Wire>>, IommuProtocol)>,
    counts: IommuCounts,
}

impl OwnerIommu {
    /// An IOMMU with one endpoint, [`ENDPOINT`], which reaches nothing yet.
    ///
    /// # Errors
    /// `InvalidInput` for a memory that is empty.
    pub fn new(memory: &OwnerMemory) -> io::Result<Self> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let mut device = Iommu::new(Settings::default());
        let doorbell = Reserved { range: MSI_DOORBELL, msi: true };
        let added = device.add_endpoint(ENDPOINT, vec![doorbell]);
        added.map_err(|error| io::Error::other(error.to_string()))?;
        let state = State {
            device,
            memory: Span::new(Gpa::new(memory.guest_start()), memory.len()).map_err(invalid)?,
            front_end_address: memory.front_end_address(),
            told: None,
            counts: IommuCounts::default(),
        };
        Ok(Self { state: Arc::new(Mutex::new(state)) })
    }

    /// Carries out a virtio-iommu request of the guest's: the bytes of its readable
    /// part, and the length of its writable part. Returns the bytes of the answer,
    /// and how it went to tell the broker: what is unmapped is out of the broker's
    /// reach, and its peer's, when this returns without an error.
    ///
    /// An error does not undo the request, nor is it in the guest's answer: so it is
    /// in a VM, too.
    pub fn request(&self, readable: &[u8], writable_len: usize) -> (Vec<u8>, Result<(), TellError>) {
        let mut state = self.lock();
        let Outcome { response, changes } = state.device.request(readable, writable_len);
        let told = state.tell(&changes);
        (response, told)
    }

    /// Where an access of the device leads: guest-physical ranges, one for each mapping
    /// that it goes through.
    ///
    /// # Errors
    /// If it is not mapped, or not for that access.
    pub fn translate(&self, iova: u64, len: u64, wanted: Access) -> Result<Vec<Reached>, Untranslated> {
        self.lock().device.translate(ENDPOINT, Iova::new(iova), len, wanted)
    }

    /// What has passed since the IOMMU was made.
    pub fn counts(&self) -> IommuCounts {
        self.lock().counts
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Each method leaves it whole even if it panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a report of an access that was not allowed.
    pub(super) fn note_denied(&self, iova: u64, perm: u8) {
        self.lock().counts.denied += 1;
        tracing::debug!(iova, perm, "the device did what is not allowed");
    }

    /// Answers a miss: with an update, which the broker has taken before this returns,
    /// and the value of the miss's own reply.
    pub(super) fn answer_miss(&self, iova: u64, perm: u8) -> u64 {
        let mut state = self.lock();
        let Some((wire, protocol)) = state.told.clone() else { return 1 };
        let Some(update) = state.translation(protocol, iova, perm) else {
            state.counts.faults += 1;
            tracing::debug!(iova, perm, "the device asked for what is not mapped");
            return 1;
        };
        match state.send(&wire, VHOST_USER_IOTLB_MSG, update.as_bytes()) {
            Ok(()) => {
                state.counts.misses += 1;
                0
            }
            Err(error) => {
                state.failed(&error);
                1
            }
        }
    }
}

impl State {
    /// From now on changes are told on this connection.
    pub(super) fn start(&mut self, wire: &Arc<Mutex<Wire>>, protocol: IommuProtocol) {
        self.told = Some((wire.clone(), protocol));
    }

    /// From now on changes are told to nobody.
    pub(super) fn stop(&mut self) {
        self.told = None;
    }

    /// The message that answers a miss; `None` if there is a fault.
    pub(super) fn translation(&self, protocol: IommuProtocol, iova: u64, perm: u8) -> Option<IotlbMessage> {
        let asked = Access::from_bits(perm.into())?;
        let at = Iova::new(iova);
        let wanted = match (protocol, asked) {
            // QEMU asks for a write or for a read, never for both.
            (IommuProtocol::IotlbLikeQemu, Access::ReadWrite) => Access::Write,
            _ => asked,
        };
        let pieces = self.device.translate(ENDPOINT, at, 1, wanted).ok()?;
        let gpa = pieces.first()?.start();
        // The whole mapping, as far as there is memory; all memory in bypass mode.
        let (whole, first, access) = match self.device.mapping_at(ENDPOINT, at) {
            Some(mapping) => (mapping.iova, mapping.gpa, mapping.access()?),
            None => (self.memory.identity(), self.memory.start(), Access::ReadWrite),
        };
        let reached = Span::new(first, whole.len()).ok()?.intersection(self.memory)?;
        if !reached.contains(gpa) {
            return None;
        }
        let (span, perm) = match protocol {
            IommuProtocol::IotlbLikeQemu => (page_around(gpa, at, reached)?, Access::ReadWrite),
            _ => (reached, access),
        };
        Some(IotlbMessage {
            iova: iova.wrapping_sub(gpa.raw() - span.start().raw()),
            size: span.len(),
            user_addr: self.user_address(span.start())?,
            perm: perm.bits() as u8,
            kind: VHOST_IOTLB_UPDATE,
            reserved: [0; 6],
        })
    }

    fn user_address(&self, gpa: Gpa) -> Option<u64> {
        self.front_end_address.checked_add(self.memory.offset_of(gpa)?)
    }

    /// Tells the broker what changed, and waits until it has done its part.
    fn tell(&mut self, changes: &[Change]) -> Result<(), TellError> {
        let Some((wire, protocol)) = self.told.clone() else { return Ok(()) };
        let told = match protocol {
            IommuProtocol::Iotlb | IommuProtocol::IotlbLikeQemu => self.invalidate(&wire, protocol, changes),
            IommuProtocol::Push => {
                let entries: Vec<_> = changes.iter().filter_map(|change| self.entry(change)).collect();
                self.push(&wire, 0, &entries)
            }
        };
        told.inspect_err(|error| self.failed(error))
    }

    fn invalidate(
        &mut self,
        wire: &Mutex<Wire>,
        protocol: IommuProtocol,
        changes: &[Change],
    ) -> Result<(), TellError> {
        let mut result = Ok(());
        for change in changes {
            let span = match change {
                Change::Unmapped { iova, .. } => *iova,
                Change::BypassOff { .. } => self.memory.identity(),
                // A back-end finds out by a miss.
                Change::Mapped { .. } | Change::BypassOn { .. } => continue,
            };
            let whole = protocol == IommuProtocol::Iotlb;
            let spans = if whole { vec![span] } else { aligned_blocks(span) };
            for span in spans {
                let message = IotlbMessage {
                    iova: span.start().raw(),
                    size: span.len(),
                    user_addr: 0,
                    perm: 0,
                    kind: VHOST_IOTLB_INVALIDATE,
                    reserved: [0; 6],
                };
                // As QEMU, go on with the others: each is a promise of its own.
                match self.send(wire, VHOST_USER_IOTLB_MSG, message.as_bytes()) {
                    Ok(()) => self.counts.invalidations += 1,
                    Err(error) => result = result.and(Err(error)),
                }
            }
        }
        result
    }

    /// A change as a push has it; `None` for a range that leads outside the memory,
    /// which the device can as little reach as one that is not mapped.
    fn entry(&self, change: &Change) -> Option<PushEntry> {
        let identity = self.memory.identity();
        let (span, gpa, perm) = match *change {
            Change::Mapped { iova, gpa, access, .. } => (iova, Some(gpa), access.bits()),
            Change::Unmapped { iova, .. } => (iova, None, 0),
            Change::BypassOn { .. } => (identity, Some(self.memory.start()), Access::ReadWrite.bits()),
            Change::BypassOff { .. } => (identity, None, 0),
        };
        let user_addr = match gpa {
            Some(gpa) => {
                let reached = Span::new(gpa, span.len()).ok()?;
                self.memory.contains_span(reached).then(|| self.user_address(gpa)).flatten()?
            }
            None => 0,
        };
        let (iova, size) = (span.start().raw(), span.len());
        Some(PushEntry { iova, size, user_addr, perm: perm as u8, reserved: [0; 7] })
    }

    fn push(&mut self, wire: &Mutex<Wire>, flags: u32, entries: &[PushEntry]) -> Result<(), TellError> {
        let wire = wire.lock().unwrap_or_else(PoisonError::into_inner);
        self.push_on(&wire, flags, entries)
    }

    fn push_on(&mut self, wire: &Wire, mut flags: u32, entries: &[PushEntry]) -> Result<(), TellError> {
        let mut chunks = entries.chunks(IOMMU_PUSH_MAX);
        let first = chunks.next().unwrap_or_default();
        if first.is_empty() && flags == 0 {
            return Ok(());
        }
        for chunk in std::iter::once(first).chain(chunks) {
            // A chunk has 64 entries at most.
            let head = PushHead { count: chunk.len() as u32, flags };
            let body = [head.as_bytes(), chunk.as_bytes()].concat();
            done(wire.exchange(VHOST_USER_IOMMU_PUSH, &body)?)?;
            self.counts.pushed += chunk.len() as u64;
            flags = 0;
        }
        Ok(())
    }

    /// Tells everything that is mapped, to a broker that is to forget what it knew.
    pub(super) fn push_all(&mut self, wire: &Wire) -> Result<(), TellError> {
        let mapped = self.device.mappings(ENDPOINT).filter_map(|mapping| {
            let (iova, gpa, access) = (mapping.iova, mapping.gpa, mapping.access()?);
            Some(Change::Mapped { endpoint: ENDPOINT, iova, gpa, access })
        });
        let bypass = self.device.is_bypassed(ENDPOINT).then_some(Change::BypassOn { endpoint: ENDPOINT });
        let entries: Vec<_> = mapped.chain(bypass).filter_map(|change| self.entry(&change)).collect();
        self.push_on(wire, IOMMU_PUSH_RESET, &entries)
    }

    fn send(&self, wire: &Mutex<Wire>, request: u32, body: &[u8]) -> Result<(), TellError> {
        let wire = wire.lock().unwrap_or_else(PoisonError::into_inner);
        done(wire.exchange(request, body)?)
    }

    /// Notes a failure. A broken connection is not tried again.
    fn failed(&mut self, error: &TellError) {
        self.counts.failures += 1;
        match error {
            TellError::Broken(_) => self.told = None,
            // Once: a guest could cause one with each packet.
            TellError::Refused { .. } if self.counts.failures > 1 => return,
            TellError::Refused { .. } => {}
        }
        tracing::warn!("{error}");
    }
}

fn done(answer: u64) -> Result<(), TellError> {
    if answer == 0 { Ok(()) } else { Err(TellError::Refused { answer }) }
}

/// The largest page of page tables that has `gpa` in it, as mapped at `iova`, and is
/// wholly mapped.
fn page_around(gpa: Gpa, iova: Iova, mapped: Span<Gpa>) -> Option<Span<Gpa>> {
    PAGE_SIZES.iter().find_map(|size| {
        let within = gpa.raw() % size;
        let page = Span::new(Gpa::new(gpa.raw() - within), *size).ok()?;
        (iova.raw() % size == within && mapped.contains_span(page)).then_some(page)
    })
}

/// The range as blocks of which each is as long as a power of two that its start is a
/// multiple of: as QEMU cuts what it tells of an unmap.
fn aligned_blocks(span: Span<Iova>) -> Vec<Span<Iova>> {
    let mut blocks = Vec::new();
    let mut rest = Some(span);
    while let Some(span) = rest {
        let start = span.start().raw();
        let alignment = if start == 0 { 1 << 63 } else { start & start.wrapping_neg() };
        let block = alignment.min(1 << span.len().ilog2());
        blocks.extend(Span::new(span.start(), block));
        rest = span.at(block).and_then(|next| Span::new(next, span.len() - block).ok());
    }
    blocks
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn blocks(start: u64, len: u64) -> Vec<(u64, u64)> {
        let span = Span::new(Iova::new(start), len).unwrap();
        aligned_blocks(span).iter().map(|block| (block.start().raw(), block.len())).collect()
    }

    #[test]
    fn blocks_are_aligned_and_cover_the_range() {
        assert_eq!(blocks(0x1000, 0x1000), [(0x1000, 0x1000)]);
        assert_eq!(blocks(0x1000, 0x4000), [(0x1000, 0x1000), (0x2000, 0x2000), (0x4000, 0x1000)]);
        assert_eq!(blocks(0, u64::MAX)[0], (0, 1 << 63));
        assert_eq!(blocks(u64::MAX - 0xfff, 0x1000), [(u64::MAX - 0xfff, 0x1000)]);
    }

    #[test]
    fn a_page_is_as_large_as_both_addresses_allow() {
        let mapped = Span::new(Gpa::new(0x20_0000), 0x40_0000).unwrap();
        let page = |gpa, iova| page_around(Gpa::new(gpa), Iova::new(iova), mapped).unwrap();
        assert_eq!(page(0x20_1234, 0x8020_1234), Span::new(Gpa::new(0x20_0000), 2 << 20).unwrap());
        assert_eq!(page(0x20_1234, 0x8020_2234), Span::new(Gpa::new(0x20_1000), 4 << 10).unwrap());
    }
}
