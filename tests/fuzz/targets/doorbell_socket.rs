//! The connection to a doorbell function, whose VMM reads when it likes, says what it should not, and
//! leaves. It gets what it was to be sent, in order, and the page says what was published last.
#![no_main]

use std::collections::VecDeque;
use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Once;

use libfuzzer_sys::fuzz_target;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vhost_pci_device::abi;
use vhost_pci_fuzz::broker::{Running, config};
use vhost_pci_fuzz::census::Census;
use vhost_pci_fuzz::front::Pool;
use vhost_pci_fuzz::input::Input;
use vhost_pci_switch::link::descriptor::Eventfd;
use vhost_pci_switch::runtime::Pass;
use vhost_pci_switch::runtime::doorbell::Doorbell;

fuzz_target!(|bytes: &[u8]| {
    static FIRST: Once = Once::new();
    FIRST.call_once(|| drop(Running::start(config())));
    let before = Census::take();
    play(&mut Input::new(bytes));
    before.is_as_before();
});

fn play(input: &mut Input<'_>) {
    let (ours, mut vmm) = UnixStream::pair().expect("descriptors");
    let Ok(mut doorbell) = Doorbell::new(ours, Pass::default(), 7, "fuzz", |_| {}) else { return };
    let eventfd = |number: u8| {
        let fd = Pool::of_process().eventfds[usize::from(number % 6)].as_fd().try_clone_to_owned();
        Eventfd::new(fd.expect("a descriptor"))
    };
    // What the VMM will find: numbers, and whether there is a descriptor.
    let mut sent = VecDeque::from([(0, false), (0, false), (-1, true)]);
    let mut page = None;
    let mut generation = 0;
    let mut gone = false;
    for _ in 0..200 {
        if input.is_empty() {
            break;
        }
        let choice = input.byte();
        match choice % 10 {
            0 | 1 => {
                doorbell.own_vector(&eventfd(choice >> 4));
                sent.push_back((0, true));
            }
            2 | 3 => {
                let number = input.word();
                doorbell.peer_vector(number, &eventfd(choice >> 4));
                sent.push_back((i64::from(number), true));
            }
            4 => assert!(doorbell.send().is_ok() || gone, "the VMM is there"),
            5 | 6 => {
                for _ in 0..=choice >> 4 {
                    let Some((number, fd)) = receive(&vmm) else { break };
                    assert_eq!(sent.pop_front(), Some((number, fd.is_some())));
                    if number == -1 {
                        page = fd.map(File::from);
                    }
                }
            }
            7 => {
                let count = input.word() % 2000;
                generation += 2;
                let entry = abi::DoorbellEntry { doorbell: generation.into(), ..Default::default() };
                doorbell.publish(&vec![entry; count.into()], generation.into()).expect("there is room");
            }
            8 => {
                let _ = doorbell.is_read();
            }
            _ => match choice >> 4 {
                0 => drop(vmm.write(input.bytes(100))),
                1 => drop(vmm.shutdown(Shutdown::Write)),
                2 => {
                    gone = true;
                    drop(vmm.shutdown(Shutdown::Read));
                }
                _ => {}
            },
        }
        if let Some(page) = &page {
            let mut header = [0; 28];
            page.read_exact_at(&mut header, 0).expect("a page");
            assert_eq!(header[16..20], generation.to_le_bytes());
            let count = u32::from_le_bytes(header[24..].try_into().expect("4 bytes"));
            assert!(count <= abi::MAX_VRINGS.into());
        }
    }
}

/// The next message, if there is one.
fn receive(vmm: &UnixStream) -> Option<(i64, Option<OwnedFd>)> {
    let (mut bytes, mut space) = ([0; 8], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))]);
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(vmm, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags).ok()?;
    let rights = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let mut fds: Vec<_> = rights.flatten().collect();
    (received.bytes == 8).then(|| (i64::from_le_bytes(bytes), fds.pop()))
}
