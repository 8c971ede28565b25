//! The connection to a peer's `ivshmem-doorbell` function (docs/vhost-pci-device.md, section
//! 12): the server's side of QEMU's ivshmem protocol, and the doorbell page. No policy: what is
//! wired, and when, is not known here.
//!
//! A message is a number of 8 bytes, little-endian, with one descriptor or none. The link sends
//! and never waits: what the VMM does not read at once is kept, in order. The VMM never says
//! anything.
//!
//! What the VMM was given it keeps: QEMU 11.1.3 can replace no vector. It can let go of another
//! end's eventfds, but then frees them once more when the function is unplugged, so it is not
//! asked to: the next eventfd gets another number.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::mem::{MaybeUninit, offset_of};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use nix::errno::Errno;
use nix::fcntl::SealFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost_pci_device::abi;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::IntoBytes;

use super::areas::{map, sealed_memfd};
use super::channel::is_passing;
use super::closing::{self, Pass, turn_away};
use super::sys;
use crate::link::descriptor::Eventfd;

/// Version of the protocol: the first message.
const PROTOCOL_VERSION: i64 = 0;
/// The function's own number among the ends that ring each other.
const OWN_ID: u16 = 0;
/// The message that brings the shared memory.
const SHARED_MEMORY: i64 = -1;
/// Entries that the page has room for.
const MAX_ENTRIES: usize = abi::MAX_VRINGS as usize;

/// What is heard of a VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// It sent something, which QEMU never does. Nothing more is read.
    Spoke,
    /// It has hung up, with all that it had not read; or the connection was dropped here.
    HungUp,
}

/// What goes with a message.
enum Attached {
    Nothing,
    Page(Arc<File>),
    Eventfd(Eventfd),
}

struct Message {
    number: i64,
    attached: Attached,
}

/// The connection to one function. Closes when dropped; the VMM keeps what it was sent, and its
/// page says that none of it counts any more.
pub struct Doorbell {
    stream: Arc<UnixStream>,
    page: GuestMemoryMmap,
    link_id: u64,
    generation: u64,
    unsent: VecDeque<Message>,
}

impl fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorbell")
            .field("link_id", &self.link_id)
            .field("unsent", &self.unsent.len())
            .finish()
    }
}

impl Doorbell {
    /// Greets a VMM that connected, with a page of this link that has no entries and generation
    /// 0. `heard` is called by a thread of this name, the last time
    /// when the VMM has hung up.
    ///
    /// # Errors
    /// When the host gives no memory, descriptor or thread, or the VMM has gone already. The connection
    /// is turned away then: the VMM may have sent what is slow to close.
    pub fn new(
        stream: UnixStream,
        pass: Pass,
        link_id: u64,
        name: &str,
        heard: impl Fn(Word) + Send + 'static,
    ) -> io::Result<Self> {
        let stream = Arc::new(stream);
        let doorbell = match Self::greet(Arc::clone(&stream), link_id) {
            Ok(doorbell) => doorbell,
            Err(error) => {
                turn_away(stream, pass);
                return Err(error);
            }
        };
        let name = format!("{name} doorbell");
        let given = (stream, pass);
        match closing::spawn(name, given, move |(stream, pass)| listen(stream, pass, heard)) {
            Ok(()) => Ok(doorbell),
            Err((error, (stream, pass))) => {
                // The last to have it is who turns it away.
                drop(doorbell);
                turn_away(stream, pass);
                Err(error)
            }
        }
    }

    fn greet(stream: Arc<UnixStream>, link_id: u64) -> io::Result<Self> {
        let fd = sealed_memfd(c"vhost-pci doorbell", abi::DOORBELL_PAGE_LEN, SealFlag::F_SEAL_SEAL)?;
        let page = map(&fd, 0, abi::DOORBELL_PAGE_LEN)?;
        let mut doorbell = Self { stream, page, link_id, generation: 0, unsent: VecDeque::new() };
        doorbell.publish(&[], 0)?;
        // QEMU waits for these three before its VM goes on.
        doorbell.queue(PROTOCOL_VERSION, Attached::Nothing);
        doorbell.queue(OWN_ID.into(), Attached::Nothing);
        doorbell.queue(SHARED_MEMORY, Attached::Page(fd));
        doorbell.send()?;
        Ok(doorbell)
    }

    /// Gives the function its next MSI-X vector, counted from 0: it is what this eventfd
    /// makes, from when the VMM has read the message.
    ///
    /// The guest must not have unmasked the vector yet: QEMU on KVM has no route for one that it
    /// knows no eventfd of, and ends itself.
    pub fn own_vector(&mut self, eventfd: &Eventfd) {
        self.queue(OWN_ID.into(), Attached::Eventfd(eventfd.clone()));
    }

    /// Lets the function ring this eventfd as [`value`]`(id)`. The number must be fresh: not 0,
    /// and not one that this connection has used.
    pub fn peer_vector(&mut self, id: u16, eventfd: &Eventfd) {
        self.queue(id.into(), Attached::Eventfd(eventfd.clone()));
    }

    /// Sends what was queued, as far as the VMM reads.
    ///
    /// # Errors
    /// When the VMM is gone.
    pub fn send(&mut self) -> io::Result<()> {
        while let Some(message) = self.unsent.front() {
            match send(&self.stream, message) {
                Ok(()) => self.unsent.pop_front(),
                Err(error) if is_passing(&error) => return Ok(()),
                Err(error) => return Err(error),
            };
        }
        Ok(())
    }

    /// Messages that the VMM has left no room for yet.
    pub fn unsent(&self) -> usize {
        self.unsent.len()
    }

    /// Whether the VMM has read all that it was to be told. QEMU does as it was told before
    /// a store of its guest to the doorbell register can be looked at.
    ///
    /// # Errors
    /// When the kernel cannot tell.
    pub fn is_read(&self) -> io::Result<bool> {
        Ok(self.unsent.is_empty() && sys::all_is_read(&self.stream)?)
    }

    /// Lets the page say this, from this generation on, which is even and larger than that
    /// before. Entries that the page has no room for are left out.
    ///
    /// # Errors
    /// Never, as the page is as long as it says.
    pub fn publish(&mut self, entries: &[abi::DoorbellEntry], generation: u64) -> io::Result<()> {
        let entries = &entries[..entries.len().min(MAX_ENTRIES)];
        self.generation = generation;
        let changing = generation.wrapping_sub(1);
        // Odd: a driver that sees it rings once more.
        self.store(changing)?;
        if !entries.is_empty() {
            self.write(entries.as_bytes(), abi::DOORBELL_ENTRIES.into())?;
        }
        let header = abi::DoorbellHeader {
            magic: abi::DOORBELL_MAGIC.into(),
            version: abi::ABI_VERSION.into(),
            header_len: (size_of::<abi::DoorbellHeader>() as u16).into(),
            link_id: self.link_id.into(),
            generation: changing.into(),
            vring_count: (entries.len() as u32).into(),
            entries: abi::DOORBELL_ENTRIES.into(),
            ..Default::default()
        };
        self.write(header.as_bytes(), 0)?;
        self.store(generation)
    }

    fn queue(&mut self, number: i64, attached: Attached) {
        self.unsent.push_back(Message { number, attached });
    }

    /// Stores a generation. Release and the fence after it pair with the driver's acquire
    /// loads of the generation before and after it reads an entry and rings
    /// (docs/vhost-pci-device.md, 12.4).
    fn store(&self, generation: u64) -> io::Result<()> {
        let at = GuestAddress(offset_of!(abi::DoorbellHeader, generation) as u64);
        self.page.store(generation.to_le(), at, Ordering::Release).map_err(io::Error::other)?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.page.write_slice(bytes, GuestAddress(at)).map_err(io::Error::other)
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        // The guest may have it mapped still.
        let _ = self.publish(&[], self.generation + 2);
        // Wakes the thread, also where the VMM keeps its end open.
        drop(self.stream.shutdown(Shutdown::Both));
    }
}

/// Waits until the VMM has hung up, and says what is heard of it. `pass` goes when the connection is closed.
fn listen(stream: Arc<UnixStream>, pass: Pass, heard: impl Fn(Word)) {
    if matches!((&*stream).read(&mut [0]), Ok(1..)) {
        heard(Word::Spoke);
    }
    // Not the end of what it sends: who says no more can still hold, unread, the
    // descriptors that it was sent. POLLHUP comes when it has closed its end.
    while poll(&mut [PollFd::new(stream.as_fd(), PollFlags::empty())], PollTimeout::NONE) == Err(Errno::EINTR)
    {
    }
    heard(Word::HungUp);
    // In this order.
    drop(stream);
    drop(pass);
}

/// What a guest stores to the doorbell register to ring what [`Doorbell::peer_vector`] gave
/// this number.
pub fn value(id: u16) -> u32 {
    u32::from(id) << 16
}

/// Sends a message at once or not at all. (The kernel takes so short a one whole.)
fn send(stream: &UnixStream, message: &Message) -> io::Result<()> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let fds: &[BorrowedFd<'_>] = match &message.attached {
        Attached::Nothing => &[],
        Attached::Page(fd) => &[fd.as_fd()],
        Attached::Eventfd(eventfd) => &[eventfd.as_fd()],
    };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    let bytes = message.number.to_le_bytes();
    match sendmsg(stream, &[IoSlice::new(&bytes)], &mut ancillary, flags) {
        Ok(sent) if sent == bytes.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(rustix::io::Errno::INTR) => send(stream, message),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use std::io::Write;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::FileExt;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::closing::tests::{is_closed_elsewhere, slow_to_close};
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use nix::sys::socket::MsgFlags;
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    fn connected() -> (Doorbell, UnixStream, mpsc::Receiver<Word>) {
        let (ours, vmm) = UnixStream::pair().unwrap();
        let (sender, heard) = mpsc::channel();
        let doorbell = Doorbell::new(ours, Pass::default(), 7, "test", move |word| {
            let _ = sender.send(word);
        })
        .unwrap();
        (doorbell, vmm, heard)
    }

    fn receive(vmm: &UnixStream) -> (i64, Option<OwnedFd>) {
        let (mut bytes, mut space) = ([0; 8], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))]);
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut pieces = [io::IoSliceMut::new(&mut bytes)];
        let received = recvmsg(vmm, &mut pieces, &mut ancillary, RecvFlags::empty()).unwrap();
        assert_eq!(received.bytes, 8);
        let fds = ancillary.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        });
        let mut fds: Vec<_> = fds.collect();
        assert!(fds.len() <= 1);
        (i64::from_le_bytes(bytes), fds.pop())
    }

    /// Receives what QEMU waits for; gives the page.
    fn greeting(vmm: &UnixStream) -> File {
        assert!(matches!(receive(vmm), (0, None)));
        assert!(matches!(receive(vmm), (0, None)));
        let (-1, Some(page)) = receive(vmm) else { panic!("no page") };
        page.into()
    }

    fn eventfd() -> (EventFd, Eventfd) {
        let mine = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let theirs = Eventfd::new(mine.as_fd().try_clone_to_owned().unwrap());
        (mine, theirs)
    }

    #[test]
    fn the_greeting_brings_a_page_of_the_link_that_nobody_can_resize() {
        let (doorbell, vmm, _heard) = connected();
        assert!(!doorbell.is_read().unwrap());
        let page = greeting(&vmm);
        assert!(doorbell.is_read().unwrap());
        assert_eq!(page.metadata().unwrap().len(), abi::DOORBELL_PAGE_LEN);
        assert!(page.set_len(0).is_err());
        let mut header = [0; 64];
        page.read_exact_at(&mut header, 0).unwrap();
        let header: abi::DoorbellHeader = zerocopy::transmute!(header);
        assert_eq!((header.magic.value(), header.link_id.value()), (abi::DOORBELL_MAGIC, 7));
        assert_eq!((header.generation.value() % 2, header.vring_count.value()), (0, 0));
    }

    #[test]
    fn eventfds_arrive_in_order_each_with_its_number() {
        let (mut doorbell, vmm, _heard) = connected();
        greeting(&vmm);
        let ends = [eventfd(), eventfd(), eventfd()];
        doorbell.own_vector(&ends[0].1);
        doorbell.peer_vector(1, &ends[1].1);
        doorbell.peer_vector(0x102, &ends[2].1);
        assert_eq!(doorbell.unsent(), 3);
        doorbell.send().unwrap();
        assert_eq!(doorbell.unsent(), 0);
        for (number, (mine, _)) in [0, 1, 0x102].into_iter().zip(&ends) {
            assert!(!doorbell.is_read().unwrap());
            let (received, fd) = receive(&vmm);
            assert_eq!(received, number);
            nix::unistd::write(fd.unwrap(), &1_u64.to_ne_bytes()).unwrap();
            assert_eq!(mine.read().unwrap(), 1);
        }
        assert!(doorbell.is_read().unwrap());
        assert_eq!(value(0x102), 0x0102_0000);
    }

    #[test]
    fn what_a_vmm_does_not_read_is_kept_in_order() {
        let (mut doorbell, vmm, _heard) = connected();
        let (_mine, theirs) = eventfd();
        let mut queued = 0_u16;
        while doorbell.unsent() < 10 {
            queued += 1;
            doorbell.peer_vector(queued, &theirs);
            doorbell.send().unwrap();
        }
        greeting(&vmm);
        for expected in 1..=i64::from(queued) {
            doorbell.send().unwrap();
            assert_eq!(receive(&vmm).0, expected);
        }
        assert!(doorbell.is_read().unwrap());
    }

    #[test]
    fn a_published_page_has_the_entries_and_an_even_generation() {
        let (mut doorbell, vmm, _heard) = connected();
        let page = greeting(&vmm);
        let entry = abi::DoorbellEntry {
            flags: abi::DOORBELL_F_CALL.into(),
            doorbell: value(3).into(),
            ..Default::default()
        };
        doorbell.publish(&[abi::DoorbellEntry::default(), entry], 42).unwrap();
        let mut bytes = [0; 96];
        page.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!((bytes[16], bytes[24], bytes[28]), (42, 2, 64));
        assert_eq!((bytes[80], bytes[90]), (2, 3));
        // More vrings than a link can have: no room, and no panic.
        doorbell.publish(&[entry; MAX_ENTRIES + 1], 44).unwrap();
        page.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!((bytes[16], bytes[24]), (44, MAX_ENTRIES as u8));
    }

    #[test]
    fn a_vmm_is_gone_when_it_has_closed_its_end_and_not_before() {
        const SOON: Duration = Duration::from_secs(5);
        let (mut doorbell, vmm, heard) = connected();
        drop(vmm);
        assert_eq!(heard.recv_timeout(SOON), Ok(Word::HungUp));
        let (_mine, theirs) = eventfd();
        doorbell.own_vector(&theirs);
        doorbell.send().unwrap_err();

        // It says that it will say no more, and keeps what it has not read.
        let (_doorbell, vmm, heard) = connected();
        vmm.shutdown(Shutdown::Write).unwrap();
        assert!(heard.recv_timeout(Duration::from_millis(100)).is_err());
        drop(vmm);
        assert_eq!(heard.recv_timeout(SOON), Ok(Word::HungUp));

        let (_doorbell, mut vmm, heard) = connected();
        vmm.write_all(&[1; 100]).unwrap();
        assert_eq!(heard.recv_timeout(SOON), Ok(Word::Spoke));
        assert!(heard.recv_timeout(Duration::from_millis(100)).is_err());
        drop(vmm);
        assert_eq!(heard.recv_timeout(SOON), Ok(Word::HungUp));
    }

    #[test]
    fn what_a_vmm_sent_that_has_gone_already_is_not_closed_by_who_greets_it() {
        let (slow, other) = slow_to_close();
        let (ours, vmm) = UnixStream::pair().unwrap();
        closing::tests::send(&vmm, slow, MsgFlags::empty()).unwrap();
        drop(vmm);
        let greet = |pass| drop(Doorbell::new(ours, pass, 7, "test", |_| {}).unwrap_err());
        is_closed_elsewhere(greet, other);
    }

    #[test]
    fn the_page_of_a_connection_that_is_over_names_nothing() {
        let (mut doorbell, vmm, heard) = connected();
        let page = greeting(&vmm);
        let entry = abi::DoorbellEntry { flags: abi::DOORBELL_F_CALL.into(), ..Default::default() };
        doorbell.publish(&[entry], 6).unwrap();
        drop(doorbell);
        assert_eq!(heard.recv_timeout(Duration::from_secs(5)), Ok(Word::HungUp));
        let mut header = [0; 32];
        page.read_exact_at(&mut header, 0).unwrap();
        assert_eq!((header[16], header[24]), (8, 0));
    }
}
