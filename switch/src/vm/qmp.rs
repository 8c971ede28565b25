//! A connection to a QEMU's QMP socket, whose commands are the `qapi` crate's. Bounded in time and length, whoever
//! is at the other end; and blind to events but those that are waited for: QEMU has some that the crate does
//! not know.

use std::collections::VecDeque;
use std::io::{self, BufRead, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use qapi::qmp::QmpCommand;
use qapi::{ErrorClass, ExecuteError, Qmp};
use serde::Deserialize;
use thiserror::Error;

/// How long QEMU may take for an answer.
const ANSWER: Duration = Duration::from_secs(10);
/// The longest line, bytes.
const MAX_LINE: usize = 1 << 20;
/// Events that are remembered.
const MAX_EVENTS: usize = 256;

/// Why a command was not carried out.
#[derive(Debug, Error)]
pub enum QmpError {
    /// Nobody is at the socket.
    #[error("nobody answers at {path}: {why}; does its QEMU run, with -qmp unix:PATH,server=on,wait=off?")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        why: io::Error,
    },
    /// QEMU says why not.
    #[error("{command}: {words}")]
    Refused {
        /// What it was asked.
        command: &'static str,
        /// Its own words.
        words: String,
        /// Whether what the command names is not there.
        is_missing: bool,
    },
    /// It says nothing.
    #[error("{command}: QEMU did not answer within {} s{}", ANSWER.as_secs(), hint(command))]
    Silent {
        /// What it was asked.
        command: &'static str,
    },
    /// It is gone, or no QEMU.
    #[error("{command}: the connection broke: {why}")]
    Broken {
        /// What it was asked.
        command: &'static str,
        /// How.
        why: io::Error,
    },
    /// A guest keeps its device.
    #[error("device_del: the guest did not let go of {device} within {} s", .time.as_secs_f64())]
    Kept {
        /// The device.
        device: String,
        /// How long it had.
        time: Duration,
    },
    /// A guest refuses.
    #[error("device_del: the guest refuses to let go of {device}")]
    GuestRefused {
        /// The device.
        device: String,
    },
}

const GREETING: &str = "the greeting";

fn hint(command: &str) -> &'static str {
    match command {
        GREETING => ": a QMP socket serves one client at a time; is another connected?",
        _ => "",
    }
}

impl QmpError {
    /// Whether nothing more can be asked on this connection.
    pub const fn is_final(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::Silent { .. } | Self::Broken { .. })
    }

    /// Whether what was to be removed is not there.
    pub const fn is_missing(&self) -> bool {
        matches!(self, Self::Refused { is_missing: true, .. })
    }
}

/// What becomes of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Deleted(String),
    Refused(String),
}

/// The lines that are answers.
struct Lines {
    stream: UnixStream,
    /// Read and not yet looked at.
    rest: Vec<u8>,
    /// The line that is read, and how much of it was.
    line: Vec<u8>,
    at: usize,
    deadline: Instant,
    events: VecDeque<Event>,
}

impl Lines {
    /// The next line with its end; none if there are no more.
    fn next_line(&mut self) -> io::Result<Vec<u8>> {
        let mut looked = 0;
        loop {
            if let Some(end) = self.rest[looked..].iter().position(|byte| *byte == b'\n') {
                let after = self.rest.split_off(looked + end + 1);
                return Ok(std::mem::replace(&mut self.rest, after));
            }
            looked = self.rest.len();
            if looked > MAX_LINE {
                return Err(io::Error::other("a line without end"));
            }
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) if self.rest.is_empty() => return Ok(Vec::new()),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => self.rest.extend(&bytes[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Remembers the event that a line is, if it is one.
    fn takes(&mut self, line: &[u8]) -> bool {
        #[derive(Deserialize)]
        struct Line {
            event: String,
            #[serde(default)]
            data: Data,
        }
        #[derive(Default, Deserialize)]
        struct Data {
            #[serde(default)]
            device: Option<String>,
        }
        let Ok(Line { event, data }) = serde_json::from_slice(line) else { return false };
        let event = match (event.as_str(), data.device) {
            ("DEVICE_DELETED", Some(device)) => Event::Deleted(device),
            ("DEVICE_UNPLUG_GUEST_ERROR", Some(device)) => Event::Refused(device),
            _ => return true,
        };
        if self.events.len() < MAX_EVENTS {
            self.events.push_back(event);
        }
        true
    }
}

impl BufRead for Lines {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.at == self.line.len() {
            let line = self.next_line()?;
            let ends = line.is_empty();
            if !self.takes(&line) {
                (self.line, self.at) = (line, 0);
            }
            if ends {
                break;
            }
        }
        Ok(&self.line[self.at..])
    }

    fn consume(&mut self, read: usize) {
        self.at += read;
    }
}

impl Read for Lines {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(buffer)?;
        self.consume(read);
        Ok(read)
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A QEMU that takes commands.
pub struct Connection(Qmp<Lines>);

impl Connection {
    /// Connects and greets.
    ///
    /// # Errors
    /// When nobody answers, or as no QEMU would.
    pub fn open(path: &Path) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path).map_err(|why| QmpError::Connect { path: path.into(), why })?;
        let broken = |why| QmpError::Broken { command: GREETING, why };
        stream.set_write_timeout(Some(ANSWER)).map_err(broken)?;
        let lines = Lines {
            stream,
            rest: Vec::new(),
            line: Vec::new(),
            at: 0,
            deadline: Instant::now() + ANSWER,
            events: VecDeque::new(),
        };
        let mut qmp = Qmp::new(lines);
        // The crate wants a line to be there.
        match qmp.inner_mut().fill_buf() {
            Ok([]) => return Err(broken(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => {}
            Err(source) => return Err(failed(GREETING, source.into())),
        }
        qmp.handshake().map_err(|error| failed(GREETING, error))?;
        Ok(Self(qmp))
    }

    /// Runs a command.
    ///
    /// # Errors
    /// When QEMU refuses, in its words; or it does not answer.
    pub fn run<C: QmpCommand>(&mut self, command: &C) -> Result<C::Ok, QmpError> {
        self.0.inner_mut().deadline = Instant::now() + ANSWER;
        self.0.execute(command).map_err(|error| failed(C::NAME, error))
    }

    /// Waits until a device that was asked to go is gone: its guest decides when.
    ///
    /// # Errors
    /// When the guest does not let go of it.
    pub fn wait_deleted(&mut self, device: &str, time: Duration) -> Result<(), QmpError> {
        let deadline = Instant::now() + time;
        loop {
            let lines = self.0.inner_mut();
            while let Some(event) = lines.events.pop_front() {
                match event {
                    Event::Deleted(name) if name == device => return Ok(()),
                    Event::Refused(name) if name == device => {
                        return Err(QmpError::GuestRefused { device: device.into() });
                    }
                    _ => {}
                }
            }
            lines.deadline = deadline;
            let source = match lines.next_line() {
                Ok(line) if line.is_empty() => io::ErrorKind::UnexpectedEof.into(),
                Ok(line) => {
                    lines.takes(&line);
                    continue;
                }
                Err(error) => error,
            };
            return Err(match failed("device_del", source.into()) {
                QmpError::Silent { .. } => QmpError::Kept { device: device.into(), time },
                error => error,
            });
        }
    }
}

fn failed(command: &'static str, error: ExecuteError) -> QmpError {
    match error {
        ExecuteError::Qapi(error) => QmpError::Refused {
            command,
            is_missing: error.class == ErrorClass::DeviceNotFound || error.desc.ends_with("not found"),
            words: error.desc,
        },
        ExecuteError::Io(error)
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
        {
            QmpError::Silent { command }
        }
        ExecuteError::Io(why) => QmpError::Broken { command, why },
    }
}
