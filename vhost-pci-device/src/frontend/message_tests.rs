//! Decoding of hostile messages. What a whole device makes of them is in `tests/window.rs`.
#![allow(clippy::unwrap_used)]

use std::os::fd::AsFd;

use proptest::prelude::{any, prop, prop_oneof, proptest};

use super::*;
use crate::sys::event;

fn descriptors(count: usize) -> Vec<OwnedFd> {
    let event = event::new().unwrap();
    (0..count).map(|_| event::borrow(&event).as_fd().try_clone_to_owned().unwrap()).collect()
}

fn wire(queue: u32, flags: u32) -> Vec<u8> {
    [queue.to_ne_bytes(), flags.to_ne_bytes()].concat()
}

fn map(fields: [u64; 5]) -> Vec<u8> {
    fields.into_iter().flat_map(u64::to_ne_bytes).collect()
}

#[test]
fn a_mapping_is_read_field_by_field() {
    let request = decode(SHMEM_MAP, &map([7, 0x1000, 0x2000, 0x3000, 1]), descriptors(1), true).unwrap();
    let expected = Range { shmid: 7, file_offset: 0x1000, offset: 0x2000, len: 0x3000, writable: true };
    assert!(matches!(request, Request::Map(range, _) if range == expected));
    let request = decode(SHMEM_UNMAP, &map([0, 0, 0x2000, 0x3000, 0]), Vec::new(), true).unwrap();
    let expected = Range { shmid: 0, file_offset: 0, writable: false, ..expected };
    assert!(matches!(request, Request::Unmap(range) if range == expected));
}

#[test]
fn a_wire_has_a_descriptor_and_its_end_none() {
    for (flags, count, direction) in [
        (0, 0, Some(Direction::Interrupt)),
        (1, 0, Some(Direction::Notify)),
        (2, 1, Some(Direction::Interrupt)),
        (3, 1, Some(Direction::Notify)),
        (0, 1, None),
        (2, 0, None),
        (3, 2, None),
        (4, 0, None),
        (u32::MAX, 1, None),
    ] {
        let request = decode(WIRE, &wire(5, flags), descriptors(count), true).unwrap();
        match request {
            Request::Wire { queue, direction: its, event } => {
                assert_eq!((queue, Some(its), event.is_some()), (5, direction, count == 1));
            }
            other => assert!(direction.is_none() && matches!(other, Request::Impossible(_))),
        }
    }
}

#[test]
fn what_was_not_negotiated_or_has_another_size_ends_the_connection() {
    assert!(decode(WIRE, &wire(0, 0), Vec::new(), false).is_err());
    assert!(decode(WIRE, &[0; 7], Vec::new(), true).is_err());
    assert!(decode(SHMEM_MAP, &[0; 32], descriptors(1), true).is_err());
    // CONFIG_CHANGE_MSG: no change is ever announced.
    assert!(decode(2, &[], Vec::new(), true).is_err());
}

proptest! {
    #[test]
    fn any_bytes_are_a_request_or_an_error(
        code in prop_oneof![3 => prop::sample::select(vec![SHMEM_MAP, SHMEM_UNMAP, WIRE]), 1 => any::<u32>()],
        flags in prop_oneof![3 => prop::sample::select(vec![1_u32, 9]), 1 => any::<u32>()],
        size in prop_oneof![3 => prop::sample::select(vec![8_u32, 40]), 1 => any::<u32>()],
        payload in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let (sender, receiver) = UnixStream::pair().unwrap();
        let mut bytes = Vec::new();
        for word in [code, flags, size] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(payload);
        (&sender).write_all(&bytes).unwrap();
        drop(sender);
        while let Ok(Some(message)) = receive(&receiver, true) {
            let _ = message.answer(&receiver, false);
        }
    }
}
