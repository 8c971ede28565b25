//! Answers a peer's VMM in the broker's place, while it takes its window down: QEMU tells of its
//! memory, which the window was a part of, and waits for the answer before it does anything else
//! (vhost-user: REPLY_ACK). The answers say what lets it go on, and mean nothing.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use vhost::vhost_user::message::FrontendReq;

use crate::runtime::backend_message::{
    FLAG_NEED_REPLY, FLAG_REPLY, FLAG_VERSION, HEADER_LEN, acknowledgement,
};

/// The longest payload of a message that is taken, bytes.
const MAX_PAYLOAD: usize = 4096;
/// Pieces that are read at once: one who writes without end is not listened to for ever.
const MAX_PIECES: usize = 16;

/// Of one connection: what has come of a message that is not whole.
#[derive(Debug, Default)]
pub struct StandIn {
    bytes: Vec<u8>,
}

impl StandIn {
    /// Answers what has come. Waits for nothing.
    ///
    /// # Errors
    /// When the VMM closed the connection, sent what cannot be answered, or reads no answer: it
    /// is to be disconnected.
    pub fn answer(&mut self, connection: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut piece = [0; 1024];
        for _ in 0..MAX_PIECES {
            // Descriptors that come along the kernel closes.
            match recv(connection, &mut piece[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(Errno::PIPE),
                Ok((len, _)) => self.bytes.extend(&piece[..len]),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error),
            }
            while let Some(answer) = self.next()? {
                if !answer.is_empty()
                    && send(connection, &answer, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)? < answer.len()
                {
                    return Err(Errno::AGAIN);
                }
            }
        }
        Ok(())
    }

    /// The answer, which may be none, to the next message that is whole.
    fn next(&mut self) -> Result<Option<Vec<u8>>, Errno> {
        let Some(header) = self.bytes.first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let [request, flags, size] = [0, 4, 8]
            .map(|at| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]));
        let len = HEADER_LEN + size as usize;
        if size as usize > MAX_PAYLOAD || flags & !FLAG_NEED_REPLY != FLAG_VERSION {
            return Err(Errno::PROTO);
        }
        if self.bytes.len() < len {
            return Ok(None);
        }
        let mut message: Vec<u8> = self.bytes.drain(..len).collect();
        // Those are answered with a payload of the question's kind: the configuration as it was
        // asked for, zeroed, and a vring's state.
        let echoed = [FrontendReq::GET_CONFIG, FrontendReq::GET_VRING_BASE];
        Ok(Some(if echoed.iter().any(|echoed| *echoed as u32 == request) {
            message[4..8].copy_from_slice(&(FLAG_VERSION | FLAG_REPLY).to_ne_bytes());
            message
        } else if flags & FLAG_NEED_REPLY != 0 {
            acknowledgement(request, true).to_vec()
        } else {
            Vec::new()
        }))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn message(request: FrontendReq, flags: u32, payload: &[u8]) -> Vec<u8> {
        let words = [request as u32, FLAG_VERSION | flags, payload.len() as u32];
        words.iter().flat_map(|word| word.to_ne_bytes()).chain(payload.iter().copied()).collect()
    }

    #[test]
    fn what_wants_an_answer_gets_one_and_what_does_not_gets_none() {
        let (mut vmm, here) = UnixStream::pair().unwrap();
        let mut stand_in = StandIn::default();
        let all = [
            message(FrontendReq::SET_VRING_NUM, 0, &[0; 8]),
            message(FrontendReq::REM_MEM_REG, FLAG_NEED_REPLY, &[7; 40]),
            message(FrontendReq::GET_VRING_BASE, 0, &[1, 0, 0, 0, 0, 0, 0, 0]),
        ]
        .concat();
        // In pieces of any length.
        for piece in all.chunks(7) {
            vmm.write_all(piece).unwrap();
            stand_in.answer(here.as_fd()).unwrap();
        }
        drop(here);
        let mut answers = Vec::new();
        vmm.read_to_end(&mut answers).unwrap();
        let acknowledged = message(FrontendReq::REM_MEM_REG, FLAG_REPLY, &[0; 8]);
        let state = message(FrontendReq::GET_VRING_BASE, FLAG_REPLY, &[1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(answers, [acknowledged, state].concat());
    }

    #[test]
    fn what_is_no_message_ends_it_and_so_does_the_vmms_end() {
        for bad in [[0xff; 12].to_vec(), message(FrontendReq::SET_OWNER, 0x10, &[])] {
            let (mut vmm, here) = UnixStream::pair().unwrap();
            vmm.write_all(&bad).unwrap();
            assert_eq!(StandIn::default().answer(here.as_fd()), Err(Errno::PROTO));
        }
        let (_, here) = UnixStream::pair().unwrap();
        assert_eq!(StandIn::default().answer(here.as_fd()), Err(Errno::PIPE));
    }
}
