//! The modules around the driver's `initialise.rs`, as it names them.

pub use guest_driver_model::transport::{ConfigError, check_config, parse_config};

pub mod virtio_pci;

/// What the unit tests in that file use.
pub mod tests {
    pub fn config_bytes(window_len: u64, vrings: u16) -> [u8; vhost_pci_device::abi::CONFIG_LEN] {
        let mut config = super::parse_config(&crate::support::config_bytes());
        (config.window_len, config.max_vrings) = (window_len.into(), vrings.into());
        zerocopy::transmute!(config)
    }
}
