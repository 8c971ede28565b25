//! The program itself: what it says about its configuration, which sockets it makes
//! and leaves, and what it answers to `status`.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-pci-switch"));
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, text: &str) -> PathBuf {
        let path = self.at("switch.toml");
        fs::write(&path, text).unwrap();
        path
    }

    /// A configuration with two links.
    fn config(&self) -> PathBuf {
        let at = |name: &str| self.at(name).display().to_string();
        let mut text = format!("control_socket = \"{}\"\n", at("control"));
        for link in ["one", "two"] {
            let (owner, peer) = (at(&format!("{link}-owner")), at(&format!("{link}-peer")));
            text += &format!(
                "[[link]]\nname = \"{link}\"\nowner_socket = \"{owner}\"\npeer_socket = \"{peer}\"\n"
            );
        }
        self.write(&text)
    }

    fn sockets(&self) -> [PathBuf; 5] {
        ["control", "one-owner", "one-peer", "two-owner", "two-peer"].map(|name| self.at(name))
    }

    fn run(&self) -> Running {
        Running::start(&self.config())
    }
}

/// A broker that listens. Killed if a test ends before it does.
struct Running(Child);

impl Running {
    fn start(config: &Path) -> Self {
        let mut command = program();
        command.arg("run").arg("--config").arg(config).stderr(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let running = Self(child);
        let mut seen = String::new();
        while !seen.contains("the broker listens") {
            assert_ne!(log.read_line(&mut seen).unwrap(), 0, "the broker ended: {seen}");
        }
        // Somebody has to read on, or the broker would wait for its log.
        thread::spawn(move || log.lines().count());
        running
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.0.id()).unwrap()), signal).unwrap();
    }

    fn ends(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "the broker does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a broker that must end by itself as a failure; gives what it says.
fn fails_to_run(config: &Path) -> String {
    let mut command = program();
    command.arg("run").arg("--config").arg(config).stderr(Stdio::piped()).stdout(Stdio::null());
    let mut broker = Running(command.spawn().unwrap());
    assert_eq!(broker.ends().code(), Some(1));
    let errors = broker.0.stderr.take().unwrap();
    BufReader::new(errors).lines().map(|line| line.unwrap() + "\n").collect()
}

fn check(config: &Path) -> Output {
    program().arg("check").arg("--config").arg(config).output().unwrap()
}

fn status(place: &Place, json: bool) -> Output {
    let mut command = program();
    command.arg("status").arg("--control-socket").arg(place.at("control"));
    if json {
        command.arg("--json");
    }
    command.output().unwrap()
}

#[test]
fn check_names_file_and_line_of_every_mistake_and_fails() {
    let place = Place::new();
    let config = place.write(
        "control_socket = \"/run/c\"\nconfirm_timeout_ms = 0\ncolour = \"red\"\n[[link]]\nname = \"a b\"\n\
         owner_socket = \"relative\"\npeer_socket = \"/run/p\"\nwindow = \"3G\"\nqueue_pairs = 0\n",
    );
    let output = check(&config);
    assert_eq!(output.status.code(), Some(1));
    let errors = text(&output.stderr);
    let mistakes = [
        (2, "confirm_timeout_ms"),
        (3, "colour"),
        (5, "letters"),
        (6, "absolute"),
        (8, "power of two"),
        (9, "queue_pairs"),
    ];
    for (line, words) in mistakes {
        let start = format!("{}:{line}: ", config.display());
        assert!(
            errors.lines().any(|error| error.starts_with(&start) && error.contains(words)),
            "{line} {words}:\n{errors}"
        );
    }
    assert!(errors.contains("6 mistakes"), "{errors}");
    assert!(output.stdout.is_empty());
}

#[test]
fn check_of_a_good_file_succeeds_and_makes_nothing() {
    let place = Place::new();
    let output = check(&place.config());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("no mistakes, 2 links"));
    assert_eq!(fs::read_dir(place.0.path()).unwrap().count(), 1);
}

#[test]
fn check_of_a_file_that_is_not_there_says_so() {
    let place = Place::new();
    let output = check(&place.at("none.toml"));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("none.toml"));
}

#[test]
fn run_refuses_a_file_with_mistakes_before_it_makes_a_socket() {
    let place = Place::new();
    let config = place.write(&format!("control_socket = \"{}\"\n", place.at("control").display()));
    let errors = fails_to_run(&config);
    assert!(errors.contains("no [[link]]"));
    assert!(!place.at("control").exists());
}

#[test]
fn sockets_are_for_owner_and_group_only_and_none_is_left_after_sigterm_or_sigint() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let place = Place::new();
        let mut broker = place.run();
        for socket in place.sockets() {
            let metadata = fs::symlink_metadata(&socket).unwrap();
            assert!(metadata.file_type().is_socket());
            assert_eq!(metadata.permissions().mode() & 0o7777, 0o660, "{}", socket.display());
        }
        broker.signal(signal);
        assert_eq!(broker.ends().code(), Some(0), "{signal}");
        for socket in place.sockets() {
            assert!(!socket.exists(), "{} is left behind", socket.display());
        }
    }
}

#[test]
fn sigterm_ends_a_broker_with_vmms_connected_and_stalled() {
    let place = Place::new();
    let mut broker = place.run();
    let vmms: Vec<_> =
        place.sockets()[1..].iter().map(|socket| UnixStream::connect(socket).unwrap()).collect();
    for mut vmm in &vmms {
        std::io::Write::write_all(&mut vmm, &[1, 0, 0, 0, 1]).unwrap();
    }
    let _control = UnixStream::connect(place.at("control")).unwrap();
    broker.signal(Signal::SIGTERM);
    assert_eq!(broker.ends().code(), Some(0));
    for vmm in &vmms {
        vmm.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(matches!(std::io::Read::read(&mut &*vmm, &mut [0]), Ok(0) | Err(_)));
    }
    assert!(place.sockets().iter().all(|socket| !socket.exists()));
}

#[test]
fn stale_sockets_of_a_killed_broker_are_replaced() {
    let place = Place::new();
    let mut broker = place.run();
    broker.signal(Signal::SIGKILL);
    broker.ends();
    assert!(place.sockets().iter().all(|socket| socket.exists()));
    let mut again = place.run();
    assert!(status(&place, false).status.success());
    again.signal(Signal::SIGTERM);
    assert!(again.ends().success());
}

#[test]
fn a_socket_that_another_process_serves_is_left_alone_and_named() {
    let place = Place::new();
    let config = place.config();
    let served = UnixListener::bind(place.at("two-peer")).unwrap();
    let errors = fails_to_run(&config);
    assert!(errors.contains("two-peer: another process listens on this socket"), "{errors}");
    // What it had made is gone; what was there works.
    for socket in &place.sockets()[..4] {
        assert!(!socket.exists(), "{}", socket.display());
    }
    UnixStream::connect(place.at("two-peer")).unwrap();
    drop(served);
}

#[test]
fn a_second_broker_with_the_same_sockets_is_refused_and_the_first_goes_on() {
    let place = Place::new();
    let _first = place.run();
    let errors = fails_to_run(&place.config());
    assert!(errors.contains("another process listens"));
    assert!(status(&place, false).status.success());
}

#[test]
fn a_file_at_a_sockets_place_is_left_alone() {
    let place = Place::new();
    let config = place.config();
    fs::write(place.at("one-owner"), "mine").unwrap();
    let errors = fails_to_run(&config);
    assert!(errors.contains("one-owner: exists and is no socket"));
    assert_eq!(fs::read_to_string(place.at("one-owner")).unwrap(), "mine");
}

#[test]
fn a_group_that_does_not_exist_and_a_folder_that_is_missing_are_named() {
    let place = Place::new();
    let at = |name: &str| place.at(name).display().to_string();
    let link =
        format!("[[link]]\nname = \"a\"\nowner_socket = \"{}\"\npeer_socket = \"{}\"\n", at("no/o"), at("p"));
    let config =
        place.write(&format!("control_socket = \"{}\"\ngroup = \"no-such-group\"\n{link}", at("control")));
    let errors = fails_to_run(&config);
    assert!(errors.contains("no group 'no-such-group'"));
    let config = place.write(&format!("control_socket = \"{}\"\n{link}", at("control")));
    let errors = fails_to_run(&config);
    assert!(errors.contains("no/o: cannot make the socket"), "{errors}");
    assert!(!place.at("control").exists());
}

#[test]
fn status_with_nobody_connected_shows_every_link_and_what_it_waits_for() {
    let place = Place::new();
    let _broker = place.run();
    let output = status(&place, false);
    assert!(output.status.success());
    let shown = text(&output.stdout);
    for words in [
        "2 links",
        "link one: waiting: the owner's VMM is not connected",
        "link two: waiting",
        "one-owner",
        "absent",
    ] {
        assert!(shown.contains(words), "no '{words}' in\n{shown}");
    }
    assert!(shown.contains("packets through the broker: 0, guest memory mapped: 0 B"));
}

#[test]
fn status_as_json_is_one_object_with_every_link() {
    let place = Place::new();
    let broker = place.run();
    let output = status(&place, true);
    assert!(output.status.success());
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["pid"], broker.0.id());
    assert_eq!(report["guest_bytes_mapped"], 0);
    assert_eq!(report["packets"], 0);
    let links = report["links"].as_array().unwrap();
    assert_eq!(links.len(), 2);
    for (link, name) in links.iter().zip(["one", "two"]) {
        assert_eq!(link["name"], name);
        assert_eq!(link["state"], "waiting");
        assert_eq!((&link["owner"]["state"], &link["peer"]["state"]), (&"absent".into(), &"absent".into()));
        assert_eq!(link["window"]["phase"], "closed");
        assert_eq!(link["counters"]["faults"], serde_json::json!({}));
        assert_eq!(link["generation"].as_u64().unwrap() % 2, 0);
    }
}

#[test]
fn status_without_a_broker_says_what_to_look_at() {
    let place = Place::new();
    for _ in 0..2 {
        let output = status(&place, true);
        assert_eq!(output.status.code(), Some(1));
        assert!(output.stdout.is_empty());
        let errors = text(&output.stderr);
        assert!(
            errors.contains("no broker answers at") && errors.contains("vhost-pci-switch run"),
            "{errors}"
        );
        // Once with nothing there, once with a stale socket.
        drop(UnixListener::bind(place.at("control")).ok());
    }
}

#[test]
fn nonsense_on_the_control_socket_is_answered_and_hurts_nobody() {
    let place = Place::new();
    let _broker = place.run();
    for question in ["\n", "{}\n", "{\"command\":\"stop\"}\n", "\u{fffd}\n", &"x".repeat(10_000)] {
        let mut client = UnixStream::connect(place.at("control")).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        drop(std::io::Write::write_all(&mut client, question.as_bytes()));
        let mut answer = String::new();
        drop(BufReader::new(&client).read_line(&mut answer));
        assert!(answer.is_empty() || answer.starts_with("{\"error\":"), "{answer}");
    }
    assert!(status(&place, false).status.success());
}

#[test]
fn generations_of_a_later_broker_are_larger() {
    let place = Place::new();
    let generation = || {
        let mut broker = place.run();
        let report: serde_json::Value = serde_json::from_slice(&status(&place, true).stdout).unwrap();
        broker.signal(Signal::SIGTERM);
        broker.ends();
        report["links"][0]["generation"].as_u64().unwrap()
    };
    assert!(generation() < generation());
}

/// The program's command with so many descriptors at most.
fn limited(place: &Place, descriptors: u32) -> Command {
    let mut command = Command::new("sh");
    let run = format!("ulimit -n {descriptors}; exec \"$0\" run --config \"$1\"");
    command.args(["-c", &run]).arg(env!("CARGO_BIN_EXE_vhost-pci-switch")).arg(place.config());
    command.env_remove("RUST_LOG").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

#[test]
fn a_connection_for_which_few_descriptors_are_left_is_turned_away_and_the_limit_is_named() {
    let place = Place::new();
    // Room for the listeners, but not for what a VMM sends.
    let mut broker = Running(limited(&place, 30).spawn().unwrap());
    let mut log = BufReader::new(broker.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    let warning = log.next().unwrap();
    assert!(warning.contains("156 descriptors") && warning.contains("limit is 30"), "{warning}");
    assert!(log.next().unwrap().contains("the broker listens"));
    for socket in &place.sockets()[1..] {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "{socket:?} is served");
    }
    // How it is can be asked all the same.
    assert!(status(&place, true).status.success());
    broker.signal(Signal::SIGTERM);
    assert!(broker.ends().success());
    let lines: Vec<_> = log.filter(|line| line.contains("turned away")).collect();
    // The first, the second and the fourth of four.
    assert!(lines.len() == 3 && lines[0].contains("the 30 descriptors"), "{lines:?}");
}

#[test]
fn a_limit_that_has_no_room_for_the_listeners_is_an_error_that_says_so() {
    let place = Place::new();
    let broker = limited(&place, 29).output().unwrap();
    assert_eq!(broker.status.code(), Some(1));
    let errors = text(&broker.stderr);
    assert!(errors.contains("2 links need 30 descriptors") && errors.contains("LimitNOFILE"), "{errors}");
    assert!(place.sockets().iter().all(|socket| !socket.exists()));
}
