//! What the guardian does with one link when the broker is gone: the link's page says that it is
//! down, so that a driver which looks before it completes a burst completes none that it may have
//! read from nowhere; the peer's VMM is asked to unmap all of the owner's memory, and the witness
//! pages last; and when the kernel says that no process has these mapped, nobody has what was
//! beside them either (`docs/architecture.md`, Revocation).
//!
//! What the VMM still answers to the broker cannot be told from what it answers here: so answers
//! say only that it reads, and the witness says that it did it.

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
use crate::runtime::areas::{AreaFile, LinkArea, Witness};
use crate::runtime::backend_message::{self, HEADER_LEN, REPLY_LEN};
use crate::runtime::broker::first_generation;

/// Requests that are sent and not answered, at most: so nobody waits for a full socket.
const MAX_OPEN: usize = 64;

/// What the guardian has of a link.
#[derive(Debug, Default)]
pub struct Held {
    /// Its name.
    pub name: String,
    /// What its page names it.
    pub link_id: u64,
    /// The connection of its owner's VMM.
    pub owner: Option<OwnedFd>,
    /// That of its peer's.
    pub peer: Option<OwnedFd>,
    /// The file of the areas in its window.
    pub areas: Option<File>,
    /// The peer's back-end channel.
    pub channel: Option<OwnedFd>,
    /// The witness pages, the oldest first.
    pub witnesses: VecDeque<File>,
}

/// A link whose peer may have memory of its owner.
#[derive(Debug)]
pub struct Takedown {
    // The connections close with it, and not before.
    held: Held,
    stand_in: StandIn,
    witnesses: Vec<Witness>,
    unsent: VecDeque<Vec<u8>>,
    /// Bytes of answers that have not come.
    unanswered: usize,
}

impl Takedown {
    /// Begins, with what is mapped in the window as offset and length, bytes; `None` if the peer has
    /// nothing: then the connections are closed.
    pub fn begin(mut held: Held, mapped: Vec<(u64, u64)>) -> Option<Self> {
        if let Some(areas) = held.areas.take()
            && let Err(error) = say_down(areas, held.link_id)
        {
            warn!(link = %held.name, %error, "the link area cannot be written");
        }
        let (owners, own): (Vec<_>, Vec<_>) =
            mapped.into_iter().partition(|(offset, _)| *offset >= abi::DATA_OFFSET);
        if owners.is_empty() {
            return None;
        }
        let unmap = |(offset, len)| backend_message::unmap(offset, len).bytes;
        let witnesses = held.witnesses.drain(..).map(Witness::from).collect();
        let unsent = owners.into_iter().chain(own).map(unmap).collect();
        Some(Self { held, stand_in: StandIn::default(), witnesses, unsent, unanswered: 0 })
    }

    /// The link's.
    pub fn name(&self) -> &str {
        &self.held.name
    }

    /// Does what can be done without waiting. Says whether the peer has nothing any more.
    pub fn go_on(&mut self) -> bool {
        if let Some(channel) = &self.held.channel
            && talk(channel.as_fd(), &mut self.unsent, &mut self.unanswered).is_err()
        {
            // The VMM is gone, or going: only the kernel tells now.
            self.held.channel = None;
        }
        if let Some(peer) = &self.held.peer
            && self.stand_in.answer(peer.as_fd()).is_err()
        {
            self.held.peer = None;
        }
        let asked = self.held.channel.is_none() || (self.unsent.is_empty() && self.unanswered == 0);
        asked && self.witnesses.iter().all(|witness| witness.is_gone().unwrap_or(false))
    }

    /// What it waits for besides time.
    pub fn waits_for(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let mut flags = PollFlags::POLLIN;
        flags.set(PollFlags::POLLOUT, !self.unsent.is_empty() && has_room(self.unanswered));
        let channel = self.held.channel.iter().map(move |channel| (channel.as_fd(), flags));
        channel.chain(self.held.peer.iter().map(|peer| (peer.as_fd(), PollFlags::POLLIN)))
    }
}

fn say_down(areas: File, link_id: u64) -> std::io::Result<()> {
    let area = LinkArea::new(&AreaFile::open(areas)?, link_id);
    // Later than any of the broker's.
    let generation = first_generation();
    area.publish(&LinkContents::default(), Generations { link: generation, table: generation })
}

fn has_room(unanswered: usize) -> bool {
    unanswered < MAX_OPEN * (HEADER_LEN + REPLY_LEN)
}

/// Reads answers and sends requests until one would have to wait.
fn talk(
    channel: BorrowedFd<'_>,
    unsent: &mut VecDeque<Vec<u8>>,
    unanswered: &mut usize,
) -> Result<(), Errno> {
    let mut answers = [0; 16 * (HEADER_LEN + REPLY_LEN)];
    loop {
        match recv(channel, &mut answers[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(Errno::PIPE),
            Ok((len, _)) => *unanswered = unanswered.saturating_sub(len),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break,
            Err(error) => return Err(error),
        }
    }
    while has_room(*unanswered)
        && let Some(request) = unsent.front()
    {
        match send(channel, request, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) => {
                *unanswered += HEADER_LEN + REPLY_LEN;
                unsent.pop_front();
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
