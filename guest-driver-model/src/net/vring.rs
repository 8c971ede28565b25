//! A vring of a network card: what its packets need beside what every vring has.

use super::lent::Lender;
use crate::reach;

/// What is kept beside a vring.
#[derive(Debug)]
pub(super) struct Packets {
    pub(super) lender: Lender,
    /// The headers of its packets have something to say (5.1.6.2): an offload was
    /// negotiated. Otherwise they are not looked at, and their cache lines stay where they
    /// are.
    pub(super) headers: bool,
}

impl Packets {
    pub(super) fn new(headers: bool) -> Self {
        Self { lender: Lender::new(), headers }
    }
}

/// A vring in use.
pub(super) type LiveVring = reach::LiveVring<Packets>;
/// A vring of the owner.
pub(super) type PortVring = reach::PortVring<Packets>;

impl LiveVring {
    /// What is out is lent no more, and is the next to be popped.
    #[inline]
    pub(super) fn end_loan(&mut self) {
        let out = self.kind.lender.end();
        if out > 0 {
            self.ring.put_back(out);
        }
    }
}
