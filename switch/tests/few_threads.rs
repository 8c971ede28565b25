//! A broker whose host gives it no thread: what it owes others it does all the same, a little later.
#![allow(clippy::unwrap_used, clippy::panic, dead_code)]

#[path = "bad_input/raw.rs"]
mod raw;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use raw::{PEER_PROTOCOL, Raw, SET_BACKEND_REQ_FD, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_KICK, words};

const TIMEOUT: Duration = Duration::from_millis(500);
/// The opener, the guardian, the program, its signals, the acceptor, the peer's session and its channel: no more.
const THREADS: u32 = 7;

struct Broker(Child);

impl Drop for Broker {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A broker with one link, of a user that nobody else is and that may have so many threads.
fn broker(threads: u32, folder: &std::path::Path) -> (Broker, mpsc::Receiver<String>) {
    // A user of its own: the limit counts all of a user's threads on the machine.
    let user = 200_000 + std::process::id() % 100_000;
    let at = |name: &str| folder.join(name).display().to_string();
    let text = format!(
        "control_socket = \"{}\"\nconfirm_timeout_ms = {}\n[[link]]\nname = \"one\"\nowner_socket = \"{}\"\npeer_socket = \"{}\"\n",
        at("control"),
        TIMEOUT.as_millis(),
        at("owner"),
        at("peer")
    );
    fs::write(folder.join("switch.toml"), text).unwrap();
    // Where it can run it: the build's folder may be closed to others.
    let program = folder.join("vhost-pci-switch");
    fs::copy(env!("CARGO_BIN_EXE_vhost-pci-switch"), &program).unwrap();
    chown(folder, Some(user), None).unwrap();
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={user}"), format!("--regid={user}"), "--clear-groups".into()]);
    command.args(["prlimit".into(), format!("--nproc={threads}")]);
    command.arg(program).args(["run", "--config"]).arg(folder.join("switch.toml"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let log = BufReader::new(child.stderr.take().unwrap());
    let (said, hears) = mpsc::channel();
    thread::spawn(move || log.lines().map_while(Result::ok).try_for_each(|line| said.send(line)));
    (Broker(child), hears)
}

fn hear(log: &mpsc::Receiver<String>, what: &str) {
    let mut all = String::new();
    while !all.contains(what) {
        all += &log.recv_timeout(Duration::from_secs(20)).unwrap_or_else(|_| panic!("no '{what}' in {all}"));
        all.push('\n');
    }
}

#[test]
fn a_silent_vmm_is_sent_away_in_time_although_the_link_gets_no_thread_for_its_clock() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: a limit of threads binds no other user than the tests', which needs root");
        assert!(std::env::var("CI").as_deref() != Ok("true"), "needs root");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (_broker, log) = broker(THREADS, folder.path());
    hear(&log, "the broker listens");
    let mut peer = Raw::connect(&folder.path().join("peer"));
    peer.negotiate(PEER_PROTOCOL);
    let (_silent, theirs) = UnixStream::pair().unwrap();
    assert!(peer.done(SET_BACKEND_REQ_FD, &[], &[theirs.into()]));
    let start = Instant::now();
    for index in 0..3u32 {
        peer.ask(SET_VRING_CALL, &raw::longs(&[index.into()]), &[raw::eventfd()]);
        peer.ask(SET_VRING_KICK, &raw::longs(&[index.into()]), &[raw::eventfd()]);
        peer.ask(SET_VRING_ENABLE, &words(&[index, 1]), &[]);
    }
    hear(&log, "no thread");
    peer.closed();
    let waited = start.elapsed();
    assert!(waited >= TIMEOUT, "{waited:?}");
    hear(&log, "did not confirm within 500 ms");
}
