//! The messages that are taken from the socket before the vhost crate sees them:
//! SET_BACKEND_REQ_FD, whose stream the broker must be able to shut down when its
//! VMM stalls (the crate's `Backend` keeps it to itself); IOTLB_MSG, which the
//! crate refuses; and SET_VRING_ENABLE, which QEMU sends before SET_FEATURES and
//! the crate takes after it only.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::link::Fault;
use crate::link::message::Request;

/// Length of a vhost-user header: request, flags, size of the payload, each 32
/// bits in native order (vhost-user: Header).
const HEADER_LEN: usize = 12;
/// Header flags: protocol version 1, a reply, a reply is wanted.
const FLAG_VERSION: u32 = 0x1;
const FLAG_REPLY: u32 = 0x4;
const FLAG_NEED_REPLY: u32 = 0x8;
/// The longest payload of an intercepted message: `struct vhost_iotlb_msg`, bytes.
const MAX_PAYLOAD: usize = 64;

/// What is next on the socket.
#[derive(Debug)]
pub enum Next {
    /// A message for the vhost crate.
    Ordinary,
    /// A message that was taken.
    Taken(Intercepted),
    /// The front-end closed the connection.
    End,
}

/// A message that was taken from the socket.
#[derive(Debug)]
pub struct Intercepted {
    code: FrontendReq,
    flags: u32,
    payload: Vec<u8>,
    file: Option<OwnedFd>,
}

/// The messages that are taken.
const WANTED: [FrontendReq; 3] =
    [FrontendReq::SET_BACKEND_REQ_FD, FrontendReq::IOTLB_MSG, FrontendReq::SET_VRING_ENABLE];

/// The 32-bit number at this place, counted in such numbers; 0 past the end.
fn word(bytes: &[u8], index: usize) -> u32 {
    bytes.get(4 * index..4 * index + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// Waits for a message and takes it if it is one of ours.
///
/// # Errors
/// When the socket fails, or the message's size is wrong.
pub fn next(stream: &mut UnixStream) -> io::Result<Next> {
    let mut header = [0; HEADER_LEN];
    let mut pause = Duration::from_millis(1);
    loop {
        match recv(stream.as_raw_fd(), &mut header, MsgFlags::MSG_PEEK) {
            Ok(0) => return Ok(Next::End),
            Ok(HEADER_LEN) => break,
            // A header in pieces: a peek does not wait for the rest.
            Ok(_) => {
                thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let request = word(&header, 0);
    let Some(code) = WANTED.into_iter().find(|code| *code as u32 == request) else {
        return Ok(Next::Ordinary);
    };
    let (len, file) = stream.recv_with_fd(&mut header)?;
    let flags = word(&header, 1);
    let size = word(&header, 2) as usize;
    if len != HEADER_LEN || size > MAX_PAYLOAD || flags & !FLAG_NEED_REPLY != FLAG_VERSION {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{code:?} with flags {flags:#x} and a payload of {size} bytes"),
        ));
    }
    let mut payload = vec![0; size];
    stream.read_exact(&mut payload)?;
    Ok(Next::Taken(Intercepted { code, flags, payload, file: file.map(OwnedFd::from) }))
}

impl Intercepted {
    /// The request that the message makes.
    ///
    /// # Errors
    /// When the payload has another size, or a descriptor is missing or one too many.
    pub fn request(&mut self) -> Result<Request, Fault> {
        let code = self.code;
        let fault = |reason: String| Err(Fault::Message(format!("{code:?} {reason}")));
        match (code, self.file.take(), self.payload.len()) {
            (FrontendReq::SET_BACKEND_REQ_FD, Some(fd), 0) => {
                Ok(Request::SetBackendChannel(UnixStream::from(fd)))
            }
            (FrontendReq::SET_BACKEND_REQ_FD, None, 0) => fault("without a descriptor".into()),
            (FrontendReq::IOTLB_MSG, None, _) => Ok(Request::Iotlb),
            (FrontendReq::SET_VRING_ENABLE, None, 8) => match word(&self.payload, 1) {
                enable @ (0 | 1) => {
                    Ok(Request::SetVringEnable { index: word(&self.payload, 0), enable: enable == 1 })
                }
                other => fault(format!("with the value {other}: it is 0 or 1")),
            },
            (_, Some(_), _) => fault("with a descriptor".into()),
            (_, None, len) => fault(format!("with a payload of {len} bytes")),
        }
    }

    /// Sends the answer, if the front-end wants one: 0 for done, 1 for refused
    /// (vhost-user: REPLY_ACK).
    ///
    /// # Errors
    /// When the socket fails.
    pub fn answer(&self, stream: &mut UnixStream, reply_ack: bool, done: bool) -> io::Result<()> {
        if !reply_ack || self.flags & FLAG_NEED_REPLY == 0 {
            return Ok(());
        }
        let mut message = Vec::with_capacity(HEADER_LEN + 8);
        for field in [self.code as u32, FLAG_VERSION | FLAG_REPLY, 8] {
            message.extend(field.to_ne_bytes());
        }
        message.extend(u64::from(!done).to_ne_bytes());
        stream.write_all(&message)
    }
}
