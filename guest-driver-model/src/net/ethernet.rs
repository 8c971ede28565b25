//! The header of an Ethernet frame, as far as anybody looks at it.
//!
//! Owns: which EtherTypes are known, and the way past VLAN tags (IEEE 802.1Q). The frame is a private
//! copy; it may be cut off anywhere.

/// EtherTypes.
pub(super) const IPV4: [u8; 2] = [0x08, 0x00];
pub(super) const IPV6: [u8; 2] = [0x86, 0xdd];
const VLAN: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];
/// Tags that are passed over: a customer's in a provider's.
pub(super) const MAX_TAGS: usize = 2;

/// The EtherType of what the frame carries, and that; a VLAN's if there are more tags.
#[inline]
pub(super) fn payload(frame: &[u8]) -> Option<([u8; 2], &[u8])> {
    let (_, mut rest) = frame.split_first_chunk::<12>()?;
    let mut kind = [0; 2];
    for _ in 0..=MAX_TAGS {
        let Some((next, after)) = rest.split_first_chunk::<2>() else { break };
        (kind, rest) = (*next, after);
        if !VLAN.contains(&kind) {
            break;
        }
        rest = rest.get(2..).unwrap_or_default();
    }
    Some((kind, rest))
}
