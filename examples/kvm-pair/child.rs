//! A process of the measurement: this program again, with a hidden subcommand. Its standard
//! input is a socket to its parent, by which it is told what to do, a line at a time, and
//! given descriptors. It ends when its parent does.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::parent_id;
use std::process::{self, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// How long a process may take for what it is told, unless it says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// What follows a line before a descriptor.
const DESCRIPTOR: u8 = b'+';

/// The process. Killed when dropped.
#[derive(Debug)]
pub struct Child {
    name: String,
    child: process::Child,
    lines: BufReader<UnixStream>,
}

impl Child {
    /// Starts this program with these arguments, and waits until it says that it is ready.
    ///
    /// # Errors
    /// If it does not.
    pub fn start(arguments: &[&str]) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("where this program is")?;
        let (stream, theirs) = UnixStream::pair()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let child = Command::new(program)
            .args(arguments)
            .arg(format!("--parent={}", process::id()))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {arguments:?}"))?;
        let name = arguments.first().copied().unwrap_or_default().to_owned();
        let mut child = Self { name, child, lines: BufReader::new(stream) };
        child.answer("start")?;
        Ok(child)
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Tells it to do something, and waits for its answer.
    ///
    /// # Errors
    /// If it cannot.
    pub fn tell(&mut self, what: &str) -> anyhow::Result<String> {
        writeln!(self.lines.get_ref(), "{what}")?;
        self.answer(what)
    }

    /// Gives it a descriptor: [`Parent::take`] is there when it is told `what`.
    ///
    /// # Errors
    /// If it cannot do with it what it is told.
    pub fn give(&mut self, what: &str, descriptor: &impl AsRawFd) -> anyhow::Result<String> {
        writeln!(self.lines.get_ref(), "{what}")?;
        self.lines.get_ref().send_with_fd(&[DESCRIPTOR][..], descriptor.as_raw_fd())?;
        self.answer(what)
    }

    /// Kills it and waits for its end.
    ///
    /// # Errors
    /// What the system answers.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }

    fn answer(&mut self, what: &str) -> anyhow::Result<String> {
        let mut answer = String::new();
        let read = self.lines.read_line(&mut answer);
        read.with_context(|| format!("the {} does not answer to {what:?}", self.name))?;
        ensure!(answer.ends_with('\n'), "the {} ended when told to {what:?}", self.name);
        match answer.trim_end().split_once(' ').unwrap_or((answer.trim_end(), "")) {
            ("ok", rest) => Ok(rest.to_owned()),
            (_, error) => bail!("the {} cannot {what:?}: {error}", self.name),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Fails only if it has ended, which is what is wanted.
        let _ = self.kill();
    }
}

/// In a child: its parent.
#[derive(Debug)]
pub struct Parent {
    stream: UnixStream,
}

impl Parent {
    /// The parent, which has this number. This process ends with it.
    ///
    /// # Errors
    /// If it is gone.
    pub fn new(number: Option<u32>) -> anyhow::Result<Self> {
        set_pdeathsig(Signal::SIGKILL)?;
        // One that ended before that will send no signal.
        ensure!(number == Some(parent_id()), "started by hand? this is for the program's own use");
        Ok(Self { stream: UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?) })
    }

    /// Tells it that this process is ready, and then does what it tells, until it is gone.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn obey(&self, mut act: impl FnMut(&Self, &str) -> anyhow::Result<String>) -> anyhow::Result<()> {
        self.reply(Ok(String::new()))?;
        while let Some(line) = self.line()? {
            self.reply(act(self, &line))?;
        }
        Ok(())
    }

    /// The descriptor that comes with what was told.
    ///
    /// # Errors
    /// If none does.
    pub fn take(&self) -> anyhow::Result<OwnedFd> {
        let (_, file) = self.stream.recv_with_fd(&mut [0]).context("taking a descriptor")?;
        file.map(OwnedFd::from).context("a descriptor should come")
    }

    fn reply(&self, answer: anyhow::Result<String>) -> io::Result<()> {
        match answer {
            Ok(answer) => writeln!(&self.stream, "ok {answer}"),
            Err(error) => writeln!(&self.stream, "error {}", format!("{error:#}").replace('\n', " ")),
        }
    }

    /// The next line. Not a byte more is read: a descriptor may follow.
    fn line(&self) -> io::Result<Option<String>> {
        let (mut line, mut byte) = (Vec::new(), [0]);
        loop {
            match io::Read::read(&mut &self.stream, &mut byte)? {
                0 => return Ok(None),
                _ if byte == *b"\n" => break,
                _ => line.extend_from_slice(&byte),
            }
        }
        String::from_utf8(line).map(Some).map_err(|_| io::ErrorKind::InvalidData.into())
    }
}
