//! The assembled function: [`Device`], which a VMM puts on its PCI bus.
//!
//! | file | what it holds |
//! |---|---|
//! | `function` | what an access to each register does |
//! | `registers` | their values |
//! | `place` | where the BARs are, and the window's slots |
//! | `wiring` | which eventfds are joined to which interrupts and notifications |
//! | `error` | why there is none |
//! | `events` | the device's own eventfds |
//! | `signals` | the thread that signals them |
//!
//! One lock protects the registers, another the window. Both are held for register work, system
//! calls and methods of [`Vmm`] only: never while anybody waits for the broker. Threads: the
//! VMM's vCPUs; the device's thread, which talks to the broker; a thread that answers the broker;
//! a thread that signals eventfds which the broker shares.

mod error;
pub(crate) mod events;
mod function;
mod place;
mod registers;
mod signals;
mod wiring;

use std::io;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

pub use self::error::DeviceError;
use self::events::Pair;
pub(crate) use self::function::Desired;
use self::function::Function;
use self::signals::{Signaller, Signals};
use crate::frontend::ending::await_end;
use crate::frontend::handshake::Connection;
pub use crate::frontend::handshake::HandshakeError;
use crate::frontend::lines::Lines;
use crate::frontend::message::Direction;
use crate::frontend::reach;
use crate::frontend::session::{self, Connector};
use crate::sys::event;
use crate::vmm::Vmm;
use crate::window::aperture::WindowError;
use crate::window::{Refusal, Request, Window};

/// How long a refusal waits for the broker to learn that the device was stopped.
const STOP_TIME: Duration = Duration::from_secs(2);
/// How long the drop of a device waits for the thread that talks to the broker.
const END_TIME: Duration = Duration::from_secs(1);

/// What a VMM chooses for a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The function's requester id (bus << 8 | device << 3 | function), which comes back in
    /// [`MsiMessage`](crate::MsiMessage). A VMM whose MSIs need none leaves it 0.
    pub requester_id: u32,
}

/// A BAR of the function, for a VMM that chooses addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarInfo {
    /// Its number. It is 64 bits wide, so it has the next number's register, too.
    pub bar: u8,
    /// Length and alignment, bytes; a power of two.
    pub len: u64,
    /// Whether it is prefetchable (the window).
    pub prefetchable: bool,
}

/// What the device is doing, for the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// There is a broker.
    pub connected: bool,
    /// The driver has set DRIVER_OK.
    pub live: bool,
    /// Queues whose interrupts come straight from the owner's VMM.
    pub wired_interrupts: usize,
    /// Queues whose notifications go straight to the owner's VMM.
    pub wired_notifications: usize,
}

/// A vhost-pci device: one PCI function. Its methods can be called by any thread at any time, with
/// any offset, length and alignment; none waits for the broker. Dropping it takes the function
/// away: nothing is registered, mapped or open any more when the drop returns. (Of a broker that sent
/// a descriptor whose close takes its time, a thread and what is open may outlive it for as long;
/// nothing that is registered, and nothing that the guest could reach.)
pub struct Device {
    shared: Arc<Shared>,
    bars: [BarInfo; 2],
    thread: Option<JoinHandle<()>>,
    // After the device's thread, which may still have something to signal.
    _signaller: Signaller,
}

/// What the device's threads and the VMM's share.
pub(crate) struct Shared {
    function: Mutex<Function>,
    /// `settled` or `connected` has changed.
    changed: Condvar,
    window: Arc<Window>,
    /// The queues' own eventfds.
    pub pairs: Arc<Vec<Pair>>,
    /// Wakes the device's thread.
    pub wake: EventFd,
    /// What ends the conversation that is under way when it is shut down; or that the device is
    /// going away.
    current: Mutex<Current>,
    lines: Mutex<Lines>,
}

#[derive(Default)]
struct Current {
    stream: Option<UnixStream>,
    ending: bool,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic inside is a defect of the VMM's methods; the registers are whole between two calls.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device {
    /// Makes the device of the link whose peer socket is at `socket`.
    ///
    /// # Errors
    /// If there is no broker that it could learn from what the device is like. Once it knows,
    /// the broker may go and come.
    pub fn connect(socket: &Path, vmm: Arc<dyn Vmm>, options: Options) -> Result<Self, DeviceError> {
        let socket = socket.to_owned();
        Self::new(move || reach::connect(&socket), vmm, options)
    }

    /// As [`connect`](Self::connect), with connections that `connect` makes: for a VMM that cannot
    /// reach the socket from where it runs. Called now and, on the device's thread, after each
    /// loss of the connection, again and again until there is one. It must not wait: the drop of
    /// the device waits for it. (A blocking connect(2) waits without limit for a broker that does
    /// not accept.)
    ///
    /// # Errors
    /// As there.
    pub fn new(
        connect: impl FnMut() -> io::Result<UnixStream> + Send + 'static,
        vmm: Arc<dyn Vmm>,
        options: Options,
    ) -> Result<Self, DeviceError> {
        let mut connect: Connector = Box::new(connect);
        let stream = connect().map_err(DeviceError::Connect)?;
        let connection = Connection::negotiate(stream).map_err(DeviceError::Broker)?;
        let geometry = connection.geometry;
        let window = Arc::new(Window::new(geometry.apertures)?);
        let pairs = (0..geometry.queues).map(|_| Pair::new()).collect::<io::Result<Vec<_>>>()?;
        let pairs = Arc::new(pairs);
        let signaller = Signals::start(pairs.clone())?;
        let signals = signaller.signals().clone();
        let function = Function::new(geometry, options.requester_id, signals, window.clone(), vmm)?;
        let bars = function.bars().map(|bar| BarInfo {
            bar: bar.number,
            len: bar.len,
            prefetchable: bar.prefetchable,
        });
        let shared = Arc::new(Shared {
            function: Mutex::new(function),
            changed: Condvar::new(),
            window,
            pairs,
            wake: event::new()?,
            current: Mutex::default(),
            lines: Mutex::new(Lines::new(Instant::now())),
        });
        let thread = std::thread::Builder::new().name("vhost-pci broker".into()).spawn({
            let shared = shared.clone();
            move || session::run(&shared, geometry, connect, connection)
        })?;
        Ok(Self { shared, bars, thread: Some(thread), _signaller: signaller })
    }

    /// The function's BARs.
    pub fn bars(&self) -> [BarInfo; 2] {
        self.bars
    }

    /// Gives a BAR an address, as firmware does: by its registers. For a VMM that boots without any.
    /// The BAR answers from when the guest, or the VMM, sets the memory bit of the command
    /// register.
    pub fn assign_bar(&self, bar: u8, address: GuestAddress) {
        if self.bars.iter().any(|known| known.bar == bar) {
            self.config_write(0x10 + 4 * u16::from(bar), &address.0.to_le_bytes());
        }
    }

    /// Reads configuration space. Zero beyond its 256 bytes.
    pub fn config_read(&self, offset: u16, data: &mut [u8]) {
        lock(&self.shared.function).config_read(offset, data);
    }

    /// Writes configuration space. What cannot be written is dropped. Calls methods of [`Vmm`] where
    /// the guest moves a BAR, or resets the function.
    pub fn config_write(&self, offset: u16, data: &[u8]) {
        self.change(|function| function.config_write(offset, data));
    }

    /// Reads a BAR, at an offset into it. All ones while memory decoding is disabled.
    pub fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        lock(&self.shared.function).bar_read(bar, offset, data);
    }

    /// Writes a BAR. Calls methods of [`Vmm`] where the guest starts or resets the device, or masks
    /// vectors.
    pub fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.change(|function| function.bar_write(bar, offset, data));
    }

    /// Resets the function as a reset of its bus or of the whole VM does.
    pub fn reset(&self) {
        self.change(Function::flr);
    }

    /// What the device is doing.
    pub fn snapshot(&self) -> Snapshot {
        let function = lock(&self.shared.function);
        let (wired_interrupts, wired_notifications) = function.wired();
        Snapshot {
            connected: function.connected,
            live: function.is_live(),
            wired_interrupts,
            wired_notifications,
        }
    }

    /// Changes the function, and wakes the device's thread if the broker is to be told, or the VMM
    /// to be asked again.
    fn change(&self, change: impl FnOnce(&mut Function)) {
        let mut function = lock(&self.shared.function);
        let before = (function.desired.epoch, function.is_refused());
        change(&mut function);
        if (function.desired.epoch, function.is_refused()) != before {
            event::signal(&self.shared.wake);
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.reset();
        self.shared.end();
        if let Some(thread) = self.thread.take() {
            await_end(&thread, END_TIME);
        }
    }
}

impl Shared {
    /// Whether the device is being dropped.
    pub fn is_ending(&self) -> bool {
        lock(&self.current).ending
    }

    /// The connection that a conversation is about to use.
    pub fn set_current(&self, stream: Option<UnixStream>) {
        let mut current = lock(&self.current);
        if let Some(stream) = stream.as_ref().filter(|_| current.ending) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        current.stream = stream;
    }

    fn end(&self) {
        let mut current = lock(&self.current);
        current.ending = true;
        if let Some(stream) = &current.stream {
            let _ = stream.shutdown(Shutdown::Both);
        }
        event::signal(&self.wake);
    }

    /// Whether the VMM is to be asked [`again`](Self::settle_again).
    pub fn is_refused(&self) -> bool {
        lock(&self.function).is_refused()
    }

    /// Asks the VMM again for what it has refused, if there is such.
    pub fn settle_again(&self) {
        let mut function = lock(&self.function);
        if function.is_refused() {
            function.settle();
        }
    }

    /// Whether what the broker does is worth another line of the log.
    pub fn may_tell(&self) -> bool {
        lock(&self.lines).take(Instant::now())
    }

    /// What the driver wants.
    pub fn desired(&self) -> Desired {
        lock(&self.function).desired.clone()
    }

    /// There is a broker.
    pub fn connected(&self, wiring: bool) {
        if self.may_tell() {
            tracing::info!(wiring, "the vhost-pci device has its broker");
        }
        let mut function = lock(&self.function);
        function.connected = true;
        self.changed.notify_all();
    }

    /// The broker is about to be told of a start.
    pub fn begin(&self, desired: &Desired) -> bool {
        lock(&self.function).begin(desired)
    }

    /// The broker knows what the driver wanted at this epoch.
    pub fn settled(&self, epoch: u64) {
        lock(&self.function).settled = epoch;
        self.changed.notify_all();
    }

    /// The broker is gone.
    pub fn lost(&self) {
        lock(&self.function).lost();
        self.changed.notify_all();
    }

    /// SHMEM_MAP.
    ///
    /// # Errors
    /// If it is refused.
    pub fn map(&self, request: Request, file: BorrowedFd<'_>) -> Result<(), WindowError> {
        let result = self.window.map(request, file);
        if let Err(WindowError::Refused(Refusal::Closed)) = result {
            // The driver was faster with a reset than the broker with its request. A broker that
            // still takes the device for started would take a refusal for a fault.
            self.wait_until_settled();
        }
        result
    }

    /// SHMEM_UNMAP.
    ///
    /// # Errors
    /// If it is refused.
    pub fn unmap(&self, request: Request) -> Result<(), WindowError> {
        self.window.unmap(request)
    }

    /// WIRE.
    ///
    /// # Errors
    /// If it is refused.
    pub fn wire(&self, queue: u32, direction: Direction, event: Option<EventFd>) -> io::Result<()> {
        let mut unused = Vec::new();
        let result = lock(&self.function).wire(queue, direction, event, &mut unused);
        // Closed without the lock.
        drop(unused);
        result
    }

    /// Waits until the broker knows what the driver wants, or is gone; not for long.
    fn wait_until_settled(&self) {
        let until = Instant::now() + STOP_TIME;
        let mut function = lock(&self.function);
        while function.connected && function.settled != function.desired.epoch {
            let Some(left) = until.checked_duration_since(Instant::now()) else { return };
            let waited = self.changed.wait_timeout(function, left);
            function = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
