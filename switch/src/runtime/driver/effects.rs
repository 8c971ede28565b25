//! Runs what a link's state asks for: answers, questions to VMMs, changes of the window, signals.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use tracing::{info, warn};
use vhost_pci_device::abi;

use super::{FIRST_LOOK, Failure, LinkDriver, Session, Watch};
use crate::link::doorbell::DoorbellMessage;
use crate::link::iommu::demand::Task;
use crate::link::iommu::iotlb::Piece;
use crate::link::message::{CommandId, Content, Log, Marks, OpId, Reply, WindowOp};
use crate::link::{Effect, Event, Side};
use crate::runtime::areas::{Source, Witness};
use crate::runtime::backend_message::{self, Message};
use crate::runtime::channel::{Asked, Channel, send_later, send_now};
use crate::runtime::control_ring::ControlRing;
use crate::runtime::copy::copy;
use crate::runtime::rate::Rate;
use crate::runtime::shown::Identity;
use crate::runtime::{Answer, ChannelId, SessionId, dirty_log};

impl LinkDriver {
    pub(super) fn run_effects(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            self.run_effect(effect);
        }
        while let Some(failure) = self.failed.pop_front() {
            let event = match failure {
                Failure::Session(side, id) => self.ended(side, id, None),
                Failure::Mark(error) => {
                    Some(Event::Unmarked(format!("what was stored cannot be marked: {error}")))
                }
            };
            let Some(event) = event else { continue };
            for effect in self.link.apply(event, Instant::now()) {
                self.run_effect(effect);
            }
        }
        if self.control_ring.take_notification(self.control_area.memory())
            && let Some(call) = self.link.control_call()
        {
            self.relay.signal(&call);
        }
        // A page that is gone already needs no wait.
        if self.watch.is_some() {
            self.look_at_witness();
        }
        // Nor does a driver that sleeps.
        self.look_at_served();
    }

    fn run_effect(&mut self, effect: Effect) {
        match effect {
            Effect::Reply(side, reply) => {
                let session = match side {
                    Side::Owner => self.owner.as_mut(),
                    Side::Peer => self.peer.as_mut(),
                };
                let unanswered = reply_to(&self.name, side.name(), session, reply).err();
                self.failed.extend(unanswered.map(|id| Failure::Session(side, id)));
            }
            Effect::ReplyWaiting(reply) => {
                let unanswered = reply_to(&self.name, "waiting owner", self.waiting.as_mut(), reply).err();
                self.failed.extend(unanswered.map(|id| Failure::Session(Side::Owner, id)));
            }
            Effect::Disconnect(side) => self.close(side),
            Effect::DisconnectWaiting => self.close_waiting(),
            Effect::SwapOwners => {
                std::mem::swap(&mut self.owner, &mut self.waiting);
                self.guard.owners_swapped();
            }
            Effect::OpenChannel(side, stream) => self.open_channel(side, stream, false),
            Effect::OpenWaitingChannel(stream) => self.open_channel(Side::Owner, stream, true),
            Effect::Miss(id, page, access) => {
                self.ask(Side::Owner, Asked::Miss(id), backend_message::miss(page, access));
            }
            Effect::AccessFail(page, access) => {
                self.ask(Side::Owner, Asked::Nothing, backend_message::access_fail(page, access));
            }
            Effect::Answer(command, status, table_changed) => {
                let flags = if table_changed { abi::RESPONSE_F_TABLE } else { 0 };
                self.control_ring.answer(self.control_area.memory(), command, status, flags, 0);
            }
            Effect::Copy(command, task, pieces, marks) => self.copy(command, task, &pieces, marks.as_ref()),
            Effect::Window(op, change) => self.change_window(op, change),
            Effect::WirePeer(id, request) => {
                self.ask(Side::Peer, Asked::Wire(id), backend_message::wire(request));
            }
            Effect::Doorbell(message) => {
                if let Some((_, doorbell)) = &mut self.doorbell_function {
                    match message {
                        DoorbellMessage::OwnVector(eventfd) => doorbell.own_vector(&eventfd),
                        DoorbellMessage::Peer(number, eventfd) => doorbell.peer_vector(number, &eventfd),
                    }
                }
            }
            Effect::WatchDoorbell => {
                self.doorbell_watch = Some(Watch { next: Instant::now(), pause: FIRST_LOOK });
            }
            Effect::PublishDoorbell(entries, generation) => {
                let published = self
                    .doorbell_function
                    .as_mut()
                    .map(|(_, doorbell)| doorbell.publish(&entries, generation));
                self.warn_of(published.unwrap_or(Ok(())), "the doorbell page cannot be written");
            }
            Effect::WatchWitness => {
                self.watch = Some(Watch { next: Instant::now() + FIRST_LOOK, pause: FIRST_LOOK });
            }
            Effect::StopWatching => self.watch = None,
            Effect::WatchServed(generation) => {
                let watch = Watch { next: Instant::now() + FIRST_LOOK, pause: FIRST_LOOK };
                self.served_watch = Some((watch, generation));
            }
            Effect::ResetControlRing => self.reset_control_ring(),
            Effect::Publish(contents, generations) => {
                let published = self.link_area.publish(&contents, generations);
                self.warn_of(published, "the link area cannot be written");
            }
            Effect::PublishTable(mappings, generation) => {
                let published = self.link_area.publish_table(&mappings, generation);
                self.warn_of(published, "the link area cannot be written");
            }
            Effect::NotifyPeer(eventfd) | Effect::Signal(eventfd) => self.relay.signal(&eventfd),
            Effect::Wire(wires) => {
                self.wires = wires;
                self.relay.wire(&self.wires, self.doorbell.as_ref());
            }
            Effect::ControlDoorbell(doorbell) => {
                self.doorbell = doorbell;
                self.relay.wire(&self.wires, self.doorbell.as_ref());
            }
            Effect::Unplugged(confirmed) => {
                if let Some(answer) = self.unplug.take() {
                    let _ = answer.send(confirmed);
                }
            }
            Effect::Log(Log::Info(line)) => info!(link = %self.name, "{line}"),
            Effect::Log(Log::Fault(line)) => warn!(link = %self.name, "{line}"),
        }
    }

    fn open_channel(&mut self, side: Side, stream: UnixStream, waits: bool) {
        let (port, name) = (self.port.clone(), self.name.clone());
        let rate = Rate::new(self.rates.messages, Instant::now());
        self.next_channel += 1;
        let id = ChannelId(self.next_channel);
        let guard = self.guard.clone();
        let session = if waits { self.waiting.as_mut() } else { self.session(side) };
        let Some(session) = session else { return };
        match Channel::open(stream, port, side, (session.id, id), &name, rate) {
            Ok(channel) => {
                let channel = session.channel.insert(channel);
                if side == Side::Peer {
                    guard.channel(channel.connection());
                }
            }
            Err(error) => warn!(link = %name, %error, "the back-end channel cannot be served"),
        }
    }

    /// Asks a VMM. Without a channel nothing answers: the link's deadlines deal with it.
    pub(super) fn ask(&mut self, side: Side, asked: Asked, message: Message) {
        let Some(channel) = self.session(side).and_then(|session| session.channel.as_mut()) else { return };
        if channel.ask(asked, message).is_err() {
            self.channel_lost(side);
        }
    }

    fn copy(&mut self, command: CommandId, task: Task, pieces: &[Piece], marks: Option<&Marks>) {
        let memory = self.control_area.memory();
        let copied = copy(&self.control_ring, memory, command, task, pieces);
        // Whatever was written. A STORE that is done is there when the owner has been migrated, too.
        let unmarked = marks.and_then(|marks| dirty_log::mark(marks).err());
        let done = copied && unmarked.is_none();
        self.failed.extend(unmarked.map(Failure::Mark));
        let written = match task {
            Task::Fetch if done => pieces.iter().map(|piece| piece.len).sum(),
            Task::Fetch | Task::Map | Task::Store => 0,
        };
        let status = if done { abi::CTRL_OK } else { abi::CTRL_FAILED };
        self.control_ring.answer(memory, command, status, 0, written);
    }

    fn warn_of(&self, result: io::Result<()>, what: &str) {
        if let Err(error) = result {
            warn!(link = %self.name, %error, "{what}");
        }
    }

    fn change_window(&mut self, op: OpId, change: WindowOp) {
        let unmapped = match &change {
            WindowOp::Unmap(content) => Some(content.place(self.link.window_len())),
            WindowOp::Map(_) => None,
        };
        let unmapped = unmapped.map(|(offset, len)| (offset.raw(), len));
        match self.prepare(op, change) {
            Ok(message) => self.ask(Side::Peer, Asked::Window(op, unmapped), message),
            Err(error) => warn!(link = %self.name, %error, "a change of the window cannot be made"),
        }
    }

    /// Fills in what the VMM has to be told.
    fn prepare(&mut self, op: OpId, change: WindowOp) -> io::Result<Message> {
        let content = match change {
            WindowOp::Unmap(content) => {
                let (offset, len) = content.place(self.link.window_len());
                return Ok(backend_message::unmap(offset.raw(), len));
            }
            WindowOp::Map(content) => content,
        };
        let (offset, len) = content.place(self.link.window_len());
        match &content {
            // The first of a window that has nothing.
            Content::LinkArea => self.guard.cleared(),
            Content::Witness { .. } | Content::Owner(_) | Content::Log(_) => {
                self.guard.mapping(op.0, offset.raw(), len)
            }
            Content::ControlArea | Content::Fence => {}
        }
        let (source, file_offset, writable) = match &content {
            // Where they are in their file is where they are in the window.
            Content::LinkArea => (self.areas.source(), offset.raw(), false),
            Content::ControlArea => (self.areas.source(), offset.raw(), true),
            Content::Witness { .. } => {
                let witness = Arc::new(Witness::new()?);
                self.guard.witness(witness.as_fd());
                let source = witness.source();
                self.witnesses.push_back(witness);
                (source, 0, true)
            }
            Content::Fence => {
                let fence = match self.fence.take() {
                    Some(fence) => fence,
                    None => Witness::new()?,
                };
                (self.fence.insert(fence).source(), 0, true)
            }
            Content::Log(placed) => (Source::Owner(placed.log.file().clone()), placed.log.offset(), true),
            Content::Owner(placement) => {
                let backing = placement.range().backing();
                let writable = placement.range().access().allows(iommu::Access::Write);
                (Source::Owner(backing.handle.clone()), backing.offset, writable)
            }
        };
        if let Some(window) = &self.shown_window {
            match &source {
                Source::Owner(file) => window.note(file.identity(), file.sender()),
                Source::Own(file) => window.note_own(identity(file)?),
            }
        }
        Ok(backend_message::map(offset.raw(), len, source, file_offset, writable))
    }

    /// A page of the broker's own has left the window for good. It is sealed: nobody can tell it as memory.
    pub(super) fn forget_shown(&self, source: &Source) {
        if let (Some(window), Source::Own(file)) = (&self.shown_window, source)
            && let Ok(identity) = identity(file)
        {
            window.forget_own(identity);
        }
    }

    fn reset_control_ring(&mut self) {
        let fresh = ControlRing::new();
        match (self.control_area.clear(), fresh) {
            (Ok(()), Ok(ring)) => self.control_ring = ring,
            _ => warn!(link = %self.name, "the control ring cannot be reset"),
        }
    }
}

fn identity(file: &File) -> io::Result<Identity> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Answers a session's open question. An error: this session cannot be answered, and is to be closed.
fn reply_to(link: &str, who: &str, session: Option<&mut Session>, reply: Reply) -> Result<(), SessionId> {
    let Some(session) = session else { return Ok(()) };
    let Some(answer) = session.answer.take() else { return Ok(()) };
    let done = match reply {
        Reply::Done => Some(true),
        Reply::Declined | Reply::Refused(_) => Some(false),
        _ => None,
    };
    let Answer { sender, acknowledge } = answer;
    let bytes = acknowledge.zip(done).map(|(request, done)| backend_message::acknowledgement(request, done));
    match bytes {
        Some(bytes) if !session.line.with(|line| send_now(line, &bytes)).unwrap_or(false) => {
            let stopped = session.line.with(|line| send_later(line, bytes, sender, reply));
            // A connection that is closed already needs no answer.
            if let Some(Err(error)) = stopped {
                warn!(%link, side = who, %error, "an answer cannot be sent");
                return Err(session.id);
            }
        }
        _ => drop(sender.send(reply)),
    }
    Ok(())
}
