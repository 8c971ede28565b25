//! What the guardian does with one link when the broker is gone: the link's page says that it is
//! down, so that a driver which looks before it completes a burst completes none that it may have
//! read from nowhere; the peer's VMM is asked to unmap all of the owner's memory, and the witness
//! pages last; and when the kernel says that no process has these mapped, nobody has what was
//! beside them either (`docs/architecture.md`, Revocation).
//!
//! What the VMM answers to the broker cannot be told from what it answers here: that it has read all
//! requests, which it carries out one after the other, the kernel says; and of the last, the witness.
//! If the broker was killed between reading a message of that VMM's and answering it, a moment, the VMM waits for
//! an answer that nobody knows of, and does nothing until the time is over.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use tracing::warn;
use vhost_pci_device::abi;

use super::stand_in::StandIn;
use crate::link::message::{Generations, LinkContents};
use crate::runtime::areas::{AreaFile, ControlArea, LinkArea, Witness};
use crate::runtime::backend_message;
use crate::runtime::broker::first_generation;
use crate::runtime::sys::all_is_read;

/// Times that answers are read in a row: one who writes without end is not listened to for ever.
const MAX_PIECES: usize = 16;

/// What the guardian has of a link.
#[derive(Debug, Default)]
pub struct Held {
    /// Its name.
    pub name: String,
    /// What its page names it.
    pub link_id: u64,
    /// The connection of its owner's VMM.
    pub owner: Option<OwnedFd>,
    /// That of another VMM of the owner's side, which waits: it sees the broker's end with the others.
    pub waiting: Option<OwnedFd>,
    /// That of its peer's.
    pub peer: Option<OwnedFd>,
    /// The file of the areas in its window.
    pub areas: Option<File>,
    /// The peer's back-end channel.
    pub channel: Option<OwnedFd>,
    /// The witness pages, the oldest first.
    pub witnesses: VecDeque<File>,
    /// Something of it is not known: what the peer has cannot be taken back for certain.
    pub is_in_part: bool,
}

impl Held {
    /// Whether nobody was there.
    pub fn is_unused(&self) -> bool {
        self.owner.is_none()
            && self.waiting.is_none()
            && self.peer.is_none()
            && self.witnesses.is_empty()
            && !self.is_in_part
    }
}

/// A link whose peer may have memory of its owner.
#[derive(Debug)]
pub struct Takedown {
    // The connections close with it, and not before.
    held: Held,
    stand_in: StandIn,
    witnesses: Vec<Witness>,
    /// Whether these tell what the peer has.
    is_told: bool,
    /// Where the peer's driver says what it serves.
    area: Option<ControlArea>,
    unsent: VecDeque<Vec<u8>>,
}

impl Takedown {
    /// Begins, with what is mapped in the window as offset and length, bytes; `None` if the
    /// peer has nothing for certain: then the connections are closed.
    pub fn begin(mut held: Held, mapped: Vec<(u64, u64)>) -> Option<Self> {
        let area = held.areas.take().and_then(|areas| {
            let said = say_down(areas, held.link_id);
            said.inspect_err(|error| warn!(link = %held.name, %error, "the link area cannot be written")).ok()
        });
        // The witness pages go last; what is behind the broker's own is the owner's, its log included.
        let (owners, own): (Vec<_>, Vec<_>) =
            mapped.into_iter().partition(|(offset, _)| *offset >= abi::LOG_OFFSET);
        let witnesses: Vec<_> = held.witnesses.drain(..).map(Witness::from).collect();
        // What a VMM has answered that it unmapped it may have until its witness is gone.
        let is_told = !held.is_in_part && (owners.is_empty() || !witnesses.is_empty());
        if is_told && owners.is_empty() && all_gone(&witnesses) {
            return None;
        }
        let unmap = |(offset, len)| backend_message::unmap(offset, len).bytes;
        let unsent = owners.into_iter().chain(own).map(unmap).collect();
        Some(Self { held, stand_in: StandIn::default(), witnesses, is_told, area, unsent })
    }

    /// Whether the peer's driver says that it is serving the link still: it has not seen that it is down.
    pub fn is_served(&self) -> bool {
        self.area.as_ref().is_some_and(|area| area.served() != 0)
    }

    /// Does what can be done without waiting. Says whether the peer has nothing any more.
    pub fn go_on(&mut self) -> bool {
        if let Some(channel) = &self.held.channel
            && talk(channel.as_fd(), &mut self.unsent).is_err()
        {
            // The VMM is gone, or going: only the kernel tells now.
            self.held.channel = None;
        }
        if let Some(peer) = &self.held.peer
            && self.stand_in.answer(peer.as_fd()).is_err()
        {
            self.held.peer = None;
        }
        let asked = self
            .held
            .channel
            .as_ref()
            .is_none_or(|channel| self.unsent.is_empty() && all_is_read(channel).unwrap_or(false));
        asked && self.is_told && all_gone(&self.witnesses)
    }

    /// What it waits for besides time.
    pub fn waits_for(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let mut flags = PollFlags::POLLIN;
        flags.set(PollFlags::POLLOUT, !self.unsent.is_empty());
        let channel = self.held.channel.iter().map(move |channel| (channel.as_fd(), flags));
        channel.chain(self.held.peer.iter().map(|peer| (peer.as_fd(), PollFlags::POLLIN)))
    }
}

fn all_gone(witnesses: &[Witness]) -> bool {
    witnesses.iter().all(|witness| witness.is_gone().unwrap_or(false))
}

fn say_down(areas: File, link_id: u64) -> std::io::Result<ControlArea> {
    let areas = AreaFile::open(areas)?;
    // Later than any of the broker's.
    let generation = first_generation();
    let generations = Generations { link: generation, table: generation };
    LinkArea::new(&areas, link_id).publish(&LinkContents::default(), generations)?;
    Ok(ControlArea::new(&areas))
}

/// Reads answers, which say nothing, and sends requests until one would have to wait.
fn talk(channel: BorrowedFd<'_>, unsent: &mut VecDeque<Vec<u8>>) -> Result<(), Errno> {
    let mut answers = [0; 1024];
    for _ in 0..MAX_PIECES {
        match recv(channel, &mut answers[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(Errno::PIPE),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break,
            Err(error) => return Err(error),
        }
    }
    while let Some(request) = unsent.front() {
        match send(channel, request, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) => drop(unsent.pop_front()),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
