//! Which of several queue pairs a frame goes by: all of a flow by one, so that it stays in order,
//! and many flows evenly by all. What cards do as receive-side scaling (virtio 1.3, 5.1.6.4.3).
//!
//! A flow is named by addresses and ports of IPv4 and IPv6, below up to two VLAN tags; of a fragment,
//! and of other protocols than TCP and UDP, by the addresses alone; without IP by the Ethernet
//! addresses. The hash is Toeplitz's with Microsoft's key, as in most cards' drivers, so that it
//! can be checked against their published values.

use super::ethernet::{IPV4, IPV6, payload};

/// The key (Microsoft, Verifying the RSS Hash Calculation).
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
    0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
    0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];
/// The longest name of a flow, bytes: two IPv6 addresses and two ports.
const MAX_NAME: usize = 36;
/// What each value of each byte of a name adds to the hash.
static TABLE: [[u32; 256]; MAX_NAME] = table();

const fn table() -> [[u32; 256]; MAX_NAME] {
    let mut table = [[0; 256]; MAX_NAME];
    let mut at = 0;
    while at < MAX_NAME {
        // The 32 bits of the key from each of the byte's bits on lie in these 40.
        let key = (KEY[at] as u64) << 32
            | (KEY[at + 1] as u64) << 24
            | (KEY[at + 2] as u64) << 16
            | (KEY[at + 3] as u64) << 8
            | KEY[at + 4] as u64;
        let mut value = 0;
        while value < 256 {
            let mut bit = 0;
            while bit < 8 {
                if value & 0x80 >> bit != 0 {
                    table[at][value] ^= (key >> (8 - bit)) as u32;
                }
                bit += 1;
            }
            value += 1;
        }
        at += 1;
    }
    table
}

/// Protocols that begin with two ports: TCP, UDP.
const WITH_PORTS: [u8; 2] = [6, 17];

/// The queue of 0 to `queues` that a frame goes by; 0 if there is one or none.
#[inline]
pub fn queue(frame: &[u8], queues: u16) -> u16 {
    match queues {
        0 | 1 => 0,
        // Below `queues`, and even without a division.
        _ => ((u64::from(hash(frame)) * u64::from(queues)) >> 32) as u16,
    }
}

/// The hash of a frame's flow. A frame that is cut off belongs to the flow that its bytes name.
#[inline]
pub fn hash(frame: &[u8]) -> u32 {
    let Some(addresses) = frame.first_chunk::<12>() else { return 0 };
    let ip = match payload(frame) {
        Some((IPV4, packet)) => ipv4(packet),
        Some((IPV6, packet)) => ipv6(packet),
        _ => None,
    };
    ip.unwrap_or_else(|| of_bytes(0, addresses))
}

fn ipv4(packet: &[u8]) -> Option<u32> {
    let header = packet.first_chunk::<20>()?;
    let addresses = of_bytes(0, &header[12..]);
    // More fragments, or not the first: only one of them has ports.
    let fragment = header[6] & 0x3f != 0 || header[7] != 0;
    let ports = packet.get(usize::from(header[0] & 0xf) * 4..).filter(|_| !fragment);
    Some(addresses ^ of_ports(8, header[9], ports))
}

fn ipv6(packet: &[u8]) -> Option<u32> {
    let (header, rest) = packet.split_first_chunk::<40>()?;
    Some(of_bytes(0, &header[8..]) ^ of_ports(32, header[6], Some(rest)))
}

fn of_ports(at: usize, protocol: u8, transport: Option<&[u8]>) -> u32 {
    let ports =
        transport.filter(|_| WITH_PORTS.contains(&protocol)).and_then(|bytes| bytes.first_chunk::<4>());
    ports.map_or(0, |ports| of_bytes(at, ports))
}

/// What these bytes of a name, from that place on, add.
fn of_bytes(at: usize, bytes: &[u8]) -> u32 {
    let rows = TABLE.iter().skip(at).zip(bytes);
    rows.fold(0, |hash, (row, byte)| hash ^ row[usize::from(*byte)])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::net::ethernet::MAX_TAGS;
    use std::net::{Ipv4Addr, Ipv6Addr};

    fn ethernet(tags: usize, kind: [u8; 2], packet: &[u8]) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        (0..tags).for_each(|_| frame.extend([0x81, 0x00, 0, 7]));
        frame.extend(kind);
        frame.extend(packet);
        frame
    }

    /// From and to, as address and port.
    fn of_ipv4(protocol: u8, from: (&str, u16), to: (&str, u16), options: usize) -> Vec<u8> {
        let mut packet = vec![0; 20 + options];
        packet[0] = 0x40 | (5 + options / 4) as u8;
        packet[9] = protocol;
        packet[12..16].copy_from_slice(&from.0.parse::<Ipv4Addr>().unwrap().octets());
        packet[16..20].copy_from_slice(&to.0.parse::<Ipv4Addr>().unwrap().octets());
        packet.extend([from.1.to_be_bytes(), to.1.to_be_bytes()].concat());
        packet
    }

    fn of_ipv6(protocol: u8, from: (&str, u16), to: (&str, u16)) -> Vec<u8> {
        let mut packet = vec![0; 40];
        (packet[0], packet[6]) = (0x60, protocol);
        packet[8..24].copy_from_slice(&from.0.parse::<Ipv6Addr>().unwrap().octets());
        packet[24..40].copy_from_slice(&to.0.parse::<Ipv6Addr>().unwrap().octets());
        packet.extend([from.1.to_be_bytes(), to.1.to_be_bytes()].concat());
        packet
    }

    const FROM: (&str, u16) = ("66.9.149.187", 2794);
    const TO: (&str, u16) = ("161.142.100.80", 1766);

    #[test]
    fn hashes_are_the_published_ones() {
        for (from, to, addresses, all) in [
            (FROM, TO, 0x323e_8fc2, 0x51cc_c178),
            (("199.92.111.2", 14230), ("65.69.140.83", 4739), 0xd718_262a, 0xc626_b0ea),
            (("24.19.198.95", 12898), ("12.22.207.184", 38024), 0xd2d0_a5de, 0x5c2b_394a),
            (("38.27.205.30", 48228), ("209.142.163.6", 2217), 0x8298_9176, 0xafc7_327f),
            (("153.39.163.191", 44251), ("202.188.127.2", 1303), 0x5d18_09c5, 0x10e8_28a2),
        ] {
            assert_eq!(hash(&ethernet(0, IPV4, &of_ipv4(6, from, to, 0))), all);
            assert_eq!(hash(&ethernet(0, IPV4, &of_ipv4(1, from, to, 0))), addresses);
        }
        let long = ("3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251);
        for (from, to, addresses, all) in [
            (("3ffe:2501:200:1fff::7", 2794), ("3ffe:2501:200:3::1", 1766), 0x2cc1_8cd5, 0x4020_7d3d),
            (("3ffe:501:8::260:97ff:fe40:efab", 14230), ("ff02::1", 4739), 0x0f0c_461c, 0xdde5_1bbf),
            (long, ("fe80::200:f8ff:fe21:67cf", 38024), 0x4b61_e985, 0x02d1_feef),
        ] {
            assert_eq!(hash(&ethernet(0, IPV6, &of_ipv6(17, from, to))), all);
            assert_eq!(hash(&ethernet(0, IPV6, &of_ipv6(58, from, to))), addresses);
        }
    }

    #[test]
    fn tags_and_options_do_not_part_a_flow() {
        for tags in 0..=MAX_TAGS {
            for options in [0, 4, 40] {
                let frame = ethernet(tags, IPV4, &of_ipv4(6, FROM, TO, options));
                assert_eq!(hash(&frame), 0x51cc_c178, "{tags} tags, {options} bytes of options");
            }
        }
    }

    #[test]
    fn all_fragments_of_a_datagram_go_by_one_queue() {
        let mut packet = of_ipv4(17, FROM, TO, 0);
        for offset in [[0x20, 0], [0x20, 5], [0x00, 9], [0x1f, 0xff]] {
            packet[6..8].copy_from_slice(&offset);
            packet[20..].fill(offset[1]);
            assert_eq!(hash(&ethernet(0, IPV4, &packet)), 0x323e_8fc2);
        }
        // "Do not fragment" is no fragment.
        let mut whole = of_ipv4(17, FROM, TO, 0);
        whole[6] = 0x40;
        assert_eq!(hash(&ethernet(0, IPV4, &whole)), 0x51cc_c178);
    }

    #[test]
    fn a_frame_that_ends_anywhere_or_lies_about_its_length_has_a_hash() {
        for frame in [
            ethernet(2, IPV4, &of_ipv4(6, FROM, TO, 40)),
            ethernet(9, IPV4, &[]),
            ethernet(0, IPV6, &of_ipv6(6, ("::1", 1), ("::2", 2))),
            vec![0xff; 80],
        ] {
            for len in 0..=frame.len() {
                hash(&frame[..len]);
                assert!(queue(&frame[..len], 7) < 7);
            }
        }
        let mut short = of_ipv4(6, FROM, TO, 0);
        for first in 0..=255 {
            short[0] = first;
            hash(&ethernet(0, IPV4, &short));
        }
    }

    #[test]
    fn flows_are_spread_evenly_and_without_ip_by_the_ethernet_addresses() {
        for queues in [2_u16, 3, 32] {
            let mut counts = vec![0_u32; usize::from(queues)];
            for port in 0..3200 {
                let frame = ethernet(0, IPV4, &of_ipv4(6, (FROM.0, 20_000 + port), TO, 0));
                counts[usize::from(queue(&frame, queues))] += 1;
            }
            let even = 3200 / u32::from(queues);
            assert!(counts.iter().all(|count| (even / 2..even * 2).contains(count)), "{counts:?}");
        }
        assert_eq!((queue(&[0xff; 60], 0), queue(&[0xff; 60], 1)), (0, 0));
        let arp = ethernet(0, [0x08, 0x06], &[1; 28]);
        let (mut other, mut same) = (arp.clone(), arp.clone());
        other[5] ^= 1;
        same[30] ^= 1;
        assert_ne!(hash(&arp), hash(&other));
        assert_eq!(hash(&arp), hash(&same));
    }

    #[test]
    fn a_thousand_random_flows_fill_four_queues_and_none_leaves_its_own() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 16) as u32
        };
        let mut counts = [0_u32; 4];
        for flow in 0..1000 {
            let [from, to] = [(); 2].map(|()| (Ipv4Addr::from(random()).to_string(), random() as u16));
            let protocol = WITH_PORTS[flow % 2];
            let mut packet = of_ipv4(protocol, (&from.0, from.1), (&to.0, to.1), 0);
            let its = queue(&ethernet(0, IPV4, &packet), 4);
            counts[usize::from(its)] += 1;
            // The rest of the header, and what comes behind the ports, are each packet's own.
            for len in [0, 1, 40, 1400] {
                packet.resize(24 + len, 0);
                for at in (1..6).chain([8, 10, 11]).chain(24..24 + len) {
                    packet[at] = random() as u8;
                }
                assert_eq!(queue(&ethernet(0, IPV4, &packet), 4), its, "flow {flow}, {len} bytes");
            }
        }
        // Five standard deviations of an even choice around 250.
        assert!(counts.iter().all(|count| (182..=318).contains(count)), "{counts:?}");
    }
}
