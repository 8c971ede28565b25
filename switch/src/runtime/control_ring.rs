//! Serves the control ring: a split virtqueue in the control area, which only this
//! link's guest shares with the broker (`docs/vhost-pci-device.md`, 9). Commands are
//! taken in order and answered in any.

use std::collections::BTreeMap;

use vhost_pci_device::abi;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

use crate::link::message::CommandId;

const REQUEST_LEN: u64 = size_of::<abi::ControlRequest>() as u64;
const RESPONSE_LEN: u64 = size_of::<abi::ControlResponse>() as u64;

/// Parts of the control area, in the order of a chain.
type Parts = Vec<(GuestAddress, u64)>;

/// The device half of the control ring.
#[derive(Debug)]
pub struct ControlRing {
    queue: Queue,
    open: BTreeMap<CommandId, OpenCommand>,
    next_id: u64,
    answered: bool,
}

/// A command that was taken and not answered yet.
#[derive(Debug)]
struct OpenCommand {
    head: u16,
    /// What is behind the request.
    readable: Parts,
    /// The response, and what is behind it.
    writable: Parts,
}

/// A command of the peer's driver.
#[derive(Debug)]
pub struct Command {
    /// To answer it by.
    pub id: CommandId,
    /// What it asks for.
    pub request: abi::ControlRequest,
    /// Bytes behind the request.
    pub readable: u64,
    /// Bytes behind the response.
    pub writable: u64,
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
        Ok(Self { queue, open: BTreeMap::new(), next_id: 0, answered: false })
    }

    /// Takes every command that is in the ring, at most one ring full. A ring that is
    /// broken gives nothing more until the device restarts.
    ///
    /// # Errors
    /// What broke it.
    pub fn take(&mut self, memory: &GuestMemoryMmap) -> Result<Vec<Command>, String> {
        let mut commands = Vec::new();
        if !self.queue.ready() {
            return Ok(commands);
        }
        // A driver that makes one chain available twice has more open than the ring holds.
        while self.open.len() < usize::from(abi::CONTROL_RING_SIZE) {
            match self.take_one(memory) {
                Ok(Some(command)) => commands.push(command),
                Ok(None) => break,
                Err(reason) => {
                    self.queue.set_ready(false);
                    self.open.clear();
                    return Err(reason);
                }
            }
        }
        Ok(commands)
    }

    fn take_one(&mut self, memory: &GuestMemoryMmap) -> Result<Option<Command>, String> {
        let Some(chain) = self.queue.iter(memory).map_err(|error| error.to_string())?.next() else {
            return Ok(None);
        };
        let head = chain.head_index();
        let (mut readable, mut writable) = (Parts::new(), Parts::new());
        for descriptor in chain {
            let part = (descriptor.addr(), u64::from(descriptor.len()));
            match descriptor.is_write_only() {
                true => writable.push(part),
                false if writable.is_empty() => readable.push(part),
                false => return Err("a command's readable part follows its writable part".into()),
            }
        }
        let short = || "a command is shorter than its structure".to_owned();
        let mut bytes = [0; REQUEST_LEN as usize];
        let start = split(&mut readable, REQUEST_LEN).ok_or_else(short)?;
        read(memory, &start, &mut bytes)?;
        let request = abi::ControlRequest::read_from_bytes(&bytes).map_err(|_| short())?;
        let room = len(&writable).checked_sub(RESPONSE_LEN);
        let Some(room) = room else { return Err("there is no room for the response".into()) };
        self.next_id += 1;
        let id = CommandId(self.next_id);
        let readable_len = len(&readable);
        self.open.insert(id, OpenCommand { head, readable, writable });
        Ok(Some(Command { id, request, readable: readable_len, writable: room }))
    }

    /// Reads what is behind a command's request, from `from` on; `false` if the command is
    /// not open, or has less.
    pub fn read(&self, memory: &GuestMemoryMmap, id: CommandId, from: u64, bytes: &mut [u8]) -> bool {
        let Some(command) = self.open.get(&id) else { return false };
        let mut parts = command.readable.clone();
        split(&mut parts, from)
            .and_then(|_| split(&mut parts, bytes.len() as u64))
            .is_some_and(|parts| read(memory, &parts, bytes).is_ok())
    }

    /// Writes behind a command's response, from `from` on; `false` as of [`Self::read`].
    pub fn write(&self, memory: &GuestMemoryMmap, id: CommandId, from: u64, bytes: &[u8]) -> bool {
        let Some(command) = self.open.get(&id) else { return false };
        let mut parts = command.writable.clone();
        (RESPONSE_LEN.checked_add(from))
            .and_then(|from| split(&mut parts, from))
            .and_then(|_| split(&mut parts, bytes.len() as u64))
            .is_some_and(|parts| write(memory, &parts, bytes).is_ok())
    }

    /// Answers a command, behind whose response `written` bytes were put. One that is not
    /// open any more has no answer.
    pub fn answer(&mut self, memory: &GuestMemoryMmap, id: CommandId, status: u32, flags: u32, written: u64) {
        let Some(mut command) = self.open.remove(&id) else { return };
        let response = abi::ControlResponse { status: status.into(), flags: flags.into() };
        let start = split(&mut command.writable, RESPONSE_LEN);
        let done = start.is_some_and(|parts| write(memory, &parts, response.as_bytes()).is_ok())
            && self.queue.add_used(memory, command.head, (RESPONSE_LEN + written) as u32).is_ok();
        self.answered |= done;
    }

    /// Whether the guest wants an interrupt for what was answered since this was asked.
    pub fn take_notification(&mut self, memory: &GuestMemoryMmap) -> bool {
        std::mem::take(&mut self.answered) && self.queue.needs_notification(memory).unwrap_or(true)
    }
}

fn len(parts: &Parts) -> u64 {
    // At most a ring's size of 32-bit lengths.
    parts.iter().map(|(_, len)| len).sum()
}

/// Takes the first `len` bytes of the parts away and gives them; `None` if there are less.
fn split(parts: &mut Parts, len: u64) -> Option<Parts> {
    let mut start = Parts::new();
    let mut left = len;
    while left > 0 {
        let (at, part) = *parts.first()?;
        let taken = part.min(left);
        start.push((at, taken));
        left -= taken;
        if taken == part {
            parts.remove(0);
        } else {
            parts[0] = (GuestAddress(at.0.checked_add(taken)?), part - taken);
        }
    }
    Some(start)
}

fn read(memory: &GuestMemoryMmap, parts: &Parts, bytes: &mut [u8]) -> Result<(), String> {
    let mut rest = bytes;
    for (at, len) in parts {
        let (now, later) = rest.split_at_mut(rest.len().min(*len as usize));
        check(*at, now.len())?;
        memory.read_slice(now, *at).map_err(|_| outside())?;
        rest = later;
    }
    Ok(())
}

fn write(memory: &GuestMemoryMmap, parts: &Parts, bytes: &[u8]) -> Result<(), String> {
    let mut rest = bytes;
    for (at, len) in parts {
        let (now, later) = rest.split_at(rest.len().min(*len as usize));
        check(*at, now.len())?;
        memory.write_slice(now, *at).map_err(|_| outside())?;
        rest = later;
    }
    Ok(())
}

/// Whether the bytes are in the control area: the link area is in the same memory, and is not the
/// driver's to write.
fn check(at: GuestAddress, len: usize) -> Result<(), String> {
    let into = at.0.checked_sub(abi::CONTROL_OFFSET).ok_or_else(outside)?;
    let end = into.checked_add(len as u64).ok_or_else(outside)?;
    if end <= abi::CONTROL_LEN { Ok(()) } else { Err(outside()) }
}

fn outside() -> String {
    "a descriptor is not inside the control area".to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    use crate::runtime::areas::{AreaFile, ControlArea};

    fn at(offset: u64) -> GuestAddress {
        GuestAddress(abi::CONTROL_OFFSET + offset)
    }

    /// Puts one command into the ring, as a driver would.
    fn put(memory: &GuestMemoryMmap, avail_index: u16, request_len: u32, response_len: u32) {
        let buffers = abi::CONTROL_OFFSET + abi::CONTROL_BUFFERS;
        let descriptors: [(u64, u32, u16, u16); 2] =
            [(buffers, request_len, 1, 1), (buffers + 256, response_len, 2, 0)];
        for (index, (address, len, flags, next)) in descriptors.into_iter().enumerate() {
            let entry = at(abi::CONTROL_DESC + 16 * index as u64);
            memory.write_obj(address, entry).unwrap();
            memory.write_obj(len, entry_at(entry, 8)).unwrap();
            memory.write_obj(flags, entry_at(entry, 12)).unwrap();
            memory.write_obj(next, entry_at(entry, 14)).unwrap();
        }
        let request = abi::ControlRequest { command: abi::CTRL_DETACH.into(), ..Default::default() };
        memory.write_slice(request.as_bytes(), GuestAddress(buffers)).unwrap();
        let slot = u64::from(avail_index % abi::CONTROL_RING_SIZE);
        memory.write_obj(0u16, at(abi::CONTROL_AVAIL + 4 + 2 * slot)).unwrap();
        memory.write_obj(avail_index.wrapping_add(1), at(abi::CONTROL_AVAIL + 2)).unwrap();
    }

    fn entry_at(entry: GuestAddress, offset: u64) -> GuestAddress {
        GuestAddress(entry.0 + offset)
    }

    #[test]
    fn a_command_is_answered_and_used() {
        let area = ControlArea::new(&AreaFile::new().unwrap());
        let memory = area.memory();
        let mut ring = ControlRing::new().unwrap();
        for round in 0..150 {
            put(memory, round, 32, 8);
            let commands = ring.take(memory).unwrap();
            assert_eq!((commands.len(), commands[0].readable, commands[0].writable), (1, 0, 0));
            assert_eq!(commands[0].request.command.value(), abi::CTRL_DETACH);
            assert!(!ring.take_notification(memory));
            ring.answer(memory, commands[0].id, 7, 1, 0);
            assert!(ring.take_notification(memory) && !ring.take_notification(memory));
            let used: u16 = memory.read_obj(at(abi::CONTROL_USED + 2)).unwrap();
            assert_eq!(used, round + 1);
            let response: [u32; 2] = memory.read_obj(at(abi::CONTROL_BUFFERS + 256)).unwrap();
            assert_eq!(response, [7, 1]);
        }
    }

    #[test]
    fn bytes_behind_request_and_response_are_reached_and_no_others() {
        let area = ControlArea::new(&AreaFile::new().unwrap());
        let memory = area.memory();
        let mut ring = ControlRing::new().unwrap();
        put(memory, 0, 32 + 10, 8 + 20);
        let commands = ring.take(memory).unwrap();
        let (id, buffers) = (commands[0].id, abi::CONTROL_BUFFERS);
        assert_eq!((commands[0].readable, commands[0].writable), (10, 20));
        memory.write_slice(b"0123456789", at(buffers + 32)).unwrap();
        let mut bytes = [0; 4];
        assert!(ring.read(memory, id, 3, &mut bytes));
        assert_eq!(&bytes, b"3456");
        assert!(!ring.read(memory, id, 7, &mut bytes));
        assert!(ring.write(memory, id, 16, b"abcd"));
        for from in [17, u64::MAX, u64::MAX - 7] {
            assert!(!ring.write(memory, id, from, b"abcd") && !ring.read(memory, id, from, &mut bytes));
        }
        let written: [u8; 4] = memory.read_obj(at(buffers + 256 + 8 + 16)).unwrap();
        assert_eq!(&written, b"abcd");
        ring.answer(memory, id, 0, 0, 20);
        assert!(!ring.read(memory, id, 0, &mut bytes));
        let used_len: u32 = memory.read_obj(at(abi::CONTROL_USED + 8)).unwrap();
        assert_eq!(used_len, 28);
    }

    #[test]
    fn a_short_command_or_no_room_breaks_the_ring_once() {
        for (request, response) in [(31, 8), (32, 7)] {
            let area = ControlArea::new(&AreaFile::new().unwrap());
            let mut ring = ControlRing::new().unwrap();
            put(area.memory(), 0, request, response);
            assert!(ring.take(area.memory()).is_err());
            assert!(ring.take(area.memory()).unwrap().is_empty());
        }
    }

    /// Both areas are in one file: found when the fuzz target's invariant was written.
    #[test]
    fn a_response_in_the_link_area_is_not_written_and_a_request_there_breaks_the_ring() {
        let area = ControlArea::new(&AreaFile::new().unwrap());
        let memory = area.memory();
        let place = abi::LINK_OFFSET + 128;
        put(memory, 0, 32, 8 + 4);
        memory.write_obj(place, at(abi::CONTROL_DESC + 16)).unwrap();
        let mut ring = ControlRing::new().unwrap();
        let commands = ring.take(memory).unwrap();
        assert!(!ring.write(memory, commands[0].id, 0, &[7; 4]));
        ring.answer(memory, commands[0].id, u32::MAX, u32::MAX, 0);
        assert!(!ring.take_notification(memory));
        assert_eq!(memory.read_obj::<[u64; 2]>(GuestAddress(place)).unwrap(), [0; 2]);
        memory.write_obj(abi::LINK_OFFSET, at(abi::CONTROL_DESC)).unwrap();
        memory.write_obj(2_u16, at(abi::CONTROL_AVAIL + 2)).unwrap();
        assert!(ring.take(memory).unwrap_err().contains("not inside the control area"));
    }

    #[test]
    fn an_index_that_jumps_breaks_the_ring() {
        let area = ControlArea::new(&AreaFile::new().unwrap());
        let mut ring = ControlRing::new().unwrap();
        area.memory().write_obj(abi::CONTROL_RING_SIZE + 1, at(abi::CONTROL_AVAIL + 2)).unwrap();
        assert!(ring.take(area.memory()).is_err());
    }

    #[test]
    fn a_driver_that_never_gets_answers_has_one_ring_full_open_at_most() {
        let area = ControlArea::new(&AreaFile::new().unwrap());
        let mut ring = ControlRing::new().unwrap();
        for round in 0..3 * abi::CONTROL_RING_SIZE {
            put(area.memory(), round, 32, 8);
            let _ = ring.take(area.memory());
        }
        assert_eq!(ring.open.len(), usize::from(abi::CONTROL_RING_SIZE));
    }
}
