//! What a port asks of the device about memory that the window does not show
//! (`docs/vhost-pci-device.md`, 9.4): the requests, their outcomes, and the trait that
//! stands for whoever takes them there.

use vhost_pci_device::abi;

use crate::translate::Access;

/// Something to be done about a range of the owner's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Show it in the window. `len` is at most `MAX_MAP`.
    Map {
        /// First address.
        iova: u64,
        /// Bytes.
        len: u64,
        /// What for.
        access: Access,
    },
    /// Copy it to the job's place in the window. `len` is at most `MAX_COPY`.
    Fetch {
        /// First address.
        iova: u64,
        /// Bytes.
        len: u32,
    },
    /// Copy what is at the job's place in the window there. `len` is at most `MAX_COPY`.
    Store {
        /// First address.
        iova: u64,
        /// Bytes.
        len: u32,
    },
}

impl Request {
    /// As it goes to the device.
    pub(super) fn to_abi(self) -> abi::ControlRequest {
        let (command, flags, value, len) = match self {
            Self::Map { iova, len, access } => (abi::CTRL_MAP, access.bits(), iova, len),
            Self::Fetch { iova, len } => (abi::CTRL_FETCH, 0, iova, len.into()),
            Self::Store { iova, len } => (abi::CTRL_STORE, 0, iova, len.into()),
        };
        abi::ControlRequest {
            command: command.into(),
            flags: flags.into(),
            value: value.into(),
            len: len.into(),
            ..abi::ControlRequest::default()
        }
    }
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Done,
    /// It is not to be mapped, but can be fetched and stored.
    Copy,
    /// The owner does not allow it.
    Denied,
    /// Nothing was done, or nobody knows: try again later.
    Later,
}

impl Outcome {
    /// From the `CTRL_*` status of a response.
    pub fn of_status(status: u32) -> Self {
        match status {
            abi::CTRL_OK => Self::Done,
            // What the window has no room for can still be copied.
            abi::CTRL_COPY | abi::CTRL_NO_ROOM => Self::Copy,
            abi::CTRL_DENIED => Self::Denied,
            _ => Self::Later,
        }
    }
}

/// A request with its room in the control area, and what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// What is to be done.
    pub request: Request,
    /// What [`Exchange::reserve`] gave for it.
    pub data: u64,
    /// [`Outcome::Later`] until it was carried out.
    pub outcome: Outcome,
}

impl Job {
    /// A job that has not been carried out.
    pub fn new(request: Request, data: u64) -> Self {
        Self { request, data, outcome: Outcome::Later }
    }
}

/// Takes jobs to the device.
pub trait Exchange {
    /// Gives all room back. What was fetched is not looked at any more.
    fn clear(&mut self);

    /// Room for one request that carries `len` bytes (0 for [`Request::Map`]): the window
    /// offset at which they are to be put, or will be found. `None` if there is no room.
    fn reserve(&mut self, len: u32) -> Option<u64>;

    /// Has the device carry out all jobs, and waits until it has, for a limited time.
    /// Each has room of its own.
    fn carry_out(&mut self, jobs: &mut [Job]);

    /// From now on who asks goes by the mapping table of this generation, and has lent what it shows to a
    /// device: of another table something may have to be let go of first, and the answers wait for that (9.5).
    /// So they are waited for no longer.
    fn follow(&mut self, _table_generation: u64) {}
}

/// Nobody: no device is asked for anything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nobody;

impl Exchange for Nobody {
    fn clear(&mut self) {}

    fn reserve(&mut self, _: u32) -> Option<u64> {
        None
    }

    fn carry_out(&mut self, _: &mut [Job]) {}
}

impl<X: Exchange> Exchange for Option<X> {
    fn clear(&mut self) {
        if let Some(exchange) = self {
            exchange.clear();
        }
    }

    fn reserve(&mut self, len: u32) -> Option<u64> {
        self.as_mut()?.reserve(len)
    }

    fn carry_out(&mut self, jobs: &mut [Job]) {
        if let Some(exchange) = self {
            exchange.carry_out(jobs);
        }
    }

    fn follow(&mut self, table_generation: u64) {
        if let Some(exchange) = self {
            exchange.follow(table_generation);
        }
    }
}
