//! Links of every kind under the filter, as user nobody: what a broker may not do any more is
//! nothing that it does. A broker that tried would be killed, and its link with it.

use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::bench::{PATIENCE, Place, Running, Who, text};

/// An owner sends to a peer and back for a second; nothing is lost.
fn packets_pass(place: &Place, peer: &[&str], owner: &[&str]) {
    let peer = place.peer(peer);
    let moved = place.owner("1", owner).ended();
    checked(&moved);
    peer.terminate();
}

fn checked(owner: &Value) {
    assert!(
        owner["tx_packets"].as_u64().unwrap() > 0 && owner["rx_packets"].as_u64().unwrap() > 0,
        "{owner}"
    );
    for count in ["lost", "corrupted", "reordered", "faults"] {
        assert_eq!(owner[count], 0, "{owner}");
    }
}

fn start(place: &Place, keys: &str) -> Running {
    place.start("confine = \"require\"", keys)
}

#[test]
fn both_sides_come_and_go_in_any_order() {
    let place = Place::of(Who::Nobody);
    let broker = start(&place, "");
    // The peer first, then the owner, then a new peer while the owner is there, then new owners.
    let peer = place.peer(&[]);
    checked(&place.owner("1", &[]).ended());
    let owner = place.owner("3", &["--wait", "interrupt"]);
    place.wait_until("up", |report| report["links"][0]["state"] == "up");
    peer.kill();
    place.wait_until("waiting", |report| report["links"][0]["peer"]["state"] == "absent");
    let peer = place.peer(&["--wait", "interrupt"]);
    place.wait_until("up again", |report| report["links"][0]["state"] == "up");
    owner.kill();
    for _ in 0..3 {
        checked(&place.owner("1", &["--wait", "adaptive"]).ended());
    }
    peer.terminate();
    let counters = &place.report()["links"][0]["counters"];
    assert!(
        counters["notifications_relayed"].as_u64().unwrap() + counters["mappings_revoked"].as_u64().unwrap()
            > 0
    );
    broker.terminate(&place);
}

#[test]
fn packets_are_copied_for_an_owner_that_maps_each() {
    let place = Place::of(Who::Nobody);
    let broker = start(&place, "");
    packets_pass(&place, &["--vmm-like-qemu"], &["--iommu", "per-packet", "--iommu-like-qemu"]);
    let counters = place.report()["links"][0]["counters"].clone();
    assert!(
        counters["fetches"].as_u64().unwrap() > 0 && counters["stores"].as_u64().unwrap() > 0,
        "{counters}"
    );
    broker.terminate(&place);
}

#[test]
fn every_kind_of_iommu_ring_and_wiring_works() {
    let place = Place::of(Who::Nobody);
    let broker = start(&place, "queue_pairs = 2\noffloads = true");
    packets_pass(&place, &[], &["--iommu", "static"]);
    packets_pass(&place, &[], &["--iommu", "static", "--iommu-push"]);
    packets_pass(&place, &[], &["--iommu", "static", "--iommu-directed"]);
    packets_pass(&place, &[], &["--packed", "--pairs", "2"]);
    broker.terminate(&place);
    let broker = start(&place, "wiring = \"relay\"\none_way = \"widen\"");
    packets_pass(&place, &["--wait", "interrupt"], &["--wait", "interrupt"]);
    packets_pass(&place, &["--vmm-like-qemu"], &["--iommu", "per-packet", "--iommu-like-qemu"]);
    let counters = place.report()["links"][0]["counters"].clone();
    assert!(counters["kicks_relayed"].as_u64().unwrap() > 0, "{counters}");
    broker.terminate(&place);
}

#[test]
fn a_doorbell_function_is_served() {
    let place = Place::of(Who::Nobody);
    let doorbell = place.at("doorbell");
    let broker = start(&place, &format!("doorbell_socket = \"{}\"", doorbell.display()));
    let (mut served, end) = (0, Instant::now() + PATIENCE);
    while served < 2 {
        assert!(Instant::now() < end, "served {served} times");
        let stream = UnixStream::connect(&doorbell).unwrap();
        let line = stream.try_clone().unwrap();
        let (sender, received) = mpsc::channel();
        // What an ivshmem-doorbell reads: numbers of 8 bytes, most with a descriptor.
        let reader = thread::spawn(move || {
            let mut bytes = [0; 8];
            while let Ok((8, file)) = stream.recv_with_fd(&mut bytes) {
                drop(sender.send((i64::from_le_bytes(bytes), file)));
            }
        });
        match received.recv_timeout(PATIENCE) {
            Ok(version) => assert!(version.0 == 0 && version.1.is_none()),
            // The broker has not seen yet that the one before hung up.
            Err(_) => {
                reader.join().unwrap();
                continue;
            }
        }
        served += 1;
        packets_pass(&place, &["--vmm-like-qemu"], &[]);
        line.shutdown(std::net::Shutdown::Both).unwrap();
        reader.join().unwrap();
        // Its page. (Eventfds go the same way, to a driver that waits for them: the VM scenario
        // `doorbell` has one, and a confined broker.)
        assert_eq!(received.into_iter().filter(|(_, file)| file.is_some()).count(), 1);
    }
    broker.terminate(&place);
    assert!(!doorbell.exists());
}

#[test]
fn status_and_watch_are_answered_and_nonsense_is_too() {
    let place = Place::of(Who::Nobody);
    let broker = start(&place, "");
    let mut watch = place.program();
    watch.args(["watch", "--interval", "0.05", "--control-socket"]).arg(place.at("control"));
    let mut watch = watch.stdout(Stdio::piped()).spawn().unwrap();
    packets_pass(&place, &[], &[]);
    thread::sleep(Duration::from_millis(300));
    watch.kill().unwrap();
    let seen = watch.wait_with_output().unwrap();
    assert!(text(&seen.stdout).matches("confinement: seccomp").count() > 3);
    assert!(place.ask("nonsense").starts_with("{\"error\":"));
    // A VMM that sends nonsense is a counted fault, also when that is written about in the log.
    let mut vmm = UnixStream::connect(place.at("link-owner")).unwrap();
    std::io::Write::write_all(&mut vmm, &[0xff; 64]).unwrap();
    broker.logs("link=link");
    place.wait_until("counted", |report| report["links"][0]["counters"]["faults"]["message"] == 1);
    broker.terminate(&place);
}

#[test]
fn a_broker_that_stood_still_goes_on() {
    use nix::sys::signal::Signal;
    let place = Place::of(Who::Nobody);
    let broker = start(&place, "");
    let peer = place.peer(&["--wait", "interrupt"]);
    let owner = place.owner("3", &["--wait", "interrupt"]);
    place.wait_until("up", |report| report["links"][0]["state"] == "up");
    // Calls with a time limit are then restarted by a system call of its own.
    for _ in 0..3 {
        broker.signal(Signal::SIGSTOP);
        thread::sleep(Duration::from_millis(50));
        broker.signal(Signal::SIGCONT);
        thread::sleep(Duration::from_millis(50));
    }
    checked(&owner.ended());
    peer.terminate();
    broker.terminate(&place);
}

#[test]
fn the_demo_works_as_nobody() {
    let place = Place::of(Who::Nobody);
    let demo = place.program().args(["demo", "--seconds", "1", "--json"]).output().unwrap();
    assert!(demo.status.success(), "{}", text(&demo.stderr));
    let outcome: Value = serde_json::from_slice(&demo.stdout).unwrap();
    assert_eq!((&outcome["lost"], &outcome["corrupted"]), (&0.into(), &0.into()), "{outcome}");
}
