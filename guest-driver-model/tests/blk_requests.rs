//! The peer's half of an owner's disk: requests of an honest owner, of one that errs, and of one whose
//! memory comes and goes.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::io;

use guest_driver_model::blk::request::{HEADER_LEN, ID_LEN, Limits, MAX_DATA};
use guest_driver_model::blk::{BlkPort, Disk};
use guest_driver_model::control::{Exchange, Nobody, Outcome, Request};
use guest_driver_model::link::Access;
use guest_driver_model::port::{Port, PortError};
use guest_driver_model::ring::split::layout::used_len;
use guest_driver_model::ring::{Buffer, Completion, DriverRing, Fault, RingFeatures, RingPlaces};
use net_support::device::{Device, Mode, Rule, willing};
use net_support::{IOVA, LinkWriter, TwoViews, frame, link_page};
use proptest::collection::vec;
use proptest::prelude::{ProptestConfig, any, prop_oneof, proptest};
use proptest::strategy::{Just, Strategy};
use vhost_pci_device::abi::{self, FaultKind};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// VIRTIO_BLK_F_FLUSH and VIRTIO_F_VERSION_1.
const KNOWS_FLUSH: u64 = 1 << 9;
const VERSION_1: u64 = 1 << 32;
const PLATFORM: u64 = 1 << 33;

const SECTORS: u64 = 2048;
const RING: u16 = 64;
/// Where requests are in the owner's memory: behind the ring.
const BUFFERS: u64 = 64 << 10;
const MEMORY: u64 = 4 << 20;

/// A disk in memory, of which some sectors fail.
struct Memory {
    bytes: Vec<u8>,
    read_only: bool,
    flushed: usize,
    /// Writes since the last flush.
    unflushed: usize,
    fails: bool,
    /// Called with each access.
    hook: Box<dyn FnMut()>,
}

impl Memory {
    fn new() -> Self {
        let bytes = frame(7, (512 * SECTORS) as usize);
        Self { bytes, read_only: false, flushed: 0, unflushed: 0, fails: false, hook: Box::new(|| {}) }
    }

    fn access(&mut self) -> io::Result<()> {
        (self.hook)();
        if self.fails { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
    }
}

impl Disk for Memory {
    fn limits(&self) -> Limits {
        Limits { len: self.bytes.len() as u64, read_only: self.read_only }
    }

    fn id(&self) -> [u8; ID_LEN] {
        *b"a disk's name\0\0\0\0\0\0\0"
    }

    fn read_at(&mut self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.access()?;
        into.copy_from_slice(&self.bytes[at as usize..][..into.len()]);
        Ok(())
    }

    fn write_at(&mut self, at: u64, from: &[u8]) -> io::Result<()> {
        self.access()?;
        self.unflushed += 1;
        self.bytes[at as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.access()?;
        self.flushed += 1;
        self.unflushed = 0;
        Ok(())
    }
}

/// An owner's driver with one vring, and the link page that tells of it.
struct Owner {
    views: TwoViews,
    ring: DriverRing,
    writer: LinkWriter,
    next: u64,
}

/// Where a request's parts are, in the owner's memory.
#[derive(Clone, Debug)]
struct Sent {
    data: Vec<Buffer>,
    status: Option<u64>,
}

impl Owner {
    fn new(features: u64) -> Self {
        let views = TwoViews::new(MEMORY);
        let (places, end) = RingPlaces::at(0, RING);
        assert!(end <= BUFFERS);
        let ring_features = RingFeatures::of(features);
        let ring = DriverRing::with_features(0, &places, &views.owner, IOVA, None, ring_features).unwrap();
        let mut writer =
            LinkWriter::new(features | VERSION_1, vec![views.mapping()], vec![places.info(IOVA)]);
        writer.owner_device = 2;
        writer.config = SECTORS.to_le_bytes().to_vec();
        writer.write(&views.window);
        Self { views, ring, writer, next: BUFFERS }
    }

    fn port(&self) -> BlkPort {
        let page = link_page(&self.views.window);
        BlkPort::open(&self.views.window, &page, &page.snapshot().unwrap()).unwrap()
    }

    /// Lays `len` bytes out in pieces of at most `cut` bytes, no two of which touch.
    fn lay_out(&mut self, len: usize, cut: usize, writable: bool) -> Vec<Buffer> {
        let mut pieces = Vec::new();
        let mut left = len;
        while left > 0 {
            let piece = left.min(cut);
            pieces.push(Buffer { offset: self.next, len: piece as u32, writable });
            self.next += piece as u64 + 24;
            left -= piece;
        }
        pieces
    }

    /// Makes a request available. The readable bytes are `header` and `out`, the writable ones `room` and
    /// the status, if there is one.
    fn send(&mut self, header: &[u8], out: &[u8], room: usize, cut: usize, has_status: bool) -> Sent {
        let readable = [header, out].concat();
        let mut pieces = self.lay_out(readable.len(), cut, false);
        let mut at = 0;
        for piece in &pieces {
            self.views.owner.write(piece.offset, &readable[at..at + piece.len as usize]).unwrap();
            at += piece.len as usize;
        }
        let writable = self.lay_out(room + usize::from(has_status), cut, true);
        let status = writable.last().filter(|_| has_status).map(|last| last.offset + u64::from(last.len) - 1);
        if let Some(status) = status {
            self.views.owner.write(status, &[0xee]).unwrap();
        }
        pieces.extend(&writable);
        self.ring.add(&pieces, 0).unwrap();
        self.ring.publish();
        Sent { data: writable, status }
    }

    fn ask(&mut self, kind: u32, sector: u64, out: &[u8], room: usize, cut: usize) -> Sent {
        self.send(&header(kind, sector), out, room, cut, true)
    }

    fn reap(&mut self) -> Vec<Completion> {
        let mut completions = Vec::new();
        self.ring.reap(RING.into(), &mut completions).unwrap();
        completions
    }

    fn status(&self, sent: &Sent) -> u8 {
        self.views.owner.read_array::<1>(sent.status.unwrap()).unwrap()[0]
    }

    fn data(&self, sent: &Sent) -> Vec<u8> {
        let read = |piece: &Buffer| {
            let mut bytes = vec![0; piece.len as usize];
            self.views.owner.read(piece.offset, &mut bytes).unwrap();
            bytes
        };
        let mut bytes: Vec<u8> = sent.data.iter().flat_map(read).collect();
        bytes.pop();
        bytes
    }

    /// The link is another one.
    fn change_link(&mut self) {
        self.writer.generation += 2;
        self.writer.table_generation += 2;
        self.writer.write(&self.views.window);
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0xff; 4], &sector.to_le_bytes()].concat()
}

/// Serves all that there is. Of a device that puts off what it is asked for, in the end.
fn serve(port: &mut BlkPort, exchange: &mut dyn Exchange, disk: &mut Memory) -> Result<usize, Fault> {
    let (mut served, mut is_last_look) = (0, false);
    loop {
        match (port.serve(exchange, 0, disk)?, port.pause()) {
            (true, _) => served += 1,
            (false, Some(pause)) => std::thread::sleep(pause),
            (false, None) if is_last_look => return Ok(served),
            // A pause may have ended before it was looked at.
            (false, None) => {
                is_last_look = true;
                continue;
            }
        }
        is_last_look = false;
    }
}

/// One request by itself: its status, and how many bytes were written.
fn one(owner: &mut Owner, port: &mut BlkPort, disk: &mut Memory, sent: &Sent) -> (u8, u32) {
    assert_eq!(serve(port, &mut Nobody, disk), Ok(1));
    let completions = owner.reap();
    assert_eq!(completions.len(), 1);
    (owner.status(sent), completions[0].len)
}

#[derive(Clone, Debug)]
enum Step {
    Read(u64, u64),
    Write(u64, u64),
    Flush,
    Id,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = || (0..SECTORS, prop_oneof![1..9_u64, 1..300_u64]);
    let inside = |(at, len): (u64, u64)| (at, len.min(SECTORS - at));
    let step = prop_oneof![
        place().prop_map(inside).prop_map(|(at, len)| Step::Read(at, len)),
        place().prop_map(inside).prop_map(|(at, len)| Step::Write(at, len)),
        Just(Step::Flush),
        Just(Step::Id),
    ];
    vec(step, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// In either format, cut anywhere, with the window showing everything, or some pages, or nothing but the
    /// ring; and with a device that puts off a request now and then.
    #[test]
    fn a_disk_has_what_was_written_to_it_last(
        steps in steps(),
        (packed, in_order) in any::<(bool, bool)>(),
        cut in prop_oneof![Just(usize::MAX), 5000_usize..20_000],
        reach in prop_oneof![Just(None), Just(Some(Mode::Copy)), Just(Some(Mode::Map))],
        shown in vec((0..MEMORY / 4096, 0_u32..4), 0..40),
        patience in 20_u64..60,
    ) {
        let features = RingFeatures { packed, in_order, event_idx: true, indirect: false }.bits();
        let mut owner = Owner::new(features | KNOWS_FLUSH | if reach.is_some() { PLATFORM } else { 0 });
        let mut device = None;
        if let Some(mode) = reach {
            let (mut asked, mut patience) = (0, patience);
            let rule: Rule = Box::new(move |_: &Request| {
                asked += 1;
                if asked < patience {
                    return Outcome::Done;
                }
                // More rarely each time: of a request that takes more than it has patience one is always put off.
                (asked, patience) = (0, 2 * patience);
                Outcome::Later
            });
            owner.writer.status |= abi::LINK_S_IOMMU | if mode == Mode::Copy { abi::LINK_S_COPY } else { 0 };
            let mut apart = Device::new(&owner.views, owner.writer.clone(), rule);
            let ring = RingPlaces::at(0, RING).0;
            apart.show(0, ring.used + u64::from(used_len(RING)), Access::READ_WRITE);
            for (page, access) in shown {
                apart.show(page * 4096, 4096, Access::from_bits(access));
            }
            device = Some(apart);
        }
        let (mut port, mut disk) = (owner.port(), Memory::new());
        let mut model = disk.bytes.clone();
        for (number, step) in steps.iter().enumerate() {
            owner.next = BUFFERS;
            let flushed = disk.flushed;
            let sent = match *step {
                Step::Read(at, len) => owner.ask(IN, at, &[], 512 * len as usize, cut),
                Step::Write(at, len) => {
                    let bytes = frame(number as u64, 512 * len as usize);
                    model[512 * at as usize..][..bytes.len()].copy_from_slice(&bytes);
                    owner.ask(OUT, at, &bytes, 0, cut)
                }
                Step::Flush => owner.ask(FLUSH, 0, &[], 0, cut),
                Step::Id => owner.ask(GET_ID, 0, &[], 20, cut),
            };
            let served = match &mut device {
                Some(device) => serve(&mut port, device, &mut disk),
                None => serve(&mut port, &mut Nobody, &mut disk),
            };
            assert_eq!(served, Ok(1));
            let done = owner.reap();
            assert_eq!((done.len(), owner.status(&sent)), (1, OK));
            match *step {
                Step::Read(at, len) => {
                    assert_eq!(u64::from(done[0].len), 512 * len + 1);
                    assert!(owner.data(&sent) == model[512 * at as usize..][..512 * len as usize]);
                }
                Step::Write(..) => assert!(disk.bytes == model),
                // One whose status was put off is carried out once more.
                Step::Flush => {
                    assert!(disk.flushed == flushed + 1 || device.is_some() && disk.flushed > flushed);
                    assert_eq!(disk.unflushed, 0);
                }
                Step::Id => assert_eq!(owner.data(&sent), disk.id()),
            }
        }
        if let Some(device) = device.filter(|_| reach == Some(Mode::Copy)) {
            assert!(device.requests() > 0 || !device.table.is_empty());
        }
    }
}

#[test]
fn what_cannot_be_is_refused_and_the_next_request_is_served() {
    let mut owner = Owner::new(KNOWS_FLUSH);
    let (mut port, mut disk) = (owner.port(), Memory::new());
    let before = disk.bytes.clone();
    let sector = vec![9; 512];
    let mut refused = 0;
    for (kind, at, out, room, status) in [
        (OUT, SECTORS, &sector[..], 0, IO_ERROR),
        (OUT, u64::MAX, &sector, 0, IO_ERROR),
        (OUT, u64::MAX / 512 + 1, &sector, 0, IO_ERROR),
        (OUT, 0, &sector[1..], 0, IO_ERROR),
        (IN, SECTORS - 1, &[], 1024, IO_ERROR),
        (IN, 0, &[], 511, IO_ERROR),
        (2, 0, &sector, 512, UNSUPPORTED),
        (11, 0, &sector[..16], 0, UNSUPPORTED),
        (u32::MAX, 0, &[], 0, UNSUPPORTED),
    ] {
        owner.next = BUFFERS;
        let sent = owner.ask(kind, at, out, room, usize::MAX);
        assert_eq!(one(&mut owner, &mut port, &mut disk, &sent), (status, 1), "{kind} {at}");
        refused += 1;
        assert_eq!(port.counters().refused, refused);
    }
    let sent = owner.send(&[0; HEADER_LEN - 1], &[], 512, usize::MAX, true);
    assert_eq!(one(&mut owner, &mut port, &mut disk, &sent).0, IO_ERROR, "a torn header");
    disk.read_only = true;
    let sent = owner.ask(OUT, 0, &sector, 0, usize::MAX);
    assert_eq!(one(&mut owner, &mut port, &mut disk, &sent).0, IO_ERROR, "read-only");
    assert!(disk.bytes == before && disk.flushed == 0);
    disk.fails = true;
    let sent = owner.ask(IN, 0, &[], 512, usize::MAX);
    assert_eq!(one(&mut owner, &mut port, &mut disk, &sent), (IO_ERROR, 1));
    assert_eq!(port.counters().failed, 1);
    disk.fails = false;
    let sent = owner.ask(IN, 1, &[], 512, usize::MAX);
    assert_eq!(one(&mut owner, &mut port, &mut disk, &sent), (OK, 513));
    assert!(port.faults().is_empty());
}

#[test]
fn a_chain_without_a_status_or_beyond_the_mappings_breaks_its_vring() {
    for (has_status, kind) in [(false, FaultKind::Length), (true, FaultKind::Unmapped)] {
        let mut owner = Owner::new(0);
        if has_status {
            owner.writer.mappings[0].len = BUFFERS;
            owner.writer.write(&owner.views.window);
        }
        let (mut port, mut disk) = (owner.port(), Memory::new());
        owner.send(&header(IN, 0), &[], 0, usize::MAX, has_status);
        let fault = serve(&mut port, &mut Nobody, &mut disk).unwrap_err();
        assert_eq!((fault.kind, fault.vring), (kind, 0));
        assert_eq!(serve(&mut port, &mut Nobody, &mut disk), Err(fault), "it stays broken");
        assert_eq!(port.faults(), [fault]);
        assert!(owner.reap().is_empty());
    }
}

#[test]
fn an_owner_that_does_not_know_flush_has_each_write_on_the_disk() {
    for features in [0, KNOWS_FLUSH] {
        let mut owner = Owner::new(features);
        let (mut port, mut disk) = (owner.port(), Memory::new());
        for sector in 0..5 {
            let sent = owner.ask(OUT, sector, &[3; 512], 0, usize::MAX);
            assert_eq!(one(&mut owner, &mut port, &mut disk, &sent).0, OK);
        }
        let expected = if features == 0 { (5, 0) } else { (0, 5) };
        assert_eq!((disk.flushed, disk.unflushed), expected);
    }
}

#[test]
fn what_was_not_completed_is_served_again_by_a_successor_once_and_in_order() {
    let packed = RingFeatures { packed: true, ..RingFeatures::default() }.bits();
    for features in [0, packed] {
        let mut owner = Owner::new(features | KNOWS_FLUSH);
        let (mut port, mut disk) = (owner.port(), Memory::new());
        for sector in 0..8 {
            owner.ask(OUT, sector, &[sector as u8; 512], 0, usize::MAX);
        }
        for _ in 0..3 {
            assert_eq!(port.serve(&mut Nobody, 0, &mut disk), Ok(true));
        }
        // The link goes while the fourth is on its way to the disk.
        let window = owner.views.window.clone();
        let mut writer = owner.writer.clone();
        disk.hook = Box::new(move || {
            writer.generation = 4;
            writer.table_generation = 4;
            writer.write(&window);
        });
        assert_eq!(port.serve(&mut Nobody, 0, &mut disk), Ok(false));
        disk.hook = Box::new(|| {});
        assert_eq!(owner.reap().len(), 3);
        assert_eq!(port.serve(&mut Nobody, 0, &mut disk), Ok(false), "it serves that link no more");
        let mut port = owner.port();
        assert_eq!(serve(&mut port, &mut Nobody, &mut disk), Ok(5));
        assert_eq!(owner.reap().len(), 5);
        assert!((0..8).all(|sector| disk.bytes[512 * sector..][..512] == [sector as u8; 512]));
    }
}

#[test]
fn bytes_that_were_fetched_for_a_link_that_is_gone_do_not_reach_the_disk() {
    let mut owner = Owner::new(KNOWS_FLUSH | PLATFORM);
    owner.writer.status |= abi::LINK_S_IOMMU | abi::LINK_S_COPY;
    let mut device = Device::new(&owner.views, owner.writer.clone(), willing());
    let ring = RingPlaces::at(0, RING).0;
    device.show(0, ring.used + u64::from(used_len(RING)), Access::READ_WRITE);
    device.before = Box::new(|writer, window| {
        writer.generation += 2;
        writer.table_generation += 2;
        writer.write(window);
    });
    let (mut port, mut disk) = (owner.port(), Memory::new());
    let before = disk.bytes.clone();
    owner.ask(OUT, 0, &[5; 4096], 0, usize::MAX);
    assert_eq!(port.serve(&mut device, 0, &mut disk), Ok(false));
    assert!(device.requests() > 0 && disk.bytes == before);
    assert!(owner.reap().is_empty());
    owner.writer.generation = 8;
    owner.change_link();
}

#[test]
fn a_port_is_for_disks_of_which_the_link_tells_the_capacity() {
    let open = |change: &dyn Fn(&mut LinkWriter)| {
        let mut owner = Owner::new(KNOWS_FLUSH);
        change(&mut owner.writer);
        owner.writer.write(&owner.views.window);
        let page = link_page(&owner.views.window);
        BlkPort::open(&owner.views.window, &page, &page.snapshot().unwrap()).map(|port| port.capacity())
    };
    assert_eq!(open(&|_| {}), Ok(512 * SECTORS));
    assert_eq!(open(&|writer| writer.config.truncate(7)), Err(PortError::Config { len: 7, needed: 8 }));
    assert_eq!(
        open(&|writer| writer.owner_device = 1),
        Err(PortError::OtherKind { device: 1, wanted: "a disk" })
    );
    assert_eq!(open(&|writer| writer.features |= 1 << 13), Err(PortError::Unknown { features: 1 << 13 }));
    assert_eq!(
        open(&|writer| writer.config = vec![0xff; 8]),
        Ok(u64::MAX),
        "bounded by the disk that there is"
    );
    const { assert!(MAX_DATA > 126 * (128 << 10)) };
}
