//! The peer's device as a program uses it that does not serve the owner's rings: its
//! window, its mapping table, and the answers to commands.

use std::time::{Duration, Instant};

use crate::control::{Command, ControlExchange, ControlRing, Exchange, Job, Outcome, Request};
use crate::link::LinkPage;
use crate::programs::ProgramError;
use crate::shm::SharedMemory;
use crate::translate::{Access, Mapping, Translation};
use crate::transport::Transport;

/// How long the link may take to be up.
const LINK_TIME: Duration = Duration::from_secs(20);
/// How long a request that is not answered may be asked again.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(1);

/// A device with a link that is up.
pub(super) struct Window<'a> {
    transport: &'a dyn Transport,
    page: LinkPage,
    control: ControlRing,
    /// The generation that the device was told is served.
    attached: Option<u64>,
}

impl<'a> Window<'a> {
    /// Waits until the link is up.
    pub fn open(transport: &'a dyn Transport) -> Result<Self, ProgramError> {
        let page = LinkPage::new(transport.window(), transport.config())?;
        let start = Instant::now();
        while !page.snapshot().is_ok_and(|snapshot| snapshot.up) {
            if start.elapsed() > LINK_TIME {
                return Err(ProgramError::NoLink { device: transport.name().to_owned(), waited: LINK_TIME });
            }
            std::thread::sleep(PAUSE);
        }
        let control = ControlRing::new(transport)?;
        Ok(Self { transport, page, control, attached: None })
    }

    /// All of it.
    pub fn memory(&self) -> &SharedMemory {
        self.transport.window()
    }

    /// Where the owner's memory can be, bytes from the start.
    pub fn data_offset(&self) -> u64 {
        self.transport.config().data_offset.value()
    }

    /// What is mapped now.
    pub fn mappings(&self) -> Result<Vec<Mapping>, ProgramError> {
        let start = Instant::now();
        loop {
            match self.page.table() {
                Ok(table) => return Ok(table.mappings),
                Err(error) if start.elapsed() > ANSWER_TIME => return Err(error.into()),
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
    }

    /// Where the mapping table says that the range is.
    pub fn place(&self, iova: u64, len: u32, access: Access) -> Result<Option<u64>, ProgramError> {
        Ok(Translation::new(&self.mappings()?).contiguous(iova, len, access))
    }

    /// Has a range mapped. Gives it as memory, or the device's answer if it is not
    /// mapped.
    pub fn map(
        &mut self,
        iova: u64,
        len: u32,
        access: Access,
    ) -> Result<Result<SharedMemory, Outcome>, ProgramError> {
        let outcome = self.ask(Request::Map { iova, len: len.into(), access }, &mut [])?;
        if outcome != Outcome::Done {
            return Ok(Err(outcome));
        }
        match self.place(iova, len, access)? {
            Some(offset) => Ok(Ok(self.memory().part(offset, len.into())?)),
            // Taken away again.
            None => Ok(Err(Outcome::Later)),
        }
    }

    /// Copies a range of the owner's memory.
    pub fn fetch(&mut self, iova: u64, into: &mut [u8]) -> Result<Outcome, ProgramError> {
        let len = into.len() as u32;
        self.ask(Request::Fetch { iova, len }, into)
    }

    /// Copies to a range of the owner's memory.
    pub fn store(&mut self, iova: u64, bytes: &mut [u8]) -> Result<Outcome, ProgramError> {
        let len = bytes.len() as u32;
        self.ask(Request::Store { iova, len }, bytes)
    }

    fn ask(&mut self, request: Request, bytes: &mut [u8]) -> Result<Outcome, ProgramError> {
        let start = Instant::now();
        loop {
            let outcome = self.ask_once(request, bytes)?;
            if outcome != Outcome::Later || start.elapsed() > ANSWER_TIME {
                return Ok(outcome);
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn ask_once(&mut self, request: Request, bytes: &mut [u8]) -> Result<Outcome, ProgramError> {
        // 9.4: the device takes commands of who is attached to the present link.
        let generation = self.page.generation();
        if self.attached != Some(generation) {
            let attach = Command::Attach {
                generation,
                interrupt: false,
                doorbell: None,
                quiesce: false,
                says_served: false,
            };
            if self.control.call(self.transport, attach, ANSWER_TIME).is_err() {
                return Ok(Outcome::Later);
            }
            self.attached = Some(generation);
        }
        let memory = self.transport.window();
        let mut exchange = ControlExchange::new(&mut self.control, self.transport, false);
        exchange.clear();
        let Some(at) = exchange.reserve(bytes.len() as u32) else { return Ok(Outcome::Later) };
        if let Request::Store { .. } = request {
            memory.write(at, bytes)?;
        }
        let mut job = Job::new(request, at);
        exchange.carry_out(std::slice::from_mut(&mut job));
        if let (Request::Fetch { .. }, Outcome::Done) = (request, job.outcome) {
            memory.read(at, bytes)?;
        }
        Ok(job.outcome)
    }
}

/// An answer, as the programs print it.
pub(super) const fn name(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Done => "done",
        Outcome::Copy => "copy",
        Outcome::Denied => "denied",
        Outcome::Later => "later",
    }
}
