//! A device in memory, for an owner with an IOMMU: it answers at once, by a rule that the
//! test gives it, and keeps the link area's mapping table.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;

use guest_driver_model::control::{Exchange, Job, Outcome, Request};
use guest_driver_model::link::{Access, LinkPage, Mapping};
use guest_driver_model::net::{OwnerConfig, OwnerLayout, OwnerPort, PeerPort};
use guest_driver_model::ring::split::layout::used_len;
use guest_driver_model::shm::SharedMemory;
use vhost_pci_device::abi;

use super::{IOVA, LinkWriter, TwoViews, link_page};

pub const PAGE: u64 = abi::PAGE_SIZE;
/// VIRTIO_F_ACCESS_PLATFORM.
const PLATFORM: u64 = 1 << 33;

/// What the device does with a request.
pub type Rule = Box<dyn FnMut(&Request) -> Outcome>;
/// What happens while a batch is carried out.
pub type Hook = Box<dyn FnMut(&mut LinkWriter, &SharedMemory)>;

pub struct Device {
    pub owner: SharedMemory,
    pub window: SharedMemory,
    pub writer: LinkWriter,
    /// Access by page of the owner's memory.
    pub table: BTreeMap<u64, Access>,
    pub rule: Rule,
    /// Batches of requests.
    pub log: Vec<Vec<Request>>,
    /// Called with each batch before it is carried out.
    pub before: Hook,
    next: u64,
}

impl Device {
    pub fn new(views: &TwoViews, writer: LinkWriter, rule: Rule) -> Self {
        let (owner, window) = (views.owner.clone(), views.window.clone());
        let mut device = Self {
            owner,
            window,
            writer,
            table: BTreeMap::new(),
            rule,
            log: Vec::new(),
            before: Box::new(|_, _| {}),
            next: 0,
        };
        device.clear();
        device
    }

    /// Shows pages of the owner's memory, from an offset on.
    pub fn show(&mut self, offset: u64, len: u64, access: Access) {
        let pages = offset / PAGE..(offset + len).div_ceil(PAGE);
        for page in pages {
            *self.table.entry(page).or_default() =
                access | self.table.get(&page).copied().unwrap_or_default();
        }
        self.write_table();
    }

    /// Hides all pages but those that have this access.
    pub fn hide_all_but(&mut self, keep: impl Fn(u64) -> bool) {
        self.table.retain(|page, _| keep(*page));
        self.write_table();
    }

    /// Each page is an entry of its own.
    pub fn write_table(&mut self) {
        let entry = |(page, access): (&u64, &Access)| Mapping {
            iova: IOVA + page * PAGE,
            len: PAGE,
            window_offset: abi::DATA_OFFSET + page * PAGE,
            access: *access,
        };
        self.writer.mappings = self.table.iter().map(entry).collect();
        self.writer.table_generation += 2;
        self.writer.write(&self.window);
    }

    pub fn requests(&self) -> usize {
        self.log.iter().map(Vec::len).sum()
    }
}

impl Exchange for Device {
    fn clear(&mut self) {
        self.next = abi::CONTROL_OFFSET + abi::CONTROL_BUFFERS + 4096;
    }

    fn reserve(&mut self, len: u32) -> Option<u64> {
        let data = self.next + 64;
        let end = data + u64::from(len).next_multiple_of(64);
        (end <= abi::CONTROL_OFFSET + abi::CONTROL_LEN - 64).then(|| {
            self.next = end;
            data
        })
    }

    fn carry_out(&mut self, jobs: &mut [Job]) {
        if jobs.is_empty() {
            return;
        }
        self.log.push(jobs.iter().map(|job| job.request).collect());
        (self.before)(&mut self.writer, &self.window);
        for job in jobs {
            job.outcome = (self.rule)(&job.request);
            if job.outcome != Outcome::Done {
                continue;
            }
            match job.request {
                Request::Map { iova, len, access } => {
                    assert!(iova.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len <= abi::MAX_MAP);
                    self.show(iova - IOVA, len, access);
                }
                Request::Fetch { iova, len } => {
                    assert!(len <= abi::MAX_COPY);
                    let mut bytes = vec![0; len as usize];
                    self.owner.read(iova - IOVA, &mut bytes).unwrap();
                    self.window.write(job.data, &bytes).unwrap();
                }
                Request::Store { iova, len } => {
                    assert!(len <= abi::MAX_COPY);
                    let mut bytes = vec![0; len as usize];
                    self.window.read(job.data, &mut bytes).unwrap();
                    self.owner.write(iova - IOVA, &bytes).unwrap();
                }
            }
        }
    }
}

/// How the peer reaches what is not in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Copy,
    Map,
}

/// An owner's port with an IOMMU, of whose memory only the rings are in the table, a peer's
/// port, and the device between them.
pub struct Apart {
    pub views: TwoViews,
    pub layout: OwnerLayout,
    pub owner: OwnerPort,
    pub peer: PeerPort,
    pub page: LinkPage,
    pub device: Device,
}

/// `rule`: what the device does with each request.
pub fn apart(config: OwnerConfig, mode: Mode, rule: Rule) -> Apart {
    let len = OwnerLayout::new(config, 0, u64::MAX >> 8).unwrap().end();
    let views = TwoViews::new(len);
    let layout = OwnerLayout::new(config, 0, len).unwrap();
    let owner = OwnerPort::new(&views.owner, &layout, IOVA).unwrap();
    let mut writer = LinkWriter::new(config.features() | PLATFORM, vec![], layout.infos(IOVA));
    writer.status |= abi::LINK_S_IOMMU | if mode == Mode::Copy { abi::LINK_S_COPY } else { 0 };
    let mut device = Device::new(&views, writer, rule);
    for vring in layout.vrings() {
        let end = vring.places.used + u64::from(used_len(vring.places.size));
        device.show(vring.places.desc, end - vring.places.desc, Access::READ_WRITE);
    }
    let page = link_page(&views.window);
    let peer = PeerPort::new(&views.window, &page, &page.snapshot().unwrap()).unwrap();
    Apart { views, layout, owner, peer, page, device }
}

/// It does whatever it is asked for.
pub fn willing() -> Rule {
    Box::new(|_| Outcome::Done)
}
