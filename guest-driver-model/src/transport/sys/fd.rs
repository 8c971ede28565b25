//! Descriptors of library types that predate `AsFd`.

use std::os::fd::{AsRawFd, BorrowedFd};

use vfio_ioctls::VfioDevice;
use vhost::vhost_user::{FrontendReqHandler, VhostUserFrontendReqHandler};

/// The descriptor of a VFIO device, for mapping its regions.
pub fn borrow_device(device: &VfioDevice) -> BorrowedFd<'_> {
    // SAFETY: the device owns the descriptor and closes it only on drop, which the
    // borrow prevents.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }
}

/// The receiving end of a back-end channel, to wait for requests.
pub fn borrow_channel<S: VhostUserFrontendReqHandler>(handler: &FrontendReqHandler<S>) -> BorrowedFd<'_> {
    // SAFETY: the handler owns the socket and closes it only on drop, which the
    // borrow prevents.
    unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) }
}
