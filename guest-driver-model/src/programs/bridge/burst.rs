//! One burst of a bridge: what its packets are, who is to have them, and their copies.
//!
//! Owns: the loan, and the room for what cannot be copied in place. Decides nothing.

use super::frame::HEAD;
use crate::net::{Copied, LentBurst, NetHeader, PacketBurst, Pick};
use crate::programs::ProgramError;
use crate::programs::session::{Paused, Session};
use crate::programs::wire::{BURST, Wire};
use crate::transport::Transport;

/// A port while its device is there.
pub(super) struct Port<'a> {
    pub session: Session<'a>,
    /// The link that was up before is gone. What it was to have, or has sent, is not the next one's.
    lost: bool,
    /// The device is gone.
    pub gone: Option<ProgramError>,
}

/// A port without its device for a moment.
pub(super) struct Rest {
    session: Paused,
    lost: bool,
    gone: Option<ProgramError>,
}

impl<'a> Port<'a> {
    /// With a session that begins.
    pub fn new(session: Session<'a>) -> Self {
        Self { session, lost: false, gone: None }
    }

    /// Lets the device go, to [go on](Self::resume) with it at once.
    pub fn pause(self) -> Rest {
        Rest { session: self.session.pause(), lost: self.lost, gone: self.gone }
    }

    /// Goes on where it was.
    pub fn resume(transport: &'a dyn Transport, interrupt: bool, rest: Rest) -> Self {
        let session = Session::resume(transport, interrupt, rest.session);
        Self { session, lost: rest.lost, gone: rest.gone }
    }

    /// Follows the link, for a round: whether one was lost since the last round began, and whether one is up.
    pub fn begin_round(&mut self) -> (bool, bool) {
        let was_lost = std::mem::take(&mut self.lost);
        let is_live = self.wire().is_some();
        match std::mem::take(&mut self.lost) {
            // It may be up again.
            true => (true, self.wire().is_some()),
            false => (was_lost, is_live),
        }
    }

    /// Follows the link. If it is up, and the one with which the round began, its port; faults found by it are
    /// to be reported.
    pub fn wire(&mut self) -> Option<Wire<'_>> {
        let Self { session, lost, gone } = self;
        match session.wire(|| *lost = true) {
            Ok(wire) => wire.filter(|_| !*lost),
            Err(error) => {
                *gone = Some(error);
                None
            }
        }
    }
}

/// A frame of the burst.
#[derive(Clone, Copy)]
pub(super) struct Seen {
    pub head: [u8; HEAD],
    pub len: usize,
    pub pick: Pick,
}

/// What a burst needs, and keeps its room from one to the next.
pub(super) struct Burst {
    pub lent: LentBurst,
    /// The packets, if they were received.
    pub private: PacketBurst,
    pieces: PacketBurst,
    pub seen: Vec<Seen>,
    /// What each port is to have.
    pub picks: Vec<Vec<Pick>>,
}

/// What became of a port's part of a burst.
#[derive(Default)]
pub(super) struct Moved {
    pub packets: usize,
    pub bytes: u64,
    pub full: usize,
    pub refused: usize,
    pub gone: usize,
    /// Bytes that were received for it, or cut.
    pub private_bytes: u64,
}

impl Moved {
    fn add(&mut self, copied: Copied) {
        self.packets += copied.packets;
        self.bytes += copied.bytes;
        self.full += copied.full;
        self.refused += copied.refused;
        self.gone += copied.gone;
    }
}

impl Burst {
    /// Of so many ports.
    pub fn new(ports: usize) -> Self {
        Self {
            lent: LentBurst::with_capacity(BURST),
            private: PacketBurst::default(),
            pieces: PacketBurst::default(),
            seen: Vec::with_capacity(BURST),
            picks: vec![Vec::with_capacity(BURST); ports],
        }
    }

    /// Keeps no owner's memory mapped any more.
    pub fn release(&mut self) {
        self.lent = LentBurst::with_capacity(BURST);
    }

    /// Looks at each packet's addresses, and where it is of use at its header: once. Whether there is any.
    pub fn look(&mut self, is_private: bool, has_headers: bool) -> bool {
        let Self { lent, private, seen, picks, .. } = self;
        seen.clear();
        picks.iter_mut().for_each(Vec::clear);
        if is_private {
            seen.extend(private.iter().enumerate().map(|(at, packet)| {
                let mut head = [0; HEAD];
                head.iter_mut().zip(packet.frame).for_each(|(to, from)| *to = *from);
                Seen { head, len: packet.frame.len(), pick: Pick { at, header: packet.header } }
            }));
        } else {
            seen.extend(lent.iter().enumerate().map(|(at, packet)| {
                let header = if has_headers { packet.header() } else { NetHeader::default() };
                Seen { head: packet.head(), len: packet.len(), pick: Pick { at, header } }
            }));
        }
        !seen.is_empty()
    }

    /// Nobody gets what a port was to have.
    pub fn none(&self, to: usize) -> Moved {
        Moved { gone: self.picks.get(to).map_or(0, Vec::len), ..Moved::default() }
    }

    /// Gives a port what it is to have: in place, and what cannot be by way of private memory, from which all
    /// others get theirs then.
    pub fn copy(
        &mut self,
        (source, pair): (&mut Port<'_>, u16),
        (target, to): (&mut Port<'_>, usize),
        is_private: &mut bool,
    ) -> Moved {
        let none = self.none(to);
        let Self { lent, private, pieces, seen, picks } = self;
        let Some(picks) = picks.get(to) else { return none };
        let Some(mut wire) = target.wire() else { return none };
        let Some(to_pair) = pair.checked_rem(wire.receiving_pairs()) else { return none };
        let mut moved = Moved::default();
        let mut done = 0;
        if !*is_private {
            // Its link has changed: it has taken its packets with it, and what comes now is not looked at.
            let Some(mut from) = source.wire() else { return none };
            let copied = from.copy((pair, lent), picks, &mut wire, to_pair);
            done = copied.done;
            moved.add(copied);
            if done < picks.len() {
                // They are the same packets: the owner has not got them back.
                from.receive_lent(pair, private, seen.len());
                *is_private = true;
                moved.private_bytes = private.frames().map(|frame| frame.len() as u64).sum();
            }
        }
        if done < picks.len() {
            let left = picks.get(done..).unwrap_or_default();
            moved.add(wire.send_copies(to_pair, private, left, pieces));
        }
        let is_faulted = wire.is_faulted();
        drop(wire);
        if is_faulted {
            target.session.report_faults();
        }
        moved
    }
}
