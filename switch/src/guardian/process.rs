//! The guardian's process: takes messages until the broker is gone, which the end of their socket
//! says, then takes back what the peers have, of all links at once, and ends.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use std::{mem, thread};

use anyhow::{Context, bail};
use crossbeam_channel::bounded;
use nix::poll::{PollFd, PollTimeout, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tracing::{error, info, warn};

use super::message::{self, Kind, Message, Received};
use super::table::Table;
use super::takedown::{Held, Takedown};
use crate::config::Confine;
use crate::confine::{self, Role};
use crate::runtime::closing::{Pass, turn_away};
use crate::runtime::limits;

/// How long the peers' drivers have from when their link is said to be down until the window is taken
/// away: one that is in the middle of a burst, which it began while the link was up, completes it, so that
/// neither a packet nor the word of it goes nowhere. Owners know of nothing yet, and lose nothing by it.
/// Of a driver that does not say what it serves, that it is enough is a guess.
const GRACE: Duration = Duration::from_millis(20);
/// The longest that a driver has which says that it is serving still: it may have no processor for a while, or
/// have been killed.
const LONGEST_GRACE: Duration = Duration::from_millis(500);
/// How long between two looks at what the kernel says, at first and at most.
const FIRST_LOOK: Duration = Duration::from_micros(200);
const LOOK: Duration = Duration::from_millis(10);
/// How much longer than `timeout` it may take that the links' threads have ended.
const SLACK: Duration = Duration::from_millis(500);
/// Stack of such a thread, bytes.
const STACK: usize = 256 << 10;
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
    let Some(Received { message: Message { kind: Kind::Table, link: links, .. }, descriptors, .. }) = first
    else {
        bail!("what came first is not the table: this is for the broker to start, not for people")
    };
    let table = Table::open(descriptors.into_iter().next().context("a table without its file")?)?;
    let most = links;
    let mut links = BTreeMap::new();
    // What is missing the broker has told of, which has the same.
    confine::enter(policy, &Role::Broker)?;
    message::send(socket.as_fd(), &Message::new(Kind::Table, most), &[])?;
    while let Some(received) = message::receive(socket.as_fd())? {
        take(&mut links, received, most);
    }
    if !table.is_forsaken() {
        take_back(links, &table, timeout);
    }
    Ok(())
}

/// Takes a message. What it replaces is closed.
fn take(links: &mut BTreeMap<u32, Held>, received: Received, most: u32) {
    let Received { message, descriptors, is_whole } = received;
    let number = message.link;
    if message.kind == Kind::Link && number < most {
        links
            .insert(number, Held { name: message.name.clone(), link_id: message.link_id, ..Held::default() });
    }
    let Some(held) = links.get_mut(&number) else { return };
    if !is_whole {
        error!(link = %held.name, kind = ?message.kind, "the guardian has no room for a descriptor; {}", limits::REMEDY);
        held.is_in_part = true;
    }
    let mut descriptors = descriptors.into_iter();
    let mut next = || descriptors.next();
    let old = match message.kind {
        Kind::Table | Kind::Link => [None, None],
        Kind::LinkGone => {
            let old = [held.owner.take(), held.waiting.take(), held.peer.take(), held.channel.take()];
            links.remove(&number);
            return close(old);
        }
        Kind::Owner => [mem::replace(&mut held.owner, next()), None],
        Kind::OwnerGone => [held.owner.take(), None],
        Kind::Waiting => [mem::replace(&mut held.waiting, next()), None],
        Kind::WaitingGone => [held.waiting.take(), None],
        Kind::OwnersSwapped => {
            mem::swap(&mut held.owner, &mut held.waiting);
            [None, None]
        }
        Kind::Peer => {
            let old = [mem::replace(&mut held.peer, next()), held.channel.take()];
            held.areas = next().map(File::from);
            old
        }
        // Its VMM may have the window still: witnesses and areas stay.
        Kind::PeerGone => [held.peer.take(), held.channel.take()],
        Kind::Channel => [mem::replace(&mut held.channel, next()), None],
        Kind::Witness => {
            held.witnesses.extend(next().map(File::from));
            let old = held.witnesses.len().saturating_sub(WITNESSES);
            held.witnesses.drain(..old);
            [None, None]
        }
    };
    close(old);
}

/// One may hold what takes long to close. The broker has ended it already.
fn close(connections: impl IntoIterator<Item = Option<OwnedFd>>) {
    for connection in connections.into_iter().flatten() {
        turn_away(connection, Pass::default());
    }
}

/// Takes back what the peers have, and lets each owner go when its peer has nothing of it any more,
/// or `timeout` has passed. A thread for each link: what one VMM does keeps no other waiting.
fn take_back(links: BTreeMap<u32, Held>, table: &Table, timeout: Duration) {
    let began = Instant::now();
    let owners = links.values().filter(|held| held.owner.is_some()).count();
    let (done, ends) = bounded(links.len());
    let mut begun = 0;
    for (number, mut held) in links {
        let mapped = table.entries(number as usize).unwrap_or_else(|error| {
            error!(link = %held.name, %error, "what its peer has mapped cannot be read");
            held.is_in_part = true;
            Vec::new()
        });
        if held.is_unused() && mapped.is_empty() {
            continue;
        }
        let done = done.clone();
        let work = move || {
            let name = held.name.clone();
            let end = Takedown::begin(held, mapped).map(|link| run_down(link, began, timeout));
            if end == Some(End::Held) {
                warn!(
                    link = %name,
                    ?timeout,
                    "the broker is gone, and the peer's VMM did not let go of the owner's memory in time: it may \
                     still reach it; end that VMM"
                );
            }
            let _ = done.send(end);
        };
        match thread::Builder::new().stack_size(STACK).spawn(work) {
            Ok(_) => begun += 1,
            Err(error) => error!(%error, "no thread for a link: its VMMs are disconnected as they are"),
        }
    }
    let last = began + timeout + SLACK;
    let ends: Vec<_> = (0..begun).map_while(|_| ends.recv_deadline(last).ok()).collect();
    let windows = begun - ends.iter().filter(|end| end.is_none()).count();
    let taken = ends.iter().filter(|end| **end == Some(End::Taken)).count();
    if begun > 0 {
        info!(
            owners,
            windows,
            still_held = windows - taken,
            milliseconds = began.elapsed().as_millis() as u64,
            "the broker is gone, and its guardian took back what peers had of owners' memory"
        );
    }
}

/// How it ended with a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The peer has nothing.
    Taken,
    /// It may have something still.
    Held,
}

/// Goes on with a link until its peer has nothing, or the time is over; then its VMMs are disconnected.
fn run_down(mut link: Takedown, began: Instant, timeout: Duration) -> End {
    thread::sleep(GRACE);
    while link.is_served() && began.elapsed() < LONGEST_GRACE.min(timeout / 2) {
        thread::sleep(LOOK / 10);
    }
    let mut pause = FIRST_LOOK;
    while !link.go_on() {
        if began.elapsed() >= timeout {
            return End::Held;
        }
        wait(&link, pause);
        pause = (pause * 2).min(LOOK);
    }
    End::Taken
}

/// Waits until a VMM has answered, or reads again, or it is time to look.
fn wait(link: &Takedown, pause: Duration) {
    let mut vmms: Vec<_> =
        link.waits_for().map(|(connection, flags)| PollFd::new(connection, flags)).collect();
    let timeout = PollTimeout::try_from(pause).unwrap_or(PollTimeout::ZERO);
    // Shorter than poll(2) can wait, or it cannot: looking more often than need be is all that follows.
    if pause < Duration::from_millis(1) || poll(&mut vmms, timeout).is_err() {
        thread::sleep(pause);
    }
}
