//! `hammer`: has a page mapped that `revoke` offers, reads and writes it in a tight loop,
//! and goes on doing so when it is taken away: a peer that obeys no rule.

use std::time::{Duration, Instant};

use super::mailbox::{Mailbox, Report, Turn};
use super::revoke::MAILBOX_IOVA;
use super::scan::search;
use super::secret::Secret;
use super::window::{Window, name};
use crate::programs::ProgramError;
use crate::programs::device::DeviceArgs;
use crate::programs::run::stop_on_signals;
use crate::shm::{SharedMemory, ShmError};
use crate::translate::Access;

/// What `hammer` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct HammerArgs {
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// After every so many rounds, look for what the owner wrote last in the whole window
    #[arg(long, default_value_t = 100)]
    pub scan_every: u64,
}

/// Blows before the owner is told that the page is being hammered, and after it was
/// taken away.
const WARM_UP: u64 = 256;
const AFTER: u64 = 4096;
/// How long a page that was mapped may take to be seen.
const PATIENCE: Duration = Duration::from_millis(500);
/// Blows between two looks into the mailbox.
const BETWEEN: u64 = 16;
/// In every word that is stored: no secret has it, most likely.
const MARK: u64 = 0xbad0_bad0 << 32;

/// Runs `hammer`.
///
/// # Errors
/// If the device cannot be had, or does not map what the owner lets its card reach.
pub fn run(args: &HammerArgs) -> Result<(), ProgramError> {
    let stop = stop_on_signals()?;
    let transport = args.device.open()?;
    let mut window = Window::open(&*transport)?;
    let page = map(&mut window, MAILBOX_IOVA, Mailbox::LEN)?;
    let mailbox = Mailbox::new(page);
    let mut report = Report::default();
    mailbox.peer_is_at(Turn::Ready, report)?;
    for round in 0.. {
        while !mailbox.owner_reached(Turn::Mapped(round))? && !stop.is_requested() {
            std::thread::yield_now();
        }
        if mailbox.is_over()? || stop.is_requested() {
            break;
        }
        let about = mailbox.round()?;
        let (secret, fresh) = (Secret::new(about.secret), Secret::new(about.fresh));
        let page = map(&mut window, about.iova, Secret::LEN)?;
        look_for(secret, &page, &mut report)?;

        let mut hammer = Hammer { page: &page, fresh: fresh.words(), stores: 0, leaked: false };
        hammer.strike(WARM_UP)?;
        mailbox.peer_is_at(Turn::Mapped(round), report)?;
        while !mailbox.owner_reached(Turn::Taken(round))? && !stop.is_requested() {
            hammer.strike(BETWEEN)?;
        }
        hammer.strike(AFTER)?;
        let mut leaked = hammer.leaked || fresh.is_in(&page)?;
        if round % args.scan_every.max(1) == 0 {
            leaked |= search(window.memory(), fresh)?.with_secret > 0;
        }
        report.leaked += u64::from(leaked);
        report.stores += hammer.stores;
        mailbox.peer_is_at(Turn::Taken(round), report)?;
    }
    crate::programs::say(&serde_json::json!(report).to_string());
    Ok(())
}

/// Looks whether a page that was just mapped shows what it should, at once or a little later.
fn look_for(secret: Secret, page: &SharedMemory, report: &mut Report) -> Result<(), ShmError> {
    let start = Instant::now();
    if secret.is_in(page)? {
        report.found += 1;
        return Ok(());
    }
    while start.elapsed() < PATIENCE {
        if secret.is_in(page)? {
            report.found += 1;
            report.late += 1;
            report.latest_us = report.latest_us.max(start.elapsed().as_micros() as u64);
            break;
        }
    }
    Ok(())
}

fn map(window: &mut Window<'_>, iova: u64, len: u64) -> Result<SharedMemory, ProgramError> {
    window
        .map(iova, len as u32, Access::READ_WRITE)?
        .map_err(|outcome| ProgramError::NotMapped { iova, answer: name(outcome) })
}

/// Stores to a page and loads from it.
struct Hammer<'a> {
    page: &'a SharedMemory,
    /// What must not be read.
    fresh: [u64; 4],
    stores: u64,
    leaked: bool,
}

impl Hammer<'_> {
    fn strike(&mut self, times: u64) -> Result<(), ShmError> {
        const WORDS: u64 = Secret::LEN / 8;
        for _ in 0..times {
            self.page.store_u64(self.stores % WORDS * 8, MARK | self.stores)?;
            // Loads walk through the page in another order, or they would see only what was
            // just stored.
            let seen = self.page.load_u64(self.stores.wrapping_mul(37) % WORDS * 8)?;
            self.leaked |= self.fresh.contains(&seen);
            self.stores += 1;
        }
        Ok(())
    }
}
