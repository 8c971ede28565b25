//! The function's registers as values: what a driver has programmed, and which eventfds are to be
//! registered for it. No I/O.

use vm_memory::GuestAddress;

use super::wiring::Wanted;
use crate::abi::{CONFIG_LEN, PCI_DEVICE_ID_STAND_IN};
use crate::frontend::handshake::Geometry;
use crate::pci::bar::{
    Bar, NOTIFY_OFF_MULTIPLIER, NOTIFY_OFFSET, REGISTERS_BAR, REGISTERS_LEN, Sizing, WINDOW_BAR,
};
use crate::pci::capability;
use crate::pci::config::{COMMAND_MASTER, COMMAND_MEMORY, ConfigSpace};
use crate::pci::msix::Table;
use crate::virtio::common_config::Common;
use crate::vmm::MsiMessage;

/// The registers.
pub struct Registers {
    /// Configuration space.
    pub space: ConfigSpace,
    /// Where in it the registers are that do something.
    pub at: capability::Places,
    /// The BARs.
    pub bars: [Bar; 2],
    /// Which of them are being sized.
    sizing: [Sizing; 2],
    /// The MSI-X table.
    pub table: Table,
    /// Common configuration.
    pub common: Common,
    /// ISR status.
    pub isr: u8,
    /// Device-specific configuration.
    pub config: [u8; CONFIG_LEN],
    /// [`Options::requester_id`](super::Options::requester_id).
    pub requester_id: u32,
    /// Where the registers' BAR is, if it is somewhere.
    pub registers_at: Option<GuestAddress>,
}

impl Registers {
    /// After power-on.
    pub fn new(geometry: Geometry, requester_id: u32) -> Self {
        let queues = geometry.queues;
        // One a queue, and one for configuration changes.
        let vectors = queues + 1;
        let region_len = geometry.apertures.region_len();
        let bars = [
            Bar { number: REGISTERS_BAR, len: REGISTERS_LEN, prefetchable: false },
            Bar { number: WINDOW_BAR, len: region_len.next_power_of_two(), prefetchable: true },
        ];
        let mut space = ConfigSpace::of_function(PCI_DEVICE_ID_STAND_IN, capability::FIRST);
        for bar in bars {
            bar.install(&mut space);
        }
        let at = capability::install(&mut space, queues, vectors, region_len);
        Self {
            space,
            at,
            bars,
            sizing: Default::default(),
            table: Table::new(vectors),
            common: Common::new(queues, vectors),
            isr: 0,
            config: geometry.config,
            requester_id,
            registers_at: None,
        }
    }

    /// Writes configuration space.
    pub fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.space.write(offset, data);
        for (bar, sizing) in self.bars.into_iter().zip(&mut self.sizing) {
            sizing.note(bar, offset, data);
        }
    }

    /// Where the BARs are to be; nowhere while the function does not decode memory.
    pub fn addresses(&self) -> [Option<GuestAddress>; 2] {
        let decodes = self.space.commands(COMMAND_MEMORY);
        let address = |index: usize| self.bars[index].address(&self.space, self.sizing[index]);
        [0, 1].map(|index| address(index).filter(|_| decodes).map(GuestAddress))
    }

    fn message(&self, vector: u16) -> Option<MsiMessage> {
        if !self.common.is_live() || !self.space.commands(COMMAND_MASTER) {
            return None;
        }
        let message = self.table.message(vector, self.space.read16(self.at.msix_flags))?;
        Some(MsiMessage {
            address_lo: message.address_lo,
            address_hi: message.address_hi,
            data: message.data,
            requester_id: self.requester_id,
        })
    }
}

impl Wanted for Registers {
    fn config(&self) -> Option<MsiMessage> {
        self.message(self.common.config_vector())
    }

    fn interrupt(&self, queue: usize) -> Option<MsiMessage> {
        let queue = self.common.queues().get(queue).filter(|queue| queue.enabled)?;
        self.message(queue.vector)
    }

    fn notify(&self, queue: usize) -> Option<GuestAddress> {
        self.common.queues().get(queue).filter(|queue| queue.enabled && self.common.is_live())?;
        let offset = NOTIFY_OFFSET + queue as u64 * u64::from(NOTIFY_OFF_MULTIPLIER);
        Some(GuestAddress(self.registers_at?.0 + offset))
    }
}
