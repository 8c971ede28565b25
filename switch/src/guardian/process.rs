//! The guardian's process: takes messages until the broker is gone, which the end of their socket
//! says, then takes back what the peers have, of all links at once, and ends.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use std::{io, thread};

use anyhow::{Context, bail};
use nix::poll::{PollFd, PollTimeout, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tracing::{info, warn};

use super::message::{self, Kind, Message};
use super::table::Table;
use super::takedown::{Held, Takedown};
use crate::config::Confine;
use crate::confine;

/// How long the peers' drivers have from when their link is said to be down until the window is taken
/// away: one that is in the middle of a burst, which it began while the link was up, completes it, so that
/// neither a packet nor the word of it goes nowhere. Owners know of nothing yet, and lose nothing by it.
const GRACE: Duration = Duration::from_millis(20);
/// How long between two looks at what the kernel says, at first and at most.
const FIRST_LOOK: Duration = Duration::from_micros(200);
const LOOK: Duration = Duration::from_millis(10);
/// Witness pages that a window has at once: the old one and the new one.
const WITNESSES: usize = 2;

/// Guards the links of the broker at the other end of `socket`.
///
/// # Errors
/// When the broker's first message does not come, or the host refuses. The links are not guarded
/// then, which the broker notices.
pub fn run(socket: &OwnedFd, timeout: Duration, policy: Confine) -> anyhow::Result<()> {
    // Who ends the broker by its terminal or its service ends all processes of it: this one ends
    // when its work is done.
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    let first = message::receive(socket.as_fd()).context("the broker's first message")?;
    let Some((Message { kind: Kind::Table, link: links, .. }, descriptors)) = first else {
        bail!("what came first is not the table: this is for the broker to start, not for people")
    };
    let table = Table::open(descriptors.into_iter().next().context("a table without its file")?)?;
    let mut links: Vec<Held> = (0..links).map(|_| Held::default()).collect();
    // What is missing the broker has told of, which has the same.
    confine::enter(policy, &[])?;
    message::send(socket.as_fd(), &Message::new(Kind::Table, links.len() as u32), &[])?;
    loop {
        match message::receive(socket.as_fd()) {
            Ok(Some((message, descriptors))) => take(&mut links, message, descriptors),
            Ok(None) => break,
            Err(error) => {
                warn!(%error, "a message of the broker to its guardian is lost");
            }
        }
    }
    take_back(links, &table, timeout);
    Ok(())
}

/// Takes a message. What it replaces is closed.
fn take(links: &mut [Held], message: Message, descriptors: Vec<OwnedFd>) {
    let Some(held) = links.get_mut(message.link as usize) else { return };
    let mut descriptors = descriptors.into_iter();
    let mut next = || descriptors.next();
    match message.kind {
        Kind::Table => {}
        Kind::Link => *held = Held { name: message.name, link_id: message.link_id, ..Held::default() },
        Kind::Owner => held.owner = next(),
        Kind::OwnerGone => held.owner = None,
        Kind::Peer => (held.peer, held.areas, held.channel) = (next(), next().map(File::from), None),
        // Its VMM may have the window still: witnesses and areas stay.
        Kind::PeerGone => (held.peer, held.channel) = (None, None),
        Kind::Channel => held.channel = next(),
        Kind::Witness => {
            held.witnesses.extend(next().map(File::from));
            let old = held.witnesses.len().saturating_sub(WITNESSES);
            held.witnesses.drain(..old);
        }
    }
}

/// Takes back what the peers have, and lets each owner go when its peer has nothing of it any more,
/// or `timeout` has passed.
fn take_back(links: Vec<Held>, table: &Table, timeout: Duration) {
    let began = Instant::now();
    let connected = links.iter().filter(|held| held.owner.is_some()).count();
    let mut open: VecDeque<Takedown> = VecDeque::new();
    for (index, held) in links.into_iter().enumerate() {
        open.extend(Takedown::begin(held, table.entries(index)));
    }
    if !open.is_empty() {
        thread::sleep(GRACE);
    }
    let (all, mut pause) = (open.len(), FIRST_LOOK);
    loop {
        open.retain_mut(|link| !link.go_on());
        if open.is_empty() || began.elapsed() >= timeout {
            break;
        }
        wait(&open, pause);
        pause = (pause * 2).min(LOOK);
    }
    for link in &open {
        warn!(
            link = %link.name(),
            ?timeout,
            "the broker is gone, and the peer's VMM did not let go of the owner's memory in time: it may still \
             reach it; end that VMM"
        );
    }
    info!(
        owners = connected,
        windows = all,
        still_held = open.len(),
        milliseconds = began.elapsed().as_millis() as u64,
        "the broker is gone, and its guardian took back what peers had of owners' memory"
    );
}

/// Waits until a VMM has answered, or reads again, or it is time to look.
fn wait(open: &VecDeque<Takedown>, pause: Duration) {
    let vmms = open.iter().flat_map(Takedown::waits_for);
    let mut vmms: Vec<_> = vmms.map(|(connection, flags)| PollFd::new(connection, flags)).collect();
    // Shorter than poll(2) can wait.
    if pause < Duration::from_millis(1) {
        thread::sleep(pause);
        return;
    }
    let timeout = PollTimeout::try_from(pause).unwrap_or(PollTimeout::ZERO);
    if let Err(error) = poll(&mut vmms, timeout) {
        // A signal, or too little memory: looking more often than need be is all that follows.
        let _: io::Error = error.into();
        thread::sleep(pause);
    }
}
