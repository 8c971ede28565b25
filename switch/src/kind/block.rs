//! A disk (virtio 1.3, 5.2). Each vring takes requests of any kind.
//!
//! A front-end asks for the configuration space before any peer is there. So the operator states the
//! disk's size, and the peer's driver serves a disk of that size and no other.

use vhost_pci_device::abi;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::{Device, Keys, Kind, bit};

/// The kind.
pub const BLOCK: Kind = Kind {
    name: "block",
    table: "a [[link]] of a block device",
    virtio_id: VIRTIO_ID_BLOCK,
    keys: &["num_queues", "size", "read_only"],
    read,
    feature_names: NAMES,
};

/// Bytes of a sector, which all of the protocol counts in (virtio 1.3, 5.2.4).
pub const SECTOR: u64 = 512;
/// Pieces of a request, and bytes of each: a request of a driver that keeps to them has less than
/// the 16 MiB that the peer's driver serves at once. Rings may be as short as 128 entries, of which
/// header and status take one each.
const SEG_MAX: u32 = 126;
const SIZE_MAX: u32 = 128 << 10;

fn read(keys: &mut dyn Keys) -> Option<Device> {
    let num_queues = keys.count("num_queues", 1, abi::MAX_VRINGS);
    let size = keys.size("size", |bytes| match bytes {
        0 => Err("a disk has at least one sector of 512 bytes".into()),
        bytes if bytes.is_multiple_of(SECTOR) => Ok(()),
        bytes => Err(format!("{bytes} bytes are no whole number of sectors of 512 bytes")),
    });
    let read_only = keys.flag("read_only");
    Some(device(size?, num_queues?, read_only?))
}

/// A disk of so many bytes, a multiple of [`SECTOR`], with so many vrings.
pub fn device(size: u64, num_queues: u16, read_only: bool) -> Device {
    let has = |is_so, number| if is_so { bit(number) } else { 0 };
    Device {
        kind: &BLOCK,
        features: bit(VIRTIO_BLK_F_SIZE_MAX)
            | bit(VIRTIO_BLK_F_SEG_MAX)
            | bit(VIRTIO_BLK_F_BLK_SIZE)
            | bit(VIRTIO_BLK_F_FLUSH)
            | has(read_only, VIRTIO_BLK_F_RO)
            | has(num_queues > 1, VIRTIO_BLK_F_MQ),
        vrings: num_queues,
        queues: num_queues,
        config: config(size, num_queues),
    }
}

/// The configuration space (virtio 1.3, 5.2.4), as far as `write_zeroes_may_unmap`.
fn config(size: u64, num_queues: u16) -> Vec<u8> {
    let mut bytes = vec![0; 60];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    // capacity, size_max, seg_max, blk_size, num_queues
    put(0, &(size / SECTOR).to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(34, &num_queues.to_le_bytes());
    bytes
}

const NAMES: &[(u32, &str)] = &[
    (VIRTIO_BLK_F_SIZE_MAX, "VIRTIO_BLK_F_SIZE_MAX"),
    (VIRTIO_BLK_F_SEG_MAX, "VIRTIO_BLK_F_SEG_MAX"),
    (VIRTIO_BLK_F_GEOMETRY, "VIRTIO_BLK_F_GEOMETRY"),
    (VIRTIO_BLK_F_RO, "VIRTIO_BLK_F_RO"),
    (VIRTIO_BLK_F_BLK_SIZE, "VIRTIO_BLK_F_BLK_SIZE"),
    (VIRTIO_BLK_F_FLUSH, "VIRTIO_BLK_F_FLUSH"),
    (VIRTIO_BLK_F_TOPOLOGY, "VIRTIO_BLK_F_TOPOLOGY"),
    (VIRTIO_BLK_F_CONFIG_WCE, "VIRTIO_BLK_F_CONFIG_WCE"),
    (VIRTIO_BLK_F_MQ, "VIRTIO_BLK_F_MQ"),
    (VIRTIO_BLK_F_DISCARD, "VIRTIO_BLK_F_DISCARD"),
    (VIRTIO_BLK_F_WRITE_ZEROES, "VIRTIO_BLK_F_WRITE_ZEROES"),
];
