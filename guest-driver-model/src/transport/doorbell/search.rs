//! Looking for the function of a link, and remembering which are not to be used for now.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::function::{Function, Plugged, Slots};

/// A function that could not be used is tried again after so long: what is in the way may go.
const TRY_AGAIN: Duration = Duration::from_secs(5);
/// The same for one whose vectors did not interrupt. Its trials cost half a second each, but one
/// that was too slow once (the host was busy) is no broken one. Twice as long each time, as
/// often as [`DOUBLINGS`].
const TRY_DEAF_AGAIN: Duration = Duration::from_secs(60);
const DOUBLINGS: u32 = 4;

/// What was found unfit, and when. The clock is the caller's.
#[derive(Default)]
pub struct Search {
    found: u32,
    /// By the number of the plugging.
    unfit: HashMap<u64, Unfit>,
    /// That there is no function was said for this link.
    missed: Option<u64>,
}

struct Unfit {
    link_id: u64,
    /// When it may be tried again.
    again: Instant,
    why: String,
    /// How often its vectors did not interrupt.
    deaf: u32,
}

/// What ended the use of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LetGo {
    /// A vector that its page names does not interrupt.
    Deaf,
    /// Something else.
    Other(&'static str),
}

impl LetGo {
    /// For messages.
    pub fn why(self) -> &'static str {
        match self {
            Self::Deaf => "a vector that its page names does not interrupt",
            Self::Other(why) => why,
        }
    }
}

impl Search {
    /// A function of this link is used no more.
    pub fn let_go(&mut self, plugging: u64, link_id: u64, reason: LetGo, now: Instant) {
        let deaf = self.times_deaf(plugging);
        let (pause, deaf) = match reason {
            LetGo::Deaf => (TRY_DEAF_AGAIN * (1 << deaf.min(DOUBLINGS)), deaf.saturating_add(1)),
            LetGo::Other(_) => (TRY_AGAIN, deaf),
        };
        let unfit = Unfit { link_id, again: now + pause, why: reason.why().into(), deaf };
        self.unfit.insert(plugging, unfit);
    }

    fn times_deaf(&self, plugging: u64) -> u32 {
        self.unfit.get(&plugging).map_or(0, |unfit| unfit.deaf)
    }

    /// The first function that is the link's, its plugging, and how many were found up to it.
    pub fn find(
        &mut self,
        slots: &dyn Slots,
        device: &str,
        link_id: u64,
        now: Instant,
    ) -> Option<(Box<dyn Function>, u64, u32)> {
        let candidates = slots.plugged();
        // What was pulled out is not remembered.
        self.unfit.retain(|known, _| candidates.iter().any(|plugged| plugged.plugging == *known));
        for Plugged { address, plugging } in &candidates {
            let known = self.unfit.get(plugging).filter(|unfit| unfit.link_id == link_id);
            if known.is_some_and(|unfit| now < unfit.again) {
                continue;
            }
            match slots.open(address, link_id) {
                Ok(function) => {
                    self.found = self.found.wrapping_add(1);
                    self.missed = None;
                    let vectors = function.vectors();
                    tracing::info!(
                        device,
                        doorbell = address,
                        vectors,
                        "notifications can go by the doorbell function"
                    );
                    return Some((function, *plugging, self.found));
                }
                Err(error) => {
                    let why = error.to_string();
                    if known.is_none_or(|unfit| unfit.why != why) {
                        tracing::info!(
                            device,
                            doorbell = address,
                            "the doorbell function is not used: {why}"
                        );
                    }
                    let deaf = self.times_deaf(*plugging);
                    self.unfit.insert(*plugging, Unfit { link_id, again: now + TRY_AGAIN, why, deaf });
                }
            }
        }
        if self.missed.replace(link_id) != Some(link_id) {
            tracing::info!(device, "no doorbell function of this link: notifications go through the broker");
        }
        None
    }
}
