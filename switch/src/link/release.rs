//! What of the window the peer's driver has lent to a device of its VM, a network card's virtual
//! function for example, and has to take back before it leaves the window
//! (`docs/vhost-pci-device.md`, 9.5).
//!
//! Only for drivers that said so (ATTACH with QUIESCE). A mapping that goes leaves the link page
//! first, and the driver is interrupted; the VMM is asked to unmap it when the driver says that its
//! device has let go of it, or has had its time. This file never does I/O.

use std::time::{Duration, Instant};

use vhost_pci_device::abi;

/// What the driver owes.
#[derive(Clone, Copy, Debug)]
struct Owed {
    /// It has to let go of all that is not in the table of this generation.
    table: u64,
    /// Then it is taken away all the same.
    deadline: Instant,
}

/// Counts of what drivers were asked to let go of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReleaseCounters {
    /// Times that a driver was asked.
    pub asked: u64,
    /// Times that it did in time.
    pub given: u64,
}

/// The release that a link waits for, if it does.
#[derive(Debug)]
pub struct Release {
    patience: Duration,
    owed: Option<Owed>,
    counters: ReleaseCounters,
}

impl Release {
    /// Nothing is owed. A driver has half of the `timeout` for a change of the window.
    pub fn new(timeout: Duration) -> Self {
        Self { patience: timeout / 2, owed: None, counters: ReleaseCounters::default() }
    }

    /// How long a driver has.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// What was asked and given so far.
    pub fn counters(&self) -> ReleaseCounters {
        self.counters
    }

    /// Whether what leaves the window has to stay in it for now.
    pub fn is_owed(&self) -> bool {
        self.owed.is_some()
    }

    /// The link page has lost mappings, as of this generation of the table. Who waits already
    /// waits for no longer than before.
    pub fn ask(&mut self, table: u64, now: Instant) {
        let deadline = match self.owed {
            Some(owed) => owed.deadline,
            None => {
                self.counters.asked += 1;
                now + self.patience
            }
        };
        self.owed = Some(Owed { table, deadline });
    }

    /// The driver has let go of all that is not in the table of this generation. Gives whether that
    /// is all that was asked of it.
    pub fn give(&mut self, table: u64) -> bool {
        let met = |owed: &mut Owed| table >= owed.table;
        if self.owed.take_if(met).is_some() {
            self.counters.given += 1;
        }
        self.owed.is_none()
    }

    /// The driver has lent nothing any more.
    pub fn forget(&mut self) {
        self.owed = None;
    }

    /// Time passed. Gives whether a driver has let its own pass.
    pub fn tick(&mut self, now: Instant) -> bool {
        self.owed.take_if(|owed| now >= owed.deadline).is_some()
    }

    /// When [`Self::tick`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.owed.map(|owed| owed.deadline)
    }
}

/// Whether a range, or a place of it, or a part of its access, is gone.
pub fn loses(before: &[abi::Mapping], after: &[abi::Mapping]) -> bool {
    // Both are sorted by IOVA.
    let mut after = after.iter().peekable();
    before.iter().any(|old| {
        while after.next_if(|new| new.iova.value() < old.iova.value()).is_some() {}
        after.peek() != Some(&old)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(iova: u64, len: u64, access: u32) -> abi::Mapping {
        abi::Mapping { iova: iova.into(), len: len.into(), access: access.into(), ..Default::default() }
    }

    #[test]
    fn what_comes_is_no_loss_and_what_goes_or_shrinks_is() {
        let [a, b, c] = [mapping(0, 1, 3), mapping(2, 1, 3), mapping(4, 1, 3)];
        assert!(!loses(&[], &[]) && !loses(&[], &[a, b]) && !loses(&[b], &[a, b, c]));
        assert!(!loses(&[a, c], &[a, b, c]));
        assert!(loses(&[a], &[]) && loses(&[a, b, c], &[a, c]) && loses(&[b], &[a, c]));
        assert!(loses(&[a], &[mapping(0, 1, 1)]) && loses(&[mapping(0, 2, 3)], &[a]));
    }

    #[test]
    fn a_release_of_an_earlier_table_is_not_enough_and_asking_again_gives_no_more_time() {
        let now = Instant::now();
        let mut release = Release::new(Duration::from_millis(100));
        assert!(release.give(4), "nothing is owed");
        release.ask(10, now);
        release.ask(12, now + Duration::from_millis(40));
        assert!(!release.give(10) && release.is_owed());
        assert!(!release.tick(now + Duration::from_millis(49)));
        assert!(release.give(12) && !release.is_owed());
        release.ask(14, now);
        assert!(release.tick(now + Duration::from_millis(50)) && !release.is_owed());
        assert_eq!(release.counters(), ReleaseCounters { asked: 2, given: 1 });
    }
}
