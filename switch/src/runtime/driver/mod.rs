//! What is around one link: it takes input, applies it to the link's state, and runs the effects
//! (`effects`). Nothing that it does waits, but for the guardian to listen: sessions, the readers of
//! back-end channels and the relay have their own threads.

mod effects;

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use rustix::net::Shutdown;
use tracing::{info, warn};

use crate::config::{LinkConfig, Rates};
use crate::guardian::Guard;
use crate::link::descriptor::Eventfd;
use crate::link::message::{WaitingEvent, Wire};
use crate::link::report::{self, LinkReport};
use crate::link::{Event, Fault, Link, Side};
use crate::runtime::admission::Caller;
use crate::runtime::areas::{AreaFile, ControlArea, LinkArea, Witness};
use crate::runtime::channel::{Asked, Channel};
use crate::runtime::closing::{self, Pass, turn_away};
use crate::runtime::control_ring::ControlRing;
use crate::runtime::doorbell::{Doorbell, Word};
use crate::runtime::rate::Rate;
use crate::runtime::relay::Relay;
use crate::runtime::shown::{Shown, ShownWindow};
use crate::runtime::{Answer, ChannelId, Input, LinkPort, SessionId};
use crate::session::decode::Decoder;
use crate::session::serve::serve;
use crate::session::sys::{Connection, Line};

/// The first pause between two looks at the witness page, and the longest: while
/// somebody waits for the outcome, and otherwise.
const FIRST_LOOK: Duration = Duration::from_micros(100);
const LOOK_WAITED_FOR: Duration = Duration::from_millis(20);
const LOOK: Duration = Duration::from_millis(500);

/// A front-end that is connected.
struct Session {
    id: SessionId,
    line: Line,
    /// Where the answer to its open question goes.
    answer: Option<Answer>,
    /// Its back-end channel.
    channel: Option<Channel>,
}

impl Drop for Session {
    fn drop(&mut self) {
        // Wakes its thread, which then ends.
        let _ = self.line.with(|line| rustix::net::shutdown(line, Shutdown::Both));
    }
}

/// When the witness page, or what else nobody tells of, is looked at next.
struct Watch {
    next: Instant,
    pause: Duration,
}

/// Something that went wrong while effects were run.
enum Failure {
    /// A session's VMM is gone, or cannot be answered.
    Session(Side, SessionId),
    /// What was stored could not be marked: why.
    Mark(io::Error),
}

/// Everything around one link.
pub struct LinkDriver {
    name: String,
    link: Link,
    port: LinkPort,
    relay: Relay,
    owner: Option<Session>,
    /// Another of the owner's side.
    waiting: Option<Session>,
    peer: Option<Session>,
    next_session: u64,
    next_channel: u64,
    areas: AreaFile,
    link_area: LinkArea,
    control_area: ControlArea,
    control_ring: ControlRing,
    /// Those in the window, the oldest first.
    witnesses: VecDeque<Arc<Witness>>,
    /// The page of this peer's VMM that comes and goes: one that is told anew each time would be a file more each
    /// time.
    fence: Option<Witness>,
    watch: Option<Watch>,
    /// Which generation of the link, and no earlier one, the peer's driver is to serve.
    served_watch: Option<(Watch, u64)>,
    doorbell_function: Option<(ChannelId, Doorbell)>,
    /// Whether its VMM has read what it was sent.
    doorbell_watch: Option<Watch>,
    link_id: u64,
    rates: Rates,
    /// Whether a second VMM of the owner's side may wait.
    migration: bool,
    wires: Vec<Wire>,
    doorbell: Option<Eventfd>,
    guard: Guard,
    shown: Shown,
    /// The window of the peer that is there, or was there last.
    shown_window: Option<ShownWindow>,
    /// Who is told when the link may end.
    unplug: Option<Sender<bool>>,
    /// The link is told when the effects that led to it are run.
    failed: VecDeque<Failure>,
}

impl LinkDriver {
    /// A driver for a link that nobody is connected to. `link_id`: what its pages name it
    /// (`docs/vhost-pci-device.md`, 12.3).
    ///
    /// # Errors
    /// When the host gives no memory.
    pub fn new(config: &LinkConfig, link: Link, link_id: u64, port: LinkPort) -> io::Result<Self> {
        let relay = Relay::new(&config.name, port.clone(), config.rates.notifications)?;
        let areas = AreaFile::new()?;
        let mut driver = Self {
            name: config.name.clone(),
            rates: config.rates,
            migration: config.migration,
            link,
            port,
            relay,
            owner: None,
            waiting: None,
            peer: None,
            next_session: 0,
            next_channel: 0,
            link_area: LinkArea::new(&areas, link_id),
            control_area: ControlArea::new(&areas),
            areas,
            control_ring: ControlRing::new().map_err(io::Error::other)?,
            witnesses: VecDeque::new(),
            fence: None,
            watch: None,
            served_watch: None,
            doorbell_function: None,
            doorbell_watch: None,
            link_id,
            wires: Vec::new(),
            doorbell: None,
            guard: Guard::none(),
            shown: Shown::default(),
            shown_window: None,
            unplug: None,
            failed: VecDeque::new(),
        };
        let first = driver.link.publication();
        driver.run_effects(vec![first]);
        Ok(driver)
    }

    /// Has it note what its peer is shown among what all links' peers are.
    pub fn among(mut self, shown: Shown) -> Self {
        self.shown = shown;
        self
    }

    /// Has a guardian told of what VMMs connect and have mapped.
    pub fn guarded(mut self, guard: Guard) -> Self {
        self.guard = guard;
        self
    }

    /// When [`Self::time_passed`] has something to do.
    pub fn next_wake(&self) -> Option<Instant> {
        let served = self.served_watch.iter().map(|(watch, _)| watch);
        let watches = self.watch.iter().chain(&self.doorbell_watch).chain(served).map(|watch| watch.next);
        self.link.deadline().into_iter().chain(watches).chain(self.relay.next_wake()).min()
    }

    /// Takes an input.
    pub fn take(&mut self, input: Input) {
        match input {
            Input::Connected { side, stream, pass } => self.connected(side, stream, pass),
            Input::Request { side, session, request, answer } => {
                if let Some(open) = self.session(side).filter(|open| open.id == session) {
                    open.answer = Some(answer);
                    self.apply(Event::Request(side, request));
                } else if let Some(open) = self.waiting.as_mut().filter(|open| open.id == session) {
                    open.answer = Some(answer);
                    self.apply(Event::Waiting(WaitingEvent::Request(request)));
                }
            }
            Input::Ended { side, session, fault } => self.end_session(side, session, fault),
            Input::ChannelAnswer { side, session, channel, request, done } => {
                self.channel_answered(side, (session, channel), request, done);
            }
            Input::ChannelEnded { side, session, channel } => {
                match self.channel(side, (session, channel)) {
                    None => {}
                    Some((_, false)) => {
                        self.channel_lost(side);
                        self.run_effects(Vec::new());
                    }
                    // It may bring another; what it was asked on this one nobody wants to know any more.
                    Some((_, true)) => self.waiting.iter_mut().for_each(|open| open.channel = None),
                }
            }
            Input::NotPermitted { door, caller } => {
                self.apply(Event::NotPermitted { door, pid: caller.pid, uid: caller.uid });
            }
            Input::DoorbellConnected(stream, pass) => self.doorbell_connected(stream, pass),
            Input::Doorbell { channel, word } => {
                let known = self.doorbell_function.as_ref().is_some_and(|(open, _)| *open == channel);
                match word {
                    _ if !known => {}
                    Word::Spoke => self.apply(Event::DoorbellSpoke),
                    Word::HungUp => {
                        self.doorbell_function = None;
                        self.doorbell_watch = None;
                        self.apply(Event::DoorbellGone);
                    }
                }
            }
            Input::ControlDoorbell => self.serve_control_ring(),
            Input::TooOften(side, flood) => self.apply(Event::TooOften(side, flood)),
            Input::Unplug(answer) => {
                self.unplug = Some(answer);
                self.apply(Event::Unplug);
            }
            Input::Report(answer) => drop(answer.send(self.report())),
        }
    }

    fn connected(&mut self, side: Side, stream: UnixStream, pass: Pass) {
        let waits = side == Side::Owner && self.owner.is_some() && self.waiting.is_none() && self.migration;
        if self.session(side).is_some() && !waits {
            turn_away(stream, pass);
            self.apply(Event::TurnedAway(side));
            return;
        }
        if side == Side::Peer
            && let Err(error) = self.renew_areas()
        {
            warn!(link = %self.name, %error, "the host gives no memory for a peer's link area; it is turned away");
            return turn_away(stream, pass);
        }
        self.next_session += 1;
        let id = SessionId(self.next_session);
        let port = self.port.clone();
        // The kernel does not say it of a socket that is no Unix one, of which there is none here.
        let process = Caller::of(&stream).map_or(0, |caller| caller.pid);
        if side == Side::Peer {
            self.shown_window = Some(self.shown.window(process));
        }
        let decoder = Arc::new(Decoder::new(port.clone(), side, id, (process, self.shown.clone())));
        // Before its first message.
        match side {
            Side::Owner if waits => self.guard.waiting(stream.as_fd()),
            Side::Owner => self.guard.owner(stream.as_fd()),
            Side::Peer => self.guard.peer(stream.as_fd(), self.areas.as_fd()),
        }
        let connection = Connection::new(stream, Arc::clone(&decoder));
        let line = connection.line();
        let rate = Rate::new(self.rates.messages, Instant::now());
        let name = format!("{} {}", self.name, side.name());
        let started = closing::spawn(name, (connection, pass), move |(connection, pass)| {
            serve(connection, &decoder, &port, rate, (side, id));
            // Closed, whatever came on it last and was not read.
            drop(pass);
        });
        if let Err((error, (connection, pass))) = started {
            warn!(link = %self.name, side = side.name(), %error, "a connection cannot be served");
            turn_away(connection, pass);
            if waits {
                self.close_waiting()
            } else {
                self.close(side)
            }
            return;
        }
        let session = Some(Session { id, line, answer: None, channel: None });
        match side {
            Side::Owner if waits => {
                self.waiting = session;
                return self.apply(Event::Waiting(WaitingEvent::Connected));
            }
            Side::Owner => self.owner = session,
            Side::Peer => self.peer = session,
        }
        self.apply(Event::Connected(side));
    }

    /// Areas that no earlier VMM has: one can keep the descriptors that it was sent.
    fn renew_areas(&mut self) -> io::Result<()> {
        let ring = ControlRing::new().map_err(io::Error::other)?;
        let areas = AreaFile::new()?;
        self.link_area = LinkArea::new(&areas, self.link_id);
        self.control_area = ControlArea::new(&areas);
        self.control_ring = ring;
        self.areas = areas;
        let all = self.link.publication();
        self.run_effects(vec![all]);
        Ok(())
    }

    fn doorbell_connected(&mut self, stream: UnixStream, pass: Pass) {
        if self.doorbell_function.is_some() {
            turn_away(stream, pass);
            self.apply(Event::DoorbellTurnedAway);
            return;
        }
        let port = self.port.clone();
        self.next_channel += 1;
        let channel = ChannelId(self.next_channel);
        let heard = move |word| port.send(Input::Doorbell { channel, word });
        match Doorbell::new(stream, pass, self.link_id, &self.name, heard) {
            Ok(doorbell) => {
                self.doorbell_function = Some((channel, doorbell));
                self.apply(Event::DoorbellConnected);
            }
            // Gone again already.
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {}
            Err(error) => warn!(link = %self.name, %error, "a doorbell function cannot be served"),
        }
    }

    /// Sends what is left to send, and looks whether all is read.
    fn look_at_doorbell(&mut self) {
        let Some((_, doorbell)) = &mut self.doorbell_function else { return };
        // That its VMM is gone comes by its own thread.
        if doorbell.send().and_then(|()| doorbell.is_read()).unwrap_or(false) {
            self.doorbell_watch = None;
            self.apply(Event::DoorbellRead);
        }
    }

    /// A time may have come.
    pub fn time_passed(&mut self, now: Instant) {
        self.relay.time_passed(now);
        let longest = if self.link.deadline().is_some() { LOOK_WAITED_FOR } else { LOOK };
        if let Some(watch) = self.watch.as_mut().filter(|watch| now >= watch.next) {
            watch.pause = (watch.pause * 2).min(longest);
            watch.next = now + watch.pause;
            self.look_at_witness();
        }
        if let Some((watch, _)) = self.served_watch.as_mut().filter(|(watch, _)| now >= watch.next) {
            watch.pause = (watch.pause * 2).min(LOOK_WAITED_FOR);
            watch.next = now + watch.pause;
            self.look_at_served();
        }
        // One that has waited too long is not looked at for ever.
        self.doorbell_watch.take_if(|_| !self.link.awaits_doorbell());
        if let Some(watch) = self.doorbell_watch.as_mut().filter(|watch| now >= watch.next) {
            watch.pause = (watch.pause * 2).min(LOOK_WAITED_FOR);
            watch.next = now + watch.pause;
            self.look_at_doorbell();
        }
        if self.link.deadline().is_some_and(|deadline| now >= deadline) {
            self.apply(Event::Tick);
        }
    }

    fn look_at_served(&mut self) {
        self.served_watch.take_if(|_| !self.link.awaits_served());
        let Some((_, generation)) = self.served_watch else { return };
        // The page was changed before: a driver that comes to serve only now has seen that.
        let word = self.control_area.served();
        if word == 0 || word >= generation {
            self.served_watch = None;
            self.apply(Event::Unserved);
        }
    }

    fn look_at_witness(&mut self) {
        let gone = match self.witnesses.front() {
            None => true,
            Some(witness) => witness.is_gone().unwrap_or_else(|error| {
                warn!(link = %self.name, %error, "the kernel does not tell about the witness page");
                false
            }),
        };
        if gone {
            self.watch = None;
            if let Some(witness) = self.witnesses.pop_front() {
                self.forget_shown(&witness.source());
            }
            self.apply(Event::WitnessGone);
        }
    }

    fn serve_control_ring(&mut self) {
        match self.control_ring.take(self.control_area.memory()) {
            Ok(commands) => {
                for command in commands {
                    let lens = (command.readable, command.writable);
                    self.apply(Event::Command(command.id, command.request, lens.0, lens.1));
                }
            }
            Err(reason) => self.apply(Event::ControlRingBroken(reason)),
        }
    }

    fn report(&self) -> LinkReport {
        let mut report = report::of(&self.link);
        let counters = self.relay.counters();
        // Relaxed: counts for people, ordered with nothing.
        report.counters.kicks_relayed = counters.kicks.load(Ordering::Relaxed);
        report.counters.calls_relayed = counters.calls.load(Ordering::Relaxed);
        report.counters.notifications_relayed = report.counters.kicks_relayed + report.counters.calls_relayed;
        report
    }

    fn apply(&mut self, event: Event) {
        let effects = self.link.apply(event, Instant::now());
        self.run_effects(effects);
    }

    /// A channel of a session's, if it is this one: another may have taken its place. Whether it is that of the owner's
    /// VMM which waits.
    fn channel(&mut self, side: Side, ids: (SessionId, ChannelId)) -> Option<(&mut Channel, bool)> {
        let active = match side {
            Side::Owner => self.owner.as_mut(),
            Side::Peer => self.peer.as_mut(),
        };
        let both = active.map(|open| (open, false)).into_iter();
        let mut both = both.chain(self.waiting.as_mut().map(|open| (open, true)));
        let (session, waits) = both.find(|(open, _)| open.id == ids.0)?;
        let channel = session.channel.as_mut().filter(|channel| channel.id() == ids.1)?;
        Some((channel, waits))
    }

    fn channel_answered(&mut self, side: Side, ids: (SessionId, ChannelId), request: u32, done: bool) {
        let Some((channel, waits)) = self.channel(side, ids) else { return };
        let answered = match channel.answered(request) {
            Ok(answered) => answered,
            Err(what) => {
                let fault =
                    format!("an answer to request {request} came on the back-end channel, not to: {what}");
                return self.end_session(side, ids.0, Some(Fault::Message(fault)));
            }
        };
        let sent = channel.send();
        // It was asked when it had the link: nobody wants to know any more, but its next answer is to the next question.
        if waits {
            return;
        }
        if sent.is_err() {
            self.channel_lost(side);
        }
        match answered {
            Some((Asked::Window(op, unmapped), what)) => {
                if let Some((offset, len)) = unmapped.filter(|_| done) {
                    self.guard.unmapped(op.0, offset, len);
                }
                let result = if done { Ok(()) } else { Err(format!("{what}: its answer was no")) };
                self.apply(Event::WindowDone(op, result));
            }
            Some((Asked::Wire(id), what)) => {
                let result = if done { Ok(()) } else { Err(what) };
                self.apply(Event::WireDone(id, result));
            }
            Some((Asked::Miss(id), _)) => self.apply(Event::MissDone(id, done)),
            Some((Asked::Nothing, _)) | None => self.run_effects(Vec::new()),
        }
    }

    /// A VMM closed its channel: what it was asked it will not answer. An owner's may bring
    /// another, and so may a peer's that shows nothing and was asked nothing. Any other
    /// can take nothing back: this is its end, of which its other socket tells in a moment.
    fn channel_lost(&mut self, side: Side) {
        let is_shown = side == Side::Peer && self.link.is_shown();
        let Some(session) = self.session(side) else { return };
        let id = session.id;
        let owes = session.channel.take().is_some_and(|channel| channel.owes_answers());
        if side == Side::Peer && (is_shown || owes) {
            info!(link = %self.name, "the peer's VMM closed its back-end channel");
            self.failed.push_back(Failure::Session(side, id));
        }
    }

    fn session(&mut self, side: Side) -> Option<&mut Session> {
        match side {
            Side::Owner => self.owner.as_mut(),
            Side::Peer => self.peer.as_mut(),
        }
    }

    fn end_session(&mut self, side: Side, id: SessionId, fault: Option<Fault>) {
        if let Some(event) = self.ended(side, id, fault) {
            self.apply(event);
        }
    }

    /// Closes a session and gives what the link is to be told of it: nothing, if it has closed it before. An owner's may
    /// be of the VMM that waits by now.
    fn ended(&mut self, side: Side, id: SessionId, fault: Option<Fault>) -> Option<Event> {
        if self.session(side).is_some_and(|open| open.id == id) {
            self.close(side);
            return Some(Event::Disconnected(side, fault));
        }
        self.waiting.as_ref().filter(|open| open.id == id)?;
        self.close_waiting();
        Some(Event::Waiting(WaitingEvent::Disconnected(fault)))
    }

    fn close_waiting(&mut self) {
        self.waiting = None;
        self.guard.waiting_gone();
    }

    fn close(&mut self, side: Side) {
        match side {
            Side::Owner => {
                self.owner = None;
                self.guard.owner_gone();
            }
            Side::Peer => {
                self.peer = None;
                self.fence = None;
                self.guard.peer_gone();
            }
        }
    }
}
