//! What can go wrong between a driver and its device.

use std::io;
use std::path::PathBuf;

use vhost_pci_device::abi::{ABI_VERSION, CONFIG_MAGIC, PCI_VENDOR_ID};

use super::sysfs::Kind;
use super::virtio_pci::{CapabilityError, InitError};

/// Why the contents of a config space cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Another kind of device.
    #[error(
        "its config space starts with {found:#x}, not with {CONFIG_MAGIC:#x} (\"VPCI\"): this is no vhost-pci device"
    )]
    Magic {
        /// The magic that was read.
        found: u32,
    },
    /// A later layout.
    #[error("it has layout version {found}; this driver knows version {ABI_VERSION}")]
    Version {
        /// The version that was read.
        found: u16,
    },
    /// An area of the window that is not in the window.
    #[error("its {area} area ({offset:#x}, {len:#x} bytes) is not inside a window of {window_len:#x} bytes")]
    Area {
        /// `link` or `control`.
        area: &'static str,
        /// Window offset of the area.
        offset: u64,
        /// Length of the area.
        len: u64,
        /// Length of the window.
        window_len: u64,
    },
    /// More vrings than the link page has room for, or none.
    #[error("it announces {found} vrings; a device has between 1 and 64")]
    Vrings {
        /// The number announced.
        found: u16,
    },
    /// The BAR is smaller than the config space says.
    #[error(
        "its window is {announced:#x} bytes long by its config space, but only {present:#x} bytes are there"
    )]
    Window {
        /// Length in the config space.
        announced: u64,
        /// Length of the shared-memory region.
        present: u64,
    },
}

/// Why there is no device to drive, or no more.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// No function with the device's PCI identity, or none that is ours.
    #[error(
        "no {} found: none of the PCI devices {tried:?} is a free one. Is the VM started with `-device {}` and \
         is /sys mounted?", kind.name(), kind.qemu_device()
    )]
    NotFound {
        /// What was looked for.
        kind: Kind,
        /// Addresses of the devices with the right vendor and device number.
        tried: Vec<String>,
    },
    /// What was given is not a PCI address of this machine.
    #[error("{address}: no such PCI device under /sys/bus/pci/devices (an address looks like 0000:00:03.0)")]
    NoSuchDevice {
        /// As given.
        address: String,
    },
    /// What was given is another device, which is left alone.
    #[error(
        "{address}: this is PCI device {vendor:#06x}:{device:#06x}, not {PCI_VENDOR_ID:#06x}:{:#06x}: no {}, so it \
         stays with its driver", kind.device_id(), kind.name()
    )]
    OtherDevice {
        /// PCI address of the device.
        address: String,
        /// What was looked for.
        kind: Kind,
        /// Its vendor; 0 if it cannot be read.
        vendor: u16,
        /// Its device number; 0 if it cannot be read.
        device: u16,
    },
    /// Another driver has the function that a device is to be lent to.
    #[error(
        "{address}: the driver {driver} has it; give it to vfio-pci: echo {address} > \
         /sys/bus/pci/devices/{address}/driver/unbind; echo vfio-pci > \
         /sys/bus/pci/devices/{address}/driver_override; echo {address} > /sys/bus/pci/drivers_probe"
    )]
    BoundElsewhere {
        /// PCI address of the function.
        address: String,
        /// The kernel driver's name.
        driver: String,
    },
    /// The function cannot be isolated from others, which other drivers have.
    #[error(
        "{address}: it is in IOMMU group {group} together with {others}: whoever has one of them can reach the \
         others' memory, so all must be bound to vfio-pci or to no driver (a port with ACS between them would part them)"
    )]
    SharedGroup {
        /// PCI address of the function.
        address: String,
        /// The group's number.
        group: String,
        /// The other functions, each with its driver.
        others: String,
    },
    /// Nothing confines what the function reaches.
    #[error(
        "{address}: it is in no IOMMU group: this machine has no IOMMU, or does not use it (QEMU: -device \
         intel-iommu,intremap=on before the devices behind it; kernel: intel_iommu=on)"
    )]
    NoIommu {
        /// PCI address of the function.
        address: String,
    },
    /// A virtio driver of the kernel's is using the device.
    #[error("{address}: a virtio driver of the kernel's is using the device, so it stays with that driver")]
    InUse {
        /// PCI address of the device.
        address: String,
    },
    /// A file of the device cannot be used.
    #[error("{address}: cannot {action} {path}: {source}{advice}")]
    File {
        /// PCI address of the device.
        address: String,
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
        /// What to do, or nothing.
        advice: &'static str,
    },
    /// A virtqueue's memory cannot be had.
    #[error("{address}: no memory for the virtqueues: {problem}")]
    RingMemory {
        /// PCI address of the device.
        address: String,
        /// What failed, and what to do.
        problem: String,
    },
    /// The PCI capabilities are not those of a vhost-pci device.
    #[error("{address}: {source}")]
    Capability {
        /// PCI address of the device.
        address: String,
        /// What is wrong.
        source: CapabilityError,
    },
    /// A part of a BAR cannot be mapped.
    #[error("{address}: cannot map {len:#x} bytes at {offset:#x} of BAR {bar}: {source}{advice}")]
    Bar {
        /// PCI address of the device.
        address: String,
        /// Number of the BAR.
        bar: u8,
        /// Offset into it.
        offset: u64,
        /// Length asked for.
        len: u64,
        /// The system's answer.
        source: io::Error,
        /// What to do, or nothing.
        advice: &'static str,
    },
    /// The device did not start.
    #[error("{address}: {source}")]
    Init {
        /// PCI address of the device.
        address: String,
        /// At which step, and why.
        source: InitError,
    },
    /// The config space is not that of a vhost-pci device we know.
    #[error("{device}: {source}")]
    Config {
        /// The device's name.
        device: String,
        /// What is wrong.
        source: ConfigError,
    },
    /// VFIO refused.
    #[error("{address}: VFIO: {step}: {source}{advice}")]
    Vfio {
        /// PCI address of the device.
        address: String,
        /// What was tried.
        step: &'static str,
        /// VFIO's answer.
        source: vfio_ioctls::VfioError,
        /// What to do, or nothing.
        advice: &'static str,
    },
    /// An eventfd of the process's own cannot be made or used.
    #[error("{device}: {what}: {source}")]
    Event {
        /// The device's name.
        device: String,
        /// What it was for.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The broker's socket does not answer as a vhost-pci back-end does.
    #[error("{socket}: {step}: {source}")]
    Broker {
        /// The socket's path.
        socket: String,
        /// What was asked.
        step: &'static str,
        /// The answer.
        source: BrokerError,
    },
    /// The device is gone.
    #[error("{device}: {why}")]
    Gone {
        /// The device's name.
        device: String,
        /// What was seen.
        why: &'static str,
    },
}

/// What a vhost-user back-end answered, or did not.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The message exchange failed.
    #[error(transparent)]
    Exchange(#[from] vhost::Error),
    /// As above, on the back-end channel.
    #[error(transparent)]
    Channel(#[from] vhost::vhost_user::Error),
    /// The system refused.
    #[error(transparent)]
    System(#[from] io::Error),
    /// Something that the front-end needs is not offered.
    #[error("the back-end does not offer {what}: is this the peer socket of a vhost-pci-switch?")]
    Missing {
        /// The feature's name.
        what: &'static str,
    },
    /// The back-end's numbers do not fit together.
    #[error("the back-end has {queues} queues and {vrings} vrings: it needs one queue more than vrings")]
    Queues {
        /// Answer to GET_QUEUE_NUM.
        queues: u64,
        /// The config space's number.
        vrings: u16,
    },
    /// There is no window.
    #[error("the back-end announces no shared-memory region with id 0")]
    NoWindow,
}
