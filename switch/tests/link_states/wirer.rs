//! The part of a peer's VMM that takes the owner's eventfds, and what its owner knows of them:
//! which of them it has been told that nobody else uses any more.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use vhost_pci_switch::link::Side;
use vhost_pci_switch::link::descriptor::Eventfd;
use vhost_pci_switch::link::message::Request;
use vhost_pci_switch::link::wiring::{End, WireId, WireRequest};

use crate::vmm::Manner;

#[derive(Debug, Default)]
pub struct Wirer {
    wired: BTreeMap<End, Eventfd>,
    asked: VecDeque<(WireId, WireRequest)>,
    answer: Option<(WireId, Result<(), String>)>,
    /// Virtqueues.
    enabled: BTreeSet<u32>,
    /// The owner's eventfds, as its front-end named them last.
    kicks: BTreeMap<u16, Eventfd>,
    calls: BTreeMap<u16, Eventfd>,
    disabled: Vec<u16>,
}

impl Wirer {
    pub fn ask(&mut self, id: WireId, request: WireRequest) {
        self.asked.push_back((id, request));
    }

    /// Its front-end is about to say this. What has to be taken back is taken back before.
    pub fn tells(&mut self, request: &Request) {
        match request {
            &Request::SetVringEnable { index, enable: true } => drop(self.enabled.insert(index)),
            &Request::SetVringKick { index, .. } => {
                self.wired.retain(|end, _| u32::from(end.vring) + 1 != index);
            }
            &Request::SetVringEnable { index, enable: false } | &Request::GetVringBase { index } => {
                self.enabled.remove(&index);
                let enabled = &self.enabled;
                self.wired.retain(|end, _| is_running(enabled, *end));
            }
            _ => {}
        }
    }

    pub fn leaves(&mut self) {
        self.enabled.clear();
        self.wired.clear();
        self.asked.clear();
        self.answer = None;
    }

    pub fn act(&mut self, manner: Manner) -> bool {
        if self.answer.is_some() {
            return false;
        }
        let Some((id, request)) = self.asked.pop_front() else { return false };
        let result = match request.eventfd {
            None => {
                self.wired.remove(&request.end);
                Ok(())
            }
            Some(_) if manner == Manner::Refuses || !is_running(&self.enabled, request.end) => {
                self.wired.remove(&request.end);
                Err("wire: the model says no".into())
            }
            Some(eventfd) => {
                self.wired.insert(request.end, eventfd);
                Ok(())
            }
        };
        self.answer = Some((id, result));
        true
    }

    pub fn deliver(&mut self) -> Option<(WireId, Result<(), String>)> {
        self.answer.take()
    }

    pub fn is_idle(&self) -> bool {
        self.asked.is_empty() && self.answer.is_none()
    }

    pub fn wired(&self, vring: u16, from: Side) -> Option<&Eventfd> {
        self.wired.get(&End { vring, from })
    }

    pub fn count(&self) -> usize {
        self.wired.len()
    }

    /// The owner's front-end asks this.
    pub fn owner_asks(&mut self, request: &Request) {
        let set = |map: &mut BTreeMap<u16, Eventfd>, index: u32, fd: &Option<Eventfd>| match fd {
            Some(fd) => drop(map.insert(index as u16, fd.clone())),
            None => drop(map.remove(&(index as u16))),
        };
        match request {
            Request::SetVringKick { index, fd } => set(&mut self.kicks, *index, fd),
            Request::SetVringCall { index, fd } => set(&mut self.calls, *index, fd),
            Request::SetVringEnable { index, enable } => {
                self.disabled.retain(|disabled| u32::from(*disabled) != *index);
                if !enable {
                    self.disabled.push(*index as u16);
                }
            }
            Request::GetVringBase { index } => drop(self.kicks.remove(&(*index as u16))),
            Request::ResetOwner => self.kicks.clear(),
            _ => {}
        }
    }

    pub fn owner_leaves(&mut self) {
        self.kicks.clear();
        self.calls.clear();
        self.disabled.clear();
    }

    /// An owner that has an answer may do with its old eventfds what it likes.
    pub fn check_answered(&self) {
        for (End { vring, from }, eventfd) in &self.wired {
            let (own, live) = (
                if *from == Side::Owner { &self.kicks } else { &self.calls },
                self.kicks.contains_key(vring) && !self.disabled.contains(vring),
            );
            assert!(own.get(vring) == Some(eventfd) && live, "{from:?} {vring} is wired to an old eventfd");
        }
    }
}

fn is_running(enabled: &BTreeSet<u32>, end: End) -> bool {
    enabled.contains(&0) && enabled.contains(&(u32::from(end.vring) + 1))
}
