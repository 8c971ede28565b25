//! A network card (virtio 1.3, 5.1). Vring 2 *i* receives and 2 *i* + 1 transmits, of pair *i*.

use vhost_pci_device::abi;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
};

use super::{Device, Keys, Kind, bit};

/// The kind.
pub const NET: Kind = Kind {
    name: "net",
    table: "a [[link]] of a network card",
    virtio_id: VIRTIO_ID_NET,
    keys: &["queue_pairs", "offloads"],
    read,
    feature_names: NAMES,
};

/// The most pairs of queues that a link may have: what the link page has room for.
pub const MAX_QUEUE_PAIRS: u16 = abi::MAX_VRINGS / 2;

/// Checksum and TCP segmentation offload, of what the owner sends and of what it receives (virtio
/// 1.3, 5.1.3).
const OFFLOADS: u64 = bit(VIRTIO_NET_F_CSUM)
    | bit(VIRTIO_NET_F_GUEST_CSUM)
    | bit(VIRTIO_NET_F_GUEST_TSO4)
    | bit(VIRTIO_NET_F_GUEST_TSO6)
    | bit(VIRTIO_NET_F_GUEST_ECN)
    | bit(VIRTIO_NET_F_HOST_TSO4)
    | bit(VIRTIO_NET_F_HOST_TSO6)
    | bit(VIRTIO_NET_F_HOST_ECN);

fn read(keys: &mut dyn Keys) -> Option<Device> {
    let queue_pairs = keys.count("queue_pairs", 1, MAX_QUEUE_PAIRS);
    let offloads = keys.flag("offloads");
    Some(device(queue_pairs?, offloads?))
}

/// A card with so many pairs of queues, at most [`MAX_QUEUE_PAIRS`].
///
/// VMMs take `offloads` unless told otherwise, and packets then have headers that ask something of
/// their receiver. The configuration says that the peer's driver knows that.
pub fn device(queue_pairs: u16, offloads: bool) -> Device {
    Device {
        kind: &NET,
        features: bit(VIRTIO_NET_F_MRG_RXBUF) | if offloads { OFFLOADS } else { 0 },
        vrings: 2 * queue_pairs,
        queues: queue_pairs,
        config: Vec::new(),
    }
}

const NAMES: &[(u32, &str)] = &[
    (VIRTIO_NET_F_CSUM, "VIRTIO_NET_F_CSUM"),
    (VIRTIO_NET_F_GUEST_CSUM, "VIRTIO_NET_F_GUEST_CSUM"),
    (VIRTIO_NET_F_MTU, "VIRTIO_NET_F_MTU"),
    (VIRTIO_NET_F_MAC, "VIRTIO_NET_F_MAC"),
    (VIRTIO_NET_F_GUEST_TSO4, "VIRTIO_NET_F_GUEST_TSO4"),
    (VIRTIO_NET_F_GUEST_TSO6, "VIRTIO_NET_F_GUEST_TSO6"),
    (VIRTIO_NET_F_GUEST_ECN, "VIRTIO_NET_F_GUEST_ECN"),
    (VIRTIO_NET_F_HOST_TSO4, "VIRTIO_NET_F_HOST_TSO4"),
    (VIRTIO_NET_F_HOST_TSO6, "VIRTIO_NET_F_HOST_TSO6"),
    (VIRTIO_NET_F_HOST_ECN, "VIRTIO_NET_F_HOST_ECN"),
    (VIRTIO_NET_F_MRG_RXBUF, "VIRTIO_NET_F_MRG_RXBUF"),
    (VIRTIO_NET_F_STATUS, "VIRTIO_NET_F_STATUS"),
    (VIRTIO_NET_F_CTRL_VQ, "VIRTIO_NET_F_CTRL_VQ"),
    (VIRTIO_NET_F_MQ, "VIRTIO_NET_F_MQ"),
];
