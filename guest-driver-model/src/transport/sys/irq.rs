//! Which eventfds a VFIO device's interrupts signal, one by one: vfio-ioctls knows them all at
//! once only.

use std::io;
use std::os::fd::AsRawFd;

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_TYPE, vfio_irq_set,
};
use vfio_ioctls::VfioDevice;

use super::event::Event;

/// `VFIO_DEVICE_SET_IRQS`.
const SET_IRQS: u64 = nix::request_code_none!(VFIO_TYPE, VFIO_BASE + 10);
/// Words of [`vfio_irq_set`], whose array of descriptors follows.
const HEADER: usize = size_of::<vfio_irq_set>() / size_of::<u32>();

const _: () = assert!(HEADER * size_of::<u32>() == size_of::<vfio_irq_set>() && HEADER == 5);

/// Lets the interrupts of kind `index` from `first` on signal these eventfds, or nothing: then
/// a vector is left masked. The first call for a kind allocates as many as it names.
///
/// # Errors
/// What the kernel answers.
pub fn set_triggers(
    device: &VfioDevice,
    index: u32,
    first: u32,
    events: &[Option<&Event>],
) -> io::Result<()> {
    let count = events.len() as u32;
    let len = ((HEADER + events.len()) * size_of::<u32>()) as u32;
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    let mut request = vec![len, flags, index, first, count];
    request.extend(events.iter().map(|event| event.map_or(-1, |event| event.inner().as_raw_fd()) as u32));
    // SAFETY: the request's number and structure belong together. The kernel only reads the
    // structure, whose five words and `count` descriptors, `len` bytes, are what `request` holds;
    // it keeps nothing of it but the eventfds, to which it takes references of its own.
    match unsafe { libc::ioctl(device.as_raw_fd(), SET_IRQS, request.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
