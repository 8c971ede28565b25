//! Links that come and go while the broker runs: which are opened, what an unplugged one leaves behind,
//! and what the others notice of it.
#![allow(clippy::unwrap_used, clippy::panic, dead_code)]

#[path = "confinement/bench.rs"]
mod bench;
#[path = "bad_input/lingering.rs"]
mod lingering;
#[path = "bad_input/raw.rs"]
mod raw;
#[path = "guardian/vmm.rs"]
mod vmm;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Output;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use bench::{Guest, Place, Running, Who, text};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use raw::Raw;
use serde_json::{Value, json};
use vmm::Vmm;

const TOP: &str = "confine = \"require\"";

/// What a user would type, as this user.
fn say_as(place: &Place, who: Who, args: &[&str]) -> Output {
    let mut command = place.program_of(who);
    command.args(args).arg("--control-socket").arg(place.at("control"));
    command.output().unwrap()
}

fn say(place: &Place, args: &[&str]) -> Output {
    say_as(place, Who::Nobody, args)
}

/// It is done; what was printed.
fn done(place: &Place, args: &[&str]) -> String {
    let output = say(place, args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// It is not; what was said.
fn refused(place: &Place, args: &[&str]) -> String {
    let output = say(place, args);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {}", text(&output.stdout));
    text(&output.stderr)
}

fn start(place: &Place, links: &[(&str, &str)]) -> Running {
    place.config(TOP, links);
    let mut command = place.program();
    command.arg("run").arg("--config").arg(place.at("switch.toml"));
    command.stderr(std::process::Stdio::piped()).stdout(std::process::Stdio::null());
    Running::listens(command)
}

fn names(report: &Value) -> Vec<String> {
    report["links"].as_array().unwrap().iter().map(|link| link["name"].as_str().unwrap().to_owned()).collect()
}

fn link<'r>(report: &'r Value, name: &str) -> &'r Value {
    report["links"].as_array().unwrap().iter().find(|link| link["name"] == name).unwrap()
}

/// A peer's and an owner's model at the sockets of this link, which send and check until told to end.
fn traffic(place: &Place, name: &str) -> (Guest, Guest) {
    let guest = |kind: &str, side: &str, args: &[&str]| {
        Guest::start(place.guest(Who::Nobody, kind, &format!("{name}-{side}")), args)
    };
    let peer = guest("gen", "peer", &["--check", "pattern", "--json-lines", "--wait", "interrupt"]);
    let owner = guest("owner", "owner", &["--mode", "both", "--json-lines", "--wait", "interrupt"]);
    place.wait_until("up", |report| link(report, name)["state"] == "up");
    (peer, owner)
}

fn descriptors(pid: u64) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn count_threads(pid: u64) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).unwrap().count()
}

#[test]
fn what_is_plugged_and_unplugged_again_and_again_leaves_nothing_behind() {
    let place = Place::of(Who::Nobody);
    let broker = start(&place, &[("link", "")]);
    place.config(TOP, &[("link", ""), ("late", "")]);
    let report = place.report();
    let processes =
        [u64::from(broker.pid()), report["guardian"].as_u64().unwrap(), report["opener"].as_u64().unwrap()];
    let state = || processes.map(|pid| (descriptors(pid), count_threads(pid)));
    let mut before = None;
    let mut last_generation = 0;
    for round in 0..6 {
        let said = done(&place, &["plug", "late"]);
        assert!(said.contains("late is plugged") && said.contains("late-owner"), "{said}");
        let (peer, owner) = traffic(&place, "late");
        let report = place.report();
        let generation = link(&report, "late")["generation"].as_u64().unwrap();
        assert!(generation > last_generation, "a driver could take the new link for the old one");
        last_generation = generation;
        if round % 2 == 0 {
            // Those who use it know nothing of it.
            assert_eq!(done(&place, &["unplug", "late"]), "late is unplugged\n");
        }
        peer.kill();
        owner.kill();
        if round % 2 == 1 {
            done(&place, &["unplug", "late"]);
        }
        for socket in ["late-owner", "late-peer"] {
            assert!(!place.at(socket).exists(), "{socket} is left behind");
        }
        assert_eq!(names(&place.report()), ["link"]);
        // Threads end a moment later.
        let before = *before.get_or_insert_with(|| {
            thread::sleep(Duration::from_millis(500));
            state()
        });
        let end = Instant::now() + bench::PATIENCE;
        while state() != before {
            assert!(Instant::now() < end, "round {round}: before {before:?}, now {:?}", state());
            thread::sleep(Duration::from_millis(10));
        }
    }
    broker.terminate(&place);
}

#[test]
fn a_link_is_unplugged_under_traffic_and_another_loses_nothing() {
    let place = Place::of(Who::Nobody);
    let broker = start(&place, &[("link", ""), ("other", "")]);
    let (peer, owner) = traffic(&place, "link");
    let (other_peer, other_owner) = traffic(&place, "other");
    for round in 0..5 {
        done(&place, &["unplug", "other"]);
        done(&place, &["plug", "other"]);
        assert_eq!(link(&place.report(), "link")["state"], "up", "round {round}");
    }
    other_peer.kill();
    other_owner.kill();
    let owner = owner.terminate();
    assert_eq!(
        (&owner["lost"], &owner["corrupted"], &owner["links"]),
        (&json!(0), &json!(0), &json!(1)),
        "{owner}"
    );
    let peer = peer.terminate();
    assert_eq!((&peer["lost"], &peer["corrupted"]), (&json!(0), &json!(0)), "{peer}");
    broker.terminate(&place);
}

#[test]
fn who_waits_at_a_door_with_what_is_slow_to_close_holds_up_no_other_link_when_it_is_closed() {
    let place = Place::of(Who::Nobody);
    let broker = start(&place, &[("link", ""), ("slow", "connections_per_second = 1")]);
    thread::scope(|scope| {
        // Most of them wait when the link is unplugged.
        let _waiting: Vec<_> = (0..12).map(|_| lingering::sent_to(&place.at("slow-owner"))).collect();
        let unplugs = scope.spawn(|| done(&place, &["unplug", "slow"]));
        place.wait_until("without it", |report| names(report) == ["link"]);
        let (peer, owner) = traffic(&place, "link");
        assert_eq!(unplugs.join().unwrap(), "slow is unplugged\n");
        peer.kill();
        owner.kill();
    });
    broker.terminate(&place);
}

#[test]
fn a_broker_that_is_told_to_end_does_not_wait_for_a_reload() {
    let place = Place::of(Who::Nobody);
    let mut broker = place.start("confirm_timeout_ms = 60000", "");
    let vmm = Vmm::start(&place);
    let _owner = Raw::owner(&place.at("link-owner"));
    place.wait_until("up", |report| report["links"][0]["state"] == "up");
    place.config("confirm_timeout_ms = 60000", &[("other", "")]);
    // It waits for a VMM that does not let go of the owner's memory.
    broker.signal(Signal::SIGHUP);
    let end = Instant::now() + bench::PATIENCE;
    while place.at("link-owner").exists() {
        assert!(Instant::now() < end, "the link stays:\n{}", broker.log());
        thread::sleep(Duration::from_millis(5));
    }
    broker.signal(Signal::SIGTERM);
    assert_eq!(broker.ends().code(), Some(0), "{}", broker.log());
    assert!(!place.at("other-owner").exists() && !place.at("control").exists());
    // For the guardian.
    vmm.may.send(()).unwrap();
}

#[test]
fn only_what_the_configuration_names_is_plugged_and_each_once() {
    let place = Place::of(Who::Nobody);
    let broker = start(&place, &[("link", "")]);
    assert!(refused(&place, &["plug", "link"]).contains("link 'link' is there already"));
    assert!(refused(&place, &["plug", "late"]).contains("no link 'late'; it has: link"));
    assert!(refused(&place, &["unplug", "late"]).contains("there is no link 'late'; there are: link"));
    fs::write(place.at("switch.toml"), "control_socket = 5\n").unwrap();
    let said = refused(&place, &["plug", "late"]);
    assert!(said.contains("switch.toml:1: ") && said.contains("2 mistakes"), "{said}");
    place.config(TOP, &[("late", "owner_users = [\"no-such-user\"]")]);
    assert!(refused(&place, &["plug", "late"]).contains("'no-such-user', and there is no such user"));
    place.config(TOP, &[("late", "")]);
    fs::write(place.at("late-peer"), "mine").unwrap();
    assert!(refused(&place, &["plug", "late"]).contains("late-peer: exists and is no socket"));
    assert!(!place.at("late-owner").exists());
    assert_eq!(names(&place.report()), ["link"]);
    // Nothing of that is in the way.
    fs::remove_file(place.at("late-peer")).unwrap();
    done(&place, &["plug", "late"]);
    assert_eq!(names(&place.report()), ["link", "late"]);
    // As at the start.
    let mode = fs::metadata(place.at("late-peer")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o660);
    broker.terminate(&place);
    assert!(!place.at("late-peer").exists());
}

#[test]
fn a_socket_in_a_folder_that_the_broker_gave_up_is_refused_with_what_to_do() {
    let place = Place::of(Who::Nobody);
    let elsewhere = Place::of(Who::Nobody);
    let broker = start(&place, &[("link", "")]);
    let late = format!(
        "[[link]]\nname = \"late\"\nowner_socket = {:?}\npeer_socket = {:?}\n",
        elsewhere.at("o").display().to_string(),
        elsewhere.at("p").display().to_string()
    );
    let config = fs::read_to_string(place.config(TOP, &[("link", "")])).unwrap();
    fs::write(place.at("switch.toml"), config + &late).unwrap();
    if place.report()["confinement"]["landlock_abi"].is_null() {
        // This kernel has no Landlock.
        return broker.terminate(&place);
    }
    let said = refused(&place, &["plug", "late"]);
    assert!(said.contains("permission denied") && said.contains("start it anew"), "{said}");
    broker.terminate(&place);
}

#[test]
fn a_reload_makes_up_the_difference_and_touches_nothing_else() {
    let place = Place::of(Who::Nobody);
    let broker = start(&place, &[("link", ""), ("gone", ""), ("other", "")]);
    let (peer, owner) = traffic(&place, "link");
    let (gone_peer, gone_owner) = traffic(&place, "gone");
    let before = link(&place.report(), "link").clone();
    place.config(TOP, &[("other", "memory_regions = 5"), ("late", ""), ("link", "")]);
    assert_eq!(done(&place, &["reload"]), "plugged: late\nunplugged: gone\nchanged: other\n");
    let report = place.report();
    assert_eq!(names(&report), ["link", "late", "other"]);
    assert_eq!(link(&report, "other")["limits"]["memory_regions"], 5);
    let after = link(&report, "link");
    for key in ["state", "generation"] {
        assert_eq!(after[key], before[key], "{key}");
    }
    for key in
        ["mappings_made", "mappings_revoked", "owner_connections", "peer_connections", "owner_messages"]
    {
        assert_eq!(after["counters"][key], before["counters"][key], "{key}");
    }
    assert!(!place.at("gone-owner").exists() && place.at("late-owner").exists());
    // By signal; there is nothing to do.
    broker.signal(Signal::SIGHUP);
    broker.logs("plugged=[] unplugged=[] changed=[]");
    // The name of a link that is gone, at its sockets.
    let was =
        fs::read_to_string(place.config(TOP, &[("link", ""), ("other", "memory_regions = 5"), ("late", "")]))
            .unwrap();
    fs::write(place.at("switch.toml"), was.replace("name = \"late\"", "name = \"later\"")).unwrap();
    assert_eq!(done(&place, &["reload"]), "plugged: later\nunplugged: late\n");
    let owner = owner.terminate();
    assert_eq!(
        (&owner["lost"], &owner["corrupted"], &owner["links"]),
        (&json!(0), &json!(0), &json!(1)),
        "{owner}"
    );
    let peer = peer.terminate();
    assert_eq!((&peer["lost"], &peer["corrupted"]), (&json!(0), &json!(0)), "{peer}");
    gone_peer.kill();
    gone_owner.kill();
    broker.terminate(&place);
}

#[test]
fn a_configuration_with_a_mistake_or_a_link_that_cannot_be_opened_changes_nothing() {
    let place = Place::of(Who::Nobody);
    let broker = start(&place, &[("link", ""), ("other", "")]);
    place.config(TOP, &[("link", ""), ("late", "queue_pairs = 0")]);
    broker.signal(Signal::SIGHUP);
    broker.logs("switch.toml:14: queue_pairs");
    broker.logs("has 1 mistake; the links are as before");
    let said = refused(&place, &["reload"]);
    assert!(said.contains("switch.toml:14: queue_pairs"), "{said}");
    place.config(TOP, &[("link", ""), ("late", ""), ("later", "")]);
    fs::write(place.at("later-peer"), "mine").unwrap();
    assert!(refused(&place, &["reload"]).contains("later-peer: exists"));
    assert_eq!(names(&place.report()), ["link", "other"]);
    assert!(!place.at("late-owner").exists() && place.at("other-owner").exists());
    broker.terminate(&place);
}

#[test]
fn what_a_running_broker_keeps_is_named() {
    let place = Place::of(Who::Nobody);
    let broker = start(&place, &[("link", "")]);
    place.config("confine = true\nconfirm_timeout_ms = 77", &[("link", ""), ("late", "")]);
    let output = say(&place, &["reload"]);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), "plugged: late\n"));
    let said = text(&output.stderr);
    assert!(said.contains("confirm_timeout_ms is another") && said.contains("confine is another"), "{said}");
    assert!(said.contains("when the broker is started anew"), "{said}");
    broker.terminate(&place);
}

#[test]
fn a_peer_that_does_not_let_go_does_not_keep_the_link_and_the_answer_says_so() {
    let place = Place::of(Who::Nobody);
    let broker = place.start("confirm_timeout_ms = 300", "");
    let mut vmm = Vmm::start(&place);
    let mut owner = Raw::owner(&place.at("link-owner"));
    place.wait_until("up", |report| report["links"][0]["state"] == "up");
    drop(std::mem::replace(&mut vmm.may, channel().0));
    let asked = Instant::now();
    let said = refused(&place, &["unplug", "link"]);
    assert!(
        said.contains("is unplugged, but the peer's VMM did not let go") && said.contains("600 ms"),
        "{said}"
    );
    assert!(asked.elapsed() >= Duration::from_millis(600));
    assert_eq!(place.report()["links"], json!([]));
    owner.closed();
    vmm.connection.closed();
    // It is there again for whoever comes next.
    done(&place, &["plug", "link"]);
    let _vmm = Vmm::start(&place);
    let _owner = Raw::owner(&place.at("link-owner"));
    place.wait_until("up", |report| report["links"][0]["state"] == "up");
    broker.terminate(&place);
}

#[test]
fn who_is_neither_the_brokers_user_nor_root_may_look_and_not_touch() {
    if !geteuid().is_root() {
        println!("skipped: to be another user than the broker's takes root");
        assert!(std::env::var("CI").as_deref() != Ok("true"), "needs root");
        return;
    }
    let place = Place::of(Who::Nobody);
    let broker = start(&place, &[("link", "")]);
    // In nobody's group, so that the socket lets it connect.
    let other = Who::Number(1_234_567);
    assert!(say_as(&place, other, &["status"]).status.success());
    for args in [&["unplug", "link"][..], &["plug", "link"], &["reload"]] {
        let said = text(&say_as(&place, other, args).stderr);
        assert!(said.contains("user 1234567 may not change links") && said.contains("65534"), "{said}");
    }
    assert_eq!(names(&place.report()), ["link"]);
    assert!(say_as(&place, Who::Tester, &["unplug", "link"]).status.success(), "root may");
    broker.terminate(&place);
}

#[test]
fn an_opener_gives_up_what_it_does_not_need_and_ends_after_its_broker() {
    let place = Place::of(Who::Nobody);
    let broker = start(&place, &[("link", "")]);
    let opener = place.report()["opener"].as_i64().unwrap();
    let path = format!("/proc/{opener}/status");
    let status = fs::read_to_string(&path).unwrap();
    let field =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".into(), "2".into()));
    assert_eq!((field("CapEff:"), field("CapPrm:")), ("0".repeat(16), "0".repeat(16)));
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        kill(Pid::from_raw(opener as i32), signal).unwrap();
    }
    done(&place, &["unplug", "link"]);
    done(&place, &["plug", "link"]);
    broker.signal(Signal::SIGKILL);
    let end = Instant::now() + bench::PATIENCE;
    while fs::read_to_string(&path).is_ok_and(|status| !status.contains("State:\tZ")) {
        assert!(Instant::now() < end, "the opener stays");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_broker_whose_opener_is_gone_serves_and_unplugs_and_says_why_it_plugs_no_more() {
    let place = Place::of(Who::Nobody);
    let mut broker = start(&place, &[("link", ""), ("other", "")]);
    let (peer, owner) = traffic(&place, "link");
    let opener = place.report()["opener"].as_i64().unwrap();
    kill(Pid::from_raw(opener as i32), Signal::SIGKILL).unwrap();
    place.wait_until("without an opener", |report| report["opener"].is_null());
    assert!(text(&place.status(false).stdout).contains("opener: none"));
    done(&place, &["unplug", "other"]);
    assert!(refused(&place, &["plug", "other"]).contains("the broker's opener does not answer"));
    assert_eq!(owner.terminate()["lost"], 0);
    assert_eq!(peer.terminate()["lost"], 0);
    broker.signal(Signal::SIGTERM);
    assert!(broker.ends().success());
}
