//! Which device a peer's program drives, and how it is reached.

use std::path::PathBuf;

use super::ProgramError;
use crate::transport::Transport;
use crate::transport::model::{ModelTransport, Vmm};
use crate::transport::sysfs::SysfsTransport;
use crate::transport::vfio::VfioTransport;

/// The choice of a device.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct DeviceArgs {
    /// The PCI address of the vhost-pci device (as 0000:00:03.0), or `auto` for the
    /// first one there is
    #[arg(long, value_name = "ADDRESS", conflicts_with = "socket")]
    pub device: Option<String>,
    /// Reach the device through VFIO, with interrupts (needs an IOMMU in the guest);
    /// otherwise through sysfs, by polling
    #[arg(long, requires = "device")]
    pub vfio: bool,
    /// No VM: be the peer's VMM too, at this peer socket of a broker
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Be a VMM like QEMU: all of the window can be written, whatever the broker asks for
    #[arg(long, requires = "socket")]
    pub vmm_like_qemu: bool,
}

impl DeviceArgs {
    /// Starts the device.
    ///
    /// # Errors
    /// If none was chosen, or it does not start.
    pub fn open(&self) -> Result<Box<dyn Transport>, ProgramError> {
        if let Some(socket) = &self.socket {
            let vmm = if self.vmm_like_qemu { Vmm::LikeQemu } else { Vmm::Strict };
            return Ok(Box::new(ModelTransport::connect_as(socket, vmm)?));
        }
        let address = match self.device.as_deref().ok_or(ProgramError::NoDevice)? {
            "auto" => None,
            address => Some(address),
        };
        Ok(match self.vfio {
            true => Box::new(VfioTransport::open(address)?),
            false => Box::new(SysfsTransport::open(address)?),
        })
    }
}
