//! A VFIO device that can be closed although it was unplugged.
//!
//! `VfioDevice` closes its descriptor and then looks its group up in sysfs, to take it out of its
//! container. The kernel removes a function as soon as that descriptor is closed, so the
//! lookup can fail, upon which it panics. Here the group goes with the container instead.

use std::any::Any;
use std::ops::Deref;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vfio_ioctls::{VfioContainer, VfioDevice, VfioError, VfioOps};

/// An open device. Closes when dropped.
pub struct Device {
    device: VfioDevice,
    lease: Arc<Lease>,
}

/// What a `VfioDevice` takes for its container: the container, until it is closing.
struct Lease {
    container: Arc<VfioContainer>,
    closing: AtomicBool,
}

impl VfioOps for Lease {
    fn as_any(&self) -> &dyn Any {
        // Relaxed: set and read by the thread that drops the device; one that was made
        // before gets the container in any order.
        match self.closing.load(Ordering::Relaxed) {
            true => &(),
            false => &*self.container,
        }
    }
}

impl Device {
    /// Opens the device of this folder in sysfs, in a container.
    ///
    /// # Errors
    /// What VFIO answers.
    pub fn open(folder: &Path, container: Arc<VfioContainer>) -> Result<Self, VfioError> {
        let lease = Arc::new(Lease { container, closing: AtomicBool::new(false) });
        let device = VfioDevice::new(folder, lease.clone(), true)?;
        Ok(Self { device, lease })
    }
}

impl Deref for Device {
    type Target = VfioDevice;

    fn deref(&self) -> &VfioDevice {
        &self.device
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.lease.closing.store(true, Ordering::Relaxed);
        // SAFETY: the descriptor is the device's own, open while the device lives. The device
        // keeps it in a `ManuallyDrop` that only its drop for a container drops; that drop comes
        // next, as part of this one, and finds no container any more (`closing`). So
        // it is closed once, here, and nobody can use the device after this.
        drop(unsafe { OwnedFd::from_raw_fd(self.device.as_raw_fd()) });
    }
}
