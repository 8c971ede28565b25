//! What owners can be told of their memory, and of the rings and buffers in it.

use super::ProgramError;
use super::quantity::{address, mebibytes};
use crate::net::OwnerConfig;
use crate::owner::OwnerMemory;

/// An owner's memory, where no VM has it.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct MemoryArgs {
    /// Length of the memory, MiB
    #[arg(long = "memory-mib", default_value = "64", value_name = "MIB", value_parser = mebibytes)]
    pub memory_len: u64,
    /// Guest-physical address of the memory
    #[arg(long, default_value = "0x100000000", value_parser = address)]
    pub guest_start: u64,
}

impl MemoryArgs {
    /// The memory.
    ///
    /// # Errors
    /// If the system has none to give, or it would be beyond the last address.
    pub fn memory(&self) -> Result<OwnerMemory, ProgramError> {
        OwnerMemory::new(self.memory_len, self.guest_start)
            .map_err(|source| ProgramError::System { what: "the owner's memory", source })
    }
}

/// What the buffers of each owner's ring are like.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct BufferArgs {
    /// Length of each buffer, bytes: a multiple of 64, of which the first 64 are for the header
    #[arg(long, default_value_t = OwnerConfig::default().buffer_len)]
    pub buffer_len: u32,
    /// Do without VIRTIO_NET_F_MRG_RXBUF
    #[arg(long)]
    pub no_mergeable: bool,
    /// Do without VIRTIO_F_EVENT_IDX
    #[arg(long)]
    pub no_event_idx: bool,
}

impl BufferArgs {
    /// A queue pair of such rings, split ones.
    pub fn config(&self, ring_size: u16) -> OwnerConfig {
        OwnerConfig {
            ring_size,
            buffer_len: self.buffer_len,
            mergeable: !self.no_mergeable,
            event_idx: !self.no_event_idx,
            ..OwnerConfig::default()
        }
    }
}

/// What the rings of an owner are like whose device is a broker's.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct RingArgs {
    /// Entries of each ring
    #[arg(long, default_value_t = 512)]
    pub ring_size: u16,
    /// Their buffers.
    #[command(flatten)]
    pub buffers: BufferArgs,
    /// Have packed rings (VIRTIO_F_RING_PACKED)
    #[arg(long)]
    pub packed: bool,
    /// Let the device give buffers back in order only, several at once (VIRTIO_F_IN_ORDER)
    #[arg(long)]
    pub in_order: bool,
}

impl RingArgs {
    /// A queue pair of such rings.
    pub fn config(&self) -> OwnerConfig {
        let Self { packed, in_order, .. } = *self;
        OwnerConfig { packed, in_order, ..self.buffers.config(self.ring_size) }
    }
}
