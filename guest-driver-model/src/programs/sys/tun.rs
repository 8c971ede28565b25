//! Tap interfaces: the ioctls of /dev/net/tun and of a socket.

use std::ffi::{c_char, c_short};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::net::HEADER_LEN;

/// The request structure for an interface of this name.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: `ifreq` is plain data, for which all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero: the kernel wants a terminated string.
    if name.is_empty() || name.len() >= request.ifr_name.len() || !name.is_ascii() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "an interface's name has 1 to 15 ASCII characters",
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as c_char;
    }
    Ok(request)
}

/// An interface ioctl.
fn control(fd: RawFd, number: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: `request` is a live `ifreq`, which is what every ioctl number in this
    // file reads and writes, and no more than it. The type of the number differs
    // between C libraries.
    let result = unsafe { libc::ioctl(fd, number as _, std::ptr::from_mut(request)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An ioctl of a tap interface with a number.
fn set(tun: &File, number: libc::c_ulong, value: &mut libc::c_int) -> io::Result<()> {
    // SAFETY: `value` is a live `int`, which is what the two ioctl numbers that are given here,
    // TUNSETVNETHDRSZ and TUNSETVNETLE, read, and no more than it.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), number as _, std::ptr::from_mut(value)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Says what whoever reads from the interface accepts: bits TUN_F_*.
pub fn set_offloads(tun: &File, bits: u8) -> io::Result<()> {
    // SAFETY: this ioctl takes a number, and no pointer.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(bits)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Opens (and creates, if need be) a tap interface: frames with the header of virtio before them,
/// which leaves nothing to the reader until [`set_offloads`]; non-blocking.
pub fn open_tap(name: &str) -> io::Result<File> {
    let tun =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as c_short;
    control(tun.as_raw_fd(), libc::TUNSETIFF as _, &mut request)?;
    set(&tun, libc::TUNSETVNETHDRSZ as _, &mut (HEADER_LEN as libc::c_int))?;
    set(&tun, libc::TUNSETVNETLE as _, &mut 1)?;
    set_offloads(&tun, 0)?;
    Ok(tun)
}

/// Sets an interface's MTU, bytes.
pub fn set_mtu(name: &str, mtu: u16) -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut request = request(name)?;
    request.ifr_ifru.ifru_mtu = mtu.into();
    control(socket.as_raw_fd(), libc::SIOCSIFMTU as _, &mut request)
}

/// Brings an interface up.
pub fn bring_up(name: &str) -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut request = request(name)?;
    control(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request)?;
    // SAFETY: SIOCGIFFLAGS has filled this member of the union; any bits are valid.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as c_short;
    control(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &mut request)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_name_that_is_none_is_refused() {
        assert!(request("").is_err());
        assert!(request("a-name-of-16-byte").is_err());
        assert!(request("vp0").is_ok());
    }
}
