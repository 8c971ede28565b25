//! An owner that is being migrated while packets pass: what its VMM would copy by the dirty log is what the owner has,
//! byte for byte. With one kind of write unmarked it is not.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use guest_driver_model::link::LinkError;
use guest_driver_model::net::{
    OwnerConfig, OwnerLayout, OwnerPort, PacketBurst, PeerPort, receive_vring, transmit_vring,
};
use guest_driver_model::shm::SharedMemory;
use net_support::{IOVA, LinkWriter, TwoViews, frame, link_page};
use vhost_pci_device::abi::{self, PAGE_SIZE};

/// Number of the first page of the owner's memory.
const FIRST: u64 = 77;

/// A VMM that migrates its VM: it copies pages by the log, and knows itself what its guest writes.
struct Migration {
    memory: SharedMemory,
    log: SharedMemory,
    copy: Vec<u8>,
    pages: u64,
}

impl Migration {
    fn begin(views: &TwoViews) -> Self {
        let memory = views.owner.clone();
        let mut copy = vec![0; memory.len() as usize];
        memory.read(0, &mut copy).unwrap();
        let log = views.window.part(abi::LOG_OFFSET, abi::MAX_LOW_LOG).unwrap();
        Self { memory, log, copy, pages: 0 }
    }

    /// Copies what is marked, and forgets the marks.
    fn round(&mut self) {
        for page in 0..self.memory.len() / PAGE_SIZE {
            let (byte, bit) = ((FIRST + page) / 8, (FIRST + page) % 8);
            let mut marks = [0];
            self.log.read(byte, &mut marks).unwrap();
            if marks[0] >> bit & 1 == 0 {
                continue;
            }
            self.log.write(byte, &[marks[0] & !(1 << bit)]).unwrap();
            let at = (page * PAGE_SIZE) as usize;
            self.memory.read(at as u64, &mut self.copy[at..at + PAGE_SIZE as usize]).unwrap();
            self.pages += 1;
        }
    }

    /// Pages in which the copy is not what the memory is.
    fn differ(&self) -> Vec<u64> {
        let mut now = vec![0; self.copy.len()];
        self.memory.read(0, &mut now).unwrap();
        let pages = now.chunks(PAGE_SIZE as usize).zip(self.copy.chunks(PAGE_SIZE as usize));
        (0..).zip(pages).filter(|(_, (now, copy))| now != copy).map(|(page, _)| page).collect()
    }

    /// Takes the guest's own writes, which its VMM knows without a log.
    fn guest_wrote(&mut self) {
        self.memory.read(0, &mut self.copy).unwrap();
    }
}

fn writer(views: &TwoViews, config: OwnerConfig, layout: &OwnerLayout) -> LinkWriter {
    let mut link = LinkWriter::new(config.features(), vec![views.mapping()], layout.infos(IOVA));
    link.status |= abi::LINK_S_LOG;
    link.log = (abi::LOG_OFFSET, abi::MAX_LOW_LOG, FIRST as u32);
    link
}

#[test]
fn whatever_the_peer_writes_is_marked() {
    for (packed, in_order, event_idx, mergeable) in [
        (false, false, false, false),
        (false, true, true, true),
        (true, false, true, false),
        (true, true, false, true),
    ] {
        let config = OwnerConfig { packed, in_order, event_idx, mergeable, ..OwnerConfig::default() };
        let len = OwnerLayout::new(config, 0, u64::MAX >> 8).unwrap().end().next_multiple_of(PAGE_SIZE);
        let views = TwoViews::new(len);
        let layout = OwnerLayout::new(config, 0, len).unwrap();
        let mut owner = OwnerPort::new(&views.owner, &layout, IOVA).unwrap();
        writer(&views, config, &layout).write(&views.window);
        let page = link_page(&views.window);
        let mut peer = PeerPort::new(&views.window, &page, &page.snapshot().unwrap()).unwrap();
        let mut migration = Migration::begin(&views);
        let mut burst = PacketBurst::default();
        for round in 0..400_u64 {
            let frames: Vec<_> =
                (0..round % 7).map(|n| frame(round * 8 + n, 60 + (round * 37 % 1400) as usize)).collect();
            // The guest's part, of which its VMM knows: then only what the peer writes is looked at.
            owner.tx_burst(0, frames.iter().map(Vec::as_slice)).unwrap();
            burst.clear();
            owner.rx_burst(0, &mut burst, 3).unwrap();
            if round % 5 == 0 {
                let _ = owner.set_calls(transmit_vring(0), round % 2 == 0);
            }
            migration.guest_wrote();

            for vring in [receive_vring(0), transmit_vring(0)] {
                peer.set_kicks(vring, round % 3 == 0).unwrap();
            }
            burst.clear();
            peer.rx_burst(0, &mut burst, 5).unwrap();
            peer.tx_burst(0, frames.iter().map(Vec::as_slice)).unwrap();
            migration.round();
            assert!(
                migration.differ().is_empty(),
                "round {round}: pages {:?} of {config:?}",
                migration.differ()
            );
        }
        assert!(migration.pages > 200, "{} pages were copied by the log", migration.pages);
    }
}

#[test]
fn a_log_that_is_outside_of_the_window_or_too_short_gives_no_link() {
    let config = OwnerConfig::default();
    let len = OwnerLayout::new(config, 0, u64::MAX >> 8).unwrap().end().next_multiple_of(PAGE_SIZE);
    let views = TwoViews::new(len);
    let layout = OwnerLayout::new(config, 0, len).unwrap();
    let page = link_page(&views.window);
    let read = |log| {
        LinkWriter { log, ..writer(&views, config, &layout) }.write(&views.window);
        page.snapshot().map(drop)
    };
    let pages = len / PAGE_SIZE;
    let least = (FIRST + pages).div_ceil(8);
    assert_eq!(read((abi::LOG_OFFSET, least, FIRST as u32)), Ok(()));
    assert!(matches!(
        read((abi::LOG_OFFSET, least - 1, FIRST as u32)),
        Err(LinkError::LogPage { index: 0, .. })
    ));
    assert!(matches!(read((abi::LOG_OFFSET, least, u32::MAX)), Err(LinkError::LogPage { .. })));
    for (offset, len) in
        [(views.window.len(), 4096), (u64::MAX - 4095, 8192), (abi::LOG_OFFSET, 0), (8, 64), (0, u64::MAX)]
    {
        assert!(matches!(read((offset, len, 0)), Err(LinkError::Log { .. })), "{offset:#x} {len:#x}");
    }
}
