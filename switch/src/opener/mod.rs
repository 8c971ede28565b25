//! What reads the configuration and makes sockets, which a confined broker cannot: a second process,
//! started before the broker gives up what it does not need, and itself confined to this. It opens what
//! the configuration names and nothing else, whatever the broker asks, and ends with it
//! (`docs/hotplug.md`).
//!
//! A program that has the broker as a library makes the sockets by the same code in its own process.
//!
//! | file | what it holds |
//! |---|---|
//! | this | the broker's side: questions |
//! | [`message`] | how they are asked and answered |
//! | [`process`] | the opener |
//! | [`maker`] | the sockets of links, made and removed |
//! | [`socket`] | one of them |

pub mod maker;
pub mod message;
pub mod process;
pub mod socket;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
use thiserror::Error;

use self::maker::{Maker, Opened};
use self::message::{Answer, Question};
use self::socket::SocketError;
use crate::config::{Config, LoadError};
use crate::runtime::admission::UnknownAccount;

/// How long the opener may take: it may ask the host's directory of users, over a network.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why something is not opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The configuration has mistakes, or cannot be read.
    #[error(transparent)]
    File(#[from] LoadError),
    /// It has no such link.
    #[error("the configuration has no link '{link}'; it has: {}", .known.join(", "))]
    NoLink {
        /// What was asked for.
        link: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// The link is open.
    #[error("link '{0}' is open already")]
    Twice(String),
    /// The broker was given no file.
    #[error("this broker was started without a configuration file: its links are those that it has")]
    NoFile,
    /// A socket cannot be listened on.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Who may join a link cannot be told.
    #[error(transparent)]
    Admission(#[from] UnknownAccount),
    /// The opener does not answer.
    #[error(
        "the broker's opener does not answer: {0}; links can be plugged again when the broker is started anew"
    )]
    Lost(#[from] io::Error),
    /// What the opener says.
    #[error("{summary}")]
    Refused {
        /// A line for each mistake of the configuration.
        mistakes: Vec<String>,
        /// Why.
        summary: String,
    },
}

impl OpenError {
    /// A line for each mistake of the configuration.
    pub fn mistakes(&self) -> &[String] {
        match self {
            Self::File(LoadError { mistakes, .. }) | Self::Refused { mistakes, .. } => mistakes,
            _ => &[],
        }
    }
}

#[derive(Debug)]
enum Inner {
    /// In this process.
    Here(Box<Maker>),
    /// A process of its own, which is not waited for: it ends after the broker.
    Process { socket: UnixStream, process: Child },
    /// It did not answer once: what it says now is to a question of before.
    Lost,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    pid: Option<u32>,
}

/// Opens and closes links, one at a time. Dropping the last one removes their sockets.
#[derive(Clone, Debug)]
pub struct Opener(Arc<Shared>);

impl Opener {
    fn new(inner: Inner) -> Self {
        let pid = match &inner {
            Inner::Process { process, .. } => Some(process.id()),
            Inner::Here(_) | Inner::Lost => None,
        };
        Self(Arc::new(Shared { inner: Mutex::new(inner), pid }))
    }

    /// One in this process, for a configuration that has no file.
    ///
    /// # Errors
    /// When the sockets' group is none.
    pub fn here(config: &Config) -> Result<Self, OpenError> {
        Ok(Self::new(Inner::Here(Box::new(Maker::new(config.clone(), None)?))))
    }

    /// Starts an opener for this file, and gives what that says. To be called before the process is
    /// confined, by the broker's program: it is started again for this.
    ///
    /// # Errors
    /// When the configuration has mistakes, or the host gives no process.
    pub fn start(file: &Path) -> Result<(Self, Config), OpenError> {
        let (ours, its) = UnixStream::pair()?;
        let process = Command::new(std::env::current_exe()?)
            .arg("opener")
            .arg("--config")
            .arg(file)
            .stdin(Stdio::from(OwnedFd::from(its)))
            .stdout(Stdio::null())
            .spawn()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        ours.set_write_timeout(Some(PATIENCE))?;
        let first = receive(&ours)?;
        let opener = Self::new(Inner::Process { socket: ours, process });
        match first {
            (Answer::Config(config), _) => Ok((opener, *config)),
            (Answer::Refused { mistakes, summary }, _) => {
                *opener.inner() = Inner::Lost;
                Err(OpenError::Refused { mistakes, summary })
            }
            _ => Err(out_of_turn().into()),
        }
    }

    /// Its process, if it is one, and there.
    pub fn pid(&self) -> Option<u32> {
        let Ok(inner) = self.0.inner.try_lock() else {
            // It is being asked.
            return self.0.pid;
        };
        let Inner::Process { socket, .. } = &*inner else { return None };
        let mut socket = [PollFd::new(socket.as_fd(), PollFlags::empty())];
        let gone = matches!(poll(&mut socket, PollTimeout::ZERO), Ok(count) if count > 0);
        self.0.pid.filter(|_| !gone)
    }

    /// Reads the configuration.
    ///
    /// # Errors
    /// When it has mistakes.
    pub fn read(&self) -> Result<Config, OpenError> {
        let mut inner = self.inner();
        if let Inner::Here(maker) = &mut *inner {
            return maker.read();
        }
        match ask(&mut inner, &Question::Read)? {
            (Answer::Config(config), _) => Ok(*config),
            _ => Err(lose(&mut inner)),
        }
    }

    /// Makes the control socket.
    ///
    /// # Errors
    /// When it cannot be listened on.
    pub fn control(&self) -> Result<UnixListener, OpenError> {
        let mut inner = self.inner();
        if let Inner::Here(maker) = &mut *inner {
            return maker.control();
        }
        match ask(&mut inner, &Question::Control)? {
            (Answer::Done, mut sockets) if sockets.len() == 1 && listen(&sockets) => {
                Ok(sockets.remove(0).into())
            }
            _ => Err(lose(&mut inner)),
        }
    }

    /// Makes the sockets of a link of the configuration that was read last.
    ///
    /// # Errors
    /// When it has no such link, or they cannot be listened on.
    pub fn open(&self, link: &str) -> Result<Opened, OpenError> {
        let mut inner = self.inner();
        if let Inner::Here(maker) = &mut *inner {
            return maker.open(link);
        }
        match ask(&mut inner, &Question::Open(link.into()))? {
            (Answer::Opened { config, owner_rule, peer_rule }, sockets)
                if config.name == link
                    && sockets.len() == maker::sockets(&config).count()
                    && listen(&sockets) =>
            {
                let listeners = sockets.into_iter().map(UnixListener::from).collect();
                Ok(Opened { config: *config, owner_rule, peer_rule, listeners })
            }
            _ => Err(lose(&mut inner)),
        }
    }

    /// Removes the sockets of a link.
    ///
    /// # Errors
    /// When the opener does not answer.
    pub fn close(&self, link: &str) -> Result<(), OpenError> {
        let mut inner = self.inner();
        if let Inner::Here(maker) = &mut *inner {
            maker.close(link);
            return Ok(());
        }
        ask(&mut inner, &Question::Close(link.into())).map(drop)
    }

    /// Removes all sockets, and opens none any more.
    pub fn close_all(&self) {
        close_all(&mut self.inner());
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A question that is asked in part is answered in part, which is an error to the next.
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        close_all(self.inner.get_mut().unwrap_or_else(PoisonError::into_inner));
    }
}

fn close_all(inner: &mut Inner) {
    // The answer is waited for, so that the sockets are gone when the broker is.
    let _ = ask(inner, &Question::CloseAll);
    *inner = Inner::Lost;
}

fn ask(inner: &mut Inner, question: &Question) -> Result<(Answer, Vec<OwnedFd>), OpenError> {
    let Inner::Process { socket, .. } = inner else {
        return Err(io::Error::other("it is gone").into());
    };
    match message::send(socket, question, &[]).and_then(|()| receive(socket)) {
        Ok((Answer::Refused { mistakes, summary }, _)) => Err(OpenError::Refused { mistakes, summary }),
        Ok(answer) => Ok(answer),
        Err(error) => {
            lose(inner);
            Err(error.into())
        }
    }
}

/// It does not do what it was asked, and is not asked again.
fn lose(inner: &mut Inner) -> OpenError {
    if let Inner::Process { socket, .. } = inner {
        let _ = socket.shutdown(std::net::Shutdown::Both);
    }
    *inner = Inner::Lost;
    out_of_turn().into()
}

fn receive(socket: &UnixStream) -> io::Result<(Answer, Vec<OwnedFd>)> {
    message::receive(socket)?.ok_or_else(|| io::Error::other("it has ended"))
}

fn out_of_turn() -> io::Error {
    io::Error::other("its answer is to another question")
}

/// Whether all are what they should be.
fn listen(sockets: &[OwnedFd]) -> bool {
    sockets.iter().all(|socket| getsockopt(socket, AcceptConn).unwrap_or(false))
}
