//! Asks a running broker.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

use super::{Answer, BrokerReport, PluggedLink, Query};
use crate::runtime::links::Difference;

/// How long the broker may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take for a change: twice the longest `confirm_timeout_ms`, and what the opener takes.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(200);

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody answers at the socket.
    #[error(
        "no broker answers at {socket}: {source}; is 'vhost-pci-switch run' running, with this control_socket?"
    )]
    Connect {
        /// The control socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the broker at {socket} did not answer: {source}")]
    Broken {
        /// The control socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The broker did not understand the question.
    #[error("the broker refused the question: {0}")]
    Refused(String),
    /// The broker does not do it.
    #[error("{0}")]
    NotDone(String),
}

/// The state of the broker and all of its links.
///
/// # Errors
/// When no broker answers.
pub fn status(socket: &Path) -> Result<BrokerReport, ClientError> {
    match ask(socket, &Query::Status, TIMEOUT)? {
        Answer::Status(report) => Ok(report),
        Answer::Error(error) => Err(ClientError::Refused(error)),
        _ => Err(out_of_turn(socket)),
    }
}

/// Has a link of the configuration begin.
///
/// # Errors
/// When no broker answers, or it does not.
pub fn plug(socket: &Path, link: &str) -> Result<PluggedLink, ClientError> {
    match ask(socket, &Query::Plug { link: link.into() }, CHANGE_TIMEOUT)? {
        Answer::Plugged(link) => Ok(link),
        Answer::Error(error) => Err(ClientError::NotDone(error)),
        _ => Err(out_of_turn(socket)),
    }
}

/// Has a link end.
///
/// # Errors
/// As [`plug`]; and when it has ended, and its peer may have something still.
pub fn unplug(socket: &Path, link: &str) -> Result<(), ClientError> {
    match ask(socket, &Query::Unplug { link: link.into() }, CHANGE_TIMEOUT)? {
        Answer::Unplugged(_) => Ok(()),
        Answer::Error(error) => Err(ClientError::NotDone(error)),
        _ => Err(out_of_turn(socket)),
    }
}

/// Has the broker read its configuration again and make up the difference.
///
/// # Errors
/// As [`plug`].
pub fn reload(socket: &Path) -> Result<Difference, ClientError> {
    match ask(socket, &Query::Reload, CHANGE_TIMEOUT)? {
        Answer::Reloaded(difference) => Ok(difference),
        Answer::Error(error) => Err(ClientError::NotDone(error)),
        _ => Err(out_of_turn(socket)),
    }
}

fn out_of_turn(socket: &Path) -> ClientError {
    let source = io::Error::other("its answer is to another question");
    ClientError::Broken { socket: socket.into(), source }
}

fn ask(socket: &Path, query: &Query, timeout: Duration) -> Result<Answer, ClientError> {
    let broken = |source: io::Error| ClientError::Broken { socket: socket.into(), source };
    let mut stream = UnixStream::connect(socket)
        .map_err(|source| ClientError::Connect { socket: socket.into(), source })?;
    stream.set_read_timeout(Some(timeout)).map_err(broken)?;
    let mut query = serde_json::to_vec(query).map_err(|error| broken(error.into()))?;
    query.push(b'\n');
    stream.write_all(&query).map_err(broken)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).map_err(broken)?;
    serde_json::from_str(&line).map_err(|error| broken(error.into()))
}
