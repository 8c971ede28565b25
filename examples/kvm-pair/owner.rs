//! The owner's process: a VM with an ordinary virtio network card, whose VMM is a vhost-user
//! front-end. Nothing in it knows of vhost-pci.
//!
//! A vring's kick eventfd is a KVM_IOEVENTFD at the vring's doorbell; its call eventfd is a
//! KVM_IRQFD of the vring's MSI. The guest exchanges notifications only: its rings stay empty.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use guest_driver_model::net::{OwnerConfig, OwnerLayout};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::child::{PATIENCE, Parent};
use crate::cpu;
use crate::guest::{Ends, Guest};
use crate::layout::{CARD, DOORBELL_STRIDE, DOORBELLS, FIRST_VECTOR, MEMORY};
use crate::vcpu::{Nothing, Processor};
use crate::vm::{Msi, Vm};

/// The vring whose notifications are exchanged: the card's transmit queue.
pub const VRING: u16 = 1;

/// The process.
///
/// # Errors
/// If there is no KVM or no broker.
pub fn run(parent: &Parent, socket: &Path) -> anyhow::Result<()> {
    let vm = Arc::new(Vm::new()?);
    let processor = Processor::start(&vm, cpu::OWNER, Arc::new(Nothing))?;
    let _card = Card::start(&vm, socket)?;
    let vector = FIRST_VECTOR + VRING as u8;
    let ends = Ends { doorbell: doorbell(VRING), value: VRING, vector };
    let guest = Guest { vm: &vm, processor: &processor, ends };
    parent.obey(|_, line| guest.obey(line))
}

/// Where a vring is kicked.
fn doorbell(vring: u16) -> u64 {
    DOORBELLS + u64::from(vring) * DOORBELL_STRIDE
}

/// The card's VMM side. It lives as long as its process.
struct Card {
    _front_end: Frontend,
    _vrings: Vec<Notifications>,
}

/// Of one vring.
struct Notifications {
    kick: EventFd,
    call: EventFd,
}

impl Notifications {
    fn new(vm: &Vm, vring: u16) -> anyhow::Result<Self> {
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let notifications = Self { kick: eventfd()?, call: eventfd()? };
        vm.add_ioeventfd(&notifications.kick, doorbell(vring)).context("KVM_IOEVENTFD of the kick")?;
        let gsi = vm.add_route(Msi::vector(FIRST_VECTOR + vring as u8)).context("KVM_SET_GSI_ROUTING")?;
        vm.add_irqfd(&notifications.call, gsi).context("KVM_IRQFD of the call")?;
        Ok(notifications)
    }
}

impl Card {
    /// Connects the card to the broker, and starts it as the guest's driver would have it.
    fn start(vm: &Vm, socket: &Path) -> anyhow::Result<Self> {
        let layout = OwnerLayout::new(OwnerConfig::default(), CARD, MEMORY)?;
        let stream = UnixStream::connect(socket).context("connecting to the broker")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut front_end = Frontend::from_stream(stream, layout.vrings().len() as u64);
        let offered = front_end.get_features()?;
        let protocol = front_end.get_protocol_features()?;
        let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        front_end.set_protocol_features(protocol & wanted)?;
        front_end.set_owner()?;
        let features = layout.config().features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        front_end.set_features(features & offered)?;
        let memory = vm.memory();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: memory.guest_start(),
            memory_size: memory.len(),
            userspace_addr: memory.front_end_address(),
            mmap_offset: 0,
            mmap_handle: memory.raw_fd(),
        };
        front_end.set_mem_table(&[region])?;
        let mut vrings = Vec::new();
        for (vring, at) in (0_u16..).zip(layout.vrings()) {
            let places = at.places;
            let notifications = Notifications::new(vm, vring)?;
            let config = VringConfigData {
                queue_max_size: places.size,
                queue_size: places.size,
                flags: 0,
                desc_table_addr: memory.front_end_address() + places.desc,
                avail_ring_addr: memory.front_end_address() + places.avail,
                used_ring_addr: memory.front_end_address() + places.used,
                log_addr: None,
            };
            let index = usize::from(vring);
            front_end.set_vring_num(index, places.size)?;
            front_end.set_vring_base(index, 0)?;
            front_end.set_vring_addr(index, &config)?;
            front_end.set_vring_kick(index, &notifications.kick)?;
            front_end.set_vring_call(index, &notifications.call)?;
            front_end.set_vring_enable(index, true)?;
            vrings.push(notifications);
        }
        Ok(Self { _front_end: front_end, _vrings: vrings })
    }
}
