//! The acceptor: a thread that accepts the connections to all sockets, no more often than each link
//! allows, and hands them to their links. It waits for no VMM. Doors come and go with their links.
//! Where the host gives a link no thread for its clock, it stands in.

use std::collections::BTreeMap;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tracing::warn;

use super::admission::{Caller, Rule};
use super::closing::{Pass, Unclosed, turn_away};
use super::limits;
use super::port::Substitute;
use super::rate::Rate;
use super::sockets::Listener;
use super::{Input, LinkPort};
use crate::control::server::{self, About};
use crate::link::Side;
use crate::link::message::Flood;

/// The token of the eventfd that tells of a word.
const WORD: u64 = u64::MAX;
/// The token of what asks it to stand in for clocks.
const STAND_IN: u64 = u64::MAX - 1;
/// How often it does.
const STAND_IN_EVERY: Duration = Duration::from_millis(100);
/// How long a door is kept shut because of connections that are not closed.
const CROWDED: Duration = Duration::from_millis(100);
/// Clients of the control socket a second.
pub const CONTROL_RATE: u32 = 2000;

/// What a listening socket is for.
pub enum Purpose {
    /// Front-ends of one side, those that the rule admits.
    Link(LinkPort, Side, Rule),
    /// Doorbell functions.
    Doorbell(LinkPort, Rule),
    /// `status` and `watch`.
    Control,
}

impl Purpose {
    /// The link's name, if it is a link's, and who comes.
    fn names(&self) -> (Option<&str>, &'static str) {
        match self {
            Self::Link(port, side, _) => (Some(port.name()), side.name()),
            Self::Doorbell(port, _) => (Some(port.name()), "doorbell"),
            Self::Control => (None, "control"),
        }
    }
}

/// A listening socket.
pub struct Door {
    listener: Listener,
    purpose: Purpose,
    rate: Rate,
    /// Those that came through it and are not closed.
    unclosed: Unclosed,
    /// Too many came: until when none is let in.
    shut: Option<Instant>,
}

impl Door {
    /// One that so many may come through in a second.
    pub fn new(listener: Listener, purpose: Purpose, per_second: u32, now: Instant) -> Self {
        Self {
            listener,
            purpose,
            rate: Rate::new(per_second, now),
            unclosed: Unclosed::default(),
            shut: None,
        }
    }

    /// Lets nobody through any more. Who waits at it may have sent what is slow to close.
    fn close(self) {
        turn_away(self.listener, Pass::default());
    }

    fn is_of(&self, link: &LinkPort) -> bool {
        match &self.purpose {
            Purpose::Link(port, ..) | Purpose::Doorbell(port, _) => port.is(link),
            Purpose::Control => false,
        }
    }
}

enum Word {
    Open(Box<Door>),
    Close(LinkPort, Sender<()>),
    Stop,
}

/// How the acceptor is told of doors.
#[derive(Clone, Debug)]
pub struct Doorkeeper {
    words: Sender<Word>,
    wakes: Arc<EventFd>,
}

/// What it is told.
pub struct Words {
    words: Receiver<Word>,
    wakes: Arc<EventFd>,
}

impl Doorkeeper {
    /// A doorkeeper, and what [`Acceptor::new`] takes.
    ///
    /// # Errors
    /// When the host gives no descriptor.
    pub fn new() -> io::Result<(Self, Words)> {
        let wakes = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let (sender, receiver) = unbounded();
        Ok((Self { words: sender, wakes: Arc::clone(&wakes) }, Words { words: receiver, wakes }))
    }

    /// Lets connections through this door from now on.
    pub fn open(&self, door: Door) {
        self.say(Word::Open(Box::new(door)));
    }

    /// Closes the doors of a link. None comes through one any more when this returns.
    pub fn close(&self, port: &LinkPort) {
        let (done, is_done) = bounded(1);
        self.say(Word::Close(port.clone(), done));
        // An acceptor that has ended lets nobody in either.
        let _ = is_done.recv();
    }

    /// Ends the acceptor.
    pub fn stop(&self) {
        self.say(Word::Stop);
    }

    fn say(&self, word: Word) {
        // Fail only when the acceptor is gone, or the count at its end, which wakes it as well.
        let _ = self.words.send(word);
        let _ = self.wakes.write(1);
    }
}

/// The thread that accepts connections to all of a broker's sockets.
pub struct Acceptor {
    epoll: Epoll,
    /// By a number that is never used again: what the kernel says late is of no other door.
    doors: BTreeMap<u64, Door>,
    next_door: u64,
    words: Words,
    about: Arc<About>,
    substitute: Substitute,
    /// How often descriptors ran short.
    short: u64,
}

impl Acceptor {
    /// One without doors.
    ///
    /// # Errors
    /// When the host gives no descriptor.
    pub fn new(about: Arc<About>, words: Words, substitute: Substitute) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(words.wakes.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, WORD))?;
        epoll.add(substitute.eventfd(), EpollEvent::new(EpollFlags::EPOLLIN, STAND_IN))?;
        Ok(Self { epoll, doors: BTreeMap::new(), next_door: 0, words, about, substitute, short: 0 })
    }

    /// Does what it was told. Says whether it is to go on.
    fn hear(&mut self) -> bool {
        let _ = self.words.wakes.read();
        while let Ok(word) = self.words.words.try_recv() {
            match word {
                Word::Open(door) => {
                    let event = EpollEvent::new(EpollFlags::EPOLLIN, self.next_door);
                    if let Err(error) = self.epoll.add(&door.listener, event) {
                        let (link, door) = door.purpose.names();
                        warn!(link = link.map(display), door, %error, "a socket cannot be waited for: nobody can connect to it");
                    }
                    self.doors.insert(self.next_door, *door);
                    self.next_door += 1;
                }
                Word::Close(port, done) => {
                    for (_, door) in self.doors.extract_if(.., |_, door| door.is_of(&port)) {
                        let _ = self.epoll.delete(&door.listener);
                        door.close();
                    }
                    let _ = done.send(());
                }
                Word::Stop => return false,
            }
        }
        true
    }

    /// Accepts until it is stopped.
    pub fn run(mut self) {
        let mut events = [EpollEvent::empty(); 64];
        let mut stands_in = false;
        loop {
            let opens = self.open_again(Instant::now());
            let wait = opens.into_iter().chain(stands_in.then_some(STAND_IN_EVERY)).min();
            // Rounded up, so that the time has come when the wait is over.
            let timeout = wait.and_then(|wait| EpollTimeout::try_from(wait + Duration::from_millis(1)).ok());
            let timeout = timeout.unwrap_or(EpollTimeout::NONE);
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => continue,
                Err(error) => {
                    warn!(%error, "no more connections can be accepted");
                    return;
                }
            };
            for event in &events[..count] {
                match event.data() {
                    WORD => {
                        if !self.hear() {
                            return;
                        }
                    }
                    STAND_IN => {
                        let _ = self.substitute.eventfd().read();
                        stands_in = true;
                    }
                    token => self.accept(token),
                }
            }
            // All of them: each tries to get its thread.
            stands_in =
                stands_in && self.about.links.ports().iter().filter(|port| port.stand_in()).count() > 0;
        }
    }

    /// Opens the doors whose time has come; says when the next has to be.
    fn open_again(&mut self, now: Instant) -> Option<Duration> {
        let mut next: Option<Instant> = None;
        for (token, door) in &mut self.doors {
            match door.shut {
                Some(until) if until <= now => {
                    door.shut = None;
                    let event = &mut EpollEvent::new(EpollFlags::EPOLLIN, *token);
                    // Fails only for a descriptor that is not waited for.
                    let _ = self.epoll.modify(&door.listener, event);
                }
                Some(until) => next = Some(next.map_or(until, |next| next.min(until))),
                None => {}
            }
        }
        next.map(|next| next - now)
    }

    /// Whether another may come in. If not, those that come wait at the door, and the broker does
    /// not hear of them for a while.
    fn admits(&mut self, token: u64) -> bool {
        let Some(door) = self.doors.get_mut(&token) else { return false };
        let now = Instant::now();
        let crowded = door.unclosed.is_crowded().then_some(CROWDED);
        let Some(wait) = crowded.or_else(|| door.rate.take(now)) else { return true };
        door.shut = Some(now + wait);
        let event = &mut EpollEvent::new(EpollFlags::empty(), token);
        let _ = self.epoll.modify(&door.listener, event);
        let (port, side) = match &door.purpose {
            Purpose::Link(port, side, _) => (port, *side),
            Purpose::Doorbell(port, _) => (port, Side::Peer),
            Purpose::Control => return false,
        };
        port.send(Input::TooOften(side, Flood::Connections));
        false
    }

    fn accept(&mut self, token: u64) {
        if !self.admits(token) {
            return;
        }
        let Some(Door { listener, purpose, unclosed, .. }) = self.doors.get(&token) else { return };
        match (listener.accept(), purpose) {
            (Ok(None), _) => {}
            // Those are short, and how to see what is wrong.
            (Ok(Some(stream)), Purpose::Control) => server::serve(stream, unclosed.pass(), &self.about),
            (Ok(Some(stream)), _) if limits::is_short(number(&stream), limits::limit()) => {
                turn_away(stream, unclosed.pass());
                self.say_short("a connection is turned away");
            }
            (Ok(Some(stream)), Purpose::Link(port, side, rule)) => {
                if permits(port, side.name(), rule, &stream) {
                    let pass = unclosed.pass();
                    port.send(Input::Connected { side: *side, stream, pass });
                } else {
                    turn_away(stream, unclosed.pass());
                }
            }
            (Ok(Some(stream)), Purpose::Doorbell(port, rule)) => {
                if permits(port, "doorbell", rule, &stream) {
                    port.send(Input::DoorbellConnected(stream, unclosed.pass()));
                } else {
                    turn_away(stream, unclosed.pass());
                }
            }
            (Err(error), _) if error.raw_os_error() == Some(nix::Error::EMFILE as i32) => {
                self.say_short("a connection waits");
                // It is still there: do not spin on it.
                thread::sleep(Duration::from_millis(100));
            }
            (Err(error), _) => {
                let (link, door) = purpose.names();
                warn!(link = link.map(display), door, %error, "a connection cannot be accepted");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }

    /// The first time, and each time that it has happened twice as often: VMMs can cause it.
    fn say_short(&mut self, what: &str) {
        self.short += 1;
        if self.short.is_power_of_two() {
            let limit = limits::limit();
            warn!(
                times = self.short,
                "{what}: nearly all of the {limit} descriptors that the broker may have are in use; {}",
                limits::REMEDY
            );
        }
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        mem::take(&mut self.doors).into_values().for_each(Door::close);
    }
}

/// Whether who connected may join; the link is told of who may not.
fn permits(port: &LinkPort, door: &'static str, rule: &Rule, stream: &UnixStream) -> bool {
    match Caller::of(stream) {
        Ok(caller) if rule.admits(&caller, stream) => true,
        Ok(caller) => {
            port.send(Input::NotPermitted { door, caller });
            false
        }
        Err(error) => {
            warn!(link = %port.name(), door, %error, "the kernel does not say who connected, who is turned away");
            false
        }
    }
}

/// The number of a connection's descriptor.
fn number(stream: &UnixStream) -> u64 {
    // It is never negative.
    stream.as_raw_fd().unsigned_abs().into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::OwnedFd;
    use std::sync::{Mutex, PoisonError};

    use crate::config;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn of_whom_the_kernel_tells_nothing_the_log_says_at_which_links_door() {
        let text = "[[link]]\nname = \"left\"\nowner_socket = \"/run/o\"\npeer_socket = \"/run/p\"\n";
        let config = config::parse(&format!("control_socket = \"/run/c\"\n{text}")).unwrap();
        let port = LinkPort::new("left", Substitute::new().unwrap());
        let rule = Rule::new(&config.links[0], Side::Peer).unwrap();
        // No socket at all.
        let stream = UnixStream::from(OwnedFd::from(File::open("/dev/null").unwrap()));
        let log = Log::default();
        let writer = log.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            assert!(!permits(&port, "doorbell", &rule, &stream));
        });
        let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        assert!(log.contains("link=left door=\"doorbell\""), "{log}");
        let purpose = Purpose::Link(port.clone(), Side::Owner, rule.clone());
        assert_eq!(purpose.names(), (Some("left"), "owner"));
        assert_eq!(Purpose::Doorbell(port, rule).names(), (Some("left"), "doorbell"));
    }
}
