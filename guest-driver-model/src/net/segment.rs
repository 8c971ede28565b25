//! Cuts a long TCP segment into such as go by a wire, for who does not accept it as it is.
//!
//! Owns: nothing. The packet's bytes are a private copy, and nothing that they say is believed before
//! it was checked.

use super::burst::{Packet, PacketBurst};
use super::ethernet::{self, IPV4, IPV6};
use super::header::NetHeader;
use super::offload::{Judged, Offloads, sum};

const TCP: u8 = 6;
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// A packet becomes so many bytes at most: its headers are repeated, and the other side says how often.
const LONGEST_HEADERS: usize = 256;
/// No TCP has shorter segments (TCP_MIN_SND_MSS of Linux).
const SHORTEST_SEGMENT: usize = 48;

/// Where the headers of a TCP segment are in its frame.
struct Headers {
    network: usize,
    is_ipv4: bool,
    tcp: usize,
    payload: usize,
}

/// Whether a receiver of these offloads does not accept the packet in one piece.
pub(super) fn is_long(packet: &Packet<'_>, offloads: Offloads) -> bool {
    !packet.header.is_plain() && offloads.judge(packet.header, packet.frame.len()) == Judged::Cut
}

/// Makes `pieces` the segments of a packet, of which there can be more than a thousand: who cuts one
/// at a time has no more than these, whatever the other side says. None of what is no TCP segment.
pub(super) fn cut(packet: Packet<'_>, pieces: &mut PacketBurst) {
    pieces.clear();
    if append(packet, pieces).is_none() {
        pieces.clear();
    }
}

fn push(burst: &mut PacketBurst, header: NetHeader, parts: &[&[u8]]) {
    let len = parts.iter().map(|part| part.len()).sum();
    let filled = burst.push(header, len, |mut room| {
        for part in parts {
            let (now, later) = room.split_at_mut_checked(part.len()).ok_or(())?;
            now.copy_from_slice(part);
            room = later;
        }
        Ok::<_, ()>(())
    });
    debug_assert!(filled.is_ok(), "the room is as long as the parts");
}

/// Appends the segments of a packet, whose header has been checked. `None` if it is no TCP segment.
fn append(packet: Packet<'_>, pieces: &mut PacketBurst) -> Option<()> {
    let header = packet.header.checked(packet.frame.len())?;
    let places = headers(packet.frame, usize::from(header.csum_start))?;
    let (first, payload) = packet.frame.split_at_checked(places.payload)?;
    let size = usize::from(header.gso_size);
    if first.len() > LONGEST_HEADERS || size < SHORTEST_SEGMENT || payload.is_empty() {
        return None;
    }
    let count = payload.len().div_ceil(size);
    for (at, payload) in payload.chunks(size).enumerate() {
        let mut headers = first.to_vec();
        rewrite(&mut headers, &places, payload, (at, at * size, at + 1 == count))?;
        push(pieces, NetHeader::default(), &[&headers, payload]);
    }
    Some(())
}

/// Finds the headers; `None` if they are not those of TCP, of which `tcp` is the start.
fn headers(frame: &[u8], tcp: usize) -> Option<Headers> {
    let (kind, ip) = ethernet::payload(frame)?;
    let network = frame.len() - ip.len();
    let is_ipv4 = match kind {
        IPV4 => {
            let len = usize::from(ip.first()? & 15) * 4;
            (network + len == tcp && len >= 20 && *ip.get(9)? == TCP).then_some(true)?
        }
        // Other headers may be between them.
        IPV6 => (network + 40 <= tcp).then_some(false)?,
        _ => return None,
    };
    let len = usize::from(frame.get(tcp + 12)? >> 4) * 4;
    (len >= 20 && tcp + len <= frame.len()).then_some(Headers { network, is_ipv4, tcp, payload: tcp + len })
}

/// Makes the headers of the long segment those of one of its pieces: number `at`, whose payload
/// starts `offset` bytes into all of it.
fn rewrite(
    headers: &mut [u8],
    places: &Headers,
    payload: &[u8],
    (at, offset, is_last): (usize, usize, bool),
) -> Option<()> {
    let len = headers.len() + payload.len() - places.network;
    let (rest, tcp) = headers.split_at_mut_checked(places.tcp)?;
    let ip = rest.get_mut(places.network..)?;
    let addresses = match places.is_ipv4 {
        true => {
            put(ip, 2, u16::try_from(len).ok()?)?;
            let id = u16::from_be_bytes(*ip.get(4..)?.first_chunk()?);
            put(ip, 4, id.wrapping_add(at as u16))?;
            put(ip, 10, 0)?;
            let checksum = !sum(ip);
            put(ip, 10, checksum)?;
            ip.get(12..20)?
        }
        false => {
            put(ip, 4, u16::try_from(len - 40).ok()?)?;
            ip.get(8..40)?
        }
    };
    let tcp_len = tcp.len() + payload.len();
    let sequence = u32::from_be_bytes(*tcp.get(4..)?.first_chunk()?).wrapping_add(offset as u32);
    tcp.get_mut(4..8)?.copy_from_slice(&sequence.to_be_bytes());
    let flags = tcp.get_mut(13)?;
    if at > 0 {
        *flags &= !CWR;
    }
    if !is_last {
        *flags &= !FIN_PSH;
    }
    put(tcp, 16, 0)?;
    let pseudo = [sum(addresses), u16::from(TCP), tcp_len as u16, sum(tcp), sum(payload)];
    let pseudo: Vec<u8> = pseudo.iter().flat_map(|word| word.to_be_bytes()).collect();
    put(tcp, 16, !sum(&pseudo))
}

fn put(bytes: &mut [u8], at: usize, word: u16) -> Option<()> {
    bytes.get_mut(at..at + 2)?.copy_from_slice(&word.to_be_bytes());
    Some(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::net::offload::complete;

    /// A long segment as Linux sends it, with so many VLAN tags and bytes of payload.
    fn long(is_ipv4: bool, tags: usize, payload: usize) -> (NetHeader, Vec<u8>) {
        let mut frame = vec![2; 12];
        for _ in 0..tags {
            frame.extend([0x81, 0, 0, 5]);
        }
        let network = frame.len() + 2;
        if is_ipv4 {
            frame.extend(IPV4);
            frame.extend([0x45, 0, 0, 0, 0xff, 0xff, 0x40, 0, 64, TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        } else {
            frame.extend(IPV6);
            frame.extend([0x60, 0, 0, 0, 0, 0, TCP, 64]);
            frame.extend([0xfd; 32]);
        }
        let tcp = frame.len();
        frame.extend([
            0,
            80,
            1,
            0,
            0xff,
            0xff,
            0xff,
            0,
            0,
            0,
            0,
            1,
            0x80,
            CWR | FIN_PSH | 0x10,
            1,
            0,
            0,
            0,
            0,
            0,
        ]);
        frame.extend([1; 12]);
        frame.extend((0..payload).map(|at| (at % 251) as u8));
        let addresses = if is_ipv4 { 12..20 } else { 8..40 };
        // What Linux leaves: the sum of the pseudo header, with the length of all of it.
        let pseudo = [sum(&frame[network..][addresses]), 6, (frame.len() - tcp) as u16];
        let pseudo: Vec<u8> = pseudo.iter().flat_map(|word| word.to_be_bytes()).collect();
        put(&mut frame, tcp + 16, sum(&pseudo)).unwrap();
        let header = NetHeader {
            flags: 1,
            gso_type: if is_ipv4 { 0x81 } else { 0x84 },
            hdr_len: (tcp + 32) as u16,
            gso_size: 1000,
            csum_start: tcp as u16,
            csum_offset: 16,
            num_buffers: 0,
        };
        (header, frame)
    }

    /// Whether the checksums of a frame are whole, and where its payload starts.
    fn is_whole(frame: &[u8]) -> (bool, usize) {
        let tags = frame.windows(2).skip(12).step_by(4).take_while(|kind| kind[0] == 0x81).count();
        let network = 14 + 4 * tags;
        let is_ipv4 = frame[network] >> 4 == 4;
        let (ip, tcp) = frame[network..].split_at(if is_ipv4 { 20 } else { 40 });
        let (lengths, addresses) = match is_ipv4 {
            true => (sum(ip) == 0xffff && sum(&ip[2..4]) as usize == ip.len() + tcp.len(), &ip[12..]),
            false => (sum(&ip[4..6]) as usize == tcp.len(), &ip[8..]),
        };
        let words = [sum(addresses), 6, tcp.len() as u16, sum(tcp)];
        let words: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        (lengths && sum(&words) == 0xffff, frame.len() - tcp.len())
    }

    /// All packets of a burst, cut; `None` if there is nothing to be cut.
    fn cut_all(burst: &PacketBurst, offloads: Offloads) -> Option<PacketBurst> {
        let mut all = PacketBurst::default();
        let (mut pieces, mut is_any_long) = (PacketBurst::default(), false);
        for packet in burst.iter() {
            pieces.clear();
            if is_long(&packet, offloads) {
                is_any_long = true;
                cut(packet, &mut pieces);
            }
            if pieces.is_empty() {
                push(&mut all, packet.header, &[packet.frame]);
            }
            pieces.iter().for_each(|piece| push(&mut all, piece.header, &[piece.frame]));
        }
        is_any_long.then_some(all)
    }

    #[test]
    fn the_pieces_of_a_long_segment_are_whole_segments_that_come_to_the_same_bytes() {
        for (is_ipv4, tags, payload) in
            [(true, 0, 2500), (true, 1, 64_000), (false, 0, 3000), (false, 2, 999)]
        {
            let (header, frame) = long(is_ipv4, tags, payload);
            let mut burst = PacketBurst::default();
            push(&mut burst, NetHeader::default(), &[&[1; 60]]);
            push(&mut burst, header, &[&frame]);
            let pieces = cut_all(&burst, Offloads::CSUM).unwrap();
            assert_eq!(pieces.len(), 1 + payload.div_ceil(1000));
            assert_eq!(pieces.packet(0), burst.packet(0), "others stay what they are");
            let mut bytes: Vec<u8> = Vec::new();
            for (at, piece) in pieces.iter().skip(1).enumerate() {
                assert!(piece.header.is_plain());
                let (is_whole, tcp) = is_whole(piece.frame);
                assert!(is_whole, "piece {at}");
                let sequence = u32::from_be_bytes(*piece.frame[tcp + 4..].first_chunk().unwrap());
                assert_eq!(sequence, 0xffff_ff00_u32.wrapping_add(1000 * at as u32));
                let (is_first, is_last) = (at == 0, at + 2 == pieces.len());
                let flags = 0x10 | if is_first { CWR } else { 0 } | if is_last { FIN_PSH } else { 0 };
                assert_eq!(piece.frame[tcp + 13], flags);
                bytes.extend(&piece.frame[tcp + 32..]);
            }
            assert_eq!(bytes, frame[frame.len() - payload..]);
            // Who accepts it gets it as it is; and its checksum is completed alike.
            assert!(
                cut_all(&burst, Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN).is_none()
            );
            let mut completed = Vec::new();
            complete(&header, &frame, &mut completed);
            let (ip, tcp) = completed.split_at(header.csum_start.into());
            let addresses = &ip[ip.len() - if is_ipv4 { 8 } else { 32 }..];
            let words = [sum(addresses), 6, tcp.len() as u16, sum(tcp)];
            let words: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
            assert_eq!(sum(&words), 0xffff);
        }
    }

    #[test]
    fn what_would_come_to_too_much_or_is_no_tcp_is_left_alone() {
        let (header, frame) = long(true, 0, 3000);
        let left_alone = |header: NetHeader, frame: &[u8]| {
            let mut burst = PacketBurst::default();
            push(&mut burst, header, &[frame]);
            cut_all(&burst, Offloads::CSUM).unwrap().packet(0) == burst.packet(0)
        };
        assert!(!left_alone(header, &frame));
        assert!(left_alone(NetHeader { gso_size: 1, ..header }, &frame));
        assert!(left_alone(NetHeader { csum_start: 35, ..header }, &frame));
        for (at, byte) in [(12, 9), (14, 0x46), (23, 17), (46, 0x10), (46, 0xf0)] {
            let mut other = frame.clone();
            other[at] = byte;
            let is_cut_elsewhere = (at, byte) == (46, 0xf0);
            assert_eq!(left_alone(header, &other), !is_cut_elsewhere, "{at}: {byte}");
        }
    }
}
