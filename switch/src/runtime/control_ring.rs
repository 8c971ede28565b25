//! Serves the control ring: a split virtqueue in the control area, which only this
//! link's guest shares with the broker (`docs/vhost-pci-device.md`, 9).

use vhost_pci_device::abi;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

/// The device half of the control ring.
#[derive(Debug)]
pub struct ControlRing {
    queue: Queue,
}

/// What serving the ring came to.
#[derive(Debug, Default)]
pub struct Served {
    /// Commands that were answered.
    pub commands: usize,
    /// Whether the guest wants an interrupt for them.
    pub notify: bool,
    /// What was wrong with the ring; it is not served until the device restarts.
    pub broken: Option<String>,
}

impl ControlRing {
    /// A ring at its start.
    ///
    /// # Errors
    /// Never, as the geometry is constant and valid.
    pub fn new() -> Result<Self, virtio_queue::Error> {
        let mut queue = Queue::new(abi::CONTROL_RING_SIZE)?;
        let at = |offset| GuestAddress(abi::CONTROL_OFFSET + offset);
        queue.try_set_size(abi::CONTROL_RING_SIZE)?;
        queue.try_set_desc_table_address(at(abi::CONTROL_DESC))?;
        queue.try_set_avail_ring_address(at(abi::CONTROL_AVAIL))?;
        queue.try_set_used_ring_address(at(abi::CONTROL_USED))?;
        queue.set_ready(true);
        Ok(Self { queue })
    }

    /// Answers every command that is in the ring, at most one ring full.
    pub fn serve(
        &mut self,
        memory: &GuestMemoryMmap,
        mut answer: impl FnMut(&abi::ControlRequest) -> u32,
    ) -> Served {
        let mut served = Served::default();
        if !self.queue.ready() {
            return served;
        }
        if let Err(error) = self.serve_all(memory, &mut answer, &mut served) {
            self.queue.set_ready(false);
            served.broken = Some(error);
        }
        served
    }

    fn serve_all(
        &mut self,
        memory: &GuestMemoryMmap,
        answer: &mut impl FnMut(&abi::ControlRequest) -> u32,
        served: &mut Served,
    ) -> Result<(), String> {
        for _ in 0..abi::CONTROL_RING_SIZE {
            let Some(chain) = self.queue.iter(memory).map_err(|error| error.to_string())?.next() else {
                break;
            };
            let head = chain.head_index();
            let mut reader = chain.clone().reader(memory).map_err(|error| error.to_string())?;
            let mut writer = chain.writer(memory).map_err(|error| error.to_string())?;
            let mut bytes = [0; size_of::<abi::ControlRequest>()];
            std::io::Read::read_exact(&mut reader, &mut bytes)
                .map_err(|_| "a command is shorter than its structure".to_owned())?;
            let request = abi::ControlRequest::read_from_bytes(&bytes)
                .map_err(|_| "a command is shorter than its structure".to_owned())?;
            let response = abi::ControlResponse { status: answer(&request).into(), flags: 0.into() };
            std::io::Write::write_all(&mut writer, response.as_bytes())
                .map_err(|_| "there is no room for the response".to_owned())?;
            let len = size_of::<abi::ControlResponse>() as u32;
            self.queue.add_used(memory, head, len).map_err(|error| error.to_string())?;
            served.commands += 1;
        }
        served.notify = served.commands > 0
            && self.queue.needs_notification(memory).map_err(|error| error.to_string())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vm_memory::Bytes;

    use crate::runtime::areas::ControlArea;

    fn at(offset: u64) -> GuestAddress {
        GuestAddress(abi::CONTROL_OFFSET + offset)
    }

    /// Puts one command into the ring, as a driver would.
    fn put(memory: &GuestMemoryMmap, avail_index: u16, request_len: u32, response_len: u32) {
        let buffers = abi::CONTROL_OFFSET + abi::CONTROL_BUFFERS;
        let descriptors: [(u64, u32, u16, u16); 2] =
            [(buffers, request_len, 1, 1), (buffers + 64, response_len, 2, 0)];
        for (index, (address, len, flags, next)) in descriptors.into_iter().enumerate() {
            let entry = at(abi::CONTROL_DESC + 16 * index as u64);
            memory.write_obj(address, entry).unwrap();
            memory.write_obj(len, entry_at(entry, 8)).unwrap();
            memory.write_obj(flags, entry_at(entry, 12)).unwrap();
            memory.write_obj(next, entry_at(entry, 14)).unwrap();
        }
        let request = abi::ControlRequest { command: abi::CTRL_DETACH.into(), ..Default::default() };
        memory.write_slice(request.as_bytes(), GuestAddress(buffers)).unwrap();
        memory.write_obj(0u16, at(abi::CONTROL_AVAIL + 4 + 2 * u64::from(avail_index % 16))).unwrap();
        memory.write_obj(avail_index.wrapping_add(1), at(abi::CONTROL_AVAIL + 2)).unwrap();
    }

    fn entry_at(entry: GuestAddress, offset: u64) -> GuestAddress {
        GuestAddress(entry.0 + offset)
    }

    #[test]
    fn a_command_is_answered_and_used() {
        let area = ControlArea::new().unwrap();
        let mut ring = ControlRing::new().unwrap();
        for round in 0..40 {
            put(area.memory(), round, 24, 8);
            let served = ring.serve(area.memory(), |request| u32::from(request.command.value()) + 7);
            assert_eq!((served.commands, served.broken), (1, None));
            let used: u16 = area.memory().read_obj(at(abi::CONTROL_USED + 2)).unwrap();
            assert_eq!(used, round + 1);
            let status: u32 = area.memory().read_obj(at(abi::CONTROL_BUFFERS + 64)).unwrap();
            assert_eq!(status, u32::from(abi::CTRL_DETACH) + 7);
        }
    }

    #[test]
    fn a_short_command_or_no_room_breaks_the_ring_once() {
        for (request, response) in [(23, 8), (24, 7)] {
            let area = ControlArea::new().unwrap();
            let mut ring = ControlRing::new().unwrap();
            put(area.memory(), 0, request, response);
            assert!(ring.serve(area.memory(), |_| 0).broken.is_some());
            assert!(ring.serve(area.memory(), |_| 0).broken.is_none());
        }
    }

    #[test]
    fn an_index_that_jumps_breaks_the_ring() {
        let area = ControlArea::new().unwrap();
        let mut ring = ControlRing::new().unwrap();
        area.memory().write_obj(17u16, at(abi::CONTROL_AVAIL + 2)).unwrap();
        assert!(ring.serve(area.memory(), |_| 0).broken.is_some());
    }
}
