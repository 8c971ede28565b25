//! The module around `initialise.rs`, and a way into it.

pub use guest_driver_model::transport::virtio_pci::Registers;

#[allow(dead_code)]
#[path = "../../../../guest-driver-model/src/transport/virtio_pci/initialise.rs"]
mod initialise;

pub use initialise::{InitError, QueuePages};

/// Starts a device; its configuration and notify offsets.
pub fn start<R: Registers>(
    common: &R,
    device: &R,
    window_len: u64,
    vectors: u16,
) -> Result<(vhost_pci_device::abi::DeviceConfig, Vec<u16>), InitError> {
    let rings = QueuePages { pages: vec![0x10_0000; QueuePages::pages_for(65)] };
    let started = initialise::start(common, device, window_len, &rings, vectors)?;
    Ok((started.config, started.notify_offsets))
}
