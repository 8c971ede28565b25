//! The model owner's IOMMU against a broker that speaks the few messages it takes:
//! what is told, in which order, and what returns only when it was answered.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use guest_driver_model::net::{OwnerConfig, OwnerLayout, PacketBurst};
use guest_driver_model::owner::addressing::STATIC_IOVA;
use guest_driver_model::owner::iotlb::{IotlbMessage, PushEntry, VHOST_IOTLB_INVALIDATE, VHOST_IOTLB_UPDATE};
use guest_driver_model::owner::{
    Addressing, DmaError, IommuDriver, IommuLink, IommuProtocol, OwnerIommu, OwnerMemory, OwnerVmm,
    PacketMappings, StaticMappings, TellError,
};
use guest_driver_model::ring::RingPlaces;
use iommu::Access;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use zerocopy::{FromBytes, IntoBytes};

const GUEST_START: u64 = 1 << 32;
const MEMORY: u64 = 4 << 20;
const PAGE: u64 = 4096;
const ACCESS_PLATFORM: u64 = 1 << 33;
/// VERSION_1, ACCESS_PLATFORM, PROTOCOL_FEATURES, MRG_RXBUF.
const FEATURES: u64 = 1 << 32 | ACCESS_PLATFORM | 1 << 30 | 1 << 15;
/// MQ, REPLY_ACK, BACKEND_REQ, CONFIGURE_MEM_SLOTS.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 5 | 1 << 15;
const PUSH: u64 = 1 << 62;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_VRING_ADDR: u32 = 9;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const IOTLB: u32 = 22;
const IOMMU_PUSH: u32 = 0x5650_0001;

#[derive(Default)]
struct Seen {
    messages: Vec<(u32, Vec<u8>)>,
    channel: Option<UnixStream>,
    /// Answer to IOTLB messages and pushes.
    answer: u64,
    /// They are answered only while this is not set.
    held: bool,
    /// The connection ends with the next of them.
    hang_up: bool,
}

/// A broker that takes everything.
struct Broker {
    directory: tempfile::TempDir,
    seen: Arc<(Mutex<Seen>, Condvar)>,
}

impl Broker {
    fn new(features: u64, protocol: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("owner.sock")).unwrap();
        let seen = Arc::new((Mutex::new(Seen::default()), Condvar::new()));
        std::thread::spawn({
            let seen = seen.clone();
            move || {
                let (stream, _) = listener.accept().unwrap();
                while take(&stream, &seen, features, protocol).is_some() {}
            }
        });
        Self { directory, seen }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("owner.sock")
    }

    /// The requests since the last call.
    fn messages(&self) -> Vec<(u32, Vec<u8>)> {
        std::mem::take(&mut self.seen.0.lock().unwrap().messages)
    }

    fn iotlb(&self) -> Vec<IotlbMessage> {
        let messages = self.messages().into_iter().filter(|(request, _)| *request == IOTLB);
        messages.map(|(_, body)| IotlbMessage::read_from_bytes(&body).unwrap()).collect()
    }

    /// Flags and entries.
    fn pushes(&self) -> Vec<(u32, Vec<PushEntry>)> {
        let pushes = self.messages().into_iter().filter(|(request, _)| *request == IOMMU_PUSH);
        let parse = |body: Vec<u8>| {
            let word = |at: usize| u32::read_from_bytes(&body[at..at + 4]).unwrap();
            let entries = body[8..].chunks(32).map(|entry| PushEntry::read_from_bytes(entry).unwrap());
            let entries: Vec<_> = entries.collect();
            assert_eq!(entries.len(), word(0) as usize);
            (word(4), entries)
        };
        pushes.map(|(_, body)| parse(body)).collect()
    }

    fn set_answer(&self, answer: u64) {
        self.seen.0.lock().unwrap().answer = answer;
    }

    fn hold(&self, held: bool) {
        self.seen.0.lock().unwrap().held = held;
        self.seen.1.notify_all();
    }

    /// Asks the front-end for a translation and waits for the answer.
    fn miss(&self, iova: u64, perm: u8) -> u64 {
        self.ask(1, iova, perm)
    }

    fn ask(&self, kind: u8, iova: u64, perm: u8) -> u64 {
        let channel = self.seen.0.lock().unwrap().channel.as_ref().unwrap().try_clone().unwrap();
        let miss = IotlbMessage { iova, size: 0, user_addr: 0, perm, kind, reserved: [0; 6] };
        let header = [1_u32, 1 | 8, 32];
        (&channel).write_all(&[header.as_bytes(), miss.as_bytes()].concat()).unwrap();
        let mut reply = [0; 20];
        (&channel).read_exact(&mut reply).unwrap();
        assert_eq!(<[u32; 3]>::read_from_bytes(&reply[..12]).unwrap(), [1, 1 | 4, 8]);
        u64::read_from_bytes(&reply[12..]).unwrap()
    }
}

/// Takes one message and answers it. `None` at the connection's end.
fn take(stream: &UnixStream, seen: &(Mutex<Seen>, Condvar), features: u64, protocol: u64) -> Option<()> {
    let mut header = [0; 12];
    let (len, file) = stream.recv_with_fd(&mut header).ok()?;
    if len == 0 {
        return None;
    }
    (&*stream).read_exact(&mut header[len..]).ok()?;
    let [request, flags, size] = <[u32; 3]>::read_from_bytes(&header).unwrap();
    let mut body = vec![0; size as usize];
    (&*stream).read_exact(&mut body).ok()?;
    let (lock, changed) = seen;
    let mut state = lock.lock().unwrap();
    if request == SET_BACKEND_REQ_FD {
        state.channel = file.map(|file| UnixStream::from(std::os::fd::OwnedFd::from(file)));
    }
    state.messages.push((request, body.clone()));
    let told = [IOTLB, IOMMU_PUSH].contains(&request);
    if told {
        state = changed.wait_while(state, |state| state.held).unwrap();
    }
    if told && state.hang_up {
        return None;
    }
    let value = match request {
        GET_FEATURES => features.to_ne_bytes(),
        GET_PROTOCOL_FEATURES => protocol.to_ne_bytes(),
        GET_VRING_BASE => <[u8; 8]>::try_from(&body[..]).unwrap(),
        _ if flags & 8 == 0 => return Some(()),
        _ if told => state.answer.to_ne_bytes(),
        _ => 0_u64.to_ne_bytes(),
    };
    drop(state);
    let header = [request, 1 | 4, 8];
    (&*stream).write_all(&[header.as_bytes(), &value].concat()).ok()
}

struct Owner {
    broker: Broker,
    memory: OwnerMemory,
    driver: IommuDriver,
    layout: OwnerLayout,
    vmm: Option<OwnerVmm>,
}

impl Owner {
    /// An owner whose device is not started.
    fn new(protocol: IommuProtocol) -> Self {
        let broker = Broker::new(FEATURES, PROTOCOL | PUSH);
        let memory = OwnerMemory::new(MEMORY, GUEST_START).unwrap();
        let iommu = OwnerIommu::new(&memory).unwrap();
        let link = IommuLink { iommu: iommu.clone(), protocol };
        let vmm = OwnerVmm::connect_with(&broker.socket(), 2, Some(link)).unwrap();
        let config = OwnerConfig { buffer_len: 2048, ring_size: 8, ..OwnerConfig::default() };
        let layout = OwnerLayout::new(config, 0, MEMORY).unwrap();
        let driver = IommuDriver::attach(iommu).unwrap();
        Self { broker, memory, driver, layout, vmm: Some(vmm) }
    }

    fn places(&self) -> Vec<RingPlaces> {
        self.layout.vrings().iter().map(|vring| vring.places).collect()
    }

    fn start(&mut self, addressing: &impl Addressing) {
        let (features, places) = (self.layout.config().features(), self.places());
        let ring_base = |vring| addressing.ring_base(&self.memory, vring);
        let vmm = self.vmm.as_mut().unwrap();
        vmm.start_at(features, &self.memory, &places, ring_base, |_| 0).unwrap();
    }

    fn packet_mappings(&self) -> PacketMappings {
        PacketMappings::new(self.driver.clone(), &self.memory, &self.layout).unwrap()
    }

    fn static_mappings(&self, directed: bool) -> StaticMappings {
        StaticMappings::new(self.driver.clone(), &self.memory, &self.layout, directed).unwrap()
    }

    /// With one page mapped, and the device started without vrings.
    fn with_page(protocol: IommuProtocol, iova: u64, access: Access) -> Self {
        let mut owner = Self::new(protocol);
        owner.driver.map_at(iova, GUEST_START + 0x3000, PAGE, access).unwrap();
        let memory = &owner.memory;
        owner.vmm.as_mut().unwrap().start_at(1 << 32, memory, &[], |_| 0, |_| 0).unwrap();
        owner.broker.messages();
        owner
    }

    fn user(&self, offset: u64) -> u64 {
        self.memory.front_end_address() + offset
    }
}

fn update(iova: u64, size: u64, user_addr: u64, perm: u8) -> IotlbMessage {
    IotlbMessage { iova, size, user_addr, perm, kind: VHOST_IOTLB_UPDATE, reserved: [0; 6] }
}

fn invalidate(iova: u64, size: u64) -> IotlbMessage {
    IotlbMessage { iova, size, user_addr: 0, perm: 0, kind: VHOST_IOTLB_INVALIDATE, reserved: [0; 6] }
}

// --- What has to be offered -----------------------------------------------------------

fn connect(features: u64, protocol: u64, of: IommuProtocol) -> Result<OwnerVmm, String> {
    let broker = Broker::new(features, protocol);
    let memory = OwnerMemory::new(MEMORY, GUEST_START).unwrap();
    let link = IommuLink { iommu: OwnerIommu::new(&memory).unwrap(), protocol: of };
    OwnerVmm::connect_with(&broker.socket(), 2, Some(link)).map_err(|error| error.to_string())
}

#[test]
fn a_broker_that_lacks_what_the_iommu_needs_is_refused() {
    let refusal = |features, protocol, of| connect(features, protocol, of).err().unwrap_or_default();
    for of in [IommuProtocol::Iotlb, IommuProtocol::IotlbLikeQemu, IommuProtocol::Push] {
        assert!(refusal(FEATURES & !ACCESS_PLATFORM, PROTOCOL | PUSH, of).contains("ACCESS_PLATFORM"));
        assert!(refusal(FEATURES, PROTOCOL & !8 | PUSH, of).contains("REPLY_ACK"));
        assert_eq!(refusal(FEATURES, PROTOCOL | PUSH, of), "");
    }
    assert!(refusal(FEATURES, PROTOCOL & !32, IommuProtocol::Iotlb).contains("BACKEND_REQ"));
    assert!(refusal(FEATURES, PROTOCOL, IommuProtocol::Push).contains("IOMMU_PUSH"));
}

#[test]
fn features_are_accepted_as_the_protocol_has_them() {
    for (of, accepted) in [
        (IommuProtocol::Iotlb, PROTOCOL),
        (IommuProtocol::IotlbLikeQemu, PROTOCOL),
        (IommuProtocol::Push, PROTOCOL & !32 | PUSH),
    ] {
        let mut owner = Owner::new(of);
        let mappings = owner.static_mappings(false);
        owner.start(&mappings);
        let messages = owner.broker.messages();
        let value = |wanted| {
            let (_, body) = messages.iter().find(|(request, _)| *request == wanted).unwrap();
            u64::read_from_bytes(body).unwrap()
        };
        assert_eq!(value(SET_PROTOCOL_FEATURES), accepted);
        assert_ne!(value(SET_FEATURES) & ACCESS_PLATFORM, 0);
        assert_eq!(owner.broker.seen.0.lock().unwrap().channel.is_some(), of != IommuProtocol::Push);
    }
}

#[test]
fn an_owner_without_an_iommu_is_as_before() {
    let broker = Broker::new(FEATURES, PROTOCOL | PUSH);
    let memory = OwnerMemory::new(MEMORY, GUEST_START).unwrap();
    let mut vmm = OwnerVmm::connect(&broker.socket(), 2).unwrap();
    let layout = OwnerLayout::new(OwnerConfig::default(), 0, MEMORY).unwrap();
    let places: Vec<_> = layout.vrings().iter().map(|vring| vring.places).collect();
    vmm.start(layout.config().features(), &memory, &places, |_| 0).unwrap();
    let messages = broker.messages();
    for (request, body) in &messages {
        match *request {
            SET_FEATURES => assert_eq!(u64::read_from_bytes(body).unwrap() & ACCESS_PLATFORM, 0),
            SET_PROTOCOL_FEATURES => assert_eq!(u64::read_from_bytes(body).unwrap(), PROTOCOL & !32),
            SET_BACKEND_REQ_FD | IOTLB | IOMMU_PUSH => panic!("request {request}"),
            _ => {}
        }
    }
    let addresses = messages.iter().find(|(request, _)| *request == SET_VRING_ADDR).unwrap();
    let first = u64::read_from_bytes(&addresses.1[8..16]).unwrap();
    assert_eq!(first, memory.front_end_address() + places[0].desc);
    assert_eq!(vmm.stop().unwrap(), [0, 0]);
}

// --- Misses -----------------------------------------------------------------------------

#[test]
fn a_miss_is_answered_by_an_update_and_then_by_its_reply() {
    let owner = Owner::with_page(IommuProtocol::Iotlb, 0x5000, Access::Read);
    assert_eq!(owner.broker.miss(0x5123, 1), 0);
    assert_eq!(owner.broker.iotlb(), [update(0x5000, PAGE, owner.user(0x3000), 1)]);
    assert_eq!(owner.driver.iommu().counts().misses, 1);
}

#[test]
fn a_miss_of_what_is_not_mapped_or_not_allowed_is_refused_without_an_update() {
    let owner = Owner::with_page(IommuProtocol::Iotlb, 0x5000, Access::Read);
    for (iova, perm) in [(0x4fff, 1), (0x6000, 1), (0x5000, 2), (0x5000, 3), (0x5000, 0), (0x5000, 4)] {
        assert_eq!(owner.broker.miss(iova, perm), 1, "{iova:#x} {perm}");
    }
    assert_eq!(owner.broker.iotlb(), []);
    assert_eq!(owner.driver.iommu().counts().faults, 6);
}

#[test]
fn a_report_of_a_denied_access_is_counted_and_an_unknown_request_refused() {
    let owner = Owner::with_page(IommuProtocol::Iotlb, 0x5000, Access::Read);
    assert_eq!(owner.broker.ask(4, 0x5000, 2), 0);
    assert_eq!(owner.driver.iommu().counts().denied, 1);
    assert_eq!(owner.broker.ask(5, 0x5000, 2), 1);
    assert_eq!(owner.broker.miss(0x5000, 1), 0);
}

#[test]
fn like_qemu_an_update_is_a_page_and_read_write_whatever_is_mapped() {
    let owner = Owner::with_page(IommuProtocol::IotlbLikeQemu, 0x5000, Access::Write);
    assert_eq!(owner.broker.miss(0x5123, 1), 1);
    for perm in [2, 3] {
        assert_eq!(owner.broker.miss(0x5123, perm), 0);
        assert_eq!(owner.broker.iotlb(), [update(0x5000, PAGE, owner.user(0x3000), 3)]);
    }
    owner.driver.map_at(0x20_0000, GUEST_START, 3 << 20, Access::Read).unwrap();
    assert_eq!(owner.broker.miss(0x20_5123, 1), 0);
    assert_eq!(owner.broker.miss(0x40_5123, 1), 0);
    let small = update(0x40_5000, PAGE, owner.user(0x20_5000), 3);
    assert_eq!(owner.broker.iotlb(), [update(0x20_0000, 2 << 20, owner.user(0), 3), small]);
}

#[test]
fn a_miss_of_a_mapping_that_leads_past_the_memory_gets_what_there_is() {
    let owner = Owner::with_page(IommuProtocol::Iotlb, 0x5000, Access::Read);
    owner.driver.map_at(0x10_0000, GUEST_START + MEMORY - PAGE, 2 * PAGE, Access::ReadWrite).unwrap();
    owner.driver.map_at(0x20_0000, 0x1000, PAGE, Access::ReadWrite).unwrap();
    assert_eq!(owner.broker.miss(0x10_0000, 3), 0);
    assert_eq!(owner.broker.miss(0x10_1000, 3), 1);
    assert_eq!(owner.broker.miss(0x20_0000, 3), 1);
    assert_eq!(owner.broker.iotlb(), [update(0x10_0000, PAGE, owner.user(MEMORY - PAGE), 3)]);
}

#[test]
fn like_qemu_the_used_rings_pages_come_unasked_before_the_vrings_are_enabled() {
    let mut owner = Owner::new(IommuProtocol::IotlbLikeQemu);
    let mappings = owner.packet_mappings();
    owner.start(&mappings);
    let messages = owner.broker.messages();
    let position = |wanted| messages.iter().position(|(request, _)| *request == wanted).unwrap();
    assert!(position(SET_VRING_ADDR) < position(IOTLB) && position(IOTLB) < position(SET_VRING_ENABLE));
    let updates = messages.iter().filter(|(request, _)| *request == IOTLB);
    let used: Vec<u64> = owner.places().iter().map(|places| places.used & !0xfff).collect();
    let bases = [0, 1].map(|vring| mappings.ring_base(&owner.memory, vring));
    let expected =
        [0, 1].map(|vring| update(bases[vring].wrapping_add(used[vring]), PAGE, owner.user(used[vring]), 3));
    let updates: Vec<_> = updates.map(|(_, body)| IotlbMessage::read_from_bytes(body).unwrap()).collect();
    assert_eq!(updates, expected);
}

// --- Unmaps -------------------------------------------------------------------------------

#[test]
fn an_unmap_returns_when_the_broker_has_answered() {
    let owner = Owner::with_page(IommuProtocol::Iotlb, 0x5000, Access::Read);
    owner.broker.hold(true);
    let unmap = std::thread::spawn({
        let driver = owner.driver.clone();
        move || driver.unmap(0x5000, PAGE)
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!unmap.is_finished());
    owner.broker.hold(false);
    unmap.join().unwrap().unwrap();
    assert_eq!(owner.broker.iotlb(), [invalidate(0x5000, PAGE)]);
    assert_eq!(owner.broker.miss(0x5000, 1), 1);
}

#[test]
fn a_broker_that_refuses_an_unmap_is_an_error_and_the_mapping_is_gone() {
    let owner = Owner::with_page(IommuProtocol::Iotlb, 0x5000, Access::Read);
    owner.broker.set_answer(7);
    let told = owner.driver.unmap(0x5000, PAGE);
    assert!(matches!(told, Err(DmaError::Told(_))), "{told:?}");
    assert_eq!(owner.driver.iommu().counts().failures, 1);
    assert!(owner.driver.iommu().translate(0x5000, 1, Access::Read).is_err());
}

#[test]
fn like_qemu_an_unmap_is_told_in_aligned_blocks() {
    let owner = Owner::with_page(IommuProtocol::IotlbLikeQemu, 0x5000, Access::Read);
    owner.driver.map_at(0x7000, GUEST_START, 3 * PAGE, Access::Read).unwrap();
    owner.driver.unmap(0x7000, 3 * PAGE).unwrap();
    assert_eq!(owner.broker.iotlb(), [invalidate(0x7000, PAGE), invalidate(0x8000, 2 * PAGE)]);
}

#[test]
fn a_partial_unmap_is_refused_and_nobody_is_told() {
    let owner = Owner::with_page(IommuProtocol::Iotlb, 0x5000, Access::Read);
    owner.driver.map_at(0x7000, GUEST_START, 2 * PAGE, Access::Read).unwrap();
    assert!(matches!(owner.driver.unmap(0x7000, PAGE), Err(DmaError::Refused { .. })));
    assert_eq!(owner.broker.iotlb(), []);
}

#[test]
fn a_stopped_device_s_unmaps_are_told_to_nobody() {
    let mut owner = Owner::with_page(IommuProtocol::Iotlb, 0x5000, Access::Read);
    owner.vmm.as_mut().unwrap().stop().unwrap();
    owner.driver.unmap(0x5000, PAGE).unwrap();
    assert_eq!(owner.broker.iotlb(), []);
    assert_eq!(owner.broker.miss(0x5000, 1), 1);
}

#[test]
fn a_broken_connection_fails_one_unmap_and_holds_up_none() {
    let owner = Owner::with_page(IommuProtocol::Iotlb, 0x5000, Access::Read);
    owner.driver.map_at(0x7000, GUEST_START, PAGE, Access::Read).unwrap();
    assert!(!owner.vmm.as_ref().unwrap().is_gone());
    owner.broker.seen.0.lock().unwrap().hang_up = true;
    let told = owner.driver.unmap(0x5000, PAGE);
    assert!(matches!(told, Err(DmaError::Told(TellError::Broken(_)))), "{told:?}");
    owner.driver.unmap(0x7000, PAGE).unwrap();
    assert!(owner.vmm.as_ref().unwrap().is_gone());
    assert_eq!(owner.driver.iommu().counts().failures, 1);
}

// --- Pushes -------------------------------------------------------------------------------

fn entry(iova: u64, size: u64, user_addr: u64, perm: u8) -> PushEntry {
    PushEntry { iova, size, user_addr, perm, reserved: [0; 7] }
}

#[test]
fn a_started_device_pushes_what_is_mapped_and_then_each_change() {
    let mut owner = Owner::new(IommuProtocol::Push);
    owner.driver.map_at(0x5000, GUEST_START + 0x3000, PAGE, Access::Read).unwrap();
    assert_eq!(owner.broker.pushes(), []);
    let memory = &owner.memory;
    owner.vmm.as_mut().unwrap().start_at(1 << 32, memory, &[], |_| 0, |_| 0).unwrap();
    assert_eq!(owner.broker.pushes(), [(1, vec![entry(0x5000, PAGE, owner.user(0x3000), 1)])]);
    owner.driver.map_at(0x9000, GUEST_START, 2 * PAGE, Access::ReadWrite).unwrap();
    owner.driver.unmap(0x5000, PAGE).unwrap();
    let unmap = entry(0x5000, PAGE, 0, 0);
    let map = entry(0x9000, 2 * PAGE, owner.user(0), 3);
    assert_eq!(owner.broker.pushes(), [(0, vec![map]), (0, vec![unmap])]);
    assert_eq!(owner.driver.iommu().counts().pushed, 3);
}

#[test]
fn more_mappings_than_a_push_has_room_for_take_several_and_reset_once() {
    let mut owner = Owner::new(IommuProtocol::Push);
    for page in 0..100 {
        owner.driver.map_at(page * PAGE, GUEST_START, PAGE, Access::Read).unwrap();
    }
    // It leads nowhere, so that nothing can be told of it.
    owner.driver.map_at(1 << 40, 0x1000, PAGE, Access::Read).unwrap();
    let memory = &owner.memory;
    owner.vmm.as_mut().unwrap().start_at(1 << 32, memory, &[], |_| 0, |_| 0).unwrap();
    let pushes: Vec<_> = owner.broker.pushes().iter().map(|(flags, all)| (*flags, all.len())).collect();
    assert_eq!(pushes, [(1, 64), (0, 36)]);
}

#[test]
fn an_iommu_that_maps_nothing_pushes_a_reset() {
    let mut owner = Owner::new(IommuProtocol::Push);
    let memory = &owner.memory;
    owner.vmm.as_mut().unwrap().start_at(1 << 32, memory, &[], |_| 0, |_| 0).unwrap();
    assert_eq!(owner.broker.pushes(), [(1, vec![])]);
}

// --- What the driver maps -----------------------------------------------------------------

#[test]
fn addresses_are_chosen_from_4_gib_down_and_used_again() {
    let owner = Owner::new(IommuProtocol::Iotlb);
    let map = |pages: u64| owner.driver.map(GUEST_START, pages * PAGE, Access::Read).unwrap();
    assert_eq!(map(1), 0xffff_f000);
    assert_eq!(map(1), 0xffff_e000);
    assert_eq!(map(3), 0xffff_8000);
    owner.driver.unmap(0xffff_e000, PAGE).unwrap();
    assert_eq!(map(1), 0xffff_e000);
    // Not in the interrupts' doorbell, which PROBE tells of.
    assert_eq!(owner.driver.map(GUEST_START, 0x110_0000, Access::Read).unwrap(), 0xfc00_0000);
}

#[test]
fn static_mappings_are_the_rings_and_buffers_and_nothing_else() {
    for directed in [false, true] {
        let mut owner = Owner::new(IommuProtocol::Iotlb);
        let mappings = owner.static_mappings(directed);
        owner.start(&mappings);
        let reaches =
            |offset: u64, access| owner.driver.iommu().translate(STATIC_IOVA + offset, 1, access).is_ok();
        let [receive, transmit] = owner.layout.vrings() else { panic!("two vrings") };
        for vring in [receive, transmit] {
            assert!(reaches(vring.places.used, Access::ReadWrite));
        }
        assert!(reaches(receive.buffers, Access::Write) && reaches(transmit.buffers, Access::Read));
        assert_eq!(reaches(receive.buffers, Access::Read), !directed);
        assert_eq!(reaches(transmit.buffers, Access::Write), !directed);
        assert!(reaches(owner.layout.end() - 1, Access::Read));
        assert!(!reaches(owner.layout.end(), Access::Read));
        let messages = owner.broker.messages();
        let addresses = messages.iter().find(|(request, _)| *request == SET_VRING_ADDR).unwrap();
        let first = u64::read_from_bytes(&addresses.1[8..16]).unwrap();
        assert_eq!(first, STATIC_IOVA + receive.places.desc);
    }
}

/// The device's half of a ring, by hand: its descriptors are I/O virtual addresses.
struct Device<'a> {
    owner: &'a Owner,
    places: RingPlaces,
    next: u16,
}

impl<'a> Device<'a> {
    fn new(owner: &'a Owner, vring: usize) -> Self {
        Self { owner, places: owner.places()[vring], next: 0 }
    }

    /// Descriptor number, address and length of the next buffer.
    fn pop(&mut self) -> (u16, u64, u32) {
        let memory = self.owner.memory.shared();
        let index = memory.load_u16(self.places.avail + 2).unwrap();
        assert_ne!(index, self.next, "no buffer is available");
        let slot = u64::from(self.next % self.places.size);
        let head = memory.load_u16(self.places.avail + 4 + 2 * slot).unwrap();
        self.next = self.next.wrapping_add(1);
        let descriptor = self.places.desc + 16 * u64::from(head);
        let (address, rest) =
            (memory.load_u64(descriptor).unwrap(), memory.load_u64(descriptor + 8).unwrap());
        (head, address, rest as u32)
    }

    fn push(&self, head: u16, len: u32) {
        let memory = self.owner.memory.shared();
        let slot = u64::from(self.next.wrapping_sub(1) % self.places.size);
        let element = u64::from(head) | u64::from(len) << 32;
        memory.write(self.places.used + 4 + 8 * slot, &element.to_le_bytes()).unwrap();
        let flags = u32::from(self.next) << 16;
        memory.write(self.places.used, &flags.to_le_bytes()).unwrap();
    }

    /// Offset in the memory that an access reaches, if it reaches any.
    fn reach(&self, iova: u64, len: u64, access: Access) -> Option<u64> {
        let pieces = self.owner.driver.iommu().translate(iova, len, access).ok()?;
        Some(pieces[0].start().raw() - GUEST_START)
    }
}

#[test]
fn a_transmitted_packet_is_mapped_to_read_until_it_comes_back() {
    let mut owner = Owner::new(IommuProtocol::Iotlb);
    let mappings = owner.packet_mappings();
    let mut port = mappings.port(&owner.memory, &owner.layout).unwrap();
    owner.start(&mappings);
    owner.broker.messages();
    let mut device = Device::new(&owner, 1);
    let mut addresses = Vec::new();
    for round in 0..20_u8 {
        let frame = [round; 100];
        assert_eq!(port.tx_burst(0, [&frame[..]]).unwrap(), 1);
        let (head, iova, len) = device.pop();
        let at = device.reach(iova, len.into(), Access::Read).unwrap();
        assert_eq!(device.reach(iova, 1, Access::Write), None);
        let mut bytes = [0; 100];
        owner.memory.shared().read(at + u64::from(len) - 100, &mut bytes).unwrap();
        assert_eq!(bytes, frame);
        device.push(head, 0);
        assert_eq!(port.reap_transmitted(0).unwrap(), 0);
        assert_eq!(device.reach(iova, 1, Access::Read), None);
        assert_eq!(owner.broker.iotlb(), [invalidate(iova & !0xfff, PAGE)]);
        addresses.push(iova);
    }
    assert!(addresses.iter().all(|iova| *iova < 1 << 32));
}

#[test]
fn a_long_packet_s_buffers_are_mapped_one_by_one() {
    let mut owner = Owner::new(IommuProtocol::Iotlb);
    let mappings = owner.packet_mappings();
    let mut port = mappings.port(&owner.memory, &owner.layout).unwrap();
    owner.start(&mappings);
    owner.broker.messages();
    assert_eq!(port.tx_burst(0, [&[7; 5000][..]]).unwrap(), 1);
    let mut device = Device::new(&owner, 1);
    let (head, iova, _) = device.pop();
    assert!(device.reach(iova, 1996, Access::Read).is_some());
    device.push(head, 0);
    assert_eq!(port.reap_transmitted(0).unwrap(), 0);
    assert_eq!(owner.broker.iotlb().len(), 3);
}

#[test]
fn a_receive_buffer_is_mapped_to_write_and_looked_at_when_it_is_unmapped() {
    for protocol in [IommuProtocol::Iotlb, IommuProtocol::IotlbLikeQemu, IommuProtocol::Push] {
        let mut owner = Owner::new(protocol);
        let mappings = owner.packet_mappings();
        let mut port = mappings.port(&owner.memory, &owner.layout).unwrap();
        owner.start(&mappings);
        let mut device = Device::new(&owner, 0);
        let mut burst = PacketBurst::with_capacity(8, 2048);
        for round in 0..20_u8 {
            let (head, iova, _) = device.pop();
            owner.broker.messages();
            let at = device.reach(iova, 1996, Access::Write).unwrap();
            assert_eq!(device.reach(iova, 1, Access::Read), None);
            // Header: the packet takes one buffer.
            owner.memory.shared().write(at, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]).unwrap();
            owner.memory.shared().write(at + 12, &[round; 60]).unwrap();
            device.push(head, 72);
            burst.clear();
            assert_eq!(port.rx_burst(0, &mut burst, 8).unwrap(), 1);
            assert_eq!(burst.frames().next().unwrap(), [round; 60]);
            if protocol == IommuProtocol::Push {
                // The unmap, and the map of the buffer that is posted again.
                let perms: Vec<u8> = owner.broker.pushes().iter().map(|(_, all)| all[0].perm).collect();
                assert_eq!(perms, [0, 2]);
            } else {
                assert_eq!(owner.broker.iotlb(), [invalidate(iova & !0xfff, PAGE)]);
            }
        }
        // A port that is dropped takes its buffers with it; the rings stay.
        let ring = mappings.ring_base(&owner.memory, 0).wrapping_add(device.places.desc);
        assert!(device.reach(ring, 16, Access::ReadWrite).is_some());
        owner.broker.messages();
        drop(port);
        assert_eq!(owner.broker.messages().len(), 8);
    }
}

#[test]
fn misses_and_unmaps_at_the_same_time_end_with_the_truth() {
    let owner = Owner::with_page(IommuProtocol::Iotlb, 0x5000, Access::Read);
    std::thread::scope(|scope| {
        scope.spawn(|| (0..300).for_each(|at| assert!(owner.broker.miss(0x10_0000 + at % 4 * PAGE, 1) < 2)));
        for round in 0..300 {
            let iova = 0x10_0000 + round % 4 * PAGE;
            owner.driver.map_at(iova, GUEST_START, PAGE, Access::Read).unwrap();
            owner.driver.unmap(iova, PAGE).unwrap();
        }
    });
    let mut cached = std::collections::BTreeSet::new();
    for message in owner.broker.iotlb() {
        match message.kind {
            VHOST_IOTLB_UPDATE => cached.insert(message.iova),
            _ => cached.remove(&message.iova),
        };
    }
    assert!(cached.is_empty(), "{cached:x?}");
}
