//! An owner with two cards that passes the packets of each on to the other without touching them:
//! the buffer in which one card received a packet is what the other card transmits, and is
//! posted again when it comes back.
//!
//! Owns: the four rings of the two cards, which are in one memory, and their buffers. A buffer
//! belongs to the card that receives into it; it is in that card's receive ring or in the other
//! card's transmit ring, so neither ring is ever too short. What the device wrote before a packet
//! is not passed on: the header is made anew, except for the number of buffers, which is
//! looked at once where VIRTIO_NET_F_MRG_RXBUF was negotiated.

use super::header::HEADER_LEN;
use super::layout::{HEADER_AT, OwnerConfig, OwnerLayout};
use super::{LayoutError, receive_vring, transmit_vring};
use crate::ring::{Buffer, Completion, DriverFault, DriverRing, RingPlaces};
use crate::shm::{SharedMemory, ShmError};

/// What comes before a packet that is transmitted: no offload, and `num_buffers` 0 (5.1.6.2).
const HEADER: [u8; HEADER_LEN] = [0; HEADER_LEN];

/// What a burst came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Crossed {
    /// Packets passed on.
    pub packets: usize,
    /// Their bytes, without headers.
    pub bytes: u64,
    /// Packets that were not whole.
    pub dropped: usize,
    /// Buffers that came back from being transmitted.
    pub returned: usize,
}

/// One card.
#[derive(Debug)]
struct Card {
    places: [RingPlaces; 2],
    receive: DriverRing,
    transmit: DriverRing,
    /// Where the last packet is that it received and that was passed on, and its length.
    last: Option<(u64, u32)>,
    /// Its first buffer, bytes from the start of the memory.
    buffers: u64,
    /// By buffer: the next one of the same packet, while it is being transmitted.
    next: Box<[u16]>,
}

/// Two cards of one owner.
#[derive(Debug)]
pub struct Crossover {
    memory: SharedMemory,
    buffer_len: u32,
    mergeable: bool,
    cards: [Card; 2],
    completions: Vec<Completion>,
    pieces: Vec<Buffer>,
}

/// The buffers of a packet that is being transmitted, as its token: the first, and how many.
#[inline]
fn token(first: u16, count: usize) -> u64 {
    u64::from(first) | (count as u64) << 32
}

/// Why there are no cards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CrossoverError {
    /// They do not fit the memory.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// As above.
    #[error(transparent)]
    Memory(#[from] ShmError),
    /// More packets are to be on their way than a ring has room for.
    #[error(
        "{packets} packets are to be on their way by each card, and {room} can be, half as many as a ring has entries: give fewer, or longer rings"
    )]
    Packets {
        /// How many are to be.
        packets: usize,
        /// How many can be.
        room: u16,
    },
    /// One of them is longer than a buffer.
    #[error(
        "a packet of {len} bytes is to be on its way, and a buffer has room for {room}: give shorter packets, or longer buffers"
    )]
    Length {
        /// Its length, bytes.
        len: usize,
        /// The longest that fits, bytes.
        room: usize,
    },
    /// The configuration has offloads.
    #[error(
        "two cards that pass packets on without their headers can accept no offloads: set `offloads` to false"
    )]
    Offloads,
}

impl Crossover {
    /// Makes fresh rings in `memory` and posts all receive buffers, of a queue pair a card.
    /// Addresses given to the devices are `iova_base` + offset in the memory.
    ///
    /// # Errors
    /// If the memory is too small for two cards like this, or if they were to have offloads: what a
    /// header says of its packet would be lost.
    pub fn new(memory: &SharedMemory, config: OwnerConfig, iova_base: u64) -> Result<Self, CrossoverError> {
        Self::with_packets(memory, config, iova_base, &[])
    }

    /// As [`Self::new`], with some packets on their way already, by each card: they go round for as
    /// long as whoever receives them sends them back.
    ///
    /// # Errors
    /// As there; and if they are more than half as many as a ring has entries, or one does not fit a
    /// buffer.
    pub fn with_packets(
        memory: &SharedMemory,
        config: OwnerConfig,
        iova_base: u64,
        packets: &[&[u8]],
    ) -> Result<Self, CrossoverError> {
        if config.offloads {
            return Err(CrossoverError::Offloads);
        }
        let config = OwnerConfig { pairs: 1, ..config };
        let first = OwnerLayout::new(config, 0, memory.len())?;
        let second = OwnerLayout::new(config, first.end(), memory.len())?;
        let (room, count) = (config.ring_size / 2, packets.len());
        let injected = u16::try_from(count).ok().filter(|injected| *injected <= room);
        let injected = injected.ok_or(CrossoverError::Packets { packets: count, room })?;
        if let Some(long) = packets.iter().find(|packet| packet.len() > config.room()) {
            return Err(CrossoverError::Length { len: long.len(), room: config.room() });
        }
        let card = |layout: &OwnerLayout| {
            let [receive, transmit] = layout.vrings() else {
                return Err(LayoutError::Config(config).into());
            };
            let features = config.ring_features();
            let ring =
                |vring, places| DriverRing::with_features(vring, places, memory, iova_base, None, features);
            Ok::<_, CrossoverError>(Card {
                places: [receive.places, transmit.places],
                receive: ring(receive_vring(0), &receive.places)?,
                transmit: ring(transmit_vring(0), &transmit.places)?,
                last: None,
                buffers: receive.buffers,
                next: vec![0; usize::from(config.ring_size)].into(),
            })
        };
        let mut crossover = Self {
            memory: memory.clone(),
            buffer_len: config.buffer_len,
            mergeable: config.mergeable,
            cards: [card(&first)?, card(&second)?],
            completions: Vec::with_capacity(usize::from(config.ring_size)),
            pieces: Vec::new(),
        };
        let buffer_len = crossover.buffer_len;
        for buffer in injected..config.ring_size {
            crossover.cards.iter_mut().for_each(|card| card.post(buffer_len, buffer));
        }
        for (buffer, packet) in (0..injected).zip(packets) {
            for _ in 0..2 {
                let [card, other] = &mut crossover.cards;
                let place = card.place(buffer_len, buffer);
                memory.write(place, &HEADER)?;
                memory.write(place + HEADER_LEN as u64, packet)?;
                let piece = Buffer::readable(place, (HEADER_LEN + packet.len()) as u32);
                let added = other.transmit.add(&[piece], token(buffer, 1));
                debug_assert!(added.is_ok(), "there are as many descriptors as buffers");
                // The same by the other card; and then they are in their places again.
                crossover.cards.swap(0, 1);
            }
        }
        for card in &mut crossover.cards {
            card.receive.publish();
            card.transmit.publish();
        }
        Ok(crossover)
    }

    /// Where the rings of a card are: the receive ring, the transmit ring.
    pub fn places(&self, card: usize) -> Option<&[RingPlaces; 2]> {
        Some(&self.cards.get(card)?.places)
    }

    /// Passes up to `budget` packets that a card has received on to the other card, and posts the
    /// buffers again that came back from there. Nothing for a card other than 0 and 1.
    ///
    /// The devices may want kicks afterwards: see [`Self::needs_kick`].
    ///
    /// # Errors
    /// A device broke a ring: all four are to be made anew, as buffers of each card are with the
    /// other.
    #[inline]
    pub fn pass(&mut self, card: usize, budget: usize) -> Result<Crossed, DriverFault> {
        let [first, second] = &mut self.cards;
        let (card, other) = match card {
            0 => (first, second),
            1 => (second, first),
            _ => return Ok(Crossed::default()),
        };
        let mut crossed = Crossed::default();
        self.completions.clear();
        other.transmit.reap(usize::from(other.transmit.size()), &mut self.completions)?;
        for Completion { token, .. } in &self.completions {
            let (mut buffer, count) = (*token as u16, (*token >> 32) as u16);
            for _ in 0..count {
                card.post(self.buffer_len, buffer);
                buffer = card.after(buffer);
            }
            crossed.returned += usize::from(count);
        }
        self.completions.clear();
        card.receive.reap(budget, &mut self.completions)?;
        // All headers are on their way before the first is waited for.
        for Completion { token: buffer, .. } in &self.completions {
            self.memory.prefetch_write(card.place(self.buffer_len, *buffer as u16));
        }
        let mut at = 0;
        while let Some(Completion { token: buffer, len }) = self.completions.get(at).copied() {
            let buffer = buffer as u16;
            let place = card.place(self.buffer_len, buffer);
            let whole = len as usize >= HEADER_LEN;
            // The one look at it: a device can change it at any moment.
            let count = match self.mergeable && whole {
                true => usize::from(self.memory.load_u16(place + HEADER_LEN as u64 - 2).unwrap_or(0)),
                false => usize::from(whole),
            };
            let have = self.completions.len() - at;
            if count > have {
                // 5.1.6.4: all buffers of a packet are in the used ring together, so what the
                // budget cut off is there. A fault is found again by the next call.
                let _ = card.receive.reap(count - have, &mut self.completions);
            }
            let have = self.completions.len() - at;
            let taken = count.clamp(1, have);
            let packet = self.completions.get(at..at + taken).unwrap_or_default();
            at += taken;
            let bytes: u64 = packet.iter().map(|completion| u64::from(completion.len)).sum();
            let is_packet = count == taken && packet.iter().all(|completion| completion.len > 0);
            if !is_packet || self.memory.write_array(place, &HEADER).is_err() {
                crossed.dropped += 1;
                packet.iter().for_each(|completion| card.post(self.buffer_len, completion.token as u16));
                continue;
            }
            let token = token(buffer, taken);
            let added = match packet {
                [_] => other.transmit.add_one(Buffer::readable(place, len), token),
                _ => {
                    self.pieces.clear();
                    self.pieces.extend(packet.iter().map(|piece| {
                        Buffer::readable(card.place(self.buffer_len, piece.token as u16), piece.len)
                    }));
                    card.link(packet);
                    other.transmit.add(&self.pieces, token)
                }
            };
            debug_assert!(added.is_ok(), "there are as many descriptors as buffers");
            card.last = Some((place + HEADER_LEN as u64, len - HEADER_LEN as u32));
            crossed.packets += 1;
            crossed.bytes += bytes - HEADER_LEN as u64;
        }
        other.transmit.publish();
        card.receive.publish();
        Ok(crossed)
    }

    #[inline]
    fn ring(&mut self, card: usize, vring: u16) -> Option<&mut DriverRing> {
        let card = self.cards.get_mut(card)?;
        Some(if vring == receive_vring(0) { &mut card.receive } else { &mut card.transmit })
    }

    /// Makes `frame` a copy of the last packet, or its first buffer, that a card received and that was
    /// passed on: for who looks at one now and then. Whether there is one.
    pub fn last_packet(&self, card: usize, frame: &mut Vec<u8>) -> bool {
        let Some((place, len)) = self.cards.get(card).and_then(|card| card.last) else { return false };
        frame.resize(len as usize, 0);
        self.memory.read(place, frame).is_ok()
    }

    /// Whether the device wants a kick for what was published on a vring of a card since this was
    /// last asked. To be asked after each burst, and once after [`Self::new`].
    #[inline]
    pub fn needs_kick(&mut self, card: usize, vring: u16) -> bool {
        self.ring(card, vring).is_some_and(DriverRing::needs_kick)
    }

    /// Asks both devices for calls, or for none. Returns whether there is something to do already:
    /// who gets `true` must not sleep. To be asked for before each sleep.
    ///
    /// What is being transmitted is called for only where most buffers are in it, and then once
    /// for most of them: with enough others posted a card goes on without.
    ///
    /// # Errors
    /// A device broke a ring.
    pub fn set_calls(&mut self, enabled: bool) -> Result<bool, DriverFault> {
        let mut work = false;
        for card in &mut self.cards {
            work |= card.receive.set_calls(enabled)?;
            let in_flight = card.transmit.in_flight();
            work |= match enabled && in_flight > card.transmit.size() / 2 {
                true => card.transmit.set_calls_after(in_flight / 4 * 3)?,
                false => card.transmit.set_calls(false)? && !enabled,
            };
        }
        Ok(work)
    }

    /// Buffers that the two devices are transmitting.
    pub fn in_flight(&self) -> u16 {
        self.cards.iter().map(|card| card.transmit.in_flight()).sum()
    }
}

impl Card {
    #[inline]
    fn place(&self, buffer_len: u32, buffer: u16) -> u64 {
        self.buffers + u64::from(buffer) * u64::from(buffer_len) + HEADER_AT as u64
    }

    #[inline]
    fn post(&mut self, buffer_len: u32, buffer: u16) {
        // A layout's buffers have room behind their header.
        let room = buffer_len - HEADER_AT as u32;
        let added =
            self.receive.add_one(Buffer::writable(self.place(buffer_len, buffer), room), buffer.into());
        debug_assert!(added.is_ok(), "there are as many buffers as descriptors");
    }

    #[inline]
    fn after(&self, buffer: u16) -> u16 {
        self.next.get(usize::from(buffer)).copied().unwrap_or(0)
    }

    /// Notes which buffers a packet has.
    fn link(&mut self, packet: &[Completion]) {
        for (piece, next) in packet.iter().zip(packet.iter().skip(1)) {
            if let Some(link) = self.next.get_mut(piece.token as usize) {
                *link = next.token as u16;
            }
        }
    }
}
