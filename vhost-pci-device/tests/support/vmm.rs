//! A hypervisor made of bookkeeping: traps, slots, and eventfds that behave as KVM's irqfds
//! and ioeventfds do.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use vhost_pci_device::{BarRange, Device, Held, MsiMessage, Vmm, WindowSlot};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::sys;

#[derive(Default)]
struct State {
    next: u64,
    traps: BTreeMap<u64, BarRange>,
    slots: BTreeMap<u64, WindowSlot>,
    irqfds: BTreeMap<u64, (MsiMessage, EventFd)>,
    ioeventfds: BTreeMap<u64, (GuestAddress, EventFd)>,
    interrupts: BTreeMap<(u64, u32), u64>,
    refuse_irqfds: bool,
    refuse_ioeventfds: bool,
}

#[derive(Default)]
pub struct FakeVmm {
    state: Arc<Mutex<State>>,
    device: OnceLock<Weak<Device>>,
}

/// Takes its entry back when it is dropped.
struct Entry(Arc<Mutex<State>>, u64);

impl Drop for Entry {
    fn drop(&mut self) {
        let mut state = self.0.lock().unwrap();
        // What was signalled before the deregistration has arrived.
        state.deliver();
        let State { traps, slots, irqfds, ioeventfds, .. } = &mut *state;
        let known = traps.remove(&self.1).is_some()
            || slots.remove(&self.1).is_some()
            || irqfds.remove(&self.1).is_some()
            || ioeventfds.remove(&self.1).is_some();
        assert!(known);
    }
}

fn has_count(event: &EventFd) -> bool {
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(sys::borrow(event), rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0
}

/// Takes the count away, if there is one. Never waits: the device may be faster.
fn take(event: &EventFd) -> bool {
    let mut count = [0; 8];
    let buffers = &mut [io::IoSliceMut::new(&mut count)];
    rustix::io::preadv2(sys::borrow(event), buffers, u64::MAX, rustix::io::ReadWriteFlags::NOWAIT).is_ok()
}

/// What the kernel calls the eventfd, the same for all its descriptors.
fn id(event: &EventFd) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", event.as_raw_fd())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("eventfd-id:"));
    line.expect("an eventfd").trim().parse().unwrap()
}

fn is_eventfd(event: &EventFd) -> bool {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", event.as_raw_fd())).unwrap();
    text.contains("eventfd-id:")
}

impl State {
    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn interrupt(&mut self, message: MsiMessage) {
        let address = u64::from(message.address_hi) << 32 | u64::from(message.address_lo);
        *self.interrupts.entry((address, message.data)).or_default() += 1;
    }

    /// KVM's irqfd: each signal is one interrupt, and its count is taken away.
    fn deliver(&mut self) {
        let signalled = self.irqfds.values().filter(|(_, event)| take(event)).map(|(message, _)| *message);
        for message in signalled.collect::<Vec<_>>() {
            self.interrupt(message);
        }
    }
}

impl FakeVmm {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    pub fn attach(&self, device: &Arc<Device>) {
        self.device.set(Arc::downgrade(device)).unwrap();
    }

    fn held(&self, state: &mut State, insert: impl FnOnce(&mut State, u64)) -> Held {
        let id = state.id();
        insert(state, id);
        Box::new(Entry(self.state.clone(), id))
    }

    pub fn traps(&self) -> Vec<BarRange> {
        self.state.lock().unwrap().traps.values().copied().collect()
    }

    /// In the order of their addresses.
    pub fn slots(&self) -> Vec<WindowSlot> {
        let mut slots: Vec<_> = self.state.lock().unwrap().slots.values().copied().collect();
        slots.sort_by_key(|slot| slot.address);
        slots
    }

    /// Registered eventfds: of interrupts, and of notifications.
    pub fn registered(&self) -> (usize, usize) {
        let state = self.state.lock().unwrap();
        (state.irqfds.len(), state.ioeventfds.len())
    }

    pub fn refuse(&self, irqfds: bool, ioeventfds: bool) {
        let mut state = self.state.lock().unwrap();
        (state.refuse_irqfds, state.refuse_ioeventfds) = (irqfds, ioeventfds);
    }

    /// Interrupts with these data since the last call.
    pub fn interrupts(&self, data: u32) -> u64 {
        let mut state = self.state.lock().unwrap();
        state.deliver();
        let keys: Vec<_> = state.interrupts.keys().filter(|key| key.1 == data).copied().collect();
        keys.iter().filter_map(|key| state.interrupts.remove(key)).sum()
    }

    /// A store of the guest to an address of the registers' BAR: an ioeventfd's, or an exit.
    pub fn store(&self, address: u64, data: &[u8]) {
        if let Some(event) = self.ioeventfd(address) {
            return event.write(1).unwrap();
        }
        let (bar, offset) = self.find(address).expect("a trap");
        self.device().bar_write(bar, offset, data);
    }

    pub fn load(&self, address: u64, data: &mut [u8]) {
        let (bar, offset) = self.find(address).expect("a trap");
        self.device().bar_read(bar, offset, data);
    }

    /// The eventfd that is registered at an address.
    pub fn ioeventfd(&self, address: u64) -> Option<EventFd> {
        let state = self.state.lock().unwrap();
        let mut its = state.ioeventfds.values().filter(|(at, _)| at.0 == address);
        its.next().map(|(_, event)| event.try_clone().unwrap())
    }

    fn find(&self, address: u64) -> Option<(u8, u64)> {
        let state = self.state.lock().unwrap();
        let range = state
            .traps
            .values()
            .find(|range| (range.address.0..range.address.0 + range.len).contains(&address))?;
        Some((range.bar, address - range.address.0))
    }

    fn device(&self) -> Arc<Device> {
        self.device.get().unwrap().upgrade().unwrap()
    }
}

impl Vmm for FakeVmm {
    fn trap(&self, range: BarRange) -> io::Result<Held> {
        let mut state = self.state.lock().unwrap();
        assert!(range.len.is_power_of_two() && range.address.0.is_multiple_of(range.len));
        let end = range.address.0 + range.len;
        // The guest has 40 bits, and memory below 1 GiB.
        let overlaps =
            |other: &BarRange| range.address.0 < other.address.0 + other.len && other.address.0 < end;
        if end > 1 << 40 || range.address.0 < 1 << 30 || state.traps.values().any(overlaps) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        Ok(self.held(&mut state, |state, id| {
            state.traps.insert(id, range);
        }))
    }

    fn map(&self, slot: WindowSlot) -> io::Result<Held> {
        for value in [slot.address.0, slot.len, slot.host_address] {
            assert!(value.is_multiple_of(4096) && value != 0);
        }
        let mut state = self.state.lock().unwrap();
        Ok(self.held(&mut state, |state, id| {
            state.slots.insert(id, slot);
        }))
    }

    fn irqfd(&self, message: MsiMessage, event: &EventFd) -> io::Result<Held> {
        assert_eq!(message.requester_id, 0x18);
        let mut state = self.state.lock().unwrap();
        if !is_eventfd(event) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if state.refuse_irqfds || state.irqfds.values().any(|(_, other)| id(other) == id(event)) {
            return Err(io::Error::from_raw_os_error(libc_ebusy()));
        }
        let event = event.try_clone()?;
        // As KVM: a count that is there makes the interrupt and stays.
        if has_count(&event) {
            state.interrupt(message);
        }
        Ok(self.held(&mut state, |state, id| drop(state.irqfds.insert(id, (message, event)))))
    }

    fn ioeventfd(&self, address: GuestAddress, event: &EventFd) -> io::Result<Held> {
        let mut state = self.state.lock().unwrap();
        if !is_eventfd(event) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if state.refuse_ioeventfds || state.ioeventfds.values().any(|(at, _)| *at == address) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let event = event.try_clone()?;
        Ok(self.held(&mut state, |state, id| drop(state.ioeventfds.insert(id, (address, event)))))
    }
}

fn libc_ebusy() -> i32 {
    rustix::io::Errno::BUSY.raw_os_error()
}
