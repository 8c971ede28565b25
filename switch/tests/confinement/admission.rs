//! Who may join a link, of those whom the sockets' mode lets connect.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::unistd::{getegid, geteuid};

use crate::bench::{NOBODY, PATIENCE, Place, Who};

/// A user and a group that nobody is or is in.
const OTHER: u32 = 1_234_567;

/// The connection is closed, without a word.
fn is_refused(socket: &Path) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "{socket:?} is served");
}

#[test]
fn a_user_who_may_not_join_is_turned_away_logged_and_counted() {
    let place = Place::of(Who::Nobody);
    let doorbell = place.at("doorbell");
    let keys = format!(
        "doorbell_socket = \"{}\"\nowner_users = [{OTHER}]\npeer_groups = [{OTHER}]",
        doorbell.display()
    );
    let broker = place.start("confine = \"require\"", &keys);
    let (pid, uid) = (std::process::id(), geteuid());
    let doors = [("owner", place.at("link-owner")), ("peer", place.at("link-peer")), ("doorbell", doorbell)];
    for (index, (door, socket)) in doors.iter().enumerate() {
        is_refused(socket);
        let count = index + 1;
        place.wait_until("counted", |report| {
            report["links"][0]["counters"]["faults"]["not_permitted"] == count
        });
        // One line for the first, the second, the fourth: nobody fills the log.
        if count.is_power_of_two() {
            let line = broker.logs(&format!("{door}: process {pid} of user {uid} was turned away"));
            assert!(line.contains("link=link"), "{line}");
        }
    }
    let report = &place.report()["links"][0];
    assert_eq!((&report["owner"]["state"], &report["peer"]["state"]), (&"absent".into(), &"absent".into()));
    assert_eq!(report["counters"]["owner_connections"], 0);
    broker.terminate(&place);
}

#[test]
fn of_two_users_who_can_connect_the_one_that_is_named_joins() {
    let place = Place::of(Who::Nobody);
    let (user, group) = match geteuid().is_root() {
        true => (NOBODY, NOBODY),
        false => (geteuid().as_raw(), getegid().as_raw()),
    };
    // By number, and by a group which the user is in.
    let keys = format!("owner_users = [{OTHER}, {user}]\npeer_groups = [{group}]\npeer_users = [{OTHER}]");
    let broker = place.start("confine = \"require\"", &keys);
    let peer = place.peer(&[]);
    if geteuid().is_root() {
        // In the sockets' group, and so let through by their mode; not named.
        let mut stranger = place.guest(Who::Number(OTHER + 1), "owner", "link-owner");
        let ended = stranger.args(["--seconds", "1"]).output().unwrap();
        assert!(!ended.status.success());
        broker.logs(&format!("of user {} was turned away", OTHER + 1));
    }
    let moved = place.owner("1", &[]).ended();
    assert_eq!((&moved["lost"], &moved["corrupted"]), (&0.into(), &0.into()));
    assert!(moved["rx_packets"].as_u64().unwrap() > 0);
    peer.terminate();
    broker.terminate(&place);
}

#[test]
fn a_user_that_the_host_does_not_know_is_an_error_at_the_start() {
    let place = Place::of(Who::Nobody);
    let broker = place.broker("", "owner_users = [\"no-such-user\"]").output().unwrap();
    assert_eq!(broker.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&broker.stderr);
    assert!(errors.contains("link 'link': owner_users names 'no-such-user'"), "{errors}");
    assert!(!place.at("control").exists());
}
