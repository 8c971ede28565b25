//! Which device a peer's program drives, or which two, and how they are reached.

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

/// The choice of two devices.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct TwoDevicesArgs {
    /// The PCI address of a vhost-pci device (as 0000:00:03.0). To be given twice, once for each
    /// owner; or once, with one --socket
    #[arg(long, value_name = "ADDRESS")]
    pub device: Vec<String>,
    /// Reach the PCI devices through VFIO, with interrupts (needs an IOMMU in the guest);
    /// otherwise through sysfs, by polling
    #[arg(long, requires = "device")]
    pub vfio: bool,
    /// No VM: be the peer's VMM too, at this peer socket of a broker. To be given twice, once for
    /// each owner
    #[arg(long, value_name = "PATH")]
    pub socket: Vec<PathBuf>,
    /// Be a VMM like QEMU: all of the window can be written, whatever the broker asks for
    #[arg(long, requires = "socket")]
    pub vmm_like_qemu: bool,
}

impl TwoDevicesArgs {
    /// The two.
    ///
    /// # Errors
    /// If they are not two, or the same one twice.
    pub fn both(&self) -> Result<[DeviceArgs; 2], ProgramError> {
        let Self { vfio, vmm_like_qemu, .. } = *self;
        let devices = self.device.iter().map(|address| {
            let device = Some(address.clone());
            DeviceArgs { device, vfio, ..DeviceArgs::default() }
        });
        let sockets = self.socket.iter().map(|path| {
            let socket = Some(path.clone());
            DeviceArgs { socket, vmm_like_qemu, ..DeviceArgs::default() }
        });
        let all: Vec<_> = devices.chain(sockets).collect();
        let [one, other]: [DeviceArgs; 2] =
            all.try_into().map_err(|all: Vec<_>| ProgramError::NotTwo { given: all.len() })?;
        // `auto` is the first one there is, both times.
        if (&one.device, &one.socket) == (&other.device, &other.socket) {
            return Err(ProgramError::Twice);
        }
        Ok([one, other])
    }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn two_devices_are_two_and_not_one_twice() {
        let two = |device: &[&str], socket: &[&str]| {
            let device = device.iter().map(|address| (*address).to_owned()).collect();
            let socket = socket.iter().map(PathBuf::from).collect();
            TwoDevicesArgs { device, socket, vfio: true, vmm_like_qemu: true }.both()
        };
        let [one, other] = two(&["0000:00:03.0"], &["/x"]).unwrap();
        assert_eq!((one.device.as_deref(), one.vfio, one.vmm_like_qemu), (Some("0000:00:03.0"), true, false));
        assert_eq!((other.socket, other.vfio, other.vmm_like_qemu), (Some("/x".into()), false, true));
        assert!(two(&[], &["/x", "/y"]).is_ok());
        for (device, socket) in [(&["a"][..], &[][..]), (&[], &["/x", "/y", "/z"]), (&[], &[])] {
            assert!(matches!(two(device, socket), Err(ProgramError::NotTwo { .. })));
        }
        assert!(matches!(two(&["auto", "auto"], &[]), Err(ProgramError::Twice)));
        assert!(matches!(two(&[], &["/x", "/x"]), Err(ProgramError::Twice)));
    }
}
