//! What the peer's driver has asked for and has not got yet, and the one question
//! that is open with the owner's VMM. Data and its bounds; what is done with it is in
//! [`serve`](super::serve).

use std::collections::{BTreeSet, VecDeque};
use std::time::Instant;

use iommu::{Access, Iova, PAGE_SIZE, Span};
use vhost_pci_device::abi;

use super::denials::Denials;
use crate::link::message::{CommandId, MissId};

/// What a command wants done with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Show it in the window.
    Map,
    /// Copy it to the peer.
    Fetch,
    /// Copy the peer's bytes to it.
    Store,
}

/// A command that waits.
#[derive(Clone, Debug)]
pub struct Want {
    /// The command to answer.
    pub command: CommandId,
    /// What it wants done.
    pub task: Task,
    /// With which range.
    pub span: Span<Iova>,
    /// For which access.
    pub access: Access,
    /// When it is answered in any case.
    pub deadline: Instant,
}

/// A miss that the owner's VMM was told of and has not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The miss.
    pub id: MissId,
    /// The page.
    pub page: Iova,
    /// Reading, or writing: never both.
    pub access: Access,
    /// Whether an update for the page came meanwhile, and allowed the access.
    pub outcome: Option<bool>,
    /// Whether the device stopped since: what is told now proves nothing.
    pub stale: bool,
}

impl Asked {
    /// The page's addresses.
    pub fn span(&self) -> Option<Span<Iova>> {
        Span::new(self.page, PAGE_SIZE).ok()
    }
}

/// Counts of what the peer asked for and what the owner was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DemandCounters {
    /// Misses that the owner's VMM was told of.
    pub misses: u64,
    /// IOTLB updates taken.
    pub updates: u64,
    /// IOTLB invalidations taken.
    pub invalidations: u64,
    /// Messages of pushed changes taken.
    pub pushes: u64,
    /// Commands refused because the owner's IOMMU does not allow them.
    pub denied: u64,
    /// Commands turned away because too many were denied.
    pub limited: u64,
    /// MAP commands.
    pub maps: u64,
    /// FETCH commands carried out.
    pub fetches: u64,
    /// Their bytes.
    pub bytes_fetched: u64,
    /// STORE commands carried out.
    pub stores: u64,
    /// Their bytes.
    pub bytes_stored: u64,
    /// Ranges taken out of the window to make room.
    pub evictions: u64,
}

/// What is open between peer, link and owner.
#[derive(Debug, Default)]
pub struct Demand {
    /// Commands, the oldest first; the control ring bounds them.
    pub wants: VecDeque<Want>,
    /// Ranges that last: the access that is not known of them is worth a question.
    pub probes: VecDeque<(Iova, Access)>,
    /// The question that is open.
    pub asked: Option<Asked>,
    /// How often the owner may be asked in vain.
    pub denials: Denials,
    /// Ranges that last and can be shown: together, soon, so that neighbours become one.
    pub lasting: BTreeSet<Iova>,
    /// When they are.
    pub show_at: Option<Instant>,
    /// Vrings whose memory the owner's IOMMU does not allow; not asked for again.
    pub refused_vrings: BTreeSet<u32>,
    /// Answers in a row that a miss was told, without an update having come.
    pub untold: u32,
    next_miss: u64,
}

impl Demand {
    /// A new open question.
    pub fn ask(&mut self, page: Iova, access: Access) -> Asked {
        self.next_miss += 1;
        let asked = Asked { id: MissId(self.next_miss), page, access, outcome: None, stale: false };
        self.asked = Some(asked);
        asked
    }

    /// When something here has to be looked at.
    pub fn deadline(&self) -> Option<Instant> {
        let wants = self.wants.iter().map(|want| want.deadline);
        // While something is asked about, its answer is waited for, not a time.
        let show_at = self.show_at.filter(|_| self.probes.is_empty());
        let probe_at = self.denials.allowed_at().filter(|_| self.asked.is_none() && !self.probes.is_empty());
        wants.chain(show_at).chain(probe_at).min()
    }

    /// The peer's driver is gone, and its commands with it.
    pub fn forget_peer(&mut self) {
        self.wants.clear();
        self.probes.clear();
        self.lasting.clear();
        self.show_at = None;
    }

    /// The owner's VMM is gone, or its device stopped. Gives the commands, to be answered. A
    /// question stays open: its answer must not be taken for that to a later one, and a VMM
    /// that does not answer is asked no more.
    pub fn forget_owner(&mut self) -> VecDeque<Want> {
        let wants = std::mem::take(&mut self.wants);
        self.forget_peer();
        if let Some(asked) = &mut self.asked {
            asked.stale = true;
        }
        self.refused_vrings.clear();
        wants
    }
}

/// Reads MAP, FETCH and STORE (`docs/vhost-pci-device.md`, 9.4). `readable` and `writable`
/// are the bytes behind request and response. `None` if a field is not allowed.
pub fn want(
    command: CommandId,
    request: &abi::ControlRequest,
    readable: u64,
    writable: u64,
    deadline: Instant,
) -> Option<Want> {
    let len = request.len.value();
    let span = Span::new(Iova::new(request.value.value()), len).ok()?;
    let copy = u64::from(abi::MAX_COPY);
    let (task, access, allowed) = match request.command.value() {
        abi::CTRL_MAP => (Task::Map, Access::from_bits(request.flags.value())?, len <= abi::MAX_MAP),
        abi::CTRL_FETCH => (Task::Fetch, Access::Read, len <= copy && len <= writable),
        abi::CTRL_STORE => (Task::Store, Access::Write, len <= copy && len <= readable),
        _ => return None,
    };
    allowed.then_some(Want { command, task, span, access, deadline })
}
