//! The device through /sys/bus/pci, by polling: for guests without an IOMMU.
//!
//! Takes the device from a kernel driver that is bound to it (virtio-pci binds to
//! every virtio function, also to one it has no virtio driver for), maps its BARs,
//! and starts it. There are no interrupts: that needs [`vfio`](super::vfio).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vhost_pci_device::abi::{
    DOORBELL_DEVICE_ID, DeviceConfig, MAX_VRINGS, PCI_DEVICE_ID_STAND_IN, PCI_VENDOR_ID, QUEUE_VRING_FIRST,
};

use super::virtio_pci::{ConfigSpace, Function, PciAccess, Resources, VirtioPci, config_space};
use super::{Transport, TransportError, ring_memory};
use crate::shm::SharedMemory;
use crate::shm::mapping::MappedRange;

/// Where Linux shows PCI functions.
const DEVICES: &str = "/sys/bus/pci/devices";

/// A network card without a legacy interface: 0x1040 and its virtio device number, 1
/// (virtio 1.3, 4.1.2).
const PCI_DEVICE_ID_NETWORK: u16 = 0x1041;

/// What a driver of this crate takes from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A vhost-pci device: the peer's.
    VhostPci,
    /// A virtio network card, without its legacy interface: an owner's.
    NetworkCard,
    /// The doorbell function of a link, beside a vhost-pci device.
    Doorbell,
}

impl Kind {
    /// The PCI device number; the vendor is always [`PCI_VENDOR_ID`].
    pub const fn device_id(self) -> u16 {
        match self {
            Self::VhostPci => PCI_DEVICE_ID_STAND_IN,
            Self::NetworkCard => PCI_DEVICE_ID_NETWORK,
            Self::Doorbell => DOORBELL_DEVICE_ID,
        }
    }

    /// In an error's words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::VhostPci => "vhost-pci device",
            Self::NetworkCard => "virtio network card",
            Self::Doorbell => "doorbell function",
        }
    }

    /// What makes QEMU have one.
    pub const fn qemu_device(self) -> &'static str {
        match self {
            Self::VhostPci => "vhost-user-test-device-pci,virtio-id=38,...",
            Self::NetworkCard => "virtio-net-pci,disable-legacy=on,...",
            Self::Doorbell => "ivshmem-doorbell,vectors=8,...",
        }
    }
}

/// A function's folder in sysfs.
#[derive(Clone, Debug)]
pub struct PciDevice {
    address: String,
    folder: PathBuf,
}

impl PciDevice {
    /// The function with this address; `03:00.0` stands for `0000:03:00.0`.
    ///
    /// # Errors
    /// [`TransportError::NoSuchDevice`].
    pub fn at(address: &str) -> Result<Self, TransportError> {
        let full = match address.matches(':').count() {
            1 => format!("0000:{address}"),
            _ => address.to_owned(),
        };
        let folder = Path::new(DEVICES).join(&full);
        if full.contains('/') || full.starts_with('.') || !folder.join("config").exists() {
            return Err(TransportError::NoSuchDevice { address: address.to_owned() });
        }
        Ok(Self { address: full, folder })
    }

    /// Every function with the kind's vendor and device number, by address. Which of
    /// them is a vhost-pci device, only its config space tells.
    pub fn candidates(kind: Kind) -> Vec<Self> {
        let mut found: Vec<_> = fs::read_dir(DEVICES)
            .into_iter()
            .flatten()
            .filter_map(|entry| Self::at(entry.ok()?.file_name().to_str()?).ok())
            .filter(|device| device.is_of(kind))
            .collect();
        found.sort_by(|one, other| one.address.cmp(&other.address));
        found
    }

    /// Vendor and device number.
    fn identity(&self) -> Option<(u16, u16)> {
        let number = |file: &str| {
            let text = fs::read_to_string(self.folder.join(file)).ok()?;
            u16::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
        };
        Some((number("vendor")?, number("device")?))
    }

    fn is_of(&self, kind: Kind) -> bool {
        self.identity() == Some((PCI_VENDOR_ID, kind.device_id()))
    }

    /// Whether it is what a driver of this crate takes.
    pub(super) fn check_kind(&self, kind: Kind) -> Result<(), TransportError> {
        if self.is_of(kind) {
            return Ok(());
        }
        let (vendor, device) = self.identity().unwrap_or_default();
        Err(TransportError::OtherDevice { address: self.address.clone(), kind, vendor, device })
    }

    /// Whether it may be taken from its kernel driver: a mistyped address must not cost
    /// the guest its disk or its network.
    fn check_free(&self, kind: Kind) -> Result<(), TransportError> {
        let address = self.address.clone();
        self.check_kind(kind)?;
        match self.is_in_use() {
            true => Err(TransportError::InUse { address }),
            false => Ok(()),
        }
    }

    /// The address with its domain.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The folder in sysfs.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether a virtio driver of the kernel's is using the device: virtio-pci alone
    /// binds to functions that no virtio driver wants, too.
    fn is_in_use(&self) -> bool {
        let children = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let virtio = |name: &str| name.starts_with("virtio");
        children
            .filter(|entry| entry.file_name().to_str().is_some_and(virtio))
            .any(|entry| entry.path().join("driver").exists())
    }

    /// The name of the kernel driver that has the device.
    pub fn driver(&self) -> Option<String> {
        let link = fs::read_link(self.folder.join("driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    }

    /// Whether the function can be given to VFIO as it is: nobody else has it, and nobody else has a
    /// function that its IOMMU does not part it from.
    ///
    /// # Errors
    /// What stands in the way, and what to do.
    pub(super) fn check_isolated(&self, driver: &str) -> Result<(), TransportError> {
        let address = self.address.clone();
        if let Some(other) = self.driver().filter(|found| found != driver) {
            return Err(TransportError::BoundElsewhere { address, driver: other });
        }
        let Ok(group) = fs::read_link(self.folder.join("iommu_group")) else {
            return Err(TransportError::NoIommu { address });
        };
        let members = fs::read_dir(self.folder.join("iommu_group/devices")).into_iter().flatten().flatten();
        let others = members.filter(|member| member.file_name() != *self.address).filter_map(|member| {
            let link = fs::read_link(member.path().join("driver")).ok()?;
            let found = link.file_name()?.to_string_lossy().into_owned();
            // Bridges do no DMA of their own: VFIO lets them be.
            let harmless = found == driver || found == "pcieport" || found == "pci-stub";
            (!harmless).then(|| format!("{} ({found})", member.file_name().to_string_lossy()))
        });
        let others: Vec<_> = others.collect();
        match others.is_empty() {
            true => Ok(()),
            false => Err(TransportError::SharedGroup {
                address,
                group: group.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                others: others.join(", "),
            }),
        }
    }

    /// Takes the device from its kernel driver, if it has one, and says so.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn unbind(&self) -> Result<(), TransportError> {
        if let Some(driver) = self.driver() {
            tracing::info!(device = self.address, driver, "taking the device from its kernel driver");
            self.store("driver/unbind", &self.address)?;
        }
        Ok(())
    }

    /// Writes to a file of the folder.
    pub(super) fn store(&self, file: &str, value: &str) -> Result<(), TransportError> {
        let path = self.folder.join(file);
        fs::write(&path, value).map_err(|source| self.file_error("write to", path, source))
    }

    pub(super) fn file_error(
        &self,
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    ) -> TransportError {
        let advice = match source.kind() {
            io::ErrorKind::PermissionDenied => " (run as root)",
            _ => "",
        };
        TransportError::File { address: self.address.clone(), action, path, source, advice }
    }
}

/// The files of a function, opened.
pub(super) struct SysfsPci {
    device: PciDevice,
    config: File,
    bars: [u64; 6],
}

impl SysfsPci {
    pub(super) fn open(device: PciDevice) -> Result<Self, TransportError> {
        let path = device.folder.join("config");
        let config = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|source| device.file_error("open", path, source))?;
        let path = device.folder.join("resource");
        let text = fs::read_to_string(&path).map_err(|source| device.file_error("read", path, source))?;
        Ok(Self { bars: bar_lens(&text), device, config })
    }
}

/// Lengths of the six BARs, from lines of `start end flags` in hexadecimal.
fn bar_lens(resource: &str) -> [u64; 6] {
    let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let mut lens = [0; 6];
    for (len, line) in lens.iter_mut().zip(resource.lines()) {
        let mut words = line.split_whitespace().map_while(number);
        if let (Some(start), Some(end)) = (words.next(), words.next()) {
            *len = end.checked_sub(start).filter(|last| *last != 0).map_or(0, |last| last.saturating_add(1));
        }
    }
    lens
}

impl ConfigSpace for SysfsPci {
    fn read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        // Who is not root reads only 64 bytes: an error, not zeros.
        self.config.read_exact_at(bytes, offset.into())
    }

    fn write(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        self.config.write_all_at(bytes, offset.into())
    }
}

impl PciAccess for SysfsPci {
    fn address(&self) -> &str {
        &self.device.address
    }

    fn bar_len(&self, bar: u8) -> u64 {
        self.bars.get(usize::from(bar)).copied().unwrap_or(0)
    }

    fn map_bar(&self, bar: u8, offset: u64, len: usize) -> io::Result<MappedRange> {
        let path = self.device.folder.join(format!("resource{bar}"));
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        MappedRange::of_file(file, offset, len)
    }
}

/// The device, reached through sysfs.
pub struct SysfsTransport(VirtioPci);

impl SysfsTransport {
    /// Starts the device at a PCI address, or, for `None`, the first vhost-pci device.
    ///
    /// # Errors
    /// If there is none, it is no vhost-pci device, or it does not start.
    pub fn open(address: Option<&str>) -> Result<Self, TransportError> {
        first_of(Kind::VhostPci, address, Self::start)
    }

    fn start(device: PciDevice) -> Result<Self, TransportError> {
        device.unbind()?;
        device.store("enable", "1")?;
        let pci = SysfsPci::open(device)?;
        config_space::enable(&pci)
            .map_err(|source| pci.device.file_error("write to", pci.device.folder.join("config"), source))?;
        let function = Function::open(&pci)?;
        let (memory, rings) = ring_memory::lock(&pci.device.address, QUEUE_VRING_FIRST + MAX_VRINGS)?;
        let resources = Resources { rings, interrupts: Vec::new(), keep: Box::new(memory) };
        function.start(&pci, resources).map(Self)
    }
}

/// Starts the device at `address`, or the first candidate that is of the kind. One
/// that turns out to be something else is passed over. `start` may take the device from
/// its driver: it only gets one that may be one of ours and is not in use.
pub(super) fn first_of<T>(
    kind: Kind,
    address: Option<&str>,
    start: impl Fn(PciDevice) -> Result<T, TransportError>,
) -> Result<T, TransportError> {
    if let Some(address) = address {
        let device = PciDevice::at(address)?;
        device.check_free(kind)?;
        return start(device);
    }
    let mut tried = Vec::new();
    for device in PciDevice::candidates(kind) {
        tried.push(device.address.clone());
        if device.is_in_use() {
            continue;
        }
        match start(device) {
            Err(error @ (TransportError::Config { .. } | TransportError::Capability { .. })) => {
                tracing::warn!("passed over {error}");
            }
            result => return result,
        }
    }
    Err(TransportError::NotFound { kind, tried })
}

impl Transport for SysfsTransport {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn config(&self) -> &DeviceConfig {
        self.0.config()
    }

    fn window(&self) -> &SharedMemory {
        self.0.window()
    }

    fn doorbell(&self, queue: u16) {
        self.0.doorbell(queue);
    }

    fn interrupt_fd(&self, _: u16) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }

    fn check(&self) -> Result<(), TransportError> {
        self.0.check()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn bar_lengths_are_read_from_the_resource_file() {
        let text = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x00000000febd5000 0x00000000febd5fff 0x0000000000040200\n\
                    0x0000000800000000 0x00000008ffffffff 0x000000000014220c\n\
                    rubbish\n";
        assert_eq!(bar_lens(text), [0, 0x1000, 0x1_0000_0000, 0, 0, 0]);
        assert_eq!(bar_lens("0x5 0x1 0x0\n0x0 0xffffffffffffffff 0x0"), [0, u64::MAX, 0, 0, 0, 0]);
    }

    /// A folder like those in sysfs, removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str, vendor: &str, device: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("vhost-pci-{name}-{}", std::process::id()));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("vendor"), format!("{vendor}\n")).unwrap();
            fs::write(folder.join("device"), format!("{device}\n")).unwrap();
            Self(folder)
        }

        fn device(&self) -> PciDevice {
            PciDevice { address: "0000:00:03.0".into(), folder: self.0.clone() }
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_device_of_another_kind_is_not_taken_from_its_driver() {
        for (name, vendor, device) in [("disk", "0x1af4", "0x1042"), ("card", "0x8086", "0x1066")] {
            let folder = Folder::new(name, vendor, device);
            let error = folder.device().check_free(Kind::VhostPci).unwrap_err();
            assert!(matches!(error, TransportError::OtherDevice { .. }), "{error}");
            assert!(error.to_string().contains(vendor) && error.to_string().contains(device), "{error}");
        }
        let empty = Folder::new("empty", "", "");
        assert!(matches!(empty.device().check_free(Kind::VhostPci), Err(TransportError::OtherDevice { .. })));
    }

    #[test]
    fn a_device_that_a_virtio_driver_uses_is_not_taken_from_it() {
        let folder = Folder::new("used", "0x1af4", "0x1066");
        // virtio-pci has bound, and no virtio driver wanted it.
        fs::create_dir_all(folder.0.join("virtio0")).unwrap();
        folder.device().check_free(Kind::VhostPci).unwrap();
        fs::create_dir_all(folder.0.join("virtio0/driver")).unwrap();
        assert!(matches!(folder.device().check_free(Kind::VhostPci), Err(TransportError::InUse { .. })));
    }

    #[test]
    fn a_function_that_others_can_reach_is_not_taken() {
        use std::os::unix::fs::symlink;
        let folder = Folder::new("group", "0x1af4", "0x1041");
        let function = folder.device();
        let none = function.check_isolated("vfio-pci").unwrap_err();
        assert!(matches!(none, TransportError::NoIommu { .. }), "{none}");
        let member = |name: &str, driver: &str| {
            let device = folder.0.join("groups/7/devices").join(name);
            fs::create_dir_all(&device).unwrap();
            let _ = fs::remove_file(device.join("driver"));
            symlink(format!("/drivers/{driver}"), device.join("driver")).unwrap();
        };
        member("0000:00:03.0", "vfio-pci");
        symlink(folder.0.join("groups/7"), folder.0.join("iommu_group")).unwrap();
        function.check_isolated("vfio-pci").unwrap();
        // A port does no DMA of its own.
        member("0000:00:02.0", "pcieport");
        member("0000:00:03.1", "vfio-pci");
        function.check_isolated("vfio-pci").unwrap();
        member("0000:00:03.1", "virtio-pci");
        let shared = function.check_isolated("vfio-pci").unwrap_err();
        assert!(matches!(shared, TransportError::SharedGroup { .. }), "{shared}");
        assert!(shared.to_string().contains("group 7 together with 0000:00:03.1 (virtio-pci)"), "{shared}");
        symlink("/drivers/mlx5_core", folder.0.join("driver")).unwrap();
        let elsewhere = function.check_isolated("vfio-pci").unwrap_err().to_string();
        assert!(elsewhere.contains("the driver mlx5_core has it") && elsewhere.contains("driver_override"));
    }

    #[test]
    fn an_address_that_is_no_device_is_refused() {
        for address in ["", "..", "../../../etc", "ffff:ff:1f.7"] {
            assert!(matches!(PciDevice::at(address), Err(TransportError::NoSuchDevice { .. })), "{address}");
        }
    }
}
