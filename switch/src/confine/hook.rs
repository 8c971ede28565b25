//! For tests, in debug builds only: the broker does what it must not be able to do, at the wish of
//! whoever may ask for its status.

use std::fs::{self, OpenOptions};
use std::net::UdpSocket;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Forbidden {
    /// Makes a socket.
    Socket,
    /// Starts a program.
    Exec,
    /// Opens a file for writing.
    Write,
    /// Reads a file that is none of its business: no forbidden system call, but a forbidden file.
    Read,
}

/// Does it. Gives what came of it, if the process still is.
pub fn commit(forbidden: Forbidden) -> String {
    let result = match forbidden {
        Forbidden::Socket => UdpSocket::bind("127.0.0.1:0").map(drop),
        Forbidden::Exec => Command::new("/bin/true").status().map(drop),
        Forbidden::Write => OpenOptions::new().write(true).open("/dev/null").map(drop),
        Forbidden::Read => fs::read("/etc/passwd").map(drop),
    };
    result.map_or_else(|error| format!("refused: {error}"), |()| "done".to_owned())
}
