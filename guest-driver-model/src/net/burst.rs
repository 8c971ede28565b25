//! Private storage of a burst of received packets. Each was copied out of shared
//! memory once; nobody but this program can change it any more.

use super::header::{HEADER_LEN, NetHeader};

/// Packets start at multiples of it, bytes: a cache line.
const ALIGN: usize = 64;

/// A received packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'burst> {
    /// The header that came with it.
    pub header: NetHeader,
    /// The Ethernet frame.
    pub frame: &'burst [u8],
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Where header and frame start in the storage.
    start: usize,
    /// Length of header and frame, at least that of a header.
    len: usize,
}

/// A burst of received packets, contiguous in one storage. Meant to be cleared and
/// filled again: the storage grows to the largest burst and stays.
#[derive(Clone, Debug, Default)]
pub struct PacketBurst {
    storage: Vec<u8>,
    entries: Vec<Entry>,
    /// Where the next packet starts.
    tail: usize,
}

impl PacketBurst {
    /// Room for `packets` packets of up to `len` bytes each without an allocation.
    pub fn with_capacity(packets: usize, len: usize) -> Self {
        let slot = (len + HEADER_LEN).next_multiple_of(ALIGN);
        Self { storage: vec![0; packets * slot], entries: Vec::with_capacity(packets), tail: 0 }
    }

    /// Forgets all packets, keeps the room.
    #[inline]
    pub fn clear(&mut self) {
        self.entries.clear();
        self.tail = 0;
    }

    /// How many packets there are.
    #[inline]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no packet.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The packet at a position, in the order of arrival.
    #[inline]
    pub fn packet(&self, at: usize) -> Option<Packet<'_>> {
        let entry = self.entries.get(at)?;
        let bytes = self.storage.get(entry.start..entry.start + entry.len)?;
        let (header, frame) = bytes.split_first_chunk::<HEADER_LEN>()?;
        Some(Packet { header: NetHeader::from_bytes(header), frame })
    }

    /// All packets, in the order of arrival.
    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = Packet<'_>> {
        (0..self.len()).map_while(|at| self.packet(at))
    }

    /// All frames, in the order of arrival: what `tx_burst` takes.
    #[inline]
    pub fn frames(&self) -> impl Iterator<Item = &[u8]> {
        self.iter().map(|packet| packet.frame)
    }

    /// Room for `len` more bytes behind the `filled` ones of the packet being
    /// received.
    #[inline]
    pub(crate) fn room(&mut self, filled: usize, len: usize) -> &mut [u8] {
        let start = self.tail + filled;
        let end = start + len;
        if end > self.storage.len() {
            self.grow(end);
        }
        // In bounds after `grow`.
        self.storage.get_mut(start..end).unwrap_or_default()
    }

    #[cold]
    fn grow(&mut self, end: usize) {
        self.storage.resize(end.next_power_of_two(), 0);
    }

    /// Room for `len` bytes of a packet received, from `from` on (the header included),
    /// whose bytes were not known before.
    #[inline]
    pub(crate) fn room_of(&mut self, at: usize, from: usize, len: usize) -> &mut [u8] {
        let entry = self.entries.get(at).filter(|entry| from + len <= entry.len);
        let start = entry.map(|entry| entry.start + from);
        start.and_then(|start| self.storage.get_mut(start..start + len)).unwrap_or_default()
    }

    /// Forgets all packets but the first `count`.
    #[inline]
    pub(crate) fn truncate(&mut self, count: usize) {
        if let Some(first) = self.entries.get(count) {
            self.tail = first.start;
            self.entries.truncate(count);
        }
    }

    /// The header of the packet being received, of which enough is filled.
    #[inline]
    pub(crate) fn pending_header(&self) -> Option<NetHeader> {
        self.storage.get(self.tail..)?.first_chunk::<HEADER_LEN>().map(NetHeader::from_bytes)
    }

    /// Ends the packet being received: header and frame are `len` bytes.
    #[inline]
    pub(crate) fn finish(&mut self, len: usize) {
        debug_assert!(len >= HEADER_LEN);
        self.entries.push(Entry { start: self.tail, len });
        self.tail += len.next_multiple_of(ALIGN);
    }
}
