//! The opener's process: reads the configuration, gives up what it does not need, and then answers the
//! broker's questions until the broker is gone.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use nix::unistd::{Group, User};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::OpenError;
use super::maker::{self, Maker};
use super::message::{self, Answer, Question};
use crate::config;
use crate::confine::{self, Role};

/// Opens links of the configuration for the broker at the other end of `socket`.
///
/// # Errors
/// When the broker does not listen.
pub fn run(socket: &UnixStream, file: &Path) -> anyhow::Result<()> {
    // Who ends the broker by its terminal or its service ends all processes of it: this one ends after it.
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    let mut maker = match begin(file) {
        Ok((maker, answer)) => {
            message::send(socket, &answer, &[])?;
            maker
        }
        Err(refused) => return Ok(message::send(socket, &refused, &[])?),
    };
    while let Ok(Some((question, _))) = message::receive(socket) {
        let (answer, listeners) = match answer(&mut maker, question) {
            Ok(answered) => answered,
            Err(error) => (refused(&error), Vec::new()),
        };
        let sockets: Vec<BorrowedFd<'_>> = listeners.iter().map(AsFd::as_fd).collect();
        if message::send(socket, &answer, &sockets).is_err() {
            break;
        }
    }
    // A broker that ends has had all removed. The sockets of one that was killed are the next one's to
    // replace: it may have done so already.
    maker.abandon();
    Ok(())
}

fn begin(file: &Path) -> Result<(Maker, Answer), Answer> {
    let config = config::load(file).map_err(|error| refused(&error.into()))?;
    let maker = Maker::new(config.clone(), Some(file)).map_err(|error| refused(&error))?;
    // Looked for wherever the host looks: what libraries that takes are there from now on.
    let _ = (User::from_name("no such user"), Group::from_name("no such group"));
    let (reads, sockets) = (folders_of(file), maker::folders(&config));
    match confine::enter(config.confine, &Role::Opener { reads: &reads, sockets: &sockets }) {
        // What is missing the broker tells of, which misses the same.
        Ok(_) => Ok((maker, Answer::Config(Box::new(config)))),
        Err(error) => Err(Answer::Refused { mistakes: Vec::new(), summary: error.to_string() }),
    }
}

/// The file's folder, and that of what it is a symbolic link to: who changes it may put a new file there.
fn folders_of(file: &Path) -> Vec<PathBuf> {
    let names = [std::path::absolute(file), file.canonicalize()];
    let mut folders: Vec<_> =
        names.into_iter().flatten().filter_map(|name| name.parent().map(Path::to_owned)).collect();
    folders.dedup();
    folders
}

fn answer(maker: &mut Maker, question: Question) -> Result<(Answer, Vec<UnixListener>), OpenError> {
    Ok(match question {
        Question::Read => (Answer::Config(Box::new(maker.read()?)), Vec::new()),
        Question::Control => (Answer::Done, vec![maker.control()?]),
        Question::Open(link) => {
            let opened = maker.open(&link)?;
            let answer = Answer::Opened {
                config: Box::new(opened.config),
                owner_rule: opened.owner_rule,
                peer_rule: opened.peer_rule,
            };
            (answer, opened.listeners)
        }
        Question::Close(link) => {
            maker.close(&link);
            (Answer::Done, Vec::new())
        }
        Question::CloseAll => {
            maker.close_all();
            (Answer::Done, Vec::new())
        }
    })
}

fn refused(error: &OpenError) -> Answer {
    let mistakes = match error {
        OpenError::File(error) => error.mistakes.clone(),
        _ => Vec::new(),
    };
    Answer::Refused { mistakes, summary: error.to_string() }
}
