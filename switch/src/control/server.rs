//! Answers the control socket. Each client has a short-lived thread: one that
//! stalls holds up nobody.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::bounded;
use tracing::warn;

use super::{Answer, BrokerReport, PluggedLink, Query};
use crate::confine::Confinement;
#[cfg(debug_assertions)]
use crate::confine::hook;
use crate::link::report::LinkReport;
use crate::runtime::Input;
use crate::runtime::admission::Caller;
use crate::runtime::closing::{Pass, turn_away};
use crate::runtime::links::{ChangeError, Links};

/// How long a client may take for its question and for taking the answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a link may take for its report.
const LINK_TIMEOUT: Duration = Duration::from_secs(2);
/// The longest question, bytes.
const MAX_QUERY: u64 = 4096;

/// What is told of.
#[derive(Debug)]
pub struct About {
    /// The links.
    pub links: Arc<Links>,
    /// What the process has given up.
    pub confinement: Confinement,
}

/// Clients that are served at once. More are turned away: each has a thread.
const MAX_CLIENTS: usize = 32;

/// One of those that are served.
struct Served;

static SERVED: AtomicUsize = AtomicUsize::new(0);

impl Served {
    fn one_more() -> Option<Self> {
        // Relaxed: a count, ordered with nothing.
        let more = |served| (served < MAX_CLIENTS).then_some(served + 1);
        SERVED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        SERVED.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves one client.
pub fn serve(mut stream: UnixStream, pass: Pass, about: &Arc<About>) {
    let Some(served) = Served::one_more() else {
        let words = format!("{MAX_CLIENTS} others ask at the moment, and one more is not served; try again");
        let text = serde_json::to_vec(&Answer::Error(words)).unwrap_or_default();
        // It fits into the socket, or is lost: nobody is waited for.
        let _ = stream.set_nonblocking(true).and_then(|()| stream.write_all(&[&text[..], b"\n"].concat()));
        return turn_away(stream, pass);
    };
    let about = Arc::clone(about);
    let client = thread::Builder::new().name("control client".into()).spawn(move || {
        let _served = served;
        // A client that leaves early is no fault of anybody's.
        drop(answer(stream, &about));
    });
    if let Err(error) = client {
        warn!(%error, "a control client cannot be served");
    }
}

fn answer(mut stream: UnixStream, about: &About) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_TIMEOUT))?;
    stream.set_write_timeout(Some(CLIENT_TIMEOUT))?;
    let mut line = String::new();
    BufReader::new(stream.try_clone()?.take(MAX_QUERY)).read_line(&mut line)?;
    let answer = match serde_json::from_str(&line) {
        Ok(Query::Status) => Answer::Status(status(about)),
        Ok(query @ (Query::Plug { .. } | Query::Unplug { .. } | Query::Reload)) => {
            change(&stream, &about.links, query)
        }
        #[cfg(debug_assertions)]
        Ok(Query::Forbidden { call }) => Answer::Forbidden(hook::commit(call)),
        Err(error) => Answer::Error(format!("not a question that this broker knows: {error}")),
    };
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    stream.write_all(&text)
}

/// Changes links, if who asks may.
fn change(stream: &UnixStream, links: &Links, query: Query) -> Answer {
    match Caller::of(stream) {
        Ok(caller) if links.may_change(caller.uid) => {}
        Ok(caller) => {
            return Answer::Error(format!(
                "user {} may not change links: the broker's own user, {}, and root may",
                caller.uid,
                links.uid()
            ));
        }
        Err(error) => return Answer::Error(format!("the kernel does not say who asks: {error}")),
    }
    let changed = match query {
        Query::Plug { link } => links.plug(&link).map(|config| {
            Answer::Plugged(PluggedLink {
                vrings: config.max_vrings(),
                profile: config.device.kind.name.into(),
                name: config.name,
                owner_socket: config.owner_socket,
                peer_socket: config.peer_socket,
            })
        }),
        Query::Unplug { link } => links.unplug(&link).map(|()| Answer::Unplugged(link)),
        _ => links.reload().map(Answer::Reloaded),
    };
    changed.unwrap_or_else(|error| Answer::Error(in_lines(&error)))
}

/// The error, after a line for each mistake of the configuration.
fn in_lines(error: &ChangeError) -> String {
    let mut lines = error.mistakes().to_vec();
    lines.push(error.to_string());
    lines.join("\n")
}

fn status(about: &About) -> BrokerReport {
    // All are asked before the first is waited for.
    let ports = about.links.ports();
    let waiting: Vec<_> = ports
        .iter()
        .map(|port| {
            let (sender, receiver) = bounded(1);
            port.send(Input::Report(sender));
            receiver
        })
        .collect();
    let links: Vec<LinkReport> =
        waiting.into_iter().filter_map(|receiver| receiver.recv_timeout(LINK_TIMEOUT).ok()).collect();
    let mapped = guest_bytes_mapped();
    let copies = links.iter().map(|link| link.counters.fetches + link.counters.stores).sum();
    BrokerReport {
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").into(),
        guest_bytes_mapped: mapped.unwrap_or(0),
        // What is copied at a driver's wish is a packet or a part of one.
        packets: mapped.filter(|bytes| *bytes == 0).map(|_| copies),
        confinement: about.confinement.clone(),
        guardian: about.links.guardian(),
        opener: about.links.opener(),
        links,
    }
}

/// Shared mappings of the broker that are not its own areas, bytes, as the kernel
/// lists them; `None` if it does not.
fn guest_bytes_mapped() -> Option<u64> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    Some(maps.lines().filter_map(foreign_shared_bytes).sum())
}

/// The length of a mapping that is shared and none of the broker's own.
fn foreign_shared_bytes(line: &str) -> Option<u64> {
    let mut fields = line.split_whitespace();
    let (range, access) = (fields.next()?, fields.next()?);
    let own = line.contains("/memfd:vhost-pci ") || line.contains("/dev/zero");
    if !access.ends_with('s') || own {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    u64::from_str_radix(end, 16).ok()?.checked_sub(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_memory_of_others_counts_as_guest_memory() {
        let guest = "7f0000000000-7f0000002000 rw-s 00000000 00:01 5 /memfd:ram (deleted)";
        let own = "7f0000000000-7f0000001000 rw-s 00000000 00:01 5 /memfd:vhost-pci areas (deleted)";
        let private = "7f0000000000-7f0000001000 r-xp 00000000 00:01 5 /bin/broker";
        assert_eq!(foreign_shared_bytes(guest), Some(0x2000));
        assert_eq!(foreign_shared_bytes(own), None);
        assert_eq!(foreign_shared_bytes(private), None);
    }
}
