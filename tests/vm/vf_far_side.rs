//! The far side of the virtual function's wire: a socket at which QEMU's card sends and receives frames,
//! one a datagram. Checks what comes, and answers each frame with another: a datagram with a datagram of a
//! stream of its own, a test's frame with itself.

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use guest_driver_model::programs::pattern::{Checker, Generator, Verdict};
use vhost_pci_tests::Sandbox;

use crate::testbed::{OWNER, PEER};

/// The far side's socket, and the card's.
pub const SOCKET: &str = "far.sock";
pub const CARD_SOCKET: &str = "card.sock";
/// The port of the datagrams, at both ends.
pub const PORT: u16 = 7000;
/// Bytes of a datagram to the owner.
const SIZE: usize = 900;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const ARP: [u8; 2] = [0x08, 0x06];
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
/// IEEE 802: local experimental ethertype 1, which is a test's frame.
const LOCAL: [u8; 2] = [0x88, 0xb5];
const UDP: u8 = 17;
/// Lengths of the headers, bytes.
const ETHERNET: usize = 14;
const IP: usize = 20;
const HEADERS: usize = ETHERNET + IP + 8;

/// What came and went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Frames that were checked.
    pub came: Verdict,
    /// Frames that nobody of the test's sent.
    pub strange: u64,
    /// Of zeros alone: what QEMU's card sends when its IOMMU lets it read nothing.
    pub blank: u64,
}

struct Shared {
    paused: AtomicBool,
    over: AtomicBool,
    seen: Mutex<Seen>,
}

/// The far side, at work in a thread.
pub struct FarSide {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl FarSide {
    /// Has to be there before the card's QEMU.
    pub fn start(sandbox: &Sandbox) -> Result<Self> {
        let socket = UnixDatagram::bind(sandbox.dir().join(SOCKET)).context("the far side's socket")?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        let (paused, over) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(Shared { paused, over, seen: Mutex::default() });
        let (card, for_thread) = (sandbox.dir().join(CARD_SOCKET), shared.clone());
        let thread = std::thread::spawn(move || serve(&socket, &card, &for_thread));
        Ok(Self { shared, thread: Some(thread) })
    }

    /// What was seen until now.
    pub fn seen(&self) -> Seen {
        *self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads no more, so that the card cannot get rid of what it is to send; or again.
    pub fn pause(&self, paused: bool) {
        self.shared.paused.store(paused, Ordering::SeqCst);
    }

    /// Ends it, and says what went wrong.
    pub fn end(mut self) -> Result<()> {
        self.shared.over.store(true, Ordering::SeqCst);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => anyhow::bail!("the far side's thread panicked"),
        }
    }
}

impl Drop for FarSide {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
    }
}

fn serve(socket: &UnixDatagram, card: &PathBuf, shared: &Shared) -> Result<()> {
    let mut checker = Checker::new();
    let mut generator = Generator::new(SIZE, 0x7666, true);
    let (mut frame, mut payload) = (vec![0; 70_000], Vec::new());
    let (mut strange, mut blank) = (0, 0);
    while !shared.over.load(Ordering::SeqCst) {
        if shared.paused.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        let Ok(len) = socket.recv(&mut frame) else { continue };
        let frame = &frame[..len];
        let answer = match kind(frame) {
            Some(LOCAL) => {
                checker.check(frame);
                Some(frame.to_vec())
            }
            Some(ARP) => arp_reply(frame),
            Some(IPV4) if is_ours(frame) => {
                checker.check(&frame[HEADERS..]);
                generator.fill(&mut payload, 1);
                Some(datagram(frame, &payload))
            }
            // A kernel that looks for neighbours and routers.
            Some(IPV6 | IPV4) => None,
            _ if frame.iter().all(|byte| *byte == 0) => {
                blank += 1;
                None
            }
            _ => {
                strange += 1;
                None
            }
        };
        if let Some(answer) = answer.filter(|_| card.exists()) {
            // Waits as long as the card has no room.
            socket.send_to(&answer, card).context("sending to the card")?;
        }
        *shared.seen.lock().unwrap_or_else(PoisonError::into_inner) =
            Seen { came: checker.verdict(), strange, blank };
    }
    Ok(())
}

fn kind(frame: &[u8]) -> Option<[u8; 2]> {
    frame.get(12..ETHERNET)?.try_into().ok()
}

fn is_ours(frame: &[u8]) -> bool {
    frame.len() > HEADERS
        && frame[ETHERNET] == 0x45
        && frame[ETHERNET + 9] == UDP
        && frame[ETHERNET + IP + 2..ETHERNET + IP + 4] == PORT.to_be_bytes()
}

fn address(text: &str) -> [u8; 4] {
    text.parse().map_or([0; 4], |address: std::net::Ipv4Addr| address.octets())
}

/// To who asks for the far side's address.
fn arp_reply(frame: &[u8]) -> Option<Vec<u8>> {
    let asks = frame.get(20..22)? == [0, 1] && frame.get(38..42)? == address(PEER);
    if !asks {
        return None;
    }
    let (from, ip) = (frame.get(22..28)?, frame.get(28..32)?);
    let mut reply = Vec::new();
    reply.extend_from_slice(from);
    reply.extend_from_slice(&MAC);
    reply.extend_from_slice(&ARP);
    reply.extend_from_slice(&frame[14..20]);
    reply.extend_from_slice(&[0, 2]);
    reply.extend_from_slice(&MAC);
    reply.extend_from_slice(&address(PEER));
    reply.extend_from_slice(from);
    reply.extend_from_slice(ip);
    reply.resize(60, 0);
    Some(reply)
}

/// A datagram to who sent this one.
fn datagram(to: &[u8], payload: &[u8]) -> Vec<u8> {
    let ports = PORT.to_be_bytes();
    let mut ip = vec![0x45, 0];
    ip.extend_from_slice(&((IP + 8 + payload.len()) as u16).to_be_bytes());
    ip.extend_from_slice(&[0, 0, 0x40, 0, 64, UDP, 0, 0]);
    ip.extend_from_slice(&address(PEER));
    ip.extend_from_slice(&address(OWNER));
    let words = ip.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = Vec::new();
    frame.extend_from_slice(&to[6..12]);
    frame.extend_from_slice(&MAC);
    frame.extend_from_slice(&IPV4);
    frame.extend_from_slice(&ip);
    frame.extend_from_slice(&[ports[0], ports[1], ports[0], ports[1]]);
    frame.extend_from_slice(&((8 + payload.len()) as u16).to_be_bytes());
    // No checksum: each byte of the payload is checked.
    frame.extend_from_slice(&[0, 0]);
    frame.extend_from_slice(payload);
    frame
}
