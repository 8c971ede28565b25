//! Tests of `tap` over a model of an interface.
#![allow(clippy::unwrap_used)]

use super::*;
use std::cell::RefCell;

/// An interface that ends its reads with an error, or has frames of flows with these numbers. It
/// keeps what it is given.
#[derive(Default)]
struct Model {
    errno: Option<i32>,
    flows: RefCell<Vec<u8>>,
    written: RefCell<Vec<Vec<u8>>>,
    accepted: RefCell<Vec<Offloads>>,
}

impl Read for &Model {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if let Some(errno) = self.errno {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let Some(flow) = self.flows.borrow_mut().pop() else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        room[..HEADER_LEN].fill(0);
        room[HEADER_LEN..][..60].fill(flow);
        Ok(HEADER_LEN + 60)
    }
}

impl Write for &Model {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let whole = parts.iter().flat_map(|part| part.iter().copied()).collect::<Vec<u8>>();
        let len = whole.len();
        self.written.borrow_mut().push(whole);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Model {
    fn as_fd(&self) -> BorrowedFd<'_> {
        unreachable!("nothing sleeps here")
    }
}

impl Interface for Model {
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.accepted.borrow_mut().push(offloads);
        Ok(())
    }
}

#[test]
fn a_header_reaches_the_kernel_if_it_can_be_its_frames_own() {
    let model = Model::default();
    let frame = [7; 1600];
    let good = NetHeader {
        flags: 1,
        gso_type: 1,
        hdr_len: 54,
        gso_size: 500,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };
    let hostile = [
        NetHeader { csum_start: 1599, ..good },
        NetHeader { csum_start: u16::MAX, ..good },
        NetHeader { csum_offset: u16::MAX, ..good },
        NetHeader { csum_start: 0, ..good },
        NetHeader { hdr_len: 1601, ..good },
        NetHeader { gso_size: 0, ..good },
        NetHeader { gso_type: 3, ..good },
        NetHeader { gso_type: 0x80, ..good },
        NetHeader { flags: 0, ..good },
    ];
    let mut traffic = Traffic::default();
    for header in hostile {
        write(&model, Packet { header, frame: &frame }, &mut traffic);
    }
    let count = hostile.len() as u64;
    assert_eq!((traffic.rx_packets, traffic.bad_headers, traffic.dropped), (count, count, count));
    assert!(model.written.borrow().is_empty());
    write(&model, Packet { header: good, frame: &frame }, &mut traffic);
    // What a driver has no business to say is left out.
    let plain = NetHeader { flags: 0xfe, gso_type: 0, num_buffers: 3, ..good }.of_driver();
    write(&model, Packet { header: plain, frame: &frame }, &mut traffic);
    assert_eq!((traffic.bad_headers, traffic.rx_long), (count, 1));
    let written: Vec<_> =
        [good.to_bytes(), [0; HEADER_LEN]].map(|header| [&header, &frame[..]].concat()).into();
    assert_eq!(*model.written.borrow(), written);
}

#[test]
fn the_interface_is_told_when_an_owner_accepts_something_else() {
    let mut tap = Tap::new(Model::default(), "vp7");
    let all = Offloads::CSUM | Offloads::TSO4;
    for accepted in [Offloads::default(), all, all, Offloads::default()] {
        tap.follow(accepted);
    }
    assert_eq!(*tap.device.accepted.borrow(), [all, Offloads::default()]);
}

#[test]
fn each_flow_goes_by_one_pair_in_order_and_many_flows_by_all() {
    let flows: Vec<u8> = (0..BURST as u8).map(|at| at % 16).collect();
    let mut tap = Tap::new(Model { flows: RefCell::new(flows), ..Model::default() }, "vp7");
    tap.read_burst(3);
    assert_eq!((tap.waiting(), tap.lanes.len()), (BURST, 3));
    let mut seen = [None; 16];
    for (pair, lane) in tap.lanes.iter().enumerate() {
        assert!(lane.waiting() > 0, "nothing goes by pair {pair}");
        assert!(lane.frames.is_sorted_by_key(|place| place.start));
        for place in &lane.frames {
            let flow = usize::from(tap.frames[place.start + HEADER_LEN]);
            assert_eq!(*seen[flow].get_or_insert(pair), pair, "flow {flow}");
        }
    }
    // All by the first, if the owner uses one only, or none yet.
    for pairs in [0, 1] {
        tap.device.flows.borrow_mut().extend([1, 2, 3]);
        tap.read_burst(pairs);
        assert_eq!((tap.waiting(), tap.lanes.len(), tap.lanes[0].waiting()), (3, 1, 3));
    }
}

#[test]
fn an_interface_that_was_deleted_ends_the_program_and_one_that_is_down_does_not() {
    let after_a_read = |errno| {
        let mut tap = Tap::new(Model { errno: Some(errno), ..Model::default() }, "vp7");
        tap.check().unwrap();
        tap.read_burst(1);
        tap.check()
    };
    // Nothing there; down.
    after_a_read(libc::EAGAIN).unwrap();
    after_a_read(libc::EIO).unwrap();
    let error = after_a_read(libc::EBADFD).unwrap_err().to_string();
    assert!(error.contains("vp7") && error.contains("deleted"), "{error}");
}
