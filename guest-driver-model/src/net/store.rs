//! Placing frames into receive buffers of an owner that has an IOMMU: into the window, or,
//! where it does not show a buffer, into the control area, from where the device stores them.
//!
//! Owns: the frames placed and not yet settled. None of their buffers is completed before
//! all of its bytes are known to be there; what cannot be settled is rolled back, to be
//! offered again.

use vhost_pci_device::abi::FaultKind;

use super::Counters;
use super::burst::Packet;
use super::header::{HEADER_LEN, MAX_FRAME, NetHeader};
use super::transmit::{POP, Source, Transmitter};
use super::vring::LiveVring;
use crate::control::{Job, Outcome, Request};
use crate::reach::Reach;
use crate::ring::{Direction, Fault, Place};

/// What became of a frame.
enum Placed {
    /// It is in buffers of the owner, or on its way.
    Taken,
    /// The frames before it have to be settled first.
    AfterOthers,
    /// Not enough buffers are posted now, or within reach.
    NotYet,
}

/// A frame that was placed.
struct Frame {
    /// Chains that it takes; 0 if it would fit none and is dropped.
    chains: usize,
    /// Without its header, bytes.
    len: usize,
    /// How many jobs there were with it.
    jobs: usize,
}

/// The frames since the last settlement, whose chains follow each other from the
/// transmitter's cursor on.
#[derive(Default)]
struct Lap {
    frames: Vec<Frame>,
    /// So many of them were written before the mapping table changed.
    sure: usize,
    /// By chain: bytes written to it.
    written: Vec<u32>,
    jobs: Vec<Job>,
}

impl Lap {
    fn chains(&self) -> usize {
        self.written.len()
    }

    fn clear(&mut self) {
        self.frames.clear();
        self.sure = 0;
        self.written.clear();
        self.jobs.clear();
    }
}

/// What a settlement came to.
enum Settled {
    /// All frames are done with.
    All,
    /// Only so many of them.
    Some,
}

impl Transmitter {
    /// As [`send`](Self::send).
    pub(super) fn send_reaching<'a>(
        &mut self,
        live: &mut LiveVring,
        reach: &mut Reach<'_>,
        packets: impl IntoIterator<Item: Into<Packet<'a>>>,
        counters: &mut Counters,
    ) -> Result<usize, Fault> {
        if let Some(fault) = live.ring.fault() {
            return Err(fault);
        }
        let before = counters.tx_packets + counters.tx_drops;
        let mut lap = Lap::default();
        reach.exchange.clear();
        let result = self.send_all(live, reach, packets, counters, &mut lap);
        live.ring.flush_used();
        match (counters.tx_packets + counters.tx_drops - before) as usize {
            0 => result.map(|()| 0),
            // The fault shows again with the next burst.
            done => Ok(done),
        }
    }

    fn send_all<'a>(
        &mut self,
        live: &mut LiveVring,
        reach: &mut Reach<'_>,
        packets: impl IntoIterator<Item: Into<Packet<'a>>>,
        counters: &mut Counters,
        lap: &mut Lap,
    ) -> Result<(), Fault> {
        for packet in packets {
            let packet = packet.into();
            let mut placed = self.place_reaching(live, reach, packet, lap);
            if matches!(placed, Ok(Placed::AfterOthers)) {
                match self.settle(live, reach, counters, lap)? {
                    Settled::All => placed = self.place_reaching(live, reach, packet, lap),
                    Settled::Some => return Ok(()),
                }
            }
            match placed {
                Ok(Placed::Taken) if reach.tables.is_unchanged() => lap.sure = lap.frames.len(),
                Ok(Placed::Taken) => match self.settle(live, reach, counters, lap)? {
                    Settled::All => {}
                    Settled::Some => return Ok(()),
                },
                Ok(Placed::AfterOthers | Placed::NotYet) => break,
                Err(fault) => {
                    self.settle(live, reach, counters, lap)?;
                    return Err(fault);
                }
            }
        }
        self.settle(live, reach, counters, lap).map(drop)
    }

    fn place_reaching(
        &mut self,
        live: &mut LiveVring,
        reach: &mut Reach<'_>,
        packet: Packet<'_>,
        lap: &mut Lap,
    ) -> Result<Placed, Fault> {
        if packet.header.is_plain() {
            return self.place_as_reaching(live, reach, packet, lap);
        }
        self.judged(packet, |transmitter, packet| match packet {
            Some(packet) => transmitter.place_as_reaching(live, reach, packet, lap),
            None => {
                lap.frames.push(Frame { chains: 0, len: 0, jobs: lap.jobs.len() });
                Ok(Placed::Taken)
            }
        })
    }

    /// Places a packet with its header, but for the number of buffers.
    fn place_as_reaching(
        &mut self,
        live: &mut LiveVring,
        reach: &mut Reach<'_>,
        packet: Packet<'_>,
        lap: &mut Lap,
    ) -> Result<Placed, Fault> {
        let never = Frame { chains: 0, len: 0, jobs: lap.jobs.len() };
        let frame = packet.frame;
        if frame.len() > MAX_FRAME {
            lap.frames.push(never);
            return Ok(Placed::Taken);
        }
        let len = HEADER_LEN + frame.len();
        // How many chains the packet takes.
        let mut room = 0_u64;
        let mut taken = 0_usize;
        while taken == 0 || (self.mergeable && room < len as u64) {
            let ahead = self.cursor + lap.chains() + taken;
            let Some(capacity) = self.posted.chain(ahead).map(|chain| chain.len) else {
                if !lap.frames.is_empty() {
                    return Ok(Placed::AfterOthers);
                }
                if self.pop_more(live, reach, taken)? {
                    (room, taken) = (0, 0);
                    continue;
                }
                if taken < usize::from(live.ring.size()) {
                    return Ok(Placed::NotYet);
                }
                lap.frames.push(never);
                return Ok(Placed::Taken);
            };
            if capacity < HEADER_LEN as u64 {
                return Err(live.ring.fail(FaultKind::Length, capacity));
            }
            room += capacity;
            taken += 1;
        }
        if room < len as u64 {
            lap.frames.push(never);
            return Ok(Placed::Taken);
        }
        self.fill_reaching(live, reach, packet, taken, lap)
    }

    /// Pops at least one chain more than the `posted` ones that are left. Whether there is
    /// one.
    pub(super) fn pop_more(
        &mut self,
        live: &mut LiveVring,
        reach: &mut Reach<'_>,
        posted: usize,
    ) -> Result<bool, Fault> {
        // All anew: by the table of now, which may change while the device is asked.
        self.put_back(&mut live.ring);
        let popped = reach.pop(live, posted + 1, posted + POP, Direction::DeviceWrites, &mut self.posted)?;
        Ok(popped > posted)
    }

    /// Copies header and frame into the next `taken` chains, which have the room, or to where
    /// the device takes them from.
    fn fill_reaching(
        &self,
        live: &mut LiveVring,
        reach: &mut Reach<'_>,
        Packet { header, frame }: Packet<'_>,
        taken: usize,
        lap: &mut Lap,
    ) -> Result<Placed, Fault> {
        // 5.1.6.4.1, as in `place`.
        let header = NetHeader { num_buffers: taken as u16, ..header }.to_bytes();
        let mut source = Source { header: &header, frame };
        let (chains, jobs) = (lap.chains(), lap.jobs.len());
        let first = self.cursor + chains;
        for chain in (first..first + taken).map_while(|at| self.posted.chain(at)) {
            let mut written = 0;
            for segment in chain.segments {
                if source.is_empty() {
                    break;
                }
                let offset = match segment.place {
                    Place::Window(offset) => offset,
                    Place::Owner => {
                        let len = (segment.len as usize).min(source.len()) as u32;
                        let asked_lately = live.backoff.left().is_some();
                        let room = if asked_lately { None } else { reach.exchange.reserve(len) };
                        let Some(data) = room else {
                            // The room that the frame took is given back with all the others'.
                            lap.written.truncate(chains);
                            lap.jobs.truncate(jobs);
                            if !lap.frames.is_empty() {
                                return Ok(Placed::AfterOthers);
                            }
                            if !asked_lately {
                                live.backoff.had_nothing();
                            }
                            return Ok(Placed::NotYet);
                        };
                        lap.jobs.push(Job::new(Request::Store { iova: segment.iova, len }, data));
                        data
                    }
                };
                // Both are inside the window, by the translation and by the exchange.
                written += source
                    .fill(reach.window, offset, segment)
                    .map_err(|_| live.ring.fail(FaultKind::Unmapped, segment.iova))?;
            }
            lap.written.push(written);
        }
        lap.frames.push(Frame { chains: taken, len: frame.len(), jobs: lap.jobs.len() });
        Ok(Placed::Taken)
    }

    /// Has the device store what is to be stored, and completes the buffers of the frames
    /// that are wholly there; rolls the others back.
    fn settle(
        &mut self,
        live: &mut LiveVring,
        reach: &mut Reach<'_>,
        counters: &mut Counters,
        lap: &mut Lap,
    ) -> Result<Settled, Fault> {
        if lap.frames.is_empty() {
            return Ok(Settled::All);
        }
        // What was written to a mapping that was going may be nowhere. Before the device is
        // asked, since that may take mappings away, too.
        let mut good = lap.frames.len();
        if lap.sure < good && !(reach.tables.is_one_change_later() && self.hold(reach, lap)) {
            good = lap.sure;
        }
        let jobs = good.checked_sub(1).and_then(|last| lap.frames.get(last)).map_or(0, |frame| frame.jobs);
        lap.jobs.truncate(jobs);
        let mut denied = None;
        if !lap.jobs.is_empty() {
            reach.carry_out(&mut lap.jobs);
            if let Some(failed) = lap.jobs.iter().position(|job| job.outcome != Outcome::Done) {
                good = lap.frames.partition_point(|frame| frame.jobs <= failed);
                denied = lap.jobs.get(failed).and_then(|job| match (job.outcome, job.request) {
                    (Outcome::Denied, Request::Store { iova, .. }) => Some(iova),
                    _ => None,
                });
            }
            // What was stored for another link is not this one's.
            if !reach.tables.is_same_link() {
                (good, denied) = (0, None);
            }
            match good {
                0 if denied.is_none() => live.backoff.had_nothing(),
                _ => live.backoff.had_something(),
            }
        }
        let settled = if good == lap.frames.len() { Settled::All } else { Settled::Some };
        let mut written = lap.written.iter();
        for frame in lap.frames.iter().take(good) {
            for written in written.by_ref().take(frame.chains) {
                if let Some(chain) = self.posted.chain(self.cursor) {
                    live.ring.push_used(chain.head, *written);
                }
                self.cursor += 1;
            }
            match frame.chains {
                0 => counters.tx_drops += 1,
                _ => {
                    counters.tx_packets += 1;
                    counters.tx_bytes += frame.len as u64;
                }
            }
        }
        lap.clear();
        reach.exchange.clear();
        if reach.tables.is_current() && live.follow(reach.tables) {
            self.put_back(&mut live.ring);
        }
        match denied {
            Some(iova) => Err(live.ring.fail(FaultKind::Unmapped, iova)),
            None => Ok(settled),
        }
    }

    /// Whether the frames that are not sure were written to where their buffers still are.
    fn hold(&self, reach: &mut Reach<'_>, lap: &Lap) -> bool {
        let sure: usize = lap.frames.iter().take(lap.sure).map(|frame| frame.chains).sum();
        (self.cursor + sure..self.cursor + lap.chains())
            .all(|at| self.posted.chain(at).is_some_and(|chain| reach.tables.hold(&chain)))
    }
}
