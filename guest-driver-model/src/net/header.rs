//! The header before each packet (virtio 1.3, 5.1.6). Little-endian; with
//! VIRTIO_F_VERSION_1 it always has `num_buffers`, so 12 bytes.

/// Length of the header, bytes.
pub const HEADER_LEN: usize = 12;
/// The longest frame that passes, bytes: 64 KiB of payload with an Ethernet header.
pub const MAX_FRAME: usize = 65_550;

/// `struct virtio_net_hdr` with VERSION_1, without hash report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetHeader {
    /// VIRTIO_NET_HDR_F_* bits.
    pub flags: u8,
    /// VIRTIO_NET_HDR_GSO_* number.
    pub gso_type: u8,
    /// Length of the headers to repeat in each segment, bytes.
    pub hdr_len: u16,
    /// Payload of each segment, bytes.
    pub gso_size: u16,
    /// Where checksumming starts, bytes from the start of the frame.
    pub csum_start: u16,
    /// Where the checksum goes, bytes from `csum_start`.
    pub csum_offset: u16,
    /// How many buffers the packet takes, in received packets.
    pub num_buffers: u16,
}

impl NetHeader {
    /// From the bytes of a private copy.
    #[inline]
    pub const fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1] = *bytes;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            csum_start: u16::from_le_bytes([s0, s1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
            num_buffers: u16::from_le_bytes([n0, n1]),
        }
    }

    /// As it goes before a packet.
    #[inline]
    pub const fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        let [n0, n1] = self.num_buffers.to_le_bytes();
        [self.flags, self.gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_fields_agree() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
        let header = NetHeader::from_bytes(&bytes);
        assert_eq!((header.flags, header.hdr_len, header.num_buffers), (1, 0x0403, 0x0c0b));
        assert_eq!(header.to_bytes(), bytes);
    }
}
