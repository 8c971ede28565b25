//! A virtio network card (virtio 1.3, 5.1) through VFIO: what SmartNICs offer as virtual functions, and
//! QEMU's SR-IOV virtio-net. One pair of queues, no control queue: it receives all that reaches it.
//!
//! Owns: the card, its rings, and what its IOMMU lets it reach: these rings, a header of zeros that goes
//! before each packet that it sends, and the ranges of the window that it was given.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF};

use super::{Lent, Nic, NicError, Piece, Way};
use crate::net::HEADER_LEN;
use crate::ring::{
    AddError, Buffer, Completion, DriverFault, DriverRing, IndirectTables, RingFeatures, RingPlaces,
};
use crate::shm::SharedMemory;
use crate::translate::{Access, Mapping};
use crate::transport::TransportError;
use crate::transport::card::{Card, Mapped, NEEDS_RESET, Pages};
use crate::transport::sys::event::Event;

/// Where the card finds its rings: below 4 GiB, away from 0 and from the interrupts' addresses.
const OWN_BUS: u64 = 16 << 20;
/// Where it finds the window's first byte.
const WINDOW_BUS: u64 = 4 << 30;
/// Entries of each ring: what every card has.
const ENTRIES: u16 = 256;
/// Pieces of a buffer that an indirect table has room for.
const TABLE_ENTRIES: u16 = 20;
/// The longest buffer in pieces, with the header.
const MAX_PIECES: usize = 64;
/// The header of zeros, bytes from the start of the card's own memory.
const HEADER: u64 = 0;
/// The card's queues.
const QUEUES: [Way; 2] = [Way::Receive, Way::Send];

/// The card. It is reset when dropped, and before the memory goes that it reaches.
pub struct VirtioNet {
    card: Card,
    reached: BTreeMap<u64, Mapped>,
    own: Pages,
    _own: Mapped,
    rings: Option<[DriverRing; 2]>,
    events: Vec<Event>,
    mergeable: bool,
    running: bool,
    pieces: Vec<Buffer>,
}

const fn at(way: Way) -> usize {
    match way {
        Way::Receive => 0,
        Way::Send => 1,
    }
}

/// Where the rings and their tables are in the card's own memory, and its length.
fn layout() -> ([RingPlaces; 2], [IndirectTables; 2], u64) {
    let (receive, end) = RingPlaces::at(4096, ENTRIES);
    let (send, end) = RingPlaces::at(end, ENTRIES);
    let len = IndirectTables::len(TABLE_ENTRIES, ENTRIES);
    let tables = [end, end + len].map(|offset| IndirectTables { offset, entries: TABLE_ENTRIES });
    ([receive, send], tables, end + 2 * len)
}

impl VirtioNet {
    /// Takes the card at a PCI address. Binds it to vfio-pci if no driver has it.
    ///
    /// # Errors
    /// What stands in the way, and what to do about it.
    pub fn open(address: &str, interrupts: bool) -> Result<Self, NicError> {
        let card = Card::open_function(address)?;
        let own = card.pages(layout().2)?;
        let mapped = card.map(OWN_BUS, &own, Access::READ_WRITE)?;
        let event = |source| TransportError::Event {
            device: card.name().to_owned(),
            what: "an eventfd for an interrupt",
            source,
        };
        let count = if interrupts { card.vectors().min(QUEUES.len() as u32) } else { 0 };
        let events = (0..count).map(|_| Event::new()).collect::<Result<Vec<_>, _>>().map_err(event)?;
        if !events.is_empty() {
            card.arm(&events)?;
        }
        Ok(Self {
            card,
            reached: BTreeMap::new(),
            own,
            _own: mapped,
            rings: None,
            events,
            mergeable: false,
            running: false,
            pieces: Vec::new(),
        })
    }

    /// Its Ethernet address.
    pub fn mac(&self) -> [u8; 6] {
        self.card.mac()
    }

    fn broken(&self, source: DriverFault) -> NicError {
        NicError::Ring { name: self.card.name().to_owned(), source }
    }
}

impl Nic for VirtioNet {
    fn name(&self) -> &str {
        self.card.name()
    }

    fn reach(&mut self, window: &SharedMemory, range: &Mapping) -> Result<(), NicError> {
        let part = window.part(range.window_offset, range.len).map_err(|_| NicError::Failed {
            name: self.card.name().to_owned(),
            why: "a range is not in the window",
        })?;
        let mapped = self.card.map_shared(self.bus(range.window_offset), part, range.access)?;
        self.reached.insert(range.window_offset, mapped);
        Ok(())
    }

    fn forget(&mut self, range: &Mapping) -> Result<(), NicError> {
        match self.reached.remove(&range.window_offset) {
            Some(mapped) => Ok(mapped.unmap()?),
            None => Ok(()),
        }
    }

    fn bus(&self, window_offset: u64) -> u64 {
        WINDOW_BUS + window_offset
    }

    fn start(&mut self, mergeable: bool) -> Result<(), NicError> {
        let understood = RingFeatures { indirect: true, event_idx: true, ..RingFeatures::default() }.bits()
            | u64::from(mergeable) << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_NET_F_MAC;
        let features = self.card.negotiate(1 << VIRTIO_F_VERSION_1, understood)?;
        self.mergeable = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let (places, tables, _) = layout();
        let (memory, ring) = (self.own.memory(), RingFeatures::of(features));
        let tables = tables.map(|tables| ring.indirect.then_some(tables));
        let make = |queue: usize| {
            let (places, tables) = (&places[queue], tables[queue]);
            DriverRing::with_features(queue as u16, places, &memory, OWN_BUS, tables, ring)
        };
        let [receive, send] = [make(0), make(1)];
        let outside = |_| NicError::Failed {
            name: self.card.name().to_owned(),
            why: "its rings are not in their memory",
        };
        self.rings = Some([receive.map_err(outside)?, send.map_err(outside)?]);
        self.set_interrupts(false)?;
        let infos = places.map(|places| places.info(OWN_BUS));
        self.card.drive(&infos, self.events.len() as u16)?;
        self.running = true;
        Ok(())
    }

    fn is_mergeable(&self) -> bool {
        self.mergeable
    }

    fn lend(&mut self, way: Way, pieces: &[Piece], token: u64) -> Lent {
        let Some(rings) = &mut self.rings else { return Lent::NoRoom };
        // The ring adds the place of its own memory to what it is given.
        let offset = |bus: u64| bus.wrapping_sub(OWN_BUS);
        self.pieces.clear();
        if way == Way::Send {
            self.pieces.push(Buffer::readable(HEADER, HEADER_LEN as u32));
        }
        self.pieces.extend(pieces.iter().map(|piece| Buffer {
            offset: offset(piece.bus),
            len: piece.len,
            writable: way == Way::Receive,
        }));
        if self.pieces.len() > MAX_PIECES {
            return Lent::Never;
        }
        match rings[at(way)].add(&self.pieces, token) {
            Ok(()) => Lent::Yes,
            Err(AddError::Full) => Lent::NoRoom,
            Err(AddError::Invalid) => Lent::Never,
        }
    }

    fn publish(&mut self, way: Way) {
        let Some(rings) = &mut self.rings else { return };
        let ring = &mut rings[at(way)];
        ring.publish();
        if self.running && ring.needs_kick() {
            self.card.kick(ring.vring());
        }
    }

    fn collect(&mut self, way: Way, into: &mut Vec<Completion>) -> Result<(), NicError> {
        let Some(rings) = &mut self.rings else { return Ok(()) };
        // All that there is: a packet in several buffers is shown by one store of the card's.
        let reaped = rings[at(way)].reap(usize::from(ENTRIES), into);
        reaped.map(drop).map_err(|source| self.broken(source))
    }

    fn held(&self) -> usize {
        let rings = self.rings.iter().flatten().filter(|_| self.running);
        rings.map(|ring| usize::from(ring.in_flight())).sum()
    }

    fn stop(&mut self) -> Result<(), NicError> {
        self.running = false;
        Ok(self.card.stop()?)
    }

    fn check(&self) -> Result<(), NicError> {
        self.card.check()?;
        let failed = |why| Err(NicError::Failed { name: self.card.name().to_owned(), why });
        match self.card.status() {
            _ if !self.running => Ok(()),
            u8::MAX => failed("the card answers no more"),
            0 => failed("the card was reset by somebody else"),
            status if status & NEEDS_RESET != 0 => failed("the card says that it needs a reset"),
            _ => Ok(()),
        }
    }

    fn interrupts(&self) -> Vec<BorrowedFd<'_>> {
        self.events.iter().map(AsFd::as_fd).collect()
    }

    fn set_interrupts(&mut self, enabled: bool) -> Result<bool, NicError> {
        let mut any = false;
        for ring in self.rings.iter_mut().flatten() {
            match ring.set_calls(enabled) {
                Ok(there) => any |= there,
                Err(source) => return Err(self.broken(source)),
            }
        }
        Ok(any)
    }
}
