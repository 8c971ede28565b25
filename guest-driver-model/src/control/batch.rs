//! Batches of MAP, FETCH and STORE over the control ring
//! (`docs/vhost-pci-device.md`, 9.4).
//!
//! Owns: the room for what they carry. A batch whose answers do not come in time is given
//! up, and its room is not used again before the device has given all of it back.

use std::mem::offset_of;
use std::time::{Duration, Instant};

use vhost_pci_device::abi;
use zerocopy::IntoBytes;

use super::exchange::{Exchange, Job, Outcome, Request};
use super::{ControlRing, REQUEST_LEN, RESPONSE_LEN, wait};
use crate::ring::{AddError, Buffer, Completion, DriverFault};
use crate::transport::Transport;

/// Before what a job carries, request and response have so much room, bytes.
const HEAD: u64 = 64;
/// How long to look for answers before sleeping.
const SPIN: Duration = Duration::from_micros(200);
/// How long answers may take together: the device asks the owner's VMM.
const PATIENCE: Duration = Duration::from_secs(3);
/// A nap, where no interrupt tells of answers; and the longest sleep where one does.
const NAP: Duration = Duration::from_micros(50);
const SLEEP: Duration = Duration::from_millis(5);
/// How late the next answer is that waits for what the driver has to let go of. What is mapped for an answer is in
/// the table just before.
const LATE: Duration = Duration::from_millis(1);

/// Marks the tokens of jobs.
pub(super) const JOB: u64 = 1 << 32;

/// The room for jobs, and the jobs in the ring.
#[derive(Debug)]
pub(super) struct Batch {
    /// Window offsets.
    start: u64,
    end: u64,
    next: u64,
    sent: Vec<Sent>,
    /// How many of them have no answer.
    waiting: usize,
}

/// A job in the ring.
#[derive(Clone, Copy, Debug)]
struct Sent {
    response: u64,
    /// Bytes that the device writes if it does what was asked.
    written: u32,
    status: Option<u32>,
}

impl Batch {
    /// With the room between two window offsets.
    pub(super) fn new(start: u64, end: u64) -> Self {
        let start = start.next_multiple_of(HEAD);
        Self { start, end, next: start, sent: Vec::new(), waiting: 0 }
    }

    fn clear(&mut self) {
        self.next = if self.waiting == 0 { self.start } else { self.end };
    }

    fn reserve(&mut self, len: u32) -> Option<u64> {
        let data = self.next.checked_add(HEAD)?;
        let end = data.checked_add(len.into())?.checked_next_multiple_of(HEAD)?;
        if end > self.end {
            return None;
        }
        self.next = end;
        Some(data)
    }
}

impl ControlRing {
    /// The device has given a job back.
    pub(super) fn job_done(&mut self, completion: Completion) {
        let index = (completion.token & !JOB) as usize;
        let Some(sent) = self.batch.sent.get_mut(index).filter(|sent| sent.status.is_none()) else { return };
        let short = u64::from(completion.len) < RESPONSE_LEN;
        let status = match short {
            true => abi::CTRL_INVALID,
            false => self.window.load_u32(sent.response).unwrap_or(abi::CTRL_INVALID),
        };
        // What it did not write has not been fetched.
        let incomplete = status == abi::CTRL_OK && completion.len < sent.written;
        sent.status = Some(if incomplete { abi::CTRL_FAILED } else { status });
        self.batch.waiting -= 1;
    }

    /// Puts a job into the ring, if there is room; the device does not see it yet.
    fn put(&mut self, job: &Job) -> Result<bool, super::ControlError> {
        let head = job.data.saturating_sub(HEAD);
        // Request and response each lie against the data that belongs to them.
        let (request, response, readable, writable) = match job.request {
            Request::Map { .. } => (head, head + REQUEST_LEN, 0, 0),
            Request::Fetch { len, .. } => (head, job.data - RESPONSE_LEN, 0, len),
            Request::Store { len, .. } => (job.data - REQUEST_LEN, head, len, 0),
        };
        self.window.write(request, job.request.to_abi().as_bytes())?;
        let written = RESPONSE_LEN as u32 + writable;
        let pieces =
            [Buffer::readable(request, REQUEST_LEN as u32 + readable), Buffer::writable(response, written)];
        match self.ring.add(&pieces, JOB | self.batch.sent.len() as u64) {
            Ok(()) => {}
            Err(AddError::Full | AddError::Invalid) => return Ok(false),
        }
        self.batch.sent.push(Sent { response, written, status: None });
        self.batch.waiting += 1;
        Ok(true)
    }
}

/// The control ring as a port uses it.
pub struct ControlExchange<'a> {
    ring: &'a mut ControlRing,
    transport: &'a dyn Transport,
    interrupt: bool,
    /// What is left of it.
    patience: Duration,
    waited: Option<&'a mut Duration>,
    /// The link that jobs are about, by the link page's generation.
    link: Option<u64>,
    /// The mapping table of which a device has been lent what it shows.
    lent: Option<u64>,
}

impl<'a> ControlExchange<'a> {
    /// Over a control ring of this device. `interrupt`: the program sleeps until it is
    /// interrupted.
    pub fn new(ring: &'a mut ControlRing, transport: &'a dyn Transport, interrupt: bool) -> Self {
        Self { ring, transport, interrupt, patience: PATIENCE, waited: None, link: None, lent: None }
    }

    /// The same, waiting at most so long, for all batches together.
    pub fn patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// The same, adding to `waited` how long was waited.
    pub fn counting(self, waited: &'a mut Duration) -> Self {
        Self { waited: Some(waited), ..self }
    }

    /// The same, for jobs about the link of this generation: when the link page has another, nobody waits for
    /// their answers. It is the host's last word, too, where a broker was killed and answers nothing any more.
    pub fn of_link(self, generation: u64) -> Self {
        Self { link: Some(generation), ..self }
    }

    /// Whether the link page has another value than this in the field of 8 bytes at an offset, if there is one to
    /// have.
    fn differs(&self, field: usize, value: Option<u64>) -> bool {
        let at = self.transport.config().link_offset.value() + field as u64;
        value.is_some_and(|value| self.transport.window().load_u64(at) != Ok(value))
    }

    /// Whether the link page has another generation than that of the jobs' link.
    fn is_of_another_link(&self) -> bool {
        self.differs(offset_of!(abi::LinkHeader, generation), self.link)
    }

    /// Whether the mapping table is another one than that of which something is lent, and no answer has come for
    /// a while since. `last`: how many were waited for when the last one came, and when.
    fn waits_for_driver(&self, last: &mut Option<(usize, Instant)>) -> bool {
        if !self.differs(offset_of!(abi::LinkHeader, table_generation), self.lent) {
            return false;
        }
        let waiting = self.ring.batch.waiting;
        match *last {
            Some((before, since)) if before == waiting => since.elapsed() >= LATE,
            _ => {
                *last = Some((waiting, Instant::now()));
                false
            }
        }
    }

    /// Sends all jobs, as the ring takes them, and waits for their answers.
    fn run(&mut self, jobs: &[Job], start: Instant) -> Result<(), super::ControlError> {
        let mut left = jobs.iter();
        let mut next = left.next();
        let mut last = None;
        loop {
            let mut fresh = false;
            while let Some(job) = next
                && self.ring.put(job)?
            {
                fresh = true;
                next = left.next();
            }
            if fresh {
                self.ring.ring.publish();
                self.transport.doorbell(abi::QUEUE_CONTROL);
            }
            self.ring.reap()?;
            if next.is_none() && self.ring.batch.waiting == 0 {
                return Ok(());
            }
            let waited = start.elapsed();
            // 9.1: in another area nobody answers, nor does a device that is gone.
            let over = !self.ring.is_current() || self.is_of_another_link() || self.transport.is_over();
            if waited >= self.patience || over || self.waits_for_driver(&mut last) {
                return Ok(());
            }
            if waited < SPIN {
                std::hint::spin_loop();
            } else {
                let interrupt = self.transport.interrupt_fd(abi::QUEUE_CONTROL).filter(|_| self.interrupt);
                let most = if interrupt.is_some() { SLEEP } else { NAP };
                let most = if last.is_some() { most.min(LATE) } else { most };
                wait(interrupt, most.min(self.patience - waited));
            }
        }
    }
}

impl Exchange for ControlExchange<'_> {
    fn clear(&mut self) {
        // A device that broke the ring has no room to give back.
        let _: Result<(), DriverFault> = self.ring.reap();
        self.ring.batch.clear();
    }

    fn reserve(&mut self, len: u32) -> Option<u64> {
        self.ring.batch.reserve(len)
    }

    fn carry_out(&mut self, jobs: &mut [Job]) {
        jobs.iter_mut().for_each(|job| job.outcome = Outcome::Later);
        let idle = self.ring.reap().is_ok() && self.ring.batch.waiting == 0;
        if jobs.is_empty() || !idle || !self.ring.is_current() {
            return;
        }
        self.ring.batch.sent.clear();
        let start = Instant::now();
        // What was answered before the ring broke, or the time was over, counts.
        let _: Result<(), super::ControlError> = self.run(jobs, start);
        let waited = start.elapsed();
        self.patience = self.patience.saturating_sub(waited);
        if let Some(all) = &mut self.waited {
            **all += waited;
        }
        for (job, sent) in jobs.iter_mut().zip(&self.ring.batch.sent) {
            job.outcome = sent.status.map_or(Outcome::Later, Outcome::of_status);
        }
    }

    fn follow(&mut self, table_generation: u64) {
        self.lent = Some(table_generation);
    }
}

#[cfg(test)]
#[path = "batch_tests.rs"]
mod tests;
