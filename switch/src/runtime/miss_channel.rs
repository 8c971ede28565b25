//! The back-end channel to an owner's VMM: one thread tells it of IOTLB misses, one
//! after the other, and waits for each answer (vhost-user: back-end message
//! VHOST_USER_BACKEND_IOTLB_MSG). The vhost crate's `Backend` has no such message.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;

use crossbeam_channel::{Receiver, Sender, unbounded};
use iommu::{Access, Iova};

use super::{Input, LinkPort, SessionId};
use crate::link::message::{IotlbMessage, MissId};

/// VHOST_USER_BACKEND_IOTLB_MSG.
const IOTLB_MSG: u32 = 1;
/// Header flags: protocol version 1, a reply, a reply is wanted.
const FLAG_VERSION: u32 = 0x1;
const FLAG_REPLY: u32 = 0x4;
const FLAG_NEED_REPLY: u32 = 0x8;
/// Lengths of header, `struct vhost_iotlb_msg` and reply, bytes.
const HEADER_LEN: usize = 12;
const IOTLB_LEN: usize = 32;
const REPLY_LEN: usize = 8;

/// What the owner's VMM is told.
#[derive(Clone, Copy, Debug)]
pub enum Word {
    /// A translation is missing.
    Miss(MissId, Iova, Access),
    /// A translation does not allow the access.
    AccessFail(Iova, Access),
}

/// The channel to one owner's VMM. Closes when dropped.
#[derive(Debug)]
pub struct MissChannel {
    words: Sender<Word>,
    stream: UnixStream,
}

impl MissChannel {
    /// Starts the thread. Answers go to the link as those of this session.
    ///
    /// # Errors
    /// When the host gives no descriptor or thread.
    pub fn open(stream: UnixStream, port: LinkPort, session: SessionId, name: &str) -> io::Result<Self> {
        let (words, queue) = unbounded();
        let mut clone = stream.try_clone()?;
        thread::Builder::new().name(format!("{name} misses")).spawn(move || {
            // The link hears of an owner that left by its session.
            let _ = serve(&mut clone, &queue, &port, session);
        })?;
        Ok(Self { words, stream })
    }

    /// Tells the VMM. Its answer to a miss comes as [`Input::MissDone`]. The link has one
    /// miss open at a time, so that no more than a few words can wait here.
    pub fn tell(&self, word: Word) {
        // A thread that is gone left because the VMM is: the link hears of that.
        let _ = self.words.send(word);
    }
}

impl Drop for MissChannel {
    fn drop(&mut self) {
        // Wakes the thread, also where the VMM keeps its end open and silent.
        drop(self.stream.shutdown(Shutdown::Both));
    }
}

fn serve(
    stream: &mut UnixStream,
    queue: &Receiver<Word>,
    port: &LinkPort,
    session: SessionId,
) -> io::Result<()> {
    for word in queue {
        match word {
            Word::AccessFail(iova, access) => {
                stream.write_all(&message(FLAG_VERSION, IotlbMessage::ACCESS_FAIL, iova, access))?;
            }
            Word::Miss(id, iova, access) => {
                let flags = FLAG_VERSION | FLAG_NEED_REPLY;
                stream.write_all(&message(flags, IotlbMessage::MISS, iova, access))?;
                let told = reply(stream)?;
                port.send(Input::MissDone { session, id, told });
            }
        }
    }
    Ok(())
}

fn message(flags: u32, kind: u8, iova: Iova, access: Access) -> [u8; HEADER_LEN + IOTLB_LEN] {
    let mut bytes = [0; HEADER_LEN + IOTLB_LEN];
    bytes[0..4].copy_from_slice(&IOTLB_MSG.to_ne_bytes());
    bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
    bytes[8..12].copy_from_slice(&(IOTLB_LEN as u32).to_ne_bytes());
    bytes[12..20].copy_from_slice(&iova.raw().to_ne_bytes());
    bytes[20..28].copy_from_slice(&iommu::PAGE_SIZE.to_ne_bytes());
    bytes[36] = access.bits() as u8;
    bytes[37] = kind;
    bytes
}

/// Whether the VMM says that it has told the translation.
fn reply(stream: &mut UnixStream) -> io::Result<bool> {
    let mut bytes = [0; HEADER_LEN + REPLY_LEN];
    stream.read_exact(&mut bytes)?;
    let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if word(0) != IOTLB_MSG || word(4) & FLAG_REPLY == 0 || word(8) as usize != REPLY_LEN {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(bytes[HEADER_LEN..].iter().all(|byte| *byte == 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_miss_has_the_layout_of_vhost_iotlb_msg() {
        let bytes = message(
            FLAG_VERSION | FLAG_NEED_REPLY,
            IotlbMessage::MISS,
            Iova::new(0x1234_5000),
            Access::Write,
        );
        let mut expected = vec![1, 0, 0, 0, 9, 0, 0, 0, 32, 0, 0, 0, 0x00, 0x50, 0x34, 0x12, 0, 0, 0, 0];
        expected.extend([0, 0x10, 0, 0, 0, 0, 0, 0]);
        expected.extend([0; 8]);
        expected.extend([2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes.to_vec(), expected);
    }
}
