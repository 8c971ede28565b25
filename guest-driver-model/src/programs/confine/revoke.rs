//! `revoke`: maps a page for its card, lets the peer hammer it, takes it back, and looks
//! whether the peer still reaches it. Over and over; then it says what it saw, and waits to
//! be ended.

use std::time::{Duration, Instant};

use serde_json::json;

use super::mailbox::{Mailbox, Round, Turn};
use super::secret::Secret;
use crate::programs::ProgramError;
use crate::programs::run::stop_on_signals;
use crate::programs::stop::Stop;
use crate::programs::vfio_owner::{CardArgs, CardPort, EXTRA_IOVA};
use crate::shm::{SharedMemory, ShmError};
use crate::translate::Access;
use crate::transport::card::Pages;

/// What `revoke` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct RevokeArgs {
    /// The card.
    #[command(flatten)]
    pub card: CardArgs,
    /// Secrets are made from this on
    #[arg(long, value_name = "SEED")]
    pub secret: u64,
    /// How often the page is mapped and taken back
    #[arg(long, default_value_t = 1000)]
    pub rounds: u64,
}

/// Where the mailbox is, for the peer.
pub const MAILBOX_IOVA: u64 = EXTRA_IOVA;
/// Where the page is while it is mapped. In a 2 MiB of its own, as a guest's buffers
/// are not.
const PAGE_IOVA: u64 = EXTRA_IOVA + (2 << 20);
/// How long the peer may take for its part of a round.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the owner watches its page once it was taken back.
const WATCH: Duration = Duration::from_millis(2);

/// What was seen of the page.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// Rounds in which the peer's stores arrived while the page was mapped.
    reached: u64,
    /// Rounds in which the page changed after it was taken back.
    changed: u64,
}

/// Runs `revoke`.
///
/// # Errors
/// If there is no card to be had, or the peer does not take its turn.
pub fn run(args: &RevokeArgs) -> Result<(), ProgramError> {
    let stop = stop_on_signals()?;
    let card = CardPort::start(&args.card)?;
    let pages = card.card.pages(Secret::LEN)?;
    let memory = pages.memory();
    Secret::new(args.secret).fill(&memory)?;
    let mailbox_pages = card.card.pages(Mailbox::LEN)?;
    let mailbox = Mailbox::new(mailbox_pages.memory());
    let _mapped = card.card.map(MAILBOX_IOVA, &mailbox_pages, Access::READ_WRITE)?;
    crate::programs::say(&json!({ "mapped_bytes": card.len + Mailbox::LEN }).to_string());
    // Until `hammer` comes the secret is in a page that is not mapped.
    while !mailbox.peer_reached(Turn::Ready)? && !stop.is_requested() {
        std::thread::sleep(Duration::from_millis(10));
    }

    let mut rounds = Rounds { card: &card, pages: &pages, memory: &memory, mailbox: &mailbox, stop: &stop };
    let mut seen = Seen::default();
    let mut times = Vec::new();
    let start = Instant::now();
    for round in 0..args.rounds {
        if stop.is_requested() {
            break;
        }
        times.push(rounds.one(round, args.secret, &mut seen)?);
    }
    let last = Round { iova: PAGE_IOVA, secret: 0, fresh: 0 };
    mailbox.owner_is_at(Turn::End, last)?;
    times.sort_unstable();
    let micros = |time: Option<&Duration>| time.map(|time| time.as_secs_f64() * 1e6);
    let line = json!({
        "rounds": times.len(),
        "seconds": start.elapsed().as_secs_f64(),
        "reached_while_mapped": seen.reached,
        "changed_after_unmap": seen.changed,
        "peer": mailbox.report()?,
        "unmap_us_median": micros(times.get(times.len() / 2)),
        "unmap_us_max": micros(times.last()),
    });
    crate::programs::say(&line.to_string());
    // The peer lets go of its device first: QEMU 11.1.3 does not survive a change of the
    // window that meets a device being reset.
    while !stop.is_requested() {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

struct Rounds<'a> {
    card: &'a CardPort,
    pages: &'a Pages,
    memory: &'a SharedMemory,
    mailbox: &'a Mailbox,
    stop: &'a Stop,
}

impl Rounds<'_> {
    /// One round. Returns how long the unmapping took.
    fn one(&mut self, round: u64, base: u64, seen: &mut Seen) -> Result<Duration, ProgramError> {
        let seed = base.wrapping_add(2 * round);
        let about = Round { iova: PAGE_IOVA, secret: seed, fresh: seed.wrapping_add(1) };
        let (secret, fresh) = (Secret::new(about.secret), Secret::new(about.fresh));
        secret.fill(self.memory)?;
        let mapped = self.card.card.map(PAGE_IOVA, self.pages, Access::READ_WRITE)?;
        self.mailbox.owner_is_at(Turn::Mapped(round), about)?;
        self.wait(Turn::Mapped(round))?;
        seen.reached += u64::from(!secret.is_in(self.memory)?);

        let start = Instant::now();
        mapped.unmap()?;
        let took = start.elapsed();

        fresh.fill(self.memory)?;
        // The peer is still at it.
        let mut whole = self.watch(fresh)?;
        self.mailbox.owner_is_at(Turn::Taken(round), about)?;
        self.wait(Turn::Taken(round))?;
        whole &= fresh.is_in(self.memory)?;
        seen.changed += u64::from(!whole);
        Ok(took)
    }

    /// Whether the page stays what it is for a while.
    fn watch(&self, fresh: Secret) -> Result<bool, ShmError> {
        let start = Instant::now();
        while start.elapsed() < WATCH {
            if !fresh.is_in(self.memory)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn wait(&self, turn: Turn) -> Result<(), ProgramError> {
        let start = Instant::now();
        while !self.mailbox.peer_reached(turn)? {
            if start.elapsed() > PATIENCE || self.stop.is_requested() {
                return Err(ProgramError::NoTurn { turn, waited: start.elapsed() });
            }
            std::thread::yield_now();
        }
        Ok(())
    }
}
