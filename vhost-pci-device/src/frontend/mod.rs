//! The vhost-user connection to the broker, of which the device is the front-end.
//!
//! | file | what it holds |
//! |---|---|
//! | [`reach`] | the way to the broker's socket |
//! | [`handshake`] | negotiation, starting and stopping: what is asked of the broker |
//! | [`session`] | the device's thread, which asks; reconnects |
//! | [`channel`] | the thread that answers what the broker asks |
//! | [`ending`] | ends that the broker can draw out |
//! | [`message`] | the broker's questions as bytes |
//! | [`lines`] | how many lines of the log the broker can cause |
//!
//! No vCPU ever waits for anything here.

pub mod channel;
pub mod ending;
pub mod handshake;
pub mod lines;
pub mod message;
pub mod reach;
pub mod session;
