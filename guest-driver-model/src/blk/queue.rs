//! One vring of the owner's disk: takes a request, carries it out, completes it, and then takes the next.
//!
//! Owns: all that a request is served with. A request that cannot be completed now, since the link or the
//! mapping table has changed, stays available and is served anew.

use std::io;
use std::time::Duration;

use vhost_pci_device::abi::FaultKind;
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use super::Counters;
use super::disk::Disk;
use super::request::{HEADER_LEN, Parts, Request, Status};
use super::transfer::{Moved, gather, scatter};
use crate::control::Exchange;
use crate::link::{LinkPage, LinkSnapshot, VringInfo};
use crate::reach::{Demand, LiveVring, PortVring, Reach, Tables};
use crate::ring::{Chain, ChainBurst, Direction, Fault};
use crate::shm::{SharedMemory, ShmError};

/// Bytes that are moved at a time, and so private: more than most requests have.
const CHUNK: usize = 256 << 10;

/// What became of a request.
enum Served {
    /// It is carried out: so many bytes of its writable part were written.
    Done(u32),
    /// It is to be served again later.
    NotYet,
    /// Its chain breaks the rules.
    Broken(FaultKind, u64),
}

impl From<Moved> for Served {
    /// What a transfer means that was not done.
    fn from(moved: Moved) -> Self {
        match moved {
            Moved::Denied(iova) => Self::Broken(FaultKind::Unmapped, iova),
            Moved::Done | Moved::Later => Self::NotYet,
        }
    }
}

/// The peer's side of one vring.
#[derive(Debug)]
pub(super) struct BlkQueue {
    window: SharedMemory,
    tables: Tables,
    demand: Demand,
    vring: PortVring<()>,
    chains: ChainBurst,
    /// The owner's driver knows FLUSH; of one that does not each write is on the disk when it is
    /// completed (5.2.6.2).
    write_back: bool,
    buffer: Vec<u8>,
    pub(super) counters: Counters,
}

impl BlkQueue {
    /// Starts to serve a vring, if it is enabled.
    pub(super) fn new(
        number: u16,
        info: &VringInfo,
        (window, page, snapshot): (&SharedMemory, &LinkPage, &LinkSnapshot),
    ) -> Result<Self, ShmError> {
        // By this the queue writes, whatever it writes.
        let (window, log) = snapshot.serving(window)?;
        let tables = Tables::new(page, snapshot, log);
        Ok(Self {
            demand: Demand::default(),
            vring: PortVring::new(number, info, &window, &tables, snapshot, ()),
            chains: ChainBurst::with_capacity(1),
            write_back: snapshot.has_feature(VIRTIO_BLK_F_FLUSH),
            buffer: Vec::new(),
            counters: Counters::default(),
            window,
            tables,
        })
    }

    pub(super) fn vring(&self) -> &PortVring<()> {
        &self.vring
    }

    pub(super) fn demand(&self) -> Demand {
        Demand { table_reads: self.tables.reads(), ..self.demand }
    }

    pub(super) fn pause(&self) -> Option<Duration> {
        self.vring.pause()
    }

    pub(super) fn needs_call(&mut self) -> bool {
        self.vring.live().ok().flatten().is_some_and(|live| live.ring.needs_call())
    }

    pub(super) fn set_kicks(&mut self, enabled: bool) -> Result<bool, Fault> {
        self.vring.live()?.map_or(Ok(false), |live| live.ring.set_kicks(enabled))
    }

    /// Serves the next request, if there is one. Whether it did.
    pub(super) fn serve(&mut self, exchange: &mut dyn Exchange, disk: &mut dyn Disk) -> Result<bool, Fault> {
        let Self { window, tables, demand, vring, chains, write_back, buffer, counters } = self;
        let Some(live) = vring.live()?.filter(|_| tables.is_current()) else { return Ok(false) };
        live.follow(tables);
        chains.clear();
        let mut reach = Reach { window, tables, exchange, demand };
        if reach.pop(live, 1, 1, Direction::Both, chains)? == 0 {
            return Ok(false);
        }
        let Some(chain) = chains.chain(0) else { return Ok(false) };
        let mut work =
            Work { live, reach, disk, buffer, write_back: *write_back, counts: Counters::default() };
        let served = work.serve(&chain);
        let counts = work.counts;
        match served {
            Served::Done(written) => {
                live.ring.push_used(chain.head, written);
                live.ring.flush_used();
                *counters = *counters + Counters { requests: 1, ..counts };
                Ok(true)
            }
            Served::NotYet => {
                live.ring.put_back(1);
                Ok(false)
            }
            Served::Broken(kind, value) => Err(live.ring.fail(kind, value)),
        }
    }
}

/// What one request is served with.
struct Work<'a> {
    live: &'a mut LiveVring<()>,
    reach: Reach<'a>,
    disk: &'a mut dyn Disk,
    buffer: &'a mut Vec<u8>,
    write_back: bool,
    counts: Counters,
}

impl Work<'_> {
    fn serve(&mut self, chain: &Chain<'_>) -> Served {
        let sum = |writable| {
            let part = chain.segments.iter().filter(|segment| segment.writable == writable);
            part.map(|segment| u64::from(segment.len)).sum::<u64>()
        };
        let parts = Parts { readable: sum(false), writable: sum(true) };
        if parts.writable == 0 {
            // There is no place for a status: nobody can be told.
            return Served::Broken(FaultKind::Length, chain.len);
        }
        // The one fetch of the header, and of what is written with it.
        let first = parts.readable.min((HEADER_LEN + CHUNK) as u64) as usize;
        self.buffer.resize(first, 0);
        match gather(self.live, &mut self.reach, chain, 0, self.buffer) {
            Moved::Done => {}
            moved => return moved.into(),
        }
        let request = Request::decode(self.buffer, parts, self.disk.limits());
        let (status, data) = match request {
            Request::Read { at, len } => return self.read(chain, parts, at, len),
            Request::Write { at, len } => match self.write(chain, at, len) {
                Ok(result) => (self.judge(result), &[][..]),
                Err(moved) => return moved.into(),
            },
            Request::Flush => {
                self.counts.flushes += 1;
                let result = self.disk.flush();
                (self.judge(result), &[][..])
            }
            Request::Id { len } => {
                let id = self.disk.id();
                self.buffer.clear();
                self.buffer.extend_from_slice(id.get(..len).unwrap_or_default());
                return self.answer_with(chain, parts, Status::Ok);
            }
            Request::Refuse(status) => {
                self.counts.refused += 1;
                (status, &[][..])
            }
        };
        self.buffer.clear();
        self.buffer.extend_from_slice(data);
        self.answer_with(chain, parts, status)
    }

    /// What the owner is told of what the disk did.
    fn judge(&mut self, result: io::Result<()>) -> Status {
        match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                self.counts.failed += 1;
                tracing::debug!("the disk: {error}");
                Status::IoError
            }
        }
    }

    /// Tells the owner what is in the buffer, from the start of the writable part on, and the status.
    fn answer_with(&mut self, chain: &Chain<'_>, parts: Parts, status: Status) -> Served {
        let len = self.buffer.len() as u64;
        if len > 0 {
            match scatter(self.live, &mut self.reach, chain, 0, self.buffer) {
                Moved::Done => {}
                moved => return moved.into(),
            }
        }
        match scatter(self.live, &mut self.reach, chain, parts.writable - 1, &[status as u8]) {
            Moved::Done => Served::Done(len as u32 + 1),
            moved => moved.into(),
        }
    }

    fn read(&mut self, chain: &Chain<'_>, parts: Parts, at: u64, len: u64) -> Served {
        let mut done = 0;
        while done < len {
            let chunk = (len - done).min(CHUNK as u64);
            self.buffer.resize(chunk as usize, 0);
            let result = self.disk.read_at(at + done, self.buffer);
            if self.judge(result) != Status::Ok {
                self.buffer.clear();
                return self.answer_with(chain, parts, Status::IoError);
            }
            done += chunk;
            if done == len {
                // The status is right behind.
                self.buffer.push(Status::Ok as u8);
            }
            match scatter(self.live, &mut self.reach, chain, done - chunk, self.buffer) {
                Moved::Done => {}
                moved => return moved.into(),
            }
        }
        if len == 0 {
            self.buffer.clear();
            return self.answer_with(chain, parts, Status::Ok);
        }
        self.counts.read_bytes += len;
        // At most `MAX_DATA`.
        Served::Done(len as u32 + 1)
    }

    /// Writes what is in the buffer behind the header, and what did not fit there.
    fn write(&mut self, chain: &Chain<'_>, at: u64, len: u64) -> Result<io::Result<()>, Moved> {
        let mut done = 0;
        let mut skip = HEADER_LEN;
        while done < len {
            if done > 0 {
                let chunk = (len - done).min(CHUNK as u64);
                self.buffer.resize(chunk as usize, 0);
                let from = HEADER_LEN as u64 + done;
                match gather(self.live, &mut self.reach, chain, from, self.buffer) {
                    Moved::Done => {}
                    moved => return Err(moved),
                }
            }
            let bytes = self.buffer.get(skip..).unwrap_or_default();
            if let Err(error) = self.disk.write_at(at + done, bytes) {
                return Ok(Err(error));
            }
            done += bytes.len() as u64;
            skip = 0;
        }
        self.counts.written_bytes += len;
        Ok(if self.write_back { Ok(()) } else { self.disk.flush() })
    }
}
