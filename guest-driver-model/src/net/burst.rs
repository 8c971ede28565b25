//! Private storage of a burst of received packets. Each was copied out of shared
//! memory once; nobody but this program can change it any more.

use std::fmt;

use zerocopy::IntoBytes;

use super::header::{HEADER_LEN, NetHeader};

/// Frames start at multiples of it, bytes: a cache line, and the widest register.
const LINE: usize = 64;
/// Where the header is in the line before the frame.
const HEADER_AT: usize = LINE - HEADER_LEN;

#[derive(
    Clone, Copy, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// A packet: received, or to be transmitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'burst> {
    /// The header that came with it; all zero where no offload was negotiated, but for the number of
    /// buffers of what a device sent. The other side wrote it: `tx_burst` judges it, and who does
    /// anything else by it has to ([`NetHeader::checked`]).
    pub header: NetHeader,
    /// The Ethernet frame.
    pub frame: &'burst [u8],
}

/// A frame that leaves nothing to its receiver.
impl<'a> From<&'a [u8]> for Packet<'a> {
    #[inline]
    fn from(frame: &'a [u8]) -> Self {
        Self { header: NetHeader::default(), frame }
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Where the frame starts in the storage; the header's bytes, if they were needed, are
    /// right before it.
    start: usize,
    /// Length of the frame.
    len: usize,
    header: NetHeader,
}

/// A burst of received packets, one behind the other in one storage. Meant to be cleared and
/// filled again: the storage grows to the largest burst and stays.
#[derive(Clone, Default)]
pub struct PacketBurst {
    storage: Vec<Line>,
    entries: Vec<Entry>,
    /// The line before the next packet's frame, bytes.
    tail: usize,
}

impl fmt::Debug for PacketBurst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl PacketBurst {
    /// Room for `packets` packets of up to `len` bytes each without an allocation.
    pub fn with_capacity(packets: usize, len: usize) -> Self {
        let lines = 1 + len.div_ceil(LINE);
        Self {
            storage: vec![Line([0; LINE]); packets * lines],
            entries: Vec::with_capacity(packets),
            tail: 0,
        }
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
        self.entries.get(at).map(|entry| self.packet_of(entry))
    }

    #[inline]
    fn packet_of(&self, entry: &Entry) -> Packet<'_> {
        // An entry is made when its bytes are there.
        let frame = self.storage.as_bytes().get(entry.start..entry.start + entry.len).unwrap_or_default();
        Packet { header: entry.header, frame }
    }

    /// All packets, in the order of arrival: what `tx_burst` takes.
    #[inline]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Packet<'_>> {
        self.entries.iter().map(|entry| self.packet_of(entry))
    }

    /// All frames, in the order of arrival, without their headers: `tx_burst` takes them, too.
    #[inline]
    pub fn frames(&self) -> impl Iterator<Item = &[u8]> {
        self.iter().map(|packet| packet.frame)
    }

    /// Appends a packet whose header is known already. `fill` is given room for `len` bytes
    /// of its frame, at the start of a cache line; what it fails for is not appended.
    #[inline]
    pub(crate) fn push<E>(
        &mut self,
        header: NetHeader,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = self.tail + LINE;
        let end = start + len;
        if end > self.storage.len() * LINE {
            self.grow(end);
        }
        // In bounds after `grow`.
        fill(self.storage.as_mut_bytes().get_mut(start..end).unwrap_or_default())?;
        self.entries.push(Entry { start, len, header });
        self.tail = end.next_multiple_of(LINE);
        Ok(())
    }

    /// Room for `len` more bytes behind the `filled` ones of the packet being received, of
    /// which the first are the header's.
    #[inline]
    pub(crate) fn room(&mut self, filled: usize, len: usize) -> &mut [u8] {
        let start = self.tail + HEADER_AT + filled;
        let end = start + len;
        if end > self.storage.len() * LINE {
            self.grow(end);
        }
        // In bounds after `grow`.
        self.storage.as_mut_bytes().get_mut(start..end).unwrap_or_default()
    }

    #[cold]
    fn grow(&mut self, end: usize) {
        self.storage.resize(end.div_ceil(LINE).next_power_of_two(), Line([0; LINE]));
    }

    /// Room for `len` bytes of a packet received, from `from` on (the header included),
    /// whose bytes were not known before.
    #[inline]
    pub(crate) fn room_of(&mut self, at: usize, from: usize, len: usize) -> &mut [u8] {
        let entry = self.entries.get(at).filter(|entry| from + len <= HEADER_LEN + entry.len);
        let start = entry.map(|entry| entry.start - HEADER_LEN + from);
        start.and_then(|start| self.storage.as_mut_bytes().get_mut(start..start + len)).unwrap_or_default()
    }

    /// The header of a packet, which a driver wrote, was not known when it was ended.
    pub(crate) fn read_header(&mut self, at: usize) {
        if let Some(entry) = self.entries.get_mut(at) {
            let from = self.storage.as_bytes().get(entry.start - HEADER_LEN..);
            let header = from.and_then(|bytes| bytes.first_chunk::<HEADER_LEN>());
            entry.header = header.map(NetHeader::from_bytes).unwrap_or_default().of_driver();
        }
    }

    /// Forgets all packets but the first `count`.
    #[inline]
    pub(crate) fn truncate(&mut self, count: usize) {
        if let Some(first) = self.entries.get(count) {
            self.tail = first.start - LINE;
            self.entries.truncate(count);
        }
    }

    /// The header of the packet being received, of which enough is filled.
    #[inline]
    pub(crate) fn pending_header(&self) -> Option<NetHeader> {
        self.storage
            .as_bytes()
            .get(self.tail + HEADER_AT..)?
            .first_chunk::<HEADER_LEN>()
            .map(NetHeader::from_bytes)
    }

    /// Ends the packet being received: header and frame are `len` bytes, and what the header has to
    /// say is this.
    #[inline]
    pub(crate) fn finish(&mut self, len: usize, header: NetHeader) {
        debug_assert!(len >= HEADER_LEN);
        self.entries.push(Entry { start: self.tail + LINE, len: len - HEADER_LEN, header });
        self.tail += (HEADER_AT + len).next_multiple_of(LINE);
    }
}
