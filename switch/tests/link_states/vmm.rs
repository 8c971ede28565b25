//! A peer's VMM, as far as the link can tell one: it carries out changes of its
//! window one after the other, and answers each. What it holds lives on after it
//! has left, until [`Vmm::dies`].

use std::collections::VecDeque;

use iommu::Placement;
use vhost_pci_device::abi;
use vhost_pci_switch::link::descriptor::MemoryFile;
use vhost_pci_switch::link::message::{Content, OpId, WindowOp, shown_at};

use crate::bench::WINDOW_LEN;

/// What a piece of the window is, told by its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    LinkArea,
    ControlArea,
    Witness,
    Fence,
    Log,
    Owner,
}

pub fn kind(content: &Content) -> Kind {
    match content.place(WINDOW_LEN).0.raw() {
        abi::LINK_OFFSET => Kind::LinkArea,
        abi::CONTROL_OFFSET => Kind::ControlArea,
        abi::FENCE_OFFSET => Kind::Fence,
        abi::LOG_OFFSET => Kind::Log,
        // A long one is at the window's end.
        _ if matches!(content, Content::Log(_)) => Kind::Log,
        abi::DATA_OFFSET.. => Kind::Owner,
        _ => Kind::Witness,
    }
}

#[derive(Clone, Debug)]
struct Mapped {
    content: Content,
    /// Which of all witness pages that were ever made it is.
    witness: Option<u64>,
}

#[derive(Clone, Debug)]
struct Asked {
    op: OpId,
    change: WindowOp,
    witness: Option<u64>,
    /// The device was reset so often when this was asked.
    epoch: u64,
    /// Whether it may be an unmap of what is not there.
    lenient: bool,
}

/// How the VMM takes the next change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Carries it out, then answers.
    Honest,
    /// Does nothing, and says so.
    Refuses,
    /// Answers at once, unmaps and maps of the owner's memory, and carries it out later, but in
    /// order.
    AnswersFirst,
}

#[derive(Debug, Default)]
pub struct Vmm {
    mapped: Vec<Mapped>,
    asked: VecDeque<Asked>,
    /// Answered, not carried out.
    late: VecDeque<Asked>,
    answer: Option<(OpId, Result<(), String>)>,
    epoch: u64,
    /// Refused something: what it is asked next need not fit.
    unruly: bool,
    /// What VMMs that left still hold.
    left_behind: Vec<Mapped>,
    /// Witness pages that the kernel lets nobody map any more.
    sealed: Vec<u64>,
}

impl Vmm {
    pub fn ask(&mut self, op: OpId, change: WindowOp, witness: Option<u64>, lenient: bool) {
        let epoch = self.epoch;
        self.asked.push_back(Asked { op, change, witness, epoch, lenient });
    }

    /// Takes the next change, unless an answer is still on its way. False if there
    /// was nothing to do.
    pub fn act(&mut self, manner: Manner) -> bool {
        if self.answer.is_some() {
            return false;
        }
        let Some(next) = self.asked.pop_front() else {
            return false;
        };
        let op = next.op;
        // As QEMU: a map that it answered before is done when it takes the next request.
        if self.late.iter().any(|late| matches!(late.change, WindowOp::Map(_))) {
            self.catch_up();
        }
        let result = match manner {
            // Without a witness the VMM's word is all there is: see `leaves`.
            Manner::Refuses if self.has_witness() || matches!(next.change, WindowOp::Map(_)) => {
                self.unruly = true;
                Err("change the window: the model says no".into())
            }
            // Where a reset came between, no witness is left to catch it: there, the
            // link can only take the VMM's word.
            Manner::AnswersFirst
                if matches!(next.change, WindowOp::Unmap(_)) && !next.lenient && next.epoch == self.epoch =>
            {
                self.late.push_back(next);
                Ok(())
            }
            Manner::AnswersFirst
                if matches!(&next.change, WindowOp::Map(content) if kind(content) == Kind::Owner)
                    && !next.lenient
                    && next.epoch == self.epoch =>
            {
                self.catch_up();
                self.late.push_back(next);
                Ok(())
            }
            _ => {
                self.catch_up();
                self.carry_out(next)
            }
        };
        self.answer = Some((op, result));
        true
    }

    /// The answer that is on its way.
    pub fn deliver(&mut self) -> Option<(OpId, Result<(), String>)> {
        self.answer.take()
    }

    /// Carries out what was answered before.
    pub fn catch_up(&mut self) {
        while let Some(late) = self.late.pop_front() {
            drop(self.carry_out(late));
        }
    }

    fn carry_out(&mut self, asked: Asked) -> Result<(), String> {
        // Asked for before the device was reset: the broker could not know better.
        let excused = asked.lenient || asked.epoch != self.epoch || self.unruly;
        match asked.change {
            WindowOp::Map(content) => {
                if asked.witness.is_some_and(|id| self.sealed.contains(&id)) {
                    return Err("map a page that is sealed".into());
                }
                if let Some(other) = self.mapped.iter().find(|other| overlap(&other.content, &content)) {
                    assert!(excused, "the VMM was asked to map {content:?} over {:?}", other.content);
                    return Err("map over another mapping".into());
                }
                let witness = asked.witness;
                self.mapped.push(Mapped { content, witness });
            }
            WindowOp::Unmap(content) => {
                let Some(place) = self.mapped.iter().position(|mapped| mapped.content == content) else {
                    assert!(excused, "the VMM was asked to unmap {content:?}, which it does not have");
                    return Err("unmap what is not mapped".into());
                };
                self.mapped.remove(place);
            }
        }
        Ok(())
    }

    /// A device reset drops every mapping.
    pub fn reset(&mut self) {
        self.late.clear();
        self.unruly = false;
        self.mapped.clear();
        self.epoch += 1;
    }

    /// The connection is gone; the process may live on with all that it holds.
    pub fn leaves(&mut self) {
        // A device that was reset has no witness any more. What it was sent before and
        // mapped after, it lets go of when it leaves: that, the link has to believe.
        if self.has_witness() {
            self.left_behind.append(&mut self.mapped);
        }
        self.mapped.clear();
        self.late.clear();
        self.asked.clear();
        self.unruly = false;
        self.answer = None;
        self.epoch += 1;
    }

    fn has_witness(&self) -> bool {
        self.mapped.iter().any(|mapped| mapped.witness.is_some())
    }

    /// The processes of VMMs that left are gone.
    pub fn dies(&mut self) {
        self.left_behind.clear();
    }

    /// Asks the kernel whether nobody has this witness page mapped; if so, nobody
    /// ever will.
    pub fn seal(&mut self, witness: u64) -> bool {
        let held = self.mapped.iter().chain(&self.left_behind);
        let gone = !held.into_iter().any(|mapped| mapped.witness == Some(witness));
        if gone {
            self.sealed.push(witness);
        }
        gone
    }

    pub fn is_idle(&self) -> bool {
        self.asked.is_empty() && self.answer.is_none() && self.late.is_empty()
    }

    /// Every range of the owner that any VMM can reach.
    pub fn owner_ranges(&self) -> impl Iterator<Item = &Placement<MemoryFile>> {
        self.mapped.iter().chain(&self.left_behind).filter_map(owner_range)
    }

    /// Whether the connected VMM has this range at this place.
    pub fn shows(&self, entry: &abi::Mapping) -> bool {
        self.mapped.iter().filter_map(owner_range).any(|placement| {
            placement.range().iova().start().raw() == entry.iova.value()
                && placement.window().len() == entry.len.value()
                && shown_at(placement, WINDOW_LEN).raw() == entry.window_offset.value()
        })
    }

    /// Kinds of what the connected VMM has, by window offset.
    pub fn kinds(&self) -> Vec<Kind> {
        let all = self.mapped.iter().map(|mapped| &mapped.content);
        // The fence comes and goes; what counts of it is its answer.
        let mut mapped: Vec<_> = all.filter(|content| kind(content) != Kind::Fence).collect();
        mapped.sort_by_key(|content| content.place(WINDOW_LEN).0);
        mapped.into_iter().map(kind).collect()
    }
}

fn owner_range(mapped: &Mapped) -> Option<&Placement<MemoryFile>> {
    match &mapped.content {
        Content::Owner(placement) => Some(placement),
        _ => None,
    }
}

fn overlap(one: &Content, other: &Content) -> bool {
    let ((a, a_len), (b, b_len)) = (one.place(WINDOW_LEN), other.place(WINDOW_LEN));
    a.raw() < b.raw() + b_len && b.raw() < a.raw() + a_len
}
