//! The function's registers together, behind the device's lock: what each access does.
//!
//! Nothing here waits for the broker. A reset is carried out before the access that asks for
//! it returns, as far as the guest can see it: nothing is wired, the window is empty, the
//! registers are as at the start. The device's thread tells the broker afterwards.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::place::Places;
use super::registers::Registers;
use super::signals::Signals;
use super::wiring::{Wanted, Wiring};
use crate::frontend::handshake::Geometry;
use crate::frontend::message::Direction;
use crate::pci::bar::{
    Bar, COMMON_OFFSET, DEVICE_OFFSET, ISR_OFFSET, MSIX_PBA_OFFSET, MSIX_TABLE_OFFSET, NOTIFY_OFF_MULTIPLIER,
    NOTIFY_OFFSET, REGISTERS_BAR, STRUCTURE_LEN,
};
use crate::pci::capability;
use crate::pci::config::COMMAND_MEMORY;
use crate::virtio::common_config::Change;
use crate::vmm::Vmm;
use crate::window::Window;

/// ISR status: the configuration has changed (virtio 1.3, 4.1.4.5).
const ISR_CONFIG: u8 = 1 << 1;

/// What the driver wants the broker to be told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Larger after each start and each reset.
    pub epoch: u64,
    /// The enabled queues with their sizes; none while the device is not started.
    pub queues: Vec<(u16, u16)>,
}

/// All registers, and what they have in force.
pub struct Function {
    // Dropped in this order: what uses the window before the window, registrations of eventfds
    // before the eventfds.
    places: Places,
    wiring: Wiring,
    registers: Registers,
    signals: Arc<Signals>,
    window: Arc<Window>,
    vmm: Arc<dyn Vmm>,
    /// What the driver wants.
    pub desired: Desired,
    /// The epoch that the broker was told of last.
    pub settled: u64,
    /// Whether there is a broker.
    pub connected: bool,
    /// Whether the broker may wire: it was told of the start.
    accepting: bool,
}

impl Function {
    /// The function after power-on.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new(
        geometry: Geometry,
        requester_id: u32,
        signals: Arc<Signals>,
        window: Arc<Window>,
        vmm: Arc<dyn Vmm>,
    ) -> io::Result<Self> {
        Ok(Self {
            places: Places::default(),
            wiring: Wiring::new(signals.pairs().clone())?,
            registers: Registers::new(geometry, requester_id),
            signals,
            window,
            vmm,
            desired: Desired::default(),
            settled: 0,
            connected: false,
            accepting: false,
        })
    }

    /// The BARs.
    pub fn bars(&self) -> [Bar; 2] {
        self.registers.bars
    }

    /// Whether the driver has set DRIVER_OK.
    pub fn is_live(&self) -> bool {
        self.registers.common.is_live()
    }

    /// How many queues have a given eventfd as interrupt, and as notification.
    pub fn wired(&self) -> (usize, usize) {
        self.wiring.wired()
    }

    /// Reads configuration space. Of the access window (virtio 1.3, 4.1.4.9) it reads a BAR.
    pub fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if let Some((bar, at, len)) = self.pci_cfg(offset, data.len()) {
            let mut value = [0; 4];
            self.register_read(bar, at, &mut value[..len]);
            self.registers.space.set(self.registers.at.pci_cfg.data, &value);
        }
        self.registers.space.read(offset, data);
    }

    /// Writes configuration space.
    pub fn config_write(&mut self, offset: u16, data: &[u8]) {
        let registers = &mut self.registers;
        registers.config_write(offset, data);
        let control = registers.at.device_control;
        let value = registers.space.read16(control);
        if value & capability::INITIATE_FLR != 0 {
            return self.flr();
        }
        if let Some((bar, at, len)) = self.pci_cfg(offset, data.len()) {
            let value = self.registers.space.read32(self.registers.at.pci_cfg.data).to_le_bytes();
            self.register_write(bar, at, &value[..len]);
        }
        self.place();
    }

    /// Reads a BAR.
    pub fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        if self.registers.space.commands(COMMAND_MEMORY) {
            self.register_read(bar, offset, data);
        } else {
            data.fill(0xff);
        }
    }

    /// Writes a BAR.
    pub fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        if self.registers.space.commands(COMMAND_MEMORY) {
            self.register_write(bar, offset, data);
        }
    }

    /// Whether an access to configuration space touches `pci_cfg_data`, and what of which BAR it
    /// then means. `None` too where the driver has asked for what there is not.
    fn pci_cfg(&self, offset: u16, len: usize) -> Option<(u8, u64, usize)> {
        let (space, at) = (&self.registers.space, self.registers.at.pci_cfg);
        let end = usize::from(offset).saturating_add(len);
        let touches = usize::from(offset) < usize::from(at.data) + 4 && end > at.data.into();
        let bar = space.read16(at.bar) as u8;
        let (place, len) = (space.read32(at.offset), space.read32(at.length));
        let fits = matches!(len, 1 | 2 | 4) && place.is_multiple_of(len);
        (touches && fits).then_some((bar, place.into(), len as usize))
    }

    fn register_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        // Where no slot of the window is: nothing is shown there.
        if bar != REGISTERS_BAR {
            return;
        }
        let (structure, at) = (offset / STRUCTURE_LEN * STRUCTURE_LEN, offset % STRUCTURE_LEN);
        let registers = &mut self.registers;
        match structure {
            COMMON_OFFSET => registers.common.read(at, data),
            ISR_OFFSET if at == 0 => {
                // 4.1.4.5: reading takes it away.
                if let Some(byte) = data.first_mut() {
                    *byte = std::mem::take(&mut registers.isr);
                }
            }
            DEVICE_OFFSET => {
                for (value, byte) in data.iter_mut().zip(registers.config.iter().skip(at as usize)) {
                    *value = *byte;
                }
            }
            MSIX_TABLE_OFFSET => registers.table.read(at, data),
            MSIX_PBA_OFFSET => {
                for (value, byte) in data.iter_mut().zip(at..) {
                    *value = self.pending(byte);
                }
            }
            // The notification area is there to be written.
            _ => {}
        }
    }

    fn register_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        if bar != REGISTERS_BAR {
            return;
        }
        let (structure, at) = (offset / STRUCTURE_LEN * STRUCTURE_LEN, offset % STRUCTURE_LEN);
        match structure {
            COMMON_OFFSET => match self.registers.common.write(at, data) {
                Change::None => {}
                Change::Vectors => self.settle(),
                Change::Started => self.started(),
                Change::Reset => self.reset(),
            },
            NOTIFY_OFFSET => self.notified((at / u64::from(NOTIFY_OFF_MULTIPLIER)) as usize),
            MSIX_TABLE_OFFSET => {
                self.registers.table.write(at, data);
                self.settle();
            }
            _ => {}
        }
    }

    /// A byte of the pending bits: those of eight vectors.
    fn pending(&self, byte: u64) -> u8 {
        let vectors = self.registers.table.vectors();
        let common = &self.registers.common;
        (0..8).fold(0, |bits, bit| {
            let vector = byte * 8 + bit;
            if vector >= vectors.into() {
                return bits;
            }
            let queues = common.queues().iter().enumerate();
            let mut its = queues.filter(|(_, queue)| queue.enabled && u64::from(queue.vector) == vector);
            let config = u64::from(common.config_vector()) == vector && self.wiring.is_config_pending();
            let pending = config || its.any(|(queue, _)| self.wiring.is_pending(queue));
            bits | u8::from(pending) << bit
        })
    }

    /// A notification that came as an exit: the broker relays it.
    fn notified(&self, queue: usize) {
        let live = self.registers.notify(queue).is_some() || self.is_enabled(queue);
        if live {
            self.signals.kick(queue);
        }
    }

    fn is_enabled(&self, queue: usize) -> bool {
        self.is_live() && self.registers.common.queues().get(queue).is_some_and(|queue| queue.enabled)
    }

    /// Whether the VMM has refused to register an interrupt: worth another [`settle`](Self::settle).
    pub fn is_refused(&self) -> bool {
        self.wiring.is_refused()
    }

    /// Brings what is registered in line with the registers.
    pub fn settle(&mut self) {
        self.wiring.settle(&*self.vmm, &self.registers);
    }

    /// Brings the BARs' places in line with the registers, and what depends on them.
    fn place(&mut self) {
        let wanted = self.registers.addresses();
        // Notifications leave the old place before it does.
        self.registers.registers_at = None;
        if self.places.at(REGISTERS_BAR) != wanted[0] {
            self.wiring.settle(&*self.vmm, &self.registers);
        }
        for (bar, address) in self.registers.bars.into_iter().zip(wanted) {
            self.places.put(&*self.vmm, bar, address, &self.window);
        }
        self.registers.registers_at = self.places.answering(REGISTERS_BAR);
        self.settle();
    }

    fn started(&mut self) {
        let queues = self.registers.common.queues().iter().zip(0..);
        let enabled = queues.filter(|(queue, _)| queue.enabled);
        let queues = enabled.map(|(queue, index)| (index, queue.size)).collect();
        self.desired = Desired { epoch: self.desired.epoch + 1, queues };
        self.settle();
    }

    /// Resets the virtio device (2.4.1): as if it had just been made, and nothing of the owner's in
    /// the guest's reach.
    pub fn reset(&mut self) {
        self.accepting = false;
        self.signals.clear();
        self.wiring.clear();
        self.window.close();
        self.registers.common.reset();
        self.registers.isr = 0;
        self.desired = Desired { epoch: self.desired.epoch + 1, queues: Vec::new() };
    }

    /// Function-level reset (PCI Express 6.6.2): the virtio device's, and that of configuration
    /// space, BARs and MSI-X. Identity is what stays.
    pub fn flr(&mut self) {
        self.reset();
        let Registers { requester_id, config, .. } = self.registers;
        let geometry = Geometry {
            config,
            queues: self.registers.common.queues().len() as u16,
            apertures: self.window.apertures(),
        };
        self.registers = Registers::new(geometry, requester_id);
        self.place();
    }

    /// The broker is about to be told of the start `desired`: it may map and wire. `false` if the
    /// driver wants something else by now.
    pub fn begin(&mut self, desired: &Desired) -> bool {
        if self.desired != *desired || desired.queues.is_empty() {
            return false;
        }
        if let Err(error) = self.window.open() {
            tracing::error!(%error, "the window cannot be used");
            self.fail();
            return false;
        }
        self.accepting = true;
        true
    }

    fn fail(&mut self) {
        if self.registers.common.fail() {
            self.registers.isr |= ISR_CONFIG;
            self.wiring.signal_config();
        }
    }

    /// The broker is gone: nothing of what it gave stays. The driver is woken to look.
    pub fn lost(&mut self) {
        self.connected = false;
        self.accepting = false;
        self.wiring.unwire();
        self.window.close();
        self.settle();
        for (queue, pair) in self.signals.pairs().iter().enumerate() {
            // What the broker leaves full and blocking must not keep others' signals waiting.
            pair.drain_full();
            if self.is_enabled(queue) {
                self.signals.call(queue);
            }
        }
    }

    /// Joins a queue's interrupt or notification to an eventfd, or parts them. What is then of no
    /// use, the one that was joined before or the one that is refused, comes to `unused`.
    ///
    /// # Errors
    /// When the device or the queue is not started, or the VMM cannot.
    pub fn wire(
        &mut self,
        queue: u32,
        direction: Direction,
        event: Option<EventFd>,
        unused: &mut Vec<EventFd>,
    ) -> io::Result<()> {
        let queue = usize::try_from(queue).unwrap_or(usize::MAX);
        let known = queue < self.signals.pairs().len();
        if !known || event.is_some() && !(self.accepting && self.is_enabled(queue)) {
            unused.extend(event);
            let kind = if known { io::ErrorKind::NotConnected } else { io::ErrorKind::InvalidInput };
            return Err(kind.into());
        }
        let registers = &self.registers;
        match direction {
            Direction::Interrupt => {
                self.wiring.wire_interrupt(&*self.vmm, queue, event, registers.interrupt(queue), unused)
            }
            Direction::Notify => {
                self.wiring.wire_notify(&*self.vmm, queue, event, registers.notify(queue), unused)
            }
        }
    }
}
