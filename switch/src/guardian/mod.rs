//! What takes the owners' memory back when the broker cannot: a second process, which the broker
//! starts before all else. It holds a copy of each VMM's connections, so that no VMM sees the
//! broker's end before the guardian lets it, and reads where in the peers' windows the broker had
//! owners' memory mapped. While the broker lives it does nothing else. When the broker is gone,
//! however it ended, it says on each link's page that the link is down, has the peer's VMM unmap
//! everything, asks the kernel whether that is so, and only then lets go of the owner: whose VM
//! may from then on do with its memory, and its VMM with the rings, what it likes
//! (`docs/architecture.md`, Death and return).
//!
//! | file | what it holds |
//! |---|---|
//! | this | the broker's side: telling the guardian, which answers once, when it is ready |
//! | [`message`] | what it is told |
//! | [`table`] | what is mapped in the windows, in memory that both have |
//! | [`process`] | the guardian: takes messages until the broker is gone |
//! | [`takedown`] | what it does then, with one link |
//! | [`stand_in`] | answers the peer's VMM meanwhile |

pub mod message;
pub mod process;
pub mod stand_in;
pub mod table;
pub mod takedown;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Shutdown, SockFlag, SockType, setsockopt, shutdown, socketpair, sockopt::ReceiveTimeout,
    sockopt::SendTimeout,
};
use nix::sys::time::TimeVal;
use tracing::error;

use self::message::{Kind, Message};
use self::table::{Spans, Table};
use crate::config::Confine;
use crate::runtime::channel::is_passing;

/// How long the guardian may take to start.
const START: Duration = Duration::from_secs(20);
/// How long the guardian may take to read. It does nothing but read, so that only one that was
/// stopped, or is gone, takes longer than a moment.
const PATIENCE: Duration = Duration::from_secs(1);

/// The broker's side.
#[derive(Debug)]
struct Inner {
    socket: OwnedFd,
    table: Table,
    lost: AtomicBool,
    // Not waited for: it ends after the broker.
    process: Child,
}

/// A guardian, as the broker has it. It acts when the process that started it has ended.
#[derive(Clone, Debug)]
pub struct Guardian(Arc<Inner>);

impl Guardian {
    /// Starts a guardian for so many links at most, each of whose peers has `timeout` to let go of memory.
    /// To be called before the process is confined, by the broker's program: it is started again for this.
    ///
    /// # Errors
    /// When the host gives no process, memory or descriptor.
    pub fn start(links: usize, timeout: Duration, confine: Confine) -> io::Result<Self> {
        let (ours, its) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let table = Table::new(links)?;
        let process = Command::new(std::env::current_exe()?)
            .arg("guardian")
            .args(["--timeout-ms", &timeout.as_millis().to_string()])
            .args(["--confine", confine.name()])
            .stdin(Stdio::from(its))
            .stdout(Stdio::null())
            .current_dir("/")
            .spawn()?;
        setsockopt(&ours, SendTimeout, &TimeVal::new(PATIENCE.as_secs() as i64, 0))?;
        setsockopt(&ours, ReceiveTimeout, &TimeVal::new(START.as_secs() as i64, 0))?;
        let guardian = Self(Arc::new(Inner { socket: ours, table, lost: AtomicBool::new(false), process }));
        guardian.tell(Message::new(Kind::Table, links as u32), &[guardian.0.table.file()]);
        // It is confined by then, or is gone and has said why.
        match message::receive(guardian.0.socket.as_fd()) {
            Ok(Some(_)) => Ok(guardian),
            Ok(None) => Err(io::Error::other("it has ended")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(io::Error::other(format!("it was not ready within {START:?}")))
            }
            Err(error) => Err(error),
        }
    }

    /// Its process, if it is there.
    pub fn pid(&self) -> Option<u32> {
        let mut socket = [PollFd::new(self.0.socket.as_fd(), PollFlags::empty())];
        let gone = matches!(poll(&mut socket, PollTimeout::ZERO), Ok(count) if count > 0);
        // Relaxed: a flag for people, ordered with nothing.
        (!gone && !self.0.lost.load(Ordering::Relaxed)).then(|| self.0.process.id())
    }

    /// What is told of the link with this number and name. `link_id`: what its page names it.
    pub fn link(&self, index: usize, name: &str, link_id: u64) -> Guard {
        self.tell(Message { name: name.into(), link_id, ..Message::new(Kind::Link, index as u32) }, &[]);
        let spans = Arc::new(Mutex::new(self.0.table.spans(index)));
        Guard { guardian: Some(self.clone()), index: index as u32, spans: Some(spans) }
    }

    fn tell(&self, message: Message, descriptors: &[BorrowedFd<'_>]) {
        if self.0.lost.load(Ordering::Relaxed) {
            return;
        }
        // What it was not told it cannot know later: it is of no use any more, and is to end without
        // doing anything.
        if let Err(error) = send_patiently(self.0.socket.as_fd(), &message, descriptors)
            && !self.0.lost.swap(true, Ordering::Relaxed)
        {
            self.0.table.forsake();
            let _ = shutdown(self.0.socket.as_raw_fd(), Shutdown::Both);
            error!(
                %error,
                "the broker's guardian does not hear it any more: nobody takes back what peers have mapped if this \
                 broker is killed; start it anew when that suits"
            );
        }
    }
}

/// Sends a message; again, for a while, where the host has too little at the moment.
fn send_patiently(
    socket: BorrowedFd<'_>,
    message: &Message,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match message::send(socket, message, descriptors) {
            Err(error) if is_passing(&error) && Instant::now() < end => {
                thread::sleep(Duration::from_millis(1))
            }
            result => return result,
        }
    }
}

/// What the guardian is told of one link; of none, if there is no guardian.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    guardian: Option<Guardian>,
    index: u32,
    spans: Option<Arc<Mutex<Spans>>>,
}

impl Guard {
    /// For a link that nobody guards.
    pub fn none() -> Self {
        Self::default()
    }

    fn tell(&self, kind: Kind, descriptors: &[BorrowedFd<'_>]) {
        if let Some(guardian) = &self.guardian {
            guardian.tell(Message::new(kind, self.index), descriptors);
        }
    }

    /// The link has ended: another may have its number from now on.
    pub fn end(&self) {
        self.with_spans(Spans::clear);
        self.tell(Kind::LinkGone, &[]);
    }

    /// The owner's VMM connected.
    pub fn owner(&self, connection: BorrowedFd<'_>) {
        self.tell(Kind::Owner, &[connection]);
    }

    /// It left.
    pub fn owner_gone(&self) {
        self.tell(Kind::OwnerGone, &[]);
    }

    /// Another VMM of the owner's side connected, which waits.
    pub fn waiting(&self, connection: BorrowedFd<'_>) {
        self.tell(Kind::Waiting, &[connection]);
    }

    /// That one left.
    pub fn waiting_gone(&self) {
        self.tell(Kind::WaitingGone, &[]);
    }

    /// The two have changed places.
    pub fn owners_swapped(&self) {
        self.tell(Kind::OwnersSwapped, &[]);
    }

    /// The peer's VMM connected; `areas`: the file of the link's own areas, which it will see.
    pub fn peer(&self, connection: BorrowedFd<'_>, areas: BorrowedFd<'_>) {
        self.tell(Kind::Peer, &[connection, areas]);
    }

    /// It left.
    pub fn peer_gone(&self) {
        self.tell(Kind::PeerGone, &[]);
    }

    /// The peer's VMM brought a back-end channel.
    pub fn channel(&self, channel: BorrowedFd<'_>) {
        self.tell(Kind::Channel, &[channel]);
    }

    /// A witness page is about to be mapped in the window.
    pub fn witness(&self, page: BorrowedFd<'_>) {
        self.tell(Kind::Witness, &[page]);
    }

    /// The window begins anew: nothing is mapped there.
    pub fn cleared(&self) {
        self.with_spans(Spans::clear);
    }

    /// The peer's VMM is about to be asked, by request `op`, to map `len` bytes at `offset`.
    pub fn mapping(&self, op: u64, offset: u64, len: u64) {
        self.with_spans(|spans| {
            if !spans.add(op, offset, len) {
                error!("a window has more mappings than its guardian can know of: a defect of the broker, please report it");
            }
        });
    }

    /// It answered that what was there is unmapped, as request `op` had asked.
    pub fn unmapped(&self, op: u64, offset: u64, len: u64) {
        self.with_spans(|spans| spans.remove(op, offset, len));
    }

    fn with_spans(&self, act: impl FnOnce(&mut Spans)) {
        if let Some(spans) = &self.spans {
            // A change of it is whole, or the link ends.
            act(&mut spans.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}
