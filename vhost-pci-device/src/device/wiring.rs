//! Which eventfds are joined to which interrupts and notifications.
//!
//! Each eventfd has a place here, and what it should be registered for follows from the
//! registers; [`Wiring::settle`] makes it so. Masking a vector is to deregister its eventfds:
//! signals that come then stay in their counts, which are the pending bits, and arrive when they
//! are registered again. KVM makes an interrupt of a count that it finds, and leaves the count: it is
//! taken away after the registration, when whatever comes is KVM's, or the next masking
//! would find it again. Else an eventfd that was given (WIRE) is never read, and never written.

use std::io;
use std::sync::Arc;

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::events::Pair;
use crate::sys::event;
use crate::vmm::{Held, MsiMessage, Vmm};

/// What eventfds are to be registered for now.
pub trait Wanted {
    /// The message of configuration changes. `None`: masked, or no vector.
    fn config(&self) -> Option<MsiMessage>;
    /// The message of a queue's interrupts. `None`: masked, or no vector.
    fn interrupt(&self, queue: usize) -> Option<MsiMessage>;
    /// Where a queue is notified. `None`: nowhere.
    fn notify(&self, queue: usize) -> Option<GuestAddress>;
}

/// An eventfd's registration. Before the eventfd in every structure: dropped first.
struct Registered<T>(Option<(T, Held)>);

impl<T> Default for Registered<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Copy + PartialEq> Registered<T> {
    fn settle(&mut self, wanted: Option<T>, register: impl FnOnce(T) -> io::Result<Held>) -> io::Result<()> {
        if self.0.as_ref().map(|(now, _)| *now) != wanted {
            self.0 = None;
            if let Some(wanted) = wanted {
                self.0 = Some((wanted, register(wanted)?));
            }
        }
        Ok(())
    }
}

impl Registered<MsiMessage> {
    fn settle_irqfd(&mut self, vmm: &dyn Vmm, wanted: Option<MsiMessage>, its: &EventFd) -> io::Result<()> {
        self.settle(wanted, |message| {
            let held = vmm.irqfd(message, its)?;
            event::drain(its);
            Ok(held)
        })
    }

    /// Whether a signal waits. What is registered has been delivered.
    fn is_pending(&self, its: &EventFd) -> bool {
        self.0.is_none() && event::has_count(its)
    }
}

/// An eventfd that was given, and its registration.
struct Given<T> {
    registered: Registered<T>,
    event: EventFd,
}

impl<T> Given<T> {
    fn new(event: EventFd) -> Self {
        Self { registered: Registered(None), event }
    }

    /// Deregisters it.
    fn let_go(self) -> EventFd {
        drop(self.registered);
        self.event
    }
}

/// One virtqueue.
#[derive(Default)]
struct Line {
    call: Registered<MsiMessage>,
    kick: Registered<GuestAddress>,
    interrupt: Option<Given<MsiMessage>>,
    notify: Option<Given<GuestAddress>>,
}

impl Line {
    fn settle_notify(
        &mut self,
        vmm: &dyn Vmm,
        wanted: Option<GuestAddress>,
        kick: &EventFd,
    ) -> io::Result<()> {
        // One eventfd an address: who goes, goes first.
        match &mut self.notify {
            Some(given) => {
                self.kick = Registered::default();
                given.registered.settle(wanted, |address| vmm.ioeventfd(address, &given.event))
            }
            None => self.kick.settle(wanted, |address| vmm.ioeventfd(address, kick)),
        }
    }
}

/// All eventfds of the device.
pub struct Wiring {
    lines: Vec<Line>,
    config: Registered<MsiMessage>,
    pairs: Arc<Vec<Pair>>,
    config_event: EventFd,
    /// The VMM has refused an interrupt's eventfd that stands here.
    refused: bool,
    /// The VMM has refused something, and the operator was told so.
    told: bool,
}

impl Wiring {
    /// Nothing is registered.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new(pairs: Arc<Vec<Pair>>) -> io::Result<Self> {
        let lines = pairs.iter().map(|_| Line::default()).collect();
        let (config, config_event) = (Registered::default(), event::new()?);
        Ok(Self { lines, config, pairs, config_event, refused: false, told: false })
    }

    /// Registers what is to be registered and nothing else. What the VMM refuses stays
    /// unregistered: a notification is then an exit, an interrupt waits for the next call.
    pub fn settle(&mut self, vmm: &dyn Vmm, wanted: &dyn Wanted) {
        let (mut interrupt, mut notification) = (Ok(()), Ok(()));
        let note = |of: &mut io::Result<()>, result: io::Result<()>| {
            if result.is_err() {
                *of = result;
            }
        };
        note(&mut interrupt, self.config.settle_irqfd(vmm, wanted.config(), &self.config_event));
        for (queue, (line, pair)) in self.lines.iter_mut().zip(self.pairs.iter()).enumerate() {
            let message = wanted.interrupt(queue);
            note(&mut interrupt, line.call.settle_irqfd(vmm, message, &pair.call));
            if let Some(given) = &mut line.interrupt {
                note(&mut interrupt, given.registered.settle_irqfd(vmm, message, &given.event));
            }
            note(&mut notification, line.settle_notify(vmm, wanted.notify(queue), &pair.kick));
        }
        self.refused = interrupt.is_err();
        if let Err(error) = interrupt.and(notification)
            && !std::mem::replace(&mut self.told, true)
        {
            tracing::warn!(%error, "the hypervisor refuses an eventfd (told once)");
        }
    }

    /// Whether an interrupt waits for the VMM to take what it refused.
    pub fn is_refused(&self) -> bool {
        self.refused
    }

    /// Joins an eventfd to a queue's interrupt, in place of one that was given before. What is
    /// joined no more comes to `unused`.
    ///
    /// # Errors
    /// What the VMM answers; then none is joined.
    pub fn wire_interrupt(
        &mut self,
        vmm: &dyn Vmm,
        queue: usize,
        event: Option<EventFd>,
        message: Option<MsiMessage>,
        unused: &mut Vec<EventFd>,
    ) -> io::Result<()> {
        let line = self.lines.get_mut(queue).ok_or(io::ErrorKind::InvalidInput)?;
        unused.extend(line.interrupt.take().map(Given::let_go));
        let Some(event) = event else { return Ok(()) };
        let mut given = Given::new(event);
        let result = given.registered.settle_irqfd(vmm, message, &given.event);
        match result {
            Ok(()) => line.interrupt = Some(given),
            Err(_) => unused.push(given.let_go()),
        }
        result
    }

    /// Joins a queue's notification to an eventfd, in place of the device's own and of one that was
    /// given before. What is joined no more comes to `unused`.
    ///
    /// # Errors
    /// What the VMM answers; then the device's own is joined again.
    pub fn wire_notify(
        &mut self,
        vmm: &dyn Vmm,
        queue: usize,
        event: Option<EventFd>,
        address: Option<GuestAddress>,
        unused: &mut Vec<EventFd>,
    ) -> io::Result<()> {
        let line = self.lines.get_mut(queue).ok_or(io::ErrorKind::InvalidInput)?;
        let pair = self.pairs.get(queue).ok_or(io::ErrorKind::InvalidInput)?;
        unused.extend(line.notify.take().map(Given::let_go));
        line.notify = event.map(Given::new);
        let result = line.settle_notify(vmm, address, &pair.kick);
        if result.is_err()
            && let Some(given) = line.notify.take()
        {
            unused.push(given.let_go());
            // Should this fail as well, notifications are exits.
            let _ = line.settle_notify(vmm, address, &pair.kick);
        }
        result
    }

    /// Lets go of everything that was given.
    pub fn unwire(&mut self) {
        for line in &mut self.lines {
            line.interrupt = None;
            line.notify = None;
        }
    }

    /// Lets go of what was given, deregisters the rest, and forgets what was signalled.
    pub fn clear(&mut self) {
        for line in &mut self.lines {
            *line = Line::default();
        }
        self.config = Registered::default();
        self.refused = false;
        event::drain(&self.config_event);
        self.pairs.iter().for_each(Pair::drain);
    }

    /// Makes a configuration interrupt.
    pub fn signal_config(&self) {
        event::signal(&self.config_event);
    }

    /// Whether an interrupt of configuration changes waits to be unmasked.
    pub fn is_config_pending(&self) -> bool {
        self.config.is_pending(&self.config_event)
    }

    /// Whether an interrupt of the queue waits to be unmasked.
    pub fn is_pending(&self, queue: usize) -> bool {
        let (Some(line), Some(pair)) = (self.lines.get(queue), self.pairs.get(queue)) else { return false };
        let given = line.interrupt.as_ref().is_some_and(|given| given.registered.is_pending(&given.event));
        given || line.call.is_pending(&pair.call)
    }

    /// How many queues have a given eventfd as interrupt, and as notification.
    pub fn wired(&self) -> (usize, usize) {
        let count = |is: fn(&Line) -> bool| self.lines.iter().filter(|line| is(line)).count();
        (count(|line| line.interrupt.is_some()), count(|line| line.notify.is_some()))
    }
}
