//! Asks a running broker.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

use super::{Answer, BrokerReport, Query};

/// How long the broker may take.
const TIMEOUT: Duration = Duration::from_secs(10);

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
}

/// The state of the broker and all of its links.
///
/// # Errors
/// When no broker answers.
pub fn status(socket: &Path) -> Result<BrokerReport, ClientError> {
    let broken = |source: io::Error| ClientError::Broken { socket: socket.into(), source };
    let mut stream = UnixStream::connect(socket)
        .map_err(|source| ClientError::Connect { socket: socket.into(), source })?;
    stream.set_read_timeout(Some(TIMEOUT)).map_err(broken)?;
    let mut query = serde_json::to_vec(&Query::Status).map_err(|error| broken(error.into()))?;
    query.push(b'\n');
    stream.write_all(&query).map_err(broken)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).map_err(broken)?;
    match serde_json::from_str(&line).map_err(|error| broken(error.into()))? {
        Answer::Status(report) => Ok(report),
        Answer::Error(error) => Err(ClientError::Refused(error)),
        #[cfg(debug_assertions)]
        Answer::Forbidden(answer) => Err(ClientError::Refused(answer)),
    }
}
