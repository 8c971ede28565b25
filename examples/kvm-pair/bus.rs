//! The guest's addresses at which its device answers, and the exits that lead there.

use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use vhost_pci_device::{BarRange, Device};

use crate::vcpu::Mmio;

/// The device, and where its BARs are now.
#[derive(Default)]
pub struct Bus {
    device: OnceLock<Weak<Device>>,
    bars: Mutex<Vec<BarRange>>,
}

impl Bus {
    /// Puts the device on the bus. A second one is ignored: there is one slot.
    pub fn plug(&self, device: &Arc<Device>) {
        let _ = self.device.set(Arc::downgrade(device));
    }

    /// From now on what happens in the range is the device's.
    ///
    /// # Errors
    /// If something else is there.
    pub fn trap(&self, range: BarRange) -> io::Result<()> {
        let mut bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, end) = (range.address.0, range.address.0.saturating_add(range.len));
        if bars.iter().any(|bar| bar.address.0 < end && start < bar.address.0.saturating_add(bar.len)) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        bars.push(range);
        Ok(())
    }

    /// Not any more.
    pub fn release(&self, range: BarRange) {
        self.bars.lock().unwrap_or_else(PoisonError::into_inner).retain(|bar| *bar != range);
    }

    /// The device, and where in it the address is. The lock is not held when it is called.
    fn find(&self, address: u64) -> Option<(Arc<Device>, u8, u64)> {
        let bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        let inside =
            |bar: &&BarRange| (bar.address.0..).contains(&address) && address - bar.address.0 < bar.len;
        let bar = bars.iter().find(inside)?;
        Some((self.device.get()?.upgrade()?, bar.bar, address - bar.address.0))
    }
}

impl Mmio for Bus {
    fn load(&self, address: u64, bytes: &mut [u8]) {
        match self.find(address) {
            Some((device, bar, offset)) => device.bar_read(bar, offset, bytes),
            None => bytes.fill(0xff),
        }
    }

    fn store(&self, address: u64, bytes: &[u8]) {
        if let Some((device, bar, offset)) = self.find(address) {
            device.bar_write(bar, offset, bytes);
        }
    }
}
