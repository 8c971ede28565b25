//! A broker whose host gives it no thread: what it owes others it does all the same, a little later.
#![allow(clippy::unwrap_used, clippy::panic, dead_code)]

#[path = "bad_input/lingering.rs"]
mod lingering;
#[path = "bad_input/raw.rs"]
mod raw;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use raw::{PEER_PROTOCOL, Raw, SET_BACKEND_REQ_FD, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_KICK, words};
use vhost_pci_switch::control::client;

const TIMEOUT: Duration = Duration::from_millis(500);
/// The opener, the guardian, the program, the acceptor, the peer's session, its channel and one more.
const THREADS: u32 = 7;

/// The number of a broker in this process.
static NEXT: AtomicU32 = AtomicU32::new(0);

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
    let user = 200_000 + (2 * std::process::id() + NEXT.fetch_add(1, Ordering::Relaxed)) % 100_000;
    let at = |name: &str| folder.join(name).display().to_string();
    let text = format!(
        "control_socket = \"{}\"\nconfirm_timeout_ms = {}\n[[link]]\nname = \"one\"\nowner_socket = \"{}\"\npeer_socket = \"{}\"\nconnections_per_second = 1\n",
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

/// Whether a test is skipped.
fn needs_root() -> bool {
    let skipped = !nix::unistd::geteuid().is_root();
    if skipped {
        println!("skipped: a limit of threads binds no other user than the tests', which needs root");
        assert!(std::env::var("CI").as_deref() != Ok("true"), "needs root");
    }
    skipped
}

#[test]
fn a_silent_vmm_is_sent_away_in_time_although_the_link_gets_no_thread_for_its_clock() {
    if needs_root() {
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

#[test]
fn who_gets_no_thread_and_has_sent_what_is_slow_to_close_holds_up_no_other() {
    if needs_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (broker, log) = broker(1000, folder.path());
    hear(&log, "the broker listens");
    // It has what the broker has: without it the broker's descriptor of a connection is the last.
    let guardian = client::status(&folder.path().join("control")).unwrap().guardian.unwrap();
    kill(Pid::from_raw(guardian.cast_signed()), Signal::SIGKILL).unwrap();
    let user = fs::metadata(folder.path()).unwrap().uid();
    let mut limit = Command::new("setpriv");
    limit.args([format!("--reuid={user}"), format!("--regid={user}"), "--clear-groups".into()]);
    limit.args(["prlimit".into(), format!("--pid={}", broker.0.id()), "--nproc=1".into()]);
    assert!(limit.status().unwrap().success());
    let owner = folder.path().join("owner");
    assert!(Raw::connect(&owner).closed().is_empty());
    hear(&log, "a connection cannot be served");
    // One a second: it has been sent before the broker takes the connection.
    let _slow = lingering::sent_to(&owner);
    hear(&log, "a connection cannot be served");
    assert!(Raw::connect(&owner).closed().is_empty());
    hear(&log, "a connection cannot be served");
}
