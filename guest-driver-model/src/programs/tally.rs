//! What the sessions with a device come to: their counts, summed over devices and links.

use std::ops::AddAssign;

use super::waiting::Sleeps;
use crate::reach::Demand;

/// What a session counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Vrings found broken.
    pub faults: u64,
    /// Links that came up.
    pub links: u64,
    /// What the device was asked for.
    pub demand: Demand,
    /// How the program slept.
    pub sleeps: Sleeps,
}

counts!(Tally { faults, links, demand, sleeps });

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}
