//! The thread of a session: reads one message after the other and has each
//! answered, until the front-end leaves, errs, or the link ends the session. A
//! front-end that stalls in mid-message stalls this thread and nothing else.

use std::os::fd::AsFd;
use std::thread;
use std::time::Instant;

use crossbeam_channel::Receiver;
use tracing::debug;
use vhost::vhost_user::Error;

use super::decode::Decoder;
use super::intercept::{self, Next};
use super::sys::Connection;
use crate::link::message::{Flood, Reply};
use crate::link::{Fault, Side};
use crate::runtime::rate::Rate;
use crate::runtime::{Input, LinkPort, SessionId};

/// Serves one front-end's connection, whose messages `decoder` takes no faster than `rate`, until it
/// ends; tells the link.
pub fn serve(
    mut connection: Connection,
    decoder: &Decoder,
    port: &LinkPort,
    mut rate: Rate,
    (side, session): (Side, SessionId),
) {
    let fault = messages(&mut connection, decoder, || {
        while let Some(wait) = rate.take(Instant::now()) {
            port.send(Input::TooOften(side, Flood::Messages));
            thread::sleep(wait);
        }
    });
    port.send(Input::Ended { side, session, fault });
}

/// Handles messages until the session ends; gives the fault that ended it, if the
/// link does not know it already.
fn messages(connection: &mut Connection, decoder: &Decoder, mut wait: impl FnMut()) -> Option<Fault> {
    // The answer to the message before, which the front-end is sent by somebody else: this
    // thread goes on waiting for the next message, and is not woken in between.
    let mut open: Option<Receiver<Reply>> = None;
    loop {
        wait();
        let next = intercept::next(connection.as_fd());
        if let Some(answer) = open.take()
            && !matches!(answer.recv(), Ok(Reply::Done | Reply::Declined))
        {
            return None;
        }
        match next {
            Ok(Next::Ordinary) => match connection.handle_request() {
                Ok(()) => {}
                Err(_) if decoder.take_declined() => {}
                Err(error) => return decoder.take_fault().or_else(|| fault_of(error)),
            },
            Ok(Next::Taken(mut message)) => {
                let request = match message.request() {
                    Ok(request) => request,
                    Err(fault) => return Some(fault),
                };
                match message.wants_answer(decoder.reply_ack()) {
                    Some(number) => open = Some(decoder.begin(request, Some(number))),
                    None if decoder.ask(request).is_ok() || decoder.take_declined() => {}
                    None => return None,
                }
            }
            Ok(Next::End) => return None,
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                return Some(Fault::Message(error.to_string()));
            }
            Err(error) => {
                debug!(%error, "session ended");
                return None;
            }
        }
    }
}

/// What an error of the vhost crate says of the front-end. A connection that
/// closed between messages, and what the link refused itself, is no further fault.
fn fault_of(error: Error) -> Option<Fault> {
    match error {
        Error::Disconnected | Error::SocketBroken(_) | Error::SocketError(_) | Error::ReqHandlerError(_) => {
            None
        }
        Error::InactiveFeature(_) | Error::InactiveOperation(_) | Error::InvalidOperation(_) => {
            Some(Fault::OutOfOrder(format!("a message whose feature was not negotiated: {error}")))
        }
        error => Some(Fault::Message(error.to_string())),
    }
}
