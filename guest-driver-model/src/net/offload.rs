//! What the header of a packet may leave to who gets it: to complete its checksum, and to cut it into
//! segments (virtio 1.3, 5.1.6.2 and 5.1.6.4).
//!
//! Owns: which of that a side accepts, and the one place where a header is judged: it was written by
//! the other side, and nothing that it says is believed before that.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

use super::header::NetHeader;

const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const DATA_VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;
const GSO_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const GSO_TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const GSO_TCPV6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const GSO_ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;

/// The features of all of them.
pub const FEATURES: u64 = TRANSMITTED | RECEIVED;
/// Those with which the headers of what the owner transmits have something to say.
pub(super) const TRANSMITTED: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN;
/// The same of what it receives.
const RECEIVED: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN;

/// An Ethernet header, bytes.
const ETHERNET: usize = 14;
/// The shortest headers of IPv4, IPv6 and TCP, bytes.
const IPV4: usize = 20;
const IPV6: usize = 40;
const TCP: usize = 20;
/// Where the checksum is in TCP's.
const TCP_CSUM: usize = 16;

/// Checksum and segmentation offloads that a side accepts. A segmentation counts only with the
/// checksum, and congestion with a segmentation, without which they mean nothing (5.1.3.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads(u8);

impl Offloads {
    /// The checksum of a packet may be left to be completed.
    pub const CSUM: Self = Self(1);
    /// A packet may be a TCP segment over IPv4 that is longer than one on a wire.
    pub const TSO4: Self = Self(2);
    /// The same over IPv6.
    pub const TSO6: Self = Self(4);
    /// Such a one may say that congestion was met (CWR).
    pub const ECN: Self = Self(8);

    /// Those of packets that the owner of these features receives.
    pub const fn to_owner(features: u64) -> Self {
        Self::of(
            features,
            [
                VIRTIO_NET_F_GUEST_CSUM,
                VIRTIO_NET_F_GUEST_TSO4,
                VIRTIO_NET_F_GUEST_TSO6,
                VIRTIO_NET_F_GUEST_ECN,
            ],
        )
    }

    /// Those of packets that it transmits.
    pub const fn from_owner(features: u64) -> Self {
        Self::of(
            features,
            [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN],
        )
    }

    const fn of(features: u64, [csum, tso4, tso6, ecn]: [u32; 4]) -> Self {
        if features >> csum & 1 == 0 {
            return Self(0);
        }
        const fn chosen(features: u64, number: u32, offload: Offloads) -> u8 {
            if features >> number & 1 == 0 { 0 } else { offload.0 }
        }
        let tso = chosen(features, tso4, Self::TSO4) | chosen(features, tso6, Self::TSO6);
        let ecn = if tso == 0 { 0 } else { chosen(features, ecn, Self::ECN) };
        Self(Self::CSUM.0 | tso | ecn)
    }

    /// Whether all of `other` are among them.
    #[inline]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// As the bits TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 and TUN_F_TSO_ECN of Linux.
    pub const fn tun_bits(self) -> u8 {
        self.0
    }

    /// What is to become of a packet whose header this is for a receiver that accepts these.
    pub fn judge(self, header: NetHeader, frame_len: usize) -> Judged {
        let Some(header) = header.checked(frame_len) else { return Judged::Invalid };
        if header.flags & NEEDS_CSUM == 0 {
            // That a checksum was looked at is told to who accepts such headers only.
            let known = if self.has(Self::CSUM) { header } else { NetHeader::default() };
            return Judged::Pass(known);
        }
        let gso = match header.gso_type & !GSO_ECN {
            GSO_TCPV4 => Self::TSO4,
            GSO_TCPV6 => Self::TSO6,
            _ => Self::default(),
        };
        let ecn = if header.gso_type & GSO_ECN == 0 { Self::default() } else { Self::ECN };
        match (self.has(gso) && self.has(ecn), self.has(Self::CSUM)) {
            (false, _) => Judged::Cut,
            (true, false) => Judged::Complete(header),
            (true, true) => Judged::Pass(header),
        }
    }
}

impl std::ops::BitOr for Offloads {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What is to become of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judged {
    /// It goes with this header.
    Pass(NetHeader),
    /// The receiver wants a whole checksum: see [`complete`].
    Complete(NetHeader),
    /// The receiver takes no segments longer than on a wire.
    Cut,
    /// The header cannot be that of a frame of this length.
    Invalid,
}

impl NetHeader {
    /// Whether it leaves nothing to the receiver: no other field than these two means anything then.
    #[inline]
    pub const fn is_plain(&self) -> bool {
        self.flags == 0 && self.gso_type == GSO_NONE
    }

    /// Of what a driver said: the flags that a driver has. Others are to be ignored (5.1.6.2.2).
    #[inline]
    pub(crate) const fn of_driver(self) -> Self {
        Self { flags: self.flags & NEEDS_CSUM, ..self }
    }

    /// The header with the fields that mean something alone, and no number of buffers; `None` if it
    /// cannot be that of a frame of this length. All places that it names are inside the frame then.
    pub fn checked(self, frame_len: usize) -> Option<Self> {
        if self.flags & NEEDS_CSUM == 0 {
            // 5.1.6.2.1: what is to be cut has a checksum to be completed.
            let plain = Self { flags: self.flags & DATA_VALID, ..Self::default() };
            return (self.gso_type == GSO_NONE).then_some(plain);
        }
        let start = usize::from(self.csum_start);
        let end = start + usize::from(self.csum_offset) + 2;
        if start < ETHERNET || end > frame_len || usize::from(self.hdr_len) > frame_len {
            return None;
        }
        let checked = Self { flags: NEEDS_CSUM, num_buffers: 0, ..self };
        let network = match self.gso_type & !GSO_ECN {
            // Congestion is a matter of TCP's.
            GSO_NONE => return (self.gso_type == GSO_NONE).then_some(Self { gso_size: 0, ..checked }),
            GSO_TCPV4 => IPV4,
            GSO_TCPV6 => IPV6,
            _ => return None,
        };
        let is_tcp = usize::from(self.csum_offset) == TCP_CSUM
            && start >= ETHERNET + network
            && start + TCP <= frame_len
            && self.gso_size > 0;
        is_tcp.then_some(checked)
    }

    /// Whether the packet is to be cut.
    #[inline]
    pub const fn is_long(&self) -> bool {
        self.gso_type != GSO_NONE
    }
}

/// Makes `whole` the frame with the checksum that its header, which was [checked](NetHeader::checked),
/// left to be completed.
pub fn complete(header: &NetHeader, frame: &[u8], whole: &mut Vec<u8>) {
    whole.clear();
    whole.extend_from_slice(frame);
    let start = usize::from(header.csum_start);
    let sum = sum(frame.get(start..).unwrap_or_default());
    // The field itself holds the sum of what is not in the packet; and 0 is for no checksum.
    let checksum = match !sum {
        0 => u16::MAX,
        checksum => checksum,
    };
    let field = start + usize::from(header.csum_offset);
    if let Some(field) = whole.get_mut(field..field + 2) {
        field.copy_from_slice(&checksum.to_be_bytes());
    }
}

/// The ones' complement sum of the bytes (RFC 1071).
pub(super) fn sum(bytes: &[u8]) -> u16 {
    let (words, last) = bytes.as_chunks::<2>();
    let words = words.iter().map(|word| u64::from(u16::from_be_bytes(*word))).sum::<u64>();
    let mut sum = words + last.first().map_or(0, |byte| u64::from(*byte) << 8);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
