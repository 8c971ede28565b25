//! Which virtio features each side is offered, and their names for `status`.

use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::{virtio_config, virtio_ring};

use super::fault::Fault;
use crate::kind::{Device, Kind};

/// VHOST_USER_F_PROTOCOL_FEATURES, a bit of the virtio feature word that vhost-user
/// keeps for itself.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

/// VHOST_F_LOG_ALL (vhost-user: Migration), a bit of the same kind: what the back-end writes is marked.
pub const LOG_ALL: u64 = 1 << 26;

/// VIRTIO_F_ACCESS_PLATFORM: the owner's device is behind an IOMMU.
pub const ACCESS_PLATFORM: u64 = bit(virtio_config::VIRTIO_F_ACCESS_PLATFORM);

/// VIRTIO_F_RING_PACKED: the owner's rings are packed ones (virtio 1.3, 2.8).
pub const RING_PACKED: u64 = bit(virtio_config::VIRTIO_F_RING_PACKED);

/// VHOST_USER_PROTOCOL_F_WIRING (`docs/vhost-user-extensions.md`): the peer's VMM takes the
/// owner's eventfds, so that notifications need no thread.
pub const PROTOCOL_WIRING: u64 = bit(60);
/// VHOST_USER_PROTOCOL_F_SHMEM_STRICT (`docs/vhost-user-extensions.md`): the peer's VMM
/// answers a change of the window when it has taken effect, and enforces its access.
pub const PROTOCOL_SHMEM_STRICT: u64 = bit(61);
/// VHOST_USER_PROTOCOL_F_IOMMU_PUSH (`docs/vhost-user-extensions.md`): the owner's VMM
/// tells each change of its guest's IOMMU by itself.
pub const PROTOCOL_IOMMU_PUSH: u64 = bit(62);

const fn bit(number: u32) -> u64 {
    1 << number
}

/// What an owner's front-end is offered: what the peer's driver can serve.
///
/// That packed rings are offered changes nothing for who does not ask for them: a front-end
/// offers its guest the features that its own configuration has and the back-end has, too.
/// QEMU has `packed=off` and, where it knows that at all, `in_order=off` unless told
/// otherwise; DPDK's virtio-user has `packed_vq=0`, but `in_order=1` for either format.
///
/// The features of the kind of device are the kind's to say.
pub fn offered_to_owner(device: &Device) -> u64 {
    bit(virtio_config::VIRTIO_F_VERSION_1)
        | bit(virtio_config::VIRTIO_F_ACCESS_PLATFORM)
        | bit(virtio_ring::VIRTIO_RING_F_INDIRECT_DESC)
        | bit(virtio_ring::VIRTIO_RING_F_EVENT_IDX)
        | RING_PACKED
        | bit(virtio_config::VIRTIO_F_IN_ORDER)
        | PROTOCOL_FEATURES
        | device.features
}

/// What a peer's front-end is offered: the vhost-pci device's own features
/// (`docs/vhost-pci-device.md`, 4).
pub fn offered_to_peer() -> u64 {
    bit(virtio_config::VIRTIO_F_VERSION_1) | bit(virtio_config::VIRTIO_F_ACCESS_PLATFORM) | PROTOCOL_FEATURES
}

/// Refuses what was acknowledged but not offered.
pub fn check(acked: u64, offered: u64) -> Result<(), Fault> {
    match acked & !offered {
        0 => Ok(()),
        extra => Err(Fault::Features(extra)),
    }
}

/// Refuses an extension that was acknowledged without a standard feature that it depends on
/// (`docs/vhost-user-extensions.md`, Negotiation).
pub fn check_needs(acked: u64, extension: u64, needs: VhostUserProtocolFeatures) -> Result<(), Fault> {
    match needs.bits() & !acked {
        missing if acked & extension != 0 && missing != 0 => Err(Fault::OutOfOrder(format!(
            "{} was acknowledged without {}, which it depends on",
            protocol_names(extension).join(", "),
            protocol_names(missing).join(", "),
        ))),
        _ => Ok(()),
    }
}

/// The names of virtio features, of a device of this kind if it has one; a bit without a name appears
/// as its number.
pub fn names(features: u64, kind: Option<&Kind>) -> Vec<String> {
    let own = kind.map_or(&[][..], |kind| kind.feature_names);
    let name = |number: u32| own.iter().chain(NAMES).find(|(known, _)| *known == number);
    let numbers = (0..64).filter(|number| features & bit(*number) != 0);
    numbers
        .map(|number| name(number).map_or_else(|| format!("bit {number}"), |(_, name)| (*name).into()))
        .collect()
}

/// The names of vhost-user protocol features.
pub fn protocol_names(features: u64) -> Vec<String> {
    let known = VhostUserProtocolFeatures::from_bits_truncate(features);
    let mut names: Vec<String> = known.iter_names().map(|(name, _)| name.to_owned()).collect();
    let unknown = (0..64).filter(|number| features & !known.bits() & bit(*number) != 0);
    names.extend(unknown.map(|number| match bit(number) {
        PROTOCOL_WIRING => "WIRING".to_owned(),
        PROTOCOL_SHMEM_STRICT => "SHMEM_STRICT".to_owned(),
        PROTOCOL_IOMMU_PUSH => "IOMMU_PUSH".to_owned(),
        _ => format!("bit {number}"),
    }));
    names
}

const NAMES: &[(u32, &str)] = &[
    (virtio_ring::VIRTIO_RING_F_INDIRECT_DESC, "VIRTIO_F_INDIRECT_DESC"),
    (virtio_ring::VIRTIO_RING_F_EVENT_IDX, "VIRTIO_F_EVENT_IDX"),
    (virtio_config::VIRTIO_F_VERSION_1, "VIRTIO_F_VERSION_1"),
    (virtio_config::VIRTIO_F_ACCESS_PLATFORM, "VIRTIO_F_ACCESS_PLATFORM"),
    (virtio_config::VIRTIO_F_RING_PACKED, "VIRTIO_F_RING_PACKED"),
    (virtio_config::VIRTIO_F_IN_ORDER, "VIRTIO_F_IN_ORDER"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kind;

    #[test]
    fn an_owner_is_offered_what_the_peers_driver_serves_and_nothing_else() {
        let offered =
            |device: &Device| names(offered_to_owner(device) & !PROTOCOL_FEATURES, Some(device.kind));
        let all = [
            "VIRTIO_F_INDIRECT_DESC",
            "VIRTIO_F_EVENT_IDX",
            "VIRTIO_F_VERSION_1",
            "VIRTIO_F_ACCESS_PLATFORM",
            "VIRTIO_F_RING_PACKED",
            "VIRTIO_F_IN_ORDER",
        ];
        let served = [&["VIRTIO_NET_F_MRG_RXBUF"][..], &all].concat();
        assert_eq!(offered(&kind::net::device(1, false)), served);
        let offloads = [
            "VIRTIO_NET_F_CSUM",
            "VIRTIO_NET_F_GUEST_CSUM",
            "VIRTIO_NET_F_GUEST_TSO4",
            "VIRTIO_NET_F_GUEST_TSO6",
            "VIRTIO_NET_F_GUEST_ECN",
            "VIRTIO_NET_F_HOST_TSO4",
            "VIRTIO_NET_F_HOST_TSO6",
            "VIRTIO_NET_F_HOST_ECN",
        ];
        assert_eq!(offered(&kind::net::device(1, true)), [&offloads[..], &served].concat());
        let size = ["VIRTIO_BLK_F_SIZE_MAX", "VIRTIO_BLK_F_SEG_MAX"];
        let disk = [&size[..], &["VIRTIO_BLK_F_BLK_SIZE", "VIRTIO_BLK_F_FLUSH"], &all].concat();
        assert_eq!(offered(&kind::block::device(512, 1, false)), disk);
        let more = [&size[..], &["VIRTIO_BLK_F_RO", "VIRTIO_BLK_F_BLK_SIZE", "VIRTIO_BLK_F_FLUSH"]].concat();
        let disk = [&more[..], &["VIRTIO_BLK_F_MQ"], &all].concat();
        assert_eq!(offered(&kind::block::device(512, 2, true)), disk);
    }
}
