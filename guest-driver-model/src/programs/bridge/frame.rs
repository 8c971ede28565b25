//! What a bridge looks at of a frame: its addresses (IEEE 802.3, 3.2; IEEE 802.1Q, 8.6.3).

/// An address of a station, or of a group of them.
pub type Mac = [u8; 6];

/// So much of a frame is looked at: both addresses and the EtherType, without which it is none.
pub const HEAD: usize = 14;

/// Whether an address is that of a group: multicast and broadcast.
#[inline]
pub fn is_group(address: &Mac) -> bool {
    let [first, ..] = address;
    first & 1 == 1
}

/// Whether frames to this address are for a bridge itself, and never forwarded: 01-80-C2-00-00-00 to -0F,
/// spanning tree, pause frames and link aggregation among them.
#[inline]
pub fn is_reserved(address: &Mac) -> bool {
    matches!(address, [0x01, 0x80, 0xc2, 0, 0, 0..=0x0f])
}

/// Whether a frame can come from this address: one station's.
#[inline]
pub fn is_station(address: &Mac) -> bool {
    !is_group(address) && *address != [0; 6]
}

/// The address as people write it.
pub fn text(address: &Mac) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_apart() {
        let station = [0x02, 0, 0, 0, 0, 1];
        assert!(is_station(&station) && !is_group(&station) && !is_reserved(&station));
        for group in [[0xff; 6], [0x01, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1]] {
            assert!(is_group(&group) && !is_station(&group) && !is_reserved(&group));
        }
        assert!(!is_station(&[0; 6]));
        for last in 0..=255 {
            assert_eq!(is_reserved(&[0x01, 0x80, 0xc2, 0, 0, last]), last < 16, "{last}");
        }
        assert!(!is_reserved(&[0x01, 0x80, 0xc2, 0, 1, 0]));
        assert_eq!(text(&[0x02, 0xab, 0, 1, 2, 0xff]), "02:ab:00:01:02:ff");
    }
}
