//! A session: one front-end's connection, served by a thread of its own that may
//! block on it.
//!
//! | file | what it holds |
//! |---|---|
//! | [`serve`] | the thread: reads messages until the session ends |
//! | [`decode`] | the vhost crate's handler: messages to [`Request`](crate::link::message::Request)s |
//! | [`intercept`] | the messages that the vhost crate does not decode |
//! | [`inspect`] | checks of received descriptors: file or eventfd |
//! | [`sys`] | the connection's one descriptor |

pub mod decode;
pub mod inspect;
pub mod intercept;
pub mod serve;
pub mod sys;
