//! Answers the control socket. Each client has a short-lived thread: one that
//! stalls holds up nobody.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use tracing::warn;

use super::{Answer, BrokerReport, PluggedLink, Query};
use crate::confine::Confinement;
#[cfg(debug_assertions)]
use crate::confine::hook;
use crate::link::report::LinkReport;
use crate::runtime::Input;
use crate::runtime::admission::Caller;
use crate::runtime::closing::{self, Pass, turn_away};
use crate::runtime::links::{ChangeError, Links};

/// How long a client may take for its question, and then for taking the answer.
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
/// How many more of those who may change links: whoever looks does not keep them from it.
const MORE_CLIENTS: usize = 8;
/// As much of an answer as the kernel takes at once: it counts the time anew for each of its pieces.
const PIECE: usize = 32 << 10;

/// One of those that are served.
struct Served;

static SERVED: AtomicUsize = AtomicUsize::new(0);

impl Served {
    fn one_more(may_change: bool) -> Option<Self> {
        let most = if may_change { MAX_CLIENTS + MORE_CLIENTS } else { MAX_CLIENTS };
        // Relaxed: a count, ordered with nothing.
        let more = |served| (served < most).then_some(served + 1);
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
    let may_change = Caller::of(&stream).is_ok_and(|caller| about.links.may_change(caller.uid));
    let Some(served) = Served::one_more(may_change) else {
        let words = format!("{MAX_CLIENTS} others ask at the moment, and one more is not served; try again");
        let text = serde_json::to_vec(&Answer::Error(words)).unwrap_or_default();
        // It fits into the socket, or is lost: nobody is waited for.
        let _ = stream.set_nonblocking(true).and_then(|()| stream.write_all(&[&text[..], b"\n"].concat()));
        return turn_away(stream, pass);
    };
    let about = Arc::clone(about);
    let client = closing::spawn("control client".into(), stream, move |stream| {
        let _served = served;
        // A client that leaves early is no fault of anybody's.
        drop(answer(&stream, &about));
    });
    if let Err((error, stream)) = client {
        warn!(%error, "a control client cannot be served");
        turn_away(stream, pass);
    }
}

/// A client's connection for so long: what it has not said or taken by then it never will.
struct Until<'s> {
    stream: &'s UnixStream,
    end: Instant,
}

impl<'s> Until<'s> {
    fn after(stream: &'s UnixStream, time: Duration) -> Self {
        Self { stream, end: Instant::now() + time }
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

impl Read for Until<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(bytes)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write(&bytes[..bytes.len().min(PIECE)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn answer(stream: &UnixStream, about: &About) -> io::Result<()> {
    let mut line = String::new();
    BufReader::new(Until::after(stream, CLIENT_TIMEOUT).take(MAX_QUERY)).read_line(&mut line)?;
    let answer = match serde_json::from_str(&line) {
        Ok(Query::Status) => Answer::Status(status(about)),
        Ok(query @ (Query::Plug { .. } | Query::Unplug { .. } | Query::Reload)) => {
            change(stream, &about.links, query)
        }
        #[cfg(debug_assertions)]
        Ok(Query::Forbidden { call }) => Answer::Forbidden(hook::commit(call)),
        Err(error) => Answer::Error(format!("not a question that this broker knows: {error}")),
    };
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    Until::after(stream, CLIENT_TIMEOUT).write_all(&text)
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
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::thread;

    /// Far longer than a client has.
    const STEPS: u32 = 100;
    const STEP: Duration = Duration::from_millis(100);
    const TIME: Duration = Duration::from_millis(300);

    #[test]
    fn who_asks_byte_by_byte_has_no_longer_than_others() {
        let (mut client, stream) = UnixStream::pair().unwrap();
        let dribbles = thread::spawn(move || {
            let mut steps = (0..STEPS).map(|_| {
                thread::sleep(STEP);
                client.write(b" ")
            });
            steps.all(|step| step.is_ok())
        });
        let mut line = String::new();
        BufReader::new(Until::after(&stream, TIME)).read_line(&mut line).unwrap_err();
        drop(stream);
        assert!(!dribbles.join().unwrap(), "the connection is closed before it has said all");
    }

    #[test]
    fn who_takes_the_answer_piece_by_piece_has_no_longer_than_others() {
        let (mut client, stream) = UnixStream::pair().unwrap();
        let takes = thread::spawn(move || {
            let mut piece = vec![0; PIECE];
            let steps = (0..STEPS).map(|_| {
                thread::sleep(STEP);
                client.read(&mut piece).unwrap()
            });
            steps.take_while(|len| *len > 0).sum::<usize>()
        });
        let answer = vec![0; 2 * PIECE * STEPS as usize];
        Until::after(&stream, TIME).write_all(&answer).unwrap_err();
        drop(stream);
        assert!(takes.join().unwrap() < PIECE * STEPS as usize, "it had as long as it liked");
    }

    #[test]
    fn who_may_change_links_is_served_though_as_many_as_there_may_be_look() {
        let _others: Vec<_> = std::iter::from_fn(|| Served::one_more(false)).collect();
        assert!(Served::one_more(true).is_some());
    }

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
