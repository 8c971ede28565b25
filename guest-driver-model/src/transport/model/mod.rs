//! A model of the peer's VMM: what is between a broker and the peer's driver where
//! no VM is started.
//!
//! To the broker it is a vhost-user front-end as QEMU with
//! `vhost-user-test-device-pci` is one; to the driver it is a started device. The
//! window is an address range of this process in which SHMEM_MAP and SHMEM_UNMAP come
//! and go; a part with nothing in it reads as zero.
//!
//! It enforces a mapping's access and answers when a change has taken effect, and says so
//! (`docs/vhost-user-extensions.md`, SHMEM_STRICT); or it does neither, as QEMU
//! ([`Vmm::LikeQemu`]).
//!
//! Two things a VM's driver is spared: if the owner shortens its memory file, a load
//! beyond its end is SIGBUS, and a store to a mapping that is read-only is SIGSEGV.
//! Both end this process, as they would stop a VM; neither goes unnoticed.

mod channel;
mod handshake;
mod window;

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use vhost_pci_device::abi::DeviceConfig;

use self::channel::{Channel, Window};
use super::sys::event::Event;
use super::{BrokerError, Transport, TransportError};
use crate::shm::SharedMemory;

/// What the model is a model of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Vmm {
    /// A VMM that enforces what a mapping allows, and accepts SHMEM_STRICT when it is
    /// offered: its answers are sent after the change.
    #[default]
    Strict,
    /// QEMU 11.1: all mappings are writable, and SHMEM_STRICT is not known.
    LikeQemu,
}

/// The two directions of a virtqueue's notifications.
struct Queue {
    kick: Event,
    call: Arc<Event>,
}

/// A device whose VMM is this process.
pub struct ModelTransport {
    name: String,
    config: DeviceConfig,
    memory: SharedMemory,
    queues: Vec<Queue>,
    channel: Channel,
    /// The connection. Closing it stops the device.
    _session: handshake::Session,
}

impl ModelTransport {
    /// Connects to the peer socket of a broker and starts the device.
    ///
    /// # Errors
    /// If there is no broker, or it is not one.
    pub fn connect(socket: &Path) -> Result<Self, TransportError> {
        Self::connect_as(socket, Vmm::default())
    }

    /// As [`connect`](Self::connect), as this VMM.
    ///
    /// # Errors
    /// As there.
    pub fn connect_as(socket: &Path, vmm: Vmm) -> Result<Self, TransportError> {
        let name = socket.display().to_string();
        let failed = |step, source| TransportError::Broker { socket: name.clone(), step, source };
        let stream = UnixStream::connect(socket).map_err(|error| {
            failed("connecting (is the broker running, and may you use its socket?)", error.into())
        })?;
        Self::start(name.clone(), stream, vmm)
    }

    /// Starts the device over a connection.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn start(name: String, stream: UnixStream, vmm: Vmm) -> Result<Self, TransportError> {
        let at = |step| {
            let name = &name;
            move |source: BrokerError| TransportError::Broker { socket: name.clone(), step, source }
        };
        let main = channel::watch(&stream).map_err(|error| at("setting up the socket")(error.into()))?;
        let (mut session, offer) =
            handshake::negotiate(stream, vmm).map_err(|(step, error)| at(step)(error))?;
        super::check_config(&offer.config, offer.window_len)
            .map_err(|source| TransportError::Config { device: name.clone(), source })?;
        let window = Window::new(offer.config.window_len.value(), vmm)
            .map_err(|error| at("reserving the window's address range")(error.into()))?;
        let window = Arc::new(window);
        let queues = (0..=offer.config.max_vrings.value())
            .map(|_| Ok(Queue { kick: Event::new()?, call: Arc::new(Event::new()?) }))
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(|source| TransportError::Event {
                device: name.clone(),
                what: "an eventfd for a queue",
                source,
            })?;
        let handler = session.channel(window.clone()).map_err(|(step, error)| at(step)(error))?;
        let wake = queues.iter().map(|queue| queue.call.clone()).collect();
        // The channel is served before the device starts: the broker may map at once.
        let channel = Channel::spawn(handler, main, wake).map_err(at("starting the channel's thread"))?;
        window.start();
        session
            .start(queues.iter().map(|queue| (&queue.kick, &*queue.call)))
            .map_err(|(step, error)| at(step)(error))?;
        let memory = window.reservation().clone().shared(offer.config.window_len.value());
        Ok(Self { name, config: offer.config, memory, queues, channel, _session: session })
    }
}

impl Transport for ModelTransport {
    fn name(&self) -> &str {
        &self.name
    }

    fn config(&self) -> &DeviceConfig {
        &self.config
    }

    fn window(&self) -> &SharedMemory {
        &self.memory
    }

    fn doorbell(&self, queue: u16) {
        if let Some(queue) = self.queues.get(usize::from(queue)) {
            queue.kick.signal();
        }
    }

    fn interrupt_fd(&self, queue: u16) -> Option<BorrowedFd<'_>> {
        Some(self.queues.get(usize::from(queue))?.call.as_fd())
    }

    fn is_over(&self) -> bool {
        self.channel.is_gone()
    }

    fn check(&self) -> Result<(), TransportError> {
        if self.channel.is_gone() {
            let why = "the broker has closed the connection";
            return Err(TransportError::Gone { device: self.name.clone(), why });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
