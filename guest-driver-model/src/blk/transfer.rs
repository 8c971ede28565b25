//! A chain's bytes, between the window and private memory; what the window does not show the device fetches
//! and stores.
//!
//! Owns: nothing. What was copied was there when it was copied, or it counts as not copied.

use crate::control::{Job, Outcome, Request};
use crate::reach::{LiveVring, Reach};
use crate::ring::{Chain, Place, Segment};

/// What became of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    /// It is done.
    Done,
    /// It is not: the link, or the mapping table, has changed, or the device could not. To be tried again.
    Later,
    /// The owner does not allow this address.
    Denied(u64),
}

/// A piece of a transfer: where it is, and which bytes of the private memory it is.
#[derive(Clone, Copy, Debug)]
struct Piece {
    iova: u64,
    place: Place,
    at: usize,
    len: u32,
}

/// The pieces of `len` bytes of one part of a chain, from its byte `from` on.
fn pieces<'c>(
    chain: &'c Chain<'_>,
    writable: bool,
    from: u64,
    len: usize,
) -> impl Iterator<Item = Piece> + Clone + 'c {
    let end = from + len as u64;
    let mut start = 0_u64;
    let of_part = chain.segments.iter().filter(move |segment| segment.writable == writable);
    of_part.filter_map(move |segment: &Segment| {
        let (first, behind) = (start, start + u64::from(segment.len));
        start = behind;
        let (low, high) = (first.max(from), behind.min(end));
        let skip = low.checked_sub(first).filter(|_| low < high)?;
        let place = match segment.place {
            Place::Window(offset) => Place::Window(offset + skip),
            Place::Owner => Place::Owner,
        };
        // Both differences are shorter than the segment, or than what is private.
        Some(Piece { iova: segment.iova + skip, place, at: (low - from) as usize, len: (high - low) as u32 })
    })
}

/// Whether the window shows the chain where it was when it was popped. To be asked before each access.
fn is_there(reach: &mut Reach<'_>, chain: &Chain<'_>) -> bool {
    reach.tables.is_unchanged() || reach.tables.is_current() && reach.tables.hold(chain)
}

/// Whether it did all the time since [`is_there`]. To be asked after each access.
fn was_there(reach: &mut Reach<'_>, chain: &Chain<'_>) -> bool {
    reach.tables.is_unchanged() || reach.tables.is_one_change_later() && reach.tables.hold(chain)
}

/// Copies the chain's readable bytes from `from` on to `into`.
pub(super) fn gather<K>(
    live: &mut LiveVring<K>,
    reach: &mut Reach<'_>,
    chain: &Chain<'_>,
    from: u64,
    into: &mut [u8],
) -> Moved {
    if !is_there(reach, chain) {
        return Moved::Later;
    }
    let all = pieces(chain, false, from, into.len());
    let mut outside = Vec::new();
    for piece in all {
        match piece.place {
            Place::Window(offset) => {
                let room = into.get_mut(piece.at..piece.at + piece.len as usize);
                // Translation only yields what is in the window.
                if room.is_none_or(|room| reach.window.read(offset, room).is_err()) {
                    return Moved::Later;
                }
            }
            Place::Owner => outside.push(piece),
        }
    }
    if !was_there(reach, chain) {
        return Moved::Later;
    }
    let window = reach.window.clone();
    let fetch = |piece: &Piece| Request::Fetch { iova: piece.iova, len: piece.len };
    exchange(
        live,
        reach,
        &outside,
        fetch,
        |_, _| true,
        |piece, data| {
            let room = into.get_mut(piece.at..piece.at + piece.len as usize);
            room.is_some_and(|room| window.read(data, room).is_ok())
        },
    )
}

/// Copies `bytes` to the chain's writable part, from its byte `to` on.
pub(super) fn scatter<K>(
    live: &mut LiveVring<K>,
    reach: &mut Reach<'_>,
    chain: &Chain<'_>,
    to: u64,
    bytes: &[u8],
) -> Moved {
    if !is_there(reach, chain) {
        return Moved::Later;
    }
    let mut outside = Vec::new();
    let of = |piece: &Piece| bytes.get(piece.at..piece.at + piece.len as usize).unwrap_or_default();
    for piece in pieces(chain, true, to, bytes.len()) {
        match piece.place {
            Place::Window(offset) if reach.window.write(offset, of(&piece)).is_err() => return Moved::Later,
            Place::Window(_) => {}
            Place::Owner => outside.push(piece),
        }
    }
    if !was_there(reach, chain) {
        return Moved::Later;
    }
    let window = reach.window.clone();
    let store = |piece: &Piece| Request::Store { iova: piece.iova, len: piece.len };
    let carry = |piece: &Piece, data| window.write(data, of(piece)).is_ok();
    exchange(live, reach, &outside, store, carry, |_, _| true)
}

/// Has the device carry out a request for each piece, as many at once as there is room for. `before` puts
/// the bytes at their place in the control area, `after` takes them from there.
fn exchange<K>(
    live: &mut LiveVring<K>,
    reach: &mut Reach<'_>,
    pieces: &[Piece],
    request: impl Fn(&Piece) -> Request,
    before: impl Fn(&Piece, u64) -> bool,
    mut after: impl FnMut(&Piece, u64) -> bool,
) -> Moved {
    let mut rest = pieces;
    while !rest.is_empty() {
        if live.backoff.left().is_some() {
            return Moved::Later;
        }
        reach.exchange.clear();
        let mut jobs = Vec::new();
        for piece in rest {
            let Some(data) = reach.exchange.reserve(piece.len) else { break };
            if !before(piece, data) {
                return Moved::Later;
            }
            jobs.push(Job::new(request(piece), data));
        }
        reach.carry_out(&mut jobs);
        let (now, later) = rest.split_at(jobs.len());
        for (piece, job) in now.iter().zip(&jobs) {
            match job.outcome {
                Outcome::Done if after(piece, job.data) => {}
                Outcome::Denied => return Moved::Denied(piece.iova),
                Outcome::Done | Outcome::Copy | Outcome::Later => {
                    live.backoff.had_nothing();
                    return Moved::Later;
                }
            }
        }
        if now.is_empty() {
            live.backoff.had_nothing();
            return Moved::Later;
        }
        live.backoff.had_something();
        rest = later;
    }
    // What was fetched, or stored, for another link is not this one's.
    match pieces.is_empty() || reach.tables.is_same_link() {
        true => Moved::Done,
        false => Moved::Later,
    }
}
