//! One device, from its start to its end: follows its link page, and tells it by the
//! control ring what is served and what is broken.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use vhost_pci_device::abi::{self, queue_of_vring};

use super::ProgramError;
use super::allowance::Allowance;
use super::live::Live;
use super::quiet::Quiet;
use super::run::LONGEST_SLEEP;
use super::tally::Tally;
use super::waiting::sleep;
use crate::control::served::Served;
use crate::control::{Command, ControlExchange, ControlRing};
use crate::link::{LinkError, LinkPage};
use crate::net::PeerPort;
use crate::port::Port;
use crate::transport::{Pairing, Transport};

/// Between two looks for a link, where no interrupt tells of it.
const LINK_PAUSE: Duration = Duration::from_millis(1);
/// The same where one does.
const LINK_SLEEP: Duration = Duration::from_millis(20);
/// When it is time to say that there is no link area (10, step 8).
const LINK_PATIENCE: Duration = Duration::from_secs(5);
/// The longest sleep where something waits for the device to be asked again.
const LONGEST_PAUSE: Duration = Duration::from_millis(10);
/// How long the device may take to answer when the program ends.
const DETACH_TIME: Duration = Duration::from_millis(500);

/// For a link area that does not appear.
#[derive(Clone, Copy, Debug, Default)]
enum Waiting {
    #[default]
    No,
    Since(Instant),
    Said,
}

impl Waiting {
    /// There still is none. Whether that is to be said: once, after a while.
    fn is_long(&mut self) -> bool {
        match *self {
            Self::No => *self = Self::Since(Instant::now()),
            Self::Since(start) if start.elapsed() >= LINK_PATIENCE => {
                *self = Self::Said;
                return true;
            }
            Self::Since(_) | Self::Said => {}
        }
        false
    }

    /// There is one.
    fn end(&mut self) {
        if let Self::Since(_) = self {
            *self = Self::No;
        }
    }
}

/// One device, from its start to its end; the owner's vrings are served by a `P`.
pub(super) struct Session<'a, P = PeerPort> {
    transport: &'a dyn Transport,
    interrupt: bool,
    kept: Paused<P>,
}

/// A session without its device for a moment, to go on with the same one: of many sessions one's device
/// can be let go, while nobody borrows them.
pub(super) struct Paused<P = PeerPort> {
    page: LinkPage,
    waiting: Waiting,
    /// There while the control area is.
    control: Option<ControlRing>,
    live: Option<Live<P>>,
    /// The doorbell function, of which the device was told.
    doorbell: Option<Pairing>,
    /// The generation that gave no port, and will not.
    refused: Option<u64>,
    /// What the device is told to be served at this moment.
    served: Served,
    tally: Tally,
    /// For lines that the owner can cause.
    quiet: Quiet,
    /// How long the owner's answers are waited for, where others wait meanwhile.
    allowance: Option<Allowance>,
}

/// A port for one round.
pub(super) struct Turn<'s, P> {
    pub port: &'s mut P,
    pub transport: &'s dyn Transport,
    /// For what the mapping table does not show.
    pub exchange: Option<ControlExchange<'s>>,
}

impl<'a, P: Port> Session<'a, P> {
    /// Goes on where it was, with the same device, which knows of nothing.
    pub fn resume(transport: &'a dyn Transport, interrupt: bool, kept: Paused<P>) -> Self {
        Self { transport, interrupt, kept }
    }

    /// Lets the device go, to [go on](Self::resume) with it at once.
    pub fn pause(self) -> Paused<P> {
        self.kept
    }

    /// On a started device. `interrupt`: the program sleeps until it is interrupted.
    pub fn new(transport: &'a dyn Transport, interrupt: bool) -> Result<Self, ProgramError> {
        if interrupt && transport.interrupt_fd(abi::QUEUE_CONTROL).is_none() {
            return Err(ProgramError::NoInterrupts { device: transport.name().to_owned() });
        }
        let kept = Paused {
            page: LinkPage::new(transport.window(), transport.config())?,
            waiting: Waiting::default(),
            control: None,
            live: None,
            doorbell: None,
            refused: None,
            served: Served::new(transport.config()),
            tally: Tally::default(),
            quiet: Quiet::default(),
            allowance: None,
        };
        Ok(Self { transport, interrupt, kept })
    }

    /// The same, waiting no longer for what the device is asked: others wait meanwhile, and the owner's VMM
    /// may not answer. What comes later is found when it is looked for again.
    pub fn allowing(mut self, allowance: Allowance) -> Self {
        self.kept.allowance = Some(allowance);
        self
    }

    /// What was counted.
    pub fn tally(&self) -> Tally {
        let now = self.kept.live.as_ref().map(|live| live.port.demand()).unwrap_or_default();
        Tally { demand: self.kept.tally.demand + now, ..self.kept.tally }
    }

    /// Whether there is a link to serve.
    pub fn is_live(&self) -> bool {
        self.kept.live.is_some()
    }

    /// Follows the link. If it is up, its port, for one round: who finds that a vring is broken has
    /// to [report](Self::report_faults) it. `lost` is called if the link that was up before is gone.
    pub fn turn(&mut self, lost: impl FnOnce()) -> Result<Option<Turn<'_, P>>, ProgramError> {
        self.follow_link(lost)?;
        let serves = self.kept.live.as_ref().map_or(0, |live| live.port.generation());
        if self.kept.served.say(self.transport.window(), serves) && self.kept.page.generation() != serves {
            // It ended before that was known.
            return Ok(None);
        }
        // Only where it is used in each round: otherwise each command looks for it.
        if self.kept.live.as_ref().is_some_and(|live| live.asks) {
            self.renew_control();
        }
        let Some(live) = &mut self.kept.live else { return Ok(None) };
        let control = self.kept.control.as_mut().filter(|_| live.asks);
        let allowance = &mut self.kept.allowance;
        let exchange = control.map(|ring| {
            let exchange = ControlExchange::new(ring, self.transport, self.interrupt);
            let exchange = exchange.of_link(live.port.generation());
            match allowance {
                Some(allowance) => {
                    let left = allowance.left(Instant::now);
                    exchange.patience(left).counting(&mut allowance.waited)
                }
                None => exchange,
            }
        });
        Ok(Some(Turn { port: &mut live.port, transport: self.transport, exchange }))
    }

    /// The link that is up, if one is.
    pub fn live(&self) -> Option<&Live<P>> {
        self.kept.live.as_ref()
    }

    /// Whether the device is known to be gone: then [`Self::check`] says so.
    pub fn is_over(&self) -> bool {
        self.transport.is_over()
    }

    /// For once a second: whether the device is there, and what it has to say.
    pub fn check(&mut self) -> Result<(), ProgramError> {
        self.transport.check()?;
        self.renew_control();
        self.hear_answers();
        // Also while the link is down: a function that is unplugged has to be let go all the same.
        let doorbell = self.transport.pair(self.kept.page.link_id());
        if doorbell != self.kept.doorbell {
            self.kept.doorbell = doorbell;
            self.attach();
        } else if self.kept.live.as_ref().is_some_and(|live| live.attach_owed) {
            self.attach();
        }
        self.transport.follow_doorbell();
        Ok(())
    }

    /// For every few rounds: follows the doorbell page. A call that met a change of it which went
    /// on may have gone nowhere; a program that never sleeps would find that out by the second.
    pub fn follow_doorbell(&self) {
        self.transport.follow_doorbell();
    }

    /// Lets go of the owner's vrings, and then tells the device so, if it is there.
    pub fn end(mut self, tell: bool) {
        self.kept.live = None;
        self.kept.served.say(self.transport.window(), 0);
        self.renew_control();
        if tell
            && let Some(mut control) = self.kept.control
            && let Err(error) = control.call(self.transport, Command::Detach, DETACH_TIME)
        {
            tracing::warn!(device = self.transport.name(), "{error}");
        }
    }

    /// Brings the port up to the link page's generation.
    fn follow_link(&mut self, lost: impl FnOnce()) -> Result<(), ProgramError> {
        let generation = self.kept.page.generation();
        if self.kept.live.as_ref().is_some_and(|live| live.port.generation() == generation) {
            return Ok(());
        }
        if let Some(live) = self.kept.live.take() {
            self.kept.tally.demand += live.port.demand();
            lost();
        }
        if self.kept.refused == Some(generation) && generation != 0 {
            return Ok(());
        }
        self.kept.refused = None;
        let snapshot = match self.kept.page.snapshot() {
            Ok(snapshot) => snapshot,
            Err(LinkError::Changing) => return Ok(()),
            Err(LinkError::NotMapped) => {
                if self.kept.waiting.is_long() {
                    tracing::warn!(
                        device = self.transport.name(),
                        "no link area for {LINK_PATIENCE:?}: the device shows an empty window. Does its broker \
                         run, and does the VMM map what it is asked to? Still waiting"
                    );
                }
                // The next control area is another one.
                self.kept.control = None;
                return Ok(());
            }
            Err(error) => {
                // The device's fault; what it writes next may be better.
                if self.kept.quiet.allows_line() {
                    tracing::error!(device = self.transport.name(), "{error}");
                }
                self.kept.refused = Some(generation);
                return Ok(());
            }
        };
        self.kept.waiting.end();
        if !self.kept.control.as_ref().is_some_and(ControlRing::is_current) {
            self.kept.control = Some(ControlRing::new(self.transport)?);
        }
        if !snapshot.up {
            self.kept.refused = Some(snapshot.generation);
            return Ok(());
        }
        match P::open(self.transport.window(), &self.kept.page, &snapshot) {
            Ok(port) => self.go_live(port, snapshot.iommu || snapshot.copy),
            Err(error) => {
                if self.kept.quiet.allows_line() {
                    tracing::error!(device = self.transport.name(), "cannot serve this owner: {error}");
                }
                self.kept.refused = Some(snapshot.generation);
            }
        }
        Ok(())
    }

    fn go_live(&mut self, mut port: P, asks: bool) {
        for vring in 0..port.vrings() {
            // A fault shows again with the first burst.
            let _ = port.set_kicks(vring, false);
        }
        // 8.4: an earlier driver may have used buffers and died before it said so.
        for vring in (0..port.vrings()).filter(|vring| port.is_enabled(*vring)) {
            self.transport.doorbell(queue_of_vring(vring));
        }
        let generation = port.generation();
        if self.kept.quiet.allows_line() {
            tracing::info!(
                device = self.transport.name(),
                generation,
                vrings = port.vrings(),
                iommu = asks,
                "the link is up"
            );
        }
        self.kept.tally.links += 1;
        let broken = !port.faults().is_empty();
        self.kept.live = Some(Live { port, asks, reported: Vec::new(), attach_owed: true });
        self.kept.doorbell = self.transport.pair(self.kept.page.link_id());
        self.attach();
        if broken {
            self.report_faults();
        }
    }

    /// Tells the device what is broken and new, unless the link has just changed:
    /// memory that is being taken away looks broken, too.
    pub fn report_faults(&mut self) {
        let Some(live) = &mut self.kept.live else { return };
        if self.kept.page.generation() != live.port.generation() {
            return;
        }
        let new: Vec<_> =
            live.port.faults().into_iter().filter(|fault| !live.reported.contains(fault)).collect();
        live.reported.extend(&new);
        self.kept.tally.faults += new.len() as u64;
        for fault in new {
            if self.kept.quiet.allows_line() {
                tracing::warn!(device = self.transport.name(), "{fault}; not served until the link changes");
            }
            self.tell(fault.into());
        }
    }

    /// What ATTACH says now, if there is something to serve.
    fn attachment(&self) -> Option<Command> {
        let generation = self.kept.live.as_ref()?.port.generation();
        let doorbell = self.kept.doorbell.map(|doorbell| doorbell.vectors);
        Some(Command::Attach {
            generation,
            interrupt: self.interrupt,
            doorbell,
            quiesce: false,
            says_served: true,
        })
    }

    /// Tells the device what is served. What it cannot be told now is owed to it: without it,
    /// kicks would go where nobody waits for them.
    fn attach(&mut self) {
        let Some(command) = self.attachment() else { return };
        let sent = self.tell(command);
        if let Some(live) = &mut self.kept.live {
            live.attach_owed = !sent;
        }
    }

    /// Gives the device a command, and says whether there was room. It may answer or not: the
    /// link works all the same.
    fn tell(&mut self, command: Command) -> bool {
        self.renew_control();
        // Makes room, too.
        self.hear_answers();
        let Some(control) = &mut self.kept.control else { return false };
        let sent = control.send(self.transport, command);
        if let Err(error) = &sent
            && self.kept.quiet.allows_line()
        {
            tracing::warn!(device = self.transport.name(), "control ring: {error}");
        }
        sent.is_ok()
    }

    /// 9.1: the mark is looked for before each command. To a ring that begins anew nobody is
    /// attached.
    fn renew_control(&mut self) {
        if self.kept.control.as_ref().is_none_or(ControlRing::is_current) {
            return;
        }
        self.kept.control = ControlRing::new(self.transport).ok();
        self.kept.served.forget();
        let attachment = self.attachment();
        if let (Some(control), Some(live), Some(attach)) =
            (&mut self.kept.control, &mut self.kept.live, attachment)
        {
            live.attach_owed = control.send(self.transport, attach).is_err();
        }
    }

    fn hear_answers(&mut self) {
        let answers = self.kept.control.as_mut().map_or(Ok(Vec::new()), ControlRing::answers);
        match answers {
            Ok(answers) => {
                // An attachment to a generation that has passed meanwhile is no news.
                let news = |status| status != abi::CTRL_OK && status != abi::CTRL_STALE;
                let quiet = &mut self.kept.quiet;
                for answer in answers.into_iter().filter(|answer| news(answer.status) && quiet.allows_line())
                {
                    tracing::warn!(device = self.transport.name(), ?answer, "the device refuses a command");
                }
            }
            Err(error) if self.kept.quiet.allows_line() => {
                tracing::warn!(device = self.transport.name(), "{error}")
            }
            Err(_) => {}
        }
    }

    /// Sleeps until the owner kicks one of the vrings that `waited_for` names, the link changes, or
    /// there is `input`; at most for `patience`.
    pub fn sleep_for(
        &mut self,
        waited_for: impl FnOnce(&Live<P>) -> Vec<u16>,
        input: Option<BorrowedFd<'_>>,
        patience: Duration,
    ) {
        let armed = self.arm(waited_for);
        match &armed {
            // No interrupt will tell of anything.
            Armed { events, .. } if events.is_empty() => std::thread::sleep(LINK_PAUSE),
            Armed { watched: None, events, most, .. } => drop(sleep(events, &[], *most)),
            Armed { has_work: true, .. } => {}
            Armed { events, most, .. } => {
                let input: Vec<_> = input.into_iter().collect();
                let most = (*most).min(patience);
                let mut sleeps = self.kept.tally.sleeps;
                sleeps.sleep(events, &input, most, || self.has_missed(&armed));
                self.kept.tally.sleeps = sleeps;
            }
        }
        self.disarm(&armed);
    }

    /// Prepares for a sleep: asks for kicks of the vrings that `waited_for` names, and looks at all
    /// that they could tell once more. What comes after that is told, and ends the sleep however
    /// late it begins.
    pub fn arm(&mut self, waited_for: impl FnOnce(&Live<P>) -> Vec<u16>) -> Armed<'a> {
        let armed = self.look_once_more(waited_for);
        // Who sleeps is in the middle of nothing, and nobody waits for it.
        self.kept.served.say(self.transport.window(), 0);
        armed
    }

    fn look_once_more(&mut self, waited_for: impl FnOnce(&Live<P>) -> Vec<u16>) -> Armed<'a> {
        let transport = self.transport;
        let Some(control) = transport.interrupt_fd(abi::QUEUE_CONTROL) else {
            return Armed { events: Vec::new(), watched: None, most: LINK_PAUSE, has_work: false };
        };
        // To a device that began anew nobody is attached, and so nobody is kicked.
        self.renew_control();
        transport.follow_doorbell();
        let mut events = vec![control];
        let Some(live) = &mut self.kept.live else {
            // A change of the link page interrupts; but look now and then.
            return Armed { events, watched: None, most: LINK_SLEEP, has_work: false };
        };
        let vrings = waited_for(live);
        let work = live.set_kicks(&vrings, true);
        // What waits for the device to be asked again is no work yet.
        let pause = live.port.pause();
        let generation = live.port.generation();
        let has_work = (work && pause.is_none()) || self.kept.page.generation() != generation;
        // One eventfd a queue, where the device has them: none is shared by choice.
        events.extend(vrings.iter().flat_map(|vring| transport.interrupt_fds(queue_of_vring(*vring))));
        let most = pause.map_or(LONGEST_SLEEP, |pause| pause.min(LONGEST_PAUSE));
        let watched = Some(Watched { vrings, generation, pauses: pause.is_some() });
        Armed { events, watched, most, has_work }
    }

    /// Whether there is work that was to be notified of.
    pub fn has_missed(&mut self, armed: &Armed<'_>) -> bool {
        let (Some(live), Some(watched)) = (&mut self.kept.live, &armed.watched) else { return false };
        !watched.pauses
            && live.set_kicks(&watched.vrings, true)
            && self.kept.page.generation() == watched.generation
    }

    /// After a sleep: asks for no more kicks.
    pub fn disarm(&mut self, armed: &Armed<'_>) {
        if let (Some(live), Some(watched)) = (&mut self.kept.live, &armed.watched) {
            live.set_kicks(&watched.vrings, false);
        }
    }
}

/// A session that is prepared for a sleep.
pub(super) struct Armed<'a> {
    /// What becomes readable when there is something to do; empty if nothing does.
    pub events: Vec<BorrowedFd<'a>>,
    /// What is waited for on a link that is up.
    watched: Option<Watched>,
    /// The longest sleep that makes sense.
    pub most: Duration,
    /// There is something to do already.
    pub has_work: bool,
}

struct Watched {
    vrings: Vec<u16>,
    generation: u64,
    /// Something waits for the device to be asked again.
    pauses: bool,
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
