//! How each limit is hit.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::bench::Bench;
use crate::raw::{
    ADD_MEM_REG, FRONTEND, GET_FEATURES, MEMORY, NEED_REPLY, OWNER_PROTOCOL, PEER_PROTOCOL, Raw,
    SET_BACKEND_REQ_FD, SET_FEATURES, SET_MEM_TABLE, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_KICK,
    VERSION, VERSION_1, eventfd, longs, memfd, message, region, table, unsealed_memfd, words,
};

/// How long a flood lasts.
const FLOOD: Duration = Duration::from_secs(3);

/// One limit.
pub struct Attack {
    /// What is limited, for people.
    pub limit: &'static str,
    /// The counter that counts it.
    pub counter: &'static str,
    /// What the log's line says.
    pub line: &'static [&'static str],
    /// Hits it.
    pub hit: fn(&Bench) -> Result<()>,
}

/// All of them.
pub const ATTACKS: [Attack; 10] = [
    Attack {
        limit: "messages a second",
        counter: "messages_per_second",
        line: &["owner: more than 200 messages a second"],
        hit: messages,
    },
    Attack {
        limit: "relayed notifications a second",
        counter: "notifications_per_second",
        line: &["owner: more than 500 relayed notifications a second"],
        hit: notifications,
    },
    Attack {
        limit: "regions of memory",
        counter: "memory_region",
        line: &["3 memory regions, 2 are allowed", "memory_regions"],
        hit: regions,
    },
    Attack {
        limit: "memory that can be shortened",
        counter: "unsealed_memory",
        line: &["can shorten its file", "unsealed_memory = true"],
        hit: unsealed,
    },
    Attack {
        limit: "descriptors of a message",
        counter: "message",
        line: &["owner: not a valid vhost-user message"],
        hit: descriptors,
    },
    Attack {
        limit: "VMMs at a socket",
        counter: "occupied",
        line: &["owner: one VMM more than may be connected here"],
        hit: second,
    },
    Attack {
        limit: "features that were offered",
        counter: "features",
        line: &["owner: features", "not offered"],
        hit: features,
    },
    Attack {
        limit: "time to confirm a change of the window",
        counter: "window_unconfirmed",
        line: &["peer: the peer's VMM did not confirm within 500 ms"],
        hit: unconfirmed,
    },
    Attack {
        limit: "answers a second on the back-end channel",
        counter: "messages_per_second",
        line: &["peer: more than 200 messages a second"],
        hit: answers,
    },
    Attack {
        limit: "connections a second",
        counter: "connections_per_second",
        line: &["owner: more than 5 connections a second"],
        hit: connections,
    },
];

/// Asks as fast as it is answered.
fn messages(bench: &Bench) -> Result<()> {
    let mut owner = Raw::connect(&bench.sockets().0);
    let (start, mut count) = (Instant::now(), 0);
    while start.elapsed() < FLOOD {
        owner.question(GET_FEATURES, &[]);
        count += 1;
    }
    // As many as in a second are taken at once.
    let most = 200.0 * (start.elapsed().as_secs_f64() + 1.0) + 1.0;
    ensure!(f64::from(count) <= most, "{count} messages were taken, {most} may be");
    Ok(())
}

/// More than are let in, which the last of them waits for.
fn connections(bench: &Bench) -> Result<()> {
    let held: Vec<_> = (0..40).map_while(|_| UnixStream::connect(&bench.sockets().0).ok()).collect();
    ensure!(held.len() == 40, "{} connections wait at the socket", held.len());
    drop(held);
    let mut last = Raw::connect(&bench.sockets().0);
    last.question(GET_FEATURES, &[]);
    Ok(())
}

/// A started owner and a started peer on the link with low limits; the owner's kick.
fn up(bench: &Bench) -> Result<(Raw, Raw, std::fs::File)> {
    let (owner_socket, peer_socket) = bench.sockets();
    let (peer, _) = Raw::peer(&peer_socket);
    let mut owner = Raw::connect(&owner_socket);
    owner.negotiate(OWNER_PROTOCOL);
    owner.set_up();
    let kick = eventfd();
    let mine = std::fs::File::from(kick.try_clone()?);
    ensure!(owner.done(SET_VRING_KICK, &longs(&[0]), &[kick]), "the vring starts");
    ensure!(owner.done(SET_VRING_ENABLE, &words(&[0, 1]), &[]), "the vring is enabled");
    Ok((owner, peer, mine))
}

/// Kicks in a tight loop.
fn notifications(bench: &Bench) -> Result<()> {
    use std::io::Write;
    let (_owner, _peer, mut kick) = up(bench)?;
    let start = Instant::now();
    while start.elapsed() < FLOOD {
        // Nobody reads it; long before it is full the link is gone.
        kick.write_all(&1_u64.to_ne_bytes())?;
    }
    Ok(())
}

/// An owner that sends this, and is sent away.
fn refused(bench: &Bench, bytes: &[u8], fds: &[OwnedFd]) -> Result<()> {
    let mut owner = Raw::connect(&bench.sockets().0);
    owner.negotiate(OWNER_PROTOCOL);
    owner.send(bytes, fds);
    owner.closed();
    Ok(())
}

fn regions(bench: &Bench) -> Result<()> {
    let three: Vec<_> = (0..3).map(|slot| [slot << 30, MEMORY, FRONTEND + (slot << 30), 0]).collect();
    refused(bench, &message(SET_MEM_TABLE, VERSION, &table(&three)), &[memfd(), memfd(), memfd()])?;
    let mut owner = Raw::connect(&bench.sockets().0);
    owner.negotiate(OWNER_PROTOCOL);
    for region in three {
        let mut payload = longs(&[0]);
        payload.extend(longs(&region));
        owner.send(&message(ADD_MEM_REG, VERSION | NEED_REPLY, &payload), &[memfd()]);
    }
    owner.closed();
    Ok(())
}

fn unsealed(bench: &Bench) -> Result<()> {
    refused(bench, &message(SET_MEM_TABLE, VERSION, &table(&[region()])), &[unsealed_memfd()])
}

/// 10,000 descriptors, as many with each message as the kernel passes on.
fn descriptors(bench: &Bench) -> Result<()> {
    for _ in 0..40 {
        let fds: Vec<_> = (0..253).map(|_| eventfd()).collect();
        let owner = Raw::connect(&bench.sockets().0);
        owner.send(&message(SET_VRING_CALL, VERSION, &longs(&[0])), &fds);
        let _ = owner.stream.shutdown(std::net::Shutdown::Write);
        let _ = (&owner.stream).read(&mut [0; 64]);
    }
    Ok(())
}

fn second(bench: &Bench) -> Result<()> {
    let mut first = Raw::connect(&bench.sockets().0);
    first.question(GET_FEATURES, &[]);
    // To which the owner might be migrated.
    let mut second = Raw::connect(&bench.sockets().0);
    second.question(GET_FEATURES, &[]);
    for _ in 0..20 {
        Raw::connect(&bench.sockets().0).closed();
    }
    Ok(())
}

fn features(bench: &Bench) -> Result<()> {
    let mut owner = Raw::connect(&bench.sockets().0);
    owner.question(GET_FEATURES, &[]);
    owner.ask(SET_FEATURES, &longs(&[VERSION_1 | 1 << 63]), &[]);
    owner.closed();
    Ok(())
}

/// A peer whose VMM says nothing on its back-end channel, or this much too much.
fn peer_with_channel(bench: &Bench) -> Result<(Raw, UnixStream)> {
    let mut peer = Raw::connect(&bench.sockets().1);
    peer.negotiate(PEER_PROTOCOL);
    let (mine, theirs) = UnixStream::pair()?;
    ensure!(peer.done(SET_BACKEND_REQ_FD, &[], &[theirs.into()]), "the channel is taken");
    Ok((peer, mine))
}

fn unconfirmed(bench: &Bench) -> Result<()> {
    let (mut peer, _silent) = peer_with_channel(bench)?;
    for index in 0..3u32 {
        peer.ask(SET_VRING_CALL, &longs(&[index.into()]), &[eventfd()]);
        peer.ask(SET_VRING_KICK, &longs(&[index.into()]), &[eventfd()]);
        peer.ask(SET_VRING_ENABLE, &words(&[index, 1]), &[]);
    }
    peer.closed();
    Ok(())
}

fn answers(bench: &Bench) -> Result<()> {
    use std::io::Write;
    let (_peer, mut channel) = peer_with_channel(bench)?;
    channel.set_nonblocking(true)?;
    let answer = message(9, VERSION | 4, &longs(&[0]));
    let start = Instant::now();
    while start.elapsed() < FLOOD {
        if channel.write_all(&answer).is_err() {
            thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}
