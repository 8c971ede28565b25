//! Why a VMM gets no device.

use std::io;

use crate::frontend::handshake::HandshakeError;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// There is nobody at the socket.
    #[error("connecting to the broker (is it running, and may you use its socket?): {0}")]
    Connect(io::Error),
    /// The broker cannot be used.
    #[error("negotiating with the broker: {0}")]
    Broker(HandshakeError),
    /// The host gives no address space, descriptor or thread.
    #[error("the host lacks resources for the device: {0}")]
    Host(#[from] io::Error),
}
