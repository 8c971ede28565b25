//! What the guest reads, as bytes: the config space and the tables of the link
//! area (`docs/vhost-pci-device.md`, 5 and 7).

use iommu::{Access, Iova, Span};
use vhost_pci_device::abi;
use zerocopy::IntoBytes;

use super::message::{Generations, LinkContents};

/// The device-specific configuration space of a device with a window of `window_len` bytes.
pub fn config_space(window_len: u64, max_vrings: u16) -> Vec<u8> {
    abi::DeviceConfig {
        magic: abi::CONFIG_MAGIC.into(),
        version: abi::ABI_VERSION.into(),
        max_vrings: max_vrings.into(),
        window_len: window_len.into(),
        link_offset: abi::LINK_OFFSET.into(),
        link_len: abi::LINK_LEN.into(),
        control_offset: abi::CONTROL_OFFSET.into(),
        control_len: abi::CONTROL_LEN.into(),
        data_offset: abi::DATA_OFFSET.into(),
        max_mappings: abi::MAX_MAPPINGS.into(),
        reserved: 0.into(),
    }
    .as_bytes()
    .to_vec()
}

/// Whether entries of a mapping table, sorted as it is, together cover `span` and each
/// allows `access`.
pub fn allows(mappings: &[abi::Mapping], span: Span<Iova>, access: Access) -> bool {
    let (mut at, last) = (span.start().raw(), span.last().raw());
    loop {
        let after = mappings.partition_point(|entry| entry.iova.value() <= at);
        let Some(entry) = after.checked_sub(1).and_then(|index| mappings.get(index)) else { return false };
        let end = entry.iova.value() + (entry.len.value() - 1);
        let allowed = Access::from_bits(entry.access.value()).is_some_and(|allowed| allowed.allows(access));
        if end < at || !allowed {
            return false;
        }
        if end >= last {
            return true;
        }
        at = end + 1;
    }
}

/// The header of a link for these contents, at these generations.
pub fn header(contents: &LinkContents, generations: Generations, link_id: u64) -> abi::LinkHeader {
    abi::LinkHeader {
        magic: abi::LINK_MAGIC.into(),
        version: abi::ABI_VERSION.into(),
        header_len: (size_of::<abi::LinkHeader>() as u16).into(),
        generation: generations.link.into(),
        table_generation: generations.table.into(),
        status: contents.status.into(),
        owner_device: contents.owner_device.into(),
        features: contents.features.into(),
        mapping_count: (contents.mappings.len() as u32).into(),
        mapping_table: abi::MAPPING_TABLE.into(),
        vring_count: (contents.vrings.len() as u32).into(),
        vring_table: abi::VRING_TABLE.into(),
        link_id: link_id.into(),
        config_len: (contents.config.len() as u32).into(),
        config: abi::OWNER_CONFIG.into(),
        log: contents.log.0.into(),
        log_len: contents.log.1.into(),
    }
}
