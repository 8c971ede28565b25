//! A peer's VMM that says yes to everything, and lets go of its witness when it may.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use vhost_pci_device::abi;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::bench::{self, Place};
use crate::raw::{
    PEER_PROTOCOL, REPLY, Raw, SET_BACKEND_REQ_FD, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_KICK, VERSION,
    eventfd, longs, message, words,
};

const SHMEM_MAP: u32 = 9;

/// What the peer's VMM was asked: to map or unmap this much here.
pub type Asked = (bool, u64, u64);

/// A peer's VMM that maps what is the broker's own, and says yes to everything; but it unmaps a
/// witness only when it may.
pub struct Vmm {
    pub connection: Raw,
    pub asked: Receiver<Asked>,
    pub areas: Receiver<GuestMemoryMmap>,
    pub may: Sender<()>,
}

fn map(file: File, len: u64) -> GuestMemoryMmap {
    let range = (GuestAddress(0), len as usize, Some(FileOffset::new(file, 0)));
    GuestMemoryMmap::from_ranges_with_files([range]).unwrap()
}

fn serve(mut channel: UnixStream, said: &Sender<Asked>, areas: &Sender<GuestMemoryMmap>, may: &Receiver<()>) {
    let mut witness = None;
    loop {
        let mut bytes = [0; 12 + 40];
        let Ok((len, file)) = channel.recv_with_fd(&mut bytes) else { return };
        if len == 0 || (len < bytes.len() && channel.read_exact(&mut bytes[len..]).is_err()) {
            return;
        }
        let request = u32::from_ne_bytes(bytes[..4].try_into().unwrap());
        let long = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
        let (offset, len) = (long(28), long(36));
        let takes_witness = file.is_none() && offset == abi::WITNESS_OFFSET;
        match (file, offset) {
            // Both areas are of one file.
            (Some(file), abi::LINK_OFFSET) => {
                drop(areas.send(map(file, abi::CONTROL_OFFSET + abi::CONTROL_LEN)))
            }
            (Some(file), abi::WITNESS_OFFSET) => witness = Some(map(file, len)),
            _ => {}
        }
        let _ = said.send((request == SHMEM_MAP, offset, len));
        // As QEMU does, before it acts.
        let answer = message(request, VERSION | REPLY, &longs(&[0]));
        if channel.send_with_fds(&[answer.as_slice()], &[]).is_err() {
            return;
        }
        if takes_witness && witness.is_some() {
            if may.recv().is_err() {
                // For good: it holds the page until the test ends.
                thread::sleep(Duration::from_secs(600));
            }
            drop(witness.take());
        }
    }
}

impl Vmm {
    pub fn start(place: &Place) -> Self {
        let mut connection = Raw::connect(&place.at("link-peer"));
        connection.negotiate(PEER_PROTOCOL);
        let (mine, theirs) = UnixStream::pair().unwrap();
        assert!(connection.done(SET_BACKEND_REQ_FD, &[], &[theirs.into()]));
        let (said, asked) = channel();
        let (gives, areas) = channel();
        let (may, allowed) = channel();
        thread::spawn(move || serve(mine, &said, &gives, &allowed));
        for index in 0..3u32 {
            assert!(connection.done(SET_VRING_CALL, &longs(&[index.into()]), &[eventfd()]));
            assert!(connection.done(SET_VRING_KICK, &longs(&[index.into()]), &[eventfd()]));
            assert!(connection.done(SET_VRING_ENABLE, &words(&[index, 1]), &[]));
        }
        Self { connection, asked, areas, may }
    }

    /// All that it was asked until it was this.
    pub fn until(&self, last: impl Fn(&Asked) -> bool) -> Vec<Asked> {
        let mut all = Vec::new();
        loop {
            all.push(self.asked.recv_timeout(bench::PATIENCE).unwrap());
            if last(all.last().unwrap()) {
                return all;
            }
        }
    }
}
