//! Packets with headers: of any content, and long TCP segments as a kernel makes them, nearly.

use guest_driver_model::net::{NetHeader, Packet};

use crate::input::Input;

const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const TCP: u8 = 6;

/// A packet to be transmitted.
#[derive(Debug)]
pub struct Spec {
    /// What it says of the frame.
    pub header: NetHeader,
    /// The frame.
    pub frame: Vec<u8>,
}

impl Spec {
    /// As ports take it.
    pub fn packet(&self) -> Packet<'_> {
        Packet { header: self.header, frame: &self.frame }
    }
}

/// Up to five.
pub fn packets(input: &mut Input<'_>) -> Vec<Spec> {
    (0..=input.below(5)).map(|_| any_packet(input)).collect()
}

/// Of any length, with any header.
pub fn any_packet(input: &mut Input<'_>) -> Spec {
    let choice = input.byte();
    if choice >= 0xe0 {
        return tcp(input);
    }
    let len = [60, 64, 1500, 3000, 9000, 66_000, 0, 14][usize::from(choice & 7)] + usize::from(input.byte());
    let mut header = NetHeader::default();
    if choice & 8 != 0 {
        header = NetHeader {
            flags: input.byte() & 7,
            gso_type: input.pick(&[0, 1, 3, 4, 5, 0x81, 0x84]),
            hdr_len: u16::from(input.byte()),
            gso_size: input.word(),
            csum_start: u16::from(input.byte()),
            csum_offset: u16::from(input.byte()),
            num_buffers: input.word(),
        };
    }
    let mut frame = vec![0; len];
    let start = input.bytes(64);
    let known = start.len().min(len);
    frame[..known].copy_from_slice(&start[..known]);
    Spec { header, frame }
}

/// A TCP segment that is to be cut, or to have its checksum completed; one byte of it may be any.
pub fn tcp(input: &mut Input<'_>) -> Spec {
    let choice = input.byte();
    let is_ipv4 = choice & 1 == 0;
    let mut frame = vec![2; 12];
    (0..choice >> 1 & 3).for_each(|_| frame.extend([0x81, 0, 0, 5]));
    let network = frame.len() + 2;
    if is_ipv4 {
        frame.extend([
            0x08, 0x00, 0x45, 0, 0, 0, 0xff, 0xff, 0x40, 0, 64, TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, TCP, 64]);
        frame.extend([0xfd; 32]);
    }
    let start = frame.len();
    frame.extend([0, 80, 1, 0, 0xff, 0xff, 0xff, 0, 0, 0, 0, 1, 0x50, 0x99, 1, 0, 0, 0, 0, 0]);
    let headers = frame.len();
    let payload = [0, 1, 100, 1448, 1449, 4000, 7000, 60_000][usize::from(choice >> 3 & 7)];
    frame.resize(headers + payload, choice);
    let is_cut = choice & 0x40 != 0;
    let kind = if is_ipv4 { GSO_TCPV4 } else { GSO_TCPV6 };
    let header = NetHeader {
        flags: NEEDS_CSUM,
        gso_type: if is_cut { kind | choice & 0x80 } else { 0 },
        hdr_len: headers as u16,
        gso_size: if is_cut { [1448, 48, 47, 536][usize::from(input.byte() & 3)] } else { 0 },
        csum_start: start as u16,
        csum_offset: 16,
        num_buffers: 0,
    };
    match input.byte() {
        0..0xc0 => {}
        at => {
            let at = usize::from(at & 0x3f) % (headers - network) + network;
            frame[at] = input.byte();
        }
    }
    Spec { header, frame }
}
