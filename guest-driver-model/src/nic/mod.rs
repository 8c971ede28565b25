//! A network card of this VM that reads and writes the owner's buffers where they lie: no processor
//! copies a packet.
//!
//! | module | what it holds |
//! |---|---|
//! | [`pass`] | a link's buffers, lent to the card and completed for the owner |
//! | [`virtio_net`] | a virtio network card, a virtual function for example, through VFIO |
//!
//! A card knows nothing of the owner: it is given ranges of the window and pieces of them. What it
//! must be able to is little: to stop, so that nothing of what it was lent is touched any more.

pub mod pass;
pub mod virtio_net;

use std::os::fd::BorrowedFd;

use crate::ring::{Completion, DriverFault};
use crate::shm::SharedMemory;
use crate::translate::Mapping;
use crate::transport::TransportError;

pub use self::pass::{Counts, Pass, PassError, Round};
pub use self::virtio_net::VirtioNet;

/// Which of a card's two directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Buffers with packets that the card sends.
    Send,
    /// Empty buffers, into which it receives.
    Receive,
}

/// A piece of a buffer, in the card's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Bus address of its first byte.
    pub bus: u64,
    /// Length, bytes; not 0.
    pub len: u32,
}

/// Whether a card took a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lent {
    /// It has it until it is collected, or the card is stopped.
    Yes,
    /// It has no room now.
    NoRoom,
    /// It can never take a buffer like this.
    Never,
}

/// What a card does not do.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// It, or what it needs, is not to be had.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// It broke its own rings: it is reset and started again.
    #[error("{name}: {source}")]
    Ring {
        /// The card.
        name: String,
        /// What it did.
        source: DriverFault,
    },
    /// It fell out of work by itself, or was reset by somebody else.
    #[error("{name}: {why}")]
    Failed {
        /// The card.
        name: String,
        /// What was seen.
        why: &'static str,
    },
}

/// A network card whose DMA this program directs.
pub trait Nic {
    /// What to call it in messages.
    fn name(&self) -> &str;

    /// Lets it reach a range of the window, with no more than its access.
    ///
    /// # Errors
    /// What the system answers.
    fn reach(&mut self, window: &SharedMemory, range: &Mapping) -> Result<(), NicError>;

    /// It reaches the range no more when this returns. It must not have a buffer there.
    ///
    /// # Errors
    /// What the system answers: the card may still reach it then.
    fn forget(&mut self, range: &Mapping) -> Result<(), NicError>;

    /// The bus address of a window offset that it [reaches](Self::reach).
    fn bus(&self, window_offset: u64) -> u64;

    /// Starts it, with nothing lent. `mergeable`: a packet may be received into several buffers, if the card
    /// can do that; what it chose [`Self::is_mergeable`] says.
    ///
    /// # Errors
    /// Why it does not start.
    fn start(&mut self, mergeable: bool) -> Result<(), NicError>;

    /// Whether the card may put a packet into several buffers, and says in the header of the first into how
    /// many. If not, `num_buffers` is the driver's to write.
    fn is_mergeable(&self) -> bool;

    /// Lends it a buffer. Of what it sends, the frame alone; of what it receives into, all, with room for a
    /// virtio-net header of 12 bytes at the start, which the card writes. The card sees it after
    /// [`Self::publish`].
    fn lend(&mut self, way: Way, pieces: &[Piece], token: u64) -> Lent;

    /// Shows it what was lent.
    fn publish(&mut self, way: Way);

    /// Appends all that it has given back, with the bytes that it wrote, header and all. A packet in several
    /// buffers comes whole. After [`Self::stop`]: what it had given back before.
    ///
    /// # Errors
    /// If it broke a rule.
    fn collect(&mut self, way: Way, into: &mut Vec<Completion>) -> Result<(), NicError>;

    /// Buffers that it may touch: lent, not collected, and it was not stopped since.
    fn held(&self) -> usize;

    /// Stops it: when this returns it touches nothing that was lent to it any more.
    ///
    /// # Errors
    /// If it does not stop.
    fn stop(&mut self) -> Result<(), NicError>;

    /// Whether it works: costs an exit, so not for each packet.
    ///
    /// # Errors
    /// Why it does not. [`NicError::Transport`]: it has to be let go, and to start it again is no use.
    fn check(&self) -> Result<(), NicError>;

    /// What becomes readable when it gave something back, if it was asked to say so.
    fn interrupts(&self) -> Vec<BorrowedFd<'_>>;

    /// Asks it to interrupt, or not to. Whether it has given something back already.
    ///
    /// # Errors
    /// If it broke a rule.
    fn set_interrupts(&mut self, enabled: bool) -> Result<bool, NicError>;
}
