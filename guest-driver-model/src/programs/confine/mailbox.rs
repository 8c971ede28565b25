//! The page by which `revoke` and `hammer` take turns. The owner maps it once and for
//! all; each side writes its own half.

use vhost_pci_device::abi::PAGE_SIZE;

use crate::shm::{SharedMemory, ShmError};

// Words of the owner, and from 2048 on those of the peer: bytes from the page's start.
const OWNER_TURN: u64 = 0;
const PAGE_IOVA: u64 = 8;
const SECRET: u64 = 16;
const FRESH: u64 = 24;
const PEER_TURN: u64 = 2048;
const REPORT: u64 = 2056;

/// How far a round is. Each side says when it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Before the first round: the other side is awaited.
    Ready,
    /// The page is mapped, or: the page is being hammered.
    Mapped(u64),
    /// The page is taken back and rewritten, or: it was looked at a last time.
    Taken(u64),
    /// There are no more rounds.
    End,
}

impl Turn {
    const fn number(self) -> u64 {
        match self {
            // A page is zero at first: nobody is anywhere.
            Self::Ready => 1,
            Self::Mapped(round) => 2 * round + 2,
            Self::Taken(round) => 2 * round + 3,
            Self::End => u64::MAX,
        }
    }
}

/// What a round is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Where the card finds the page.
    pub iova: u64,
    /// Seed of the secret in it while it is mapped.
    pub secret: u64,
    /// Seed of the one that the owner writes when it is not mapped any more.
    pub fresh: u64,
}

/// What the peer saw, in all rounds so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Rounds in which the mapped page showed its secret.
    pub found: u64,
    /// Rounds in which it did so only some time after the device had said that the page
    /// was mapped.
    pub late: u64,
    /// The longest such time, microseconds.
    pub latest_us: u64,
    /// Rounds in which the fresh secret was seen, whole or in part.
    pub leaked: u64,
    /// Stores to the page, or to where it had been.
    pub stores: u64,
}

/// The mailbox.
#[derive(Clone, Debug)]
pub struct Mailbox(SharedMemory);

impl Mailbox {
    /// Bytes that it takes.
    pub const LEN: u64 = PAGE_SIZE;

    /// In a page of shared memory.
    pub const fn new(page: SharedMemory) -> Self {
        Self(page)
    }

    /// The owner's: what the round is about, then how far it is.
    ///
    /// # Errors
    /// If the page is shorter than one.
    pub fn owner_is_at(&self, turn: Turn, round: Round) -> Result<(), ShmError> {
        self.0.store_u64(PAGE_IOVA, round.iova)?;
        self.0.store_u64(SECRET, round.secret)?;
        self.0.store_u64(FRESH, round.fresh)?;
        // Release: pairs with the load in `owner_reached`.
        self.0.store_u64_release(OWNER_TURN, turn.number())
    }

    /// Whether the owner is there, or at the end.
    ///
    /// # Errors
    /// As above.
    pub fn owner_reached(&self, turn: Turn) -> Result<bool, ShmError> {
        Ok(self.0.load_u64_acquire(OWNER_TURN)? >= turn.number())
    }

    /// Whether there are no more rounds.
    ///
    /// # Errors
    /// As above.
    pub fn is_over(&self) -> Result<bool, ShmError> {
        self.owner_reached(Turn::End)
    }

    /// What the round is about.
    ///
    /// # Errors
    /// As above.
    pub fn round(&self) -> Result<Round, ShmError> {
        Ok(Round {
            iova: self.0.load_u64(PAGE_IOVA)?,
            secret: self.0.load_u64(SECRET)?,
            fresh: self.0.load_u64(FRESH)?,
        })
    }

    /// The peer's: what it saw, then how far it is.
    ///
    /// # Errors
    /// As above.
    pub fn peer_is_at(&self, turn: Turn, report: Report) -> Result<(), ShmError> {
        let words = [report.found, report.late, report.latest_us, report.leaked, report.stores];
        for (at, word) in (REPORT..).step_by(8).zip(words) {
            self.0.store_u64(at, word)?;
        }
        // Release: pairs with the load in `peer_reached`.
        self.0.store_u64_release(PEER_TURN, turn.number())
    }

    /// Whether the peer is there, or at the end.
    ///
    /// # Errors
    /// As above.
    pub fn peer_reached(&self, turn: Turn) -> Result<bool, ShmError> {
        Ok(self.0.load_u64_acquire(PEER_TURN)? >= turn.number())
    }

    /// What the peer saw.
    ///
    /// # Errors
    /// As above.
    pub fn report(&self) -> Result<Report, ShmError> {
        let word = |index: u64| self.0.load_u64(REPORT + 8 * index);
        Ok(Report {
            found: word(0)?,
            late: word(1)?,
            latest_us: word(2)?,
            leaked: word(3)?,
            stores: word(4)?,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::shm::mapping::MappedRange;
    use std::sync::Arc;

    #[test]
    fn turns_follow_each_other_and_reports_arrive() {
        let page = Arc::new(MappedRange::locked_pages(Mailbox::LEN as usize).unwrap()).shared();
        let mailbox = Mailbox::new(page);
        let turns =
            [Turn::Ready, Turn::Mapped(0), Turn::Taken(0), Turn::Mapped(1), Turn::Taken(1), Turn::End];
        let round = Round { iova: 1 << 40, secret: 2, fresh: 3 };
        let report = Report { found: 1, late: 2, latest_us: 3, leaked: 4, stores: 5 };
        for (at, turn) in turns.into_iter().enumerate() {
            assert!(!mailbox.owner_reached(turn).unwrap() && !mailbox.peer_reached(turn).unwrap());
            mailbox.owner_is_at(turn, round).unwrap();
            mailbox.peer_is_at(turn, report).unwrap();
            for earlier in &turns[..=at] {
                assert!(mailbox.owner_reached(*earlier).unwrap() && mailbox.peer_reached(*earlier).unwrap());
            }
            assert_eq!((mailbox.round().unwrap(), mailbox.report().unwrap()), (round, report));
        }
        assert!(mailbox.is_over().unwrap());
    }
}
