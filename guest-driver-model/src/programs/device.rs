//! Which device a peer's program drives, or which ones, and how they are reached.

use std::path::PathBuf;

use super::ProgramError;
use crate::transport::Transport;
use crate::transport::model::{ModelTransport, Vmm};
use crate::transport::sysfs::{Kind, PciDevice, SysfsTransport};
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

/// The choice of two devices, or more.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ManyDevicesArgs {
    /// The PCI address of a vhost-pci device (as 0000:00:03.0). To be given once for each owner; or `all`,
    /// for all that there are now
    #[arg(long, value_name = "ADDRESS")]
    pub device: Vec<String>,
    /// Reach the PCI devices through VFIO, with interrupts (needs an IOMMU in the guest);
    /// otherwise through sysfs, by polling
    #[arg(long, requires = "device")]
    pub vfio: bool,
    /// No VM: be the peer's VMM too, at this peer socket of a broker. To be given once for each owner
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
        let all = each((&self.device, self.vfio), (&self.socket, self.vmm_like_qemu))?;
        all.try_into().map_err(|all: Vec<_>| ProgramError::NotTwo { given: all.len() })
    }
}

impl ManyDevicesArgs {
    /// All of them.
    ///
    /// # Errors
    /// If they are not two at least, more than `most`, or one of them is given twice.
    pub fn all(&self, most: usize) -> Result<Vec<DeviceArgs>, ProgramError> {
        let found = match self.device.as_slice() {
            [all] if all == "all" => {
                let found = PciDevice::candidates(Kind::VhostPci);
                found.iter().map(|device| device.address().to_owned()).collect()
            }
            chosen => chosen.to_vec(),
        };
        let all = each((&found, self.vfio), (&self.socket, self.vmm_like_qemu))?;
        match (2..=most).contains(&all.len()) {
            true => Ok(all),
            false => Err(ProgramError::NotSeveral { given: all.len(), most }),
        }
    }
}

/// Devices and sockets one by one.
fn each(
    (device, vfio): (&[String], bool),
    (socket, vmm_like_qemu): (&[PathBuf], bool),
) -> Result<Vec<DeviceArgs>, ProgramError> {
    let devices = device.iter().map(|address| {
        let device = Some(address.clone());
        DeviceArgs { device, vfio, ..DeviceArgs::default() }
    });
    let sockets = socket.iter().map(|path| {
        let socket = Some(path.clone());
        DeviceArgs { socket, vmm_like_qemu, ..DeviceArgs::default() }
    });
    let all: Vec<_> = devices.chain(sockets).collect();
    // `auto` is the first one there is, each time.
    let is_twice = |(at, one): (usize, &DeviceArgs)| {
        let mut others = all.iter().skip(at + 1);
        others.any(|other| (&one.device, &one.socket) == (&other.device, &other.socket))
    };
    match all.iter().enumerate().any(is_twice) {
        true => Err(ProgramError::Twice),
        false => Ok(all),
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

    #[test]
    fn many_devices_are_two_at_least_and_none_is_there_twice() {
        let many = |sockets: &[&str]| {
            let socket = sockets.iter().map(PathBuf::from).collect();
            ManyDevicesArgs { socket, ..ManyDevicesArgs::default() }.all(3)
        };
        assert_eq!(many(&["/x", "/y", "/z"]).unwrap().len(), 3);
        for sockets in [&[][..], &["/x"], &["/w", "/x", "/y", "/z"]] {
            assert!(
                matches!(many(sockets), Err(ProgramError::NotSeveral { given, most: 3 }) if given == sockets.len())
            );
        }
        assert!(matches!(many(&["/x", "/y", "/x"]), Err(ProgramError::Twice)));
    }
}
