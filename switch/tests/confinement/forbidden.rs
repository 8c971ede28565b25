//! What the broker must not do. Debug builds do it at a test's wish.
#![cfg(debug_assertions)]

use std::os::unix::process::ExitStatusExt;

use nix::sys::signal::Signal;

use crate::bench::{Place, Who};

fn question(call: &str) -> String {
    format!("{{\"command\":\"forbidden\",\"call\":\"{call}\"}}")
}

#[test]
fn a_forbidden_system_call_in_a_running_broker_ends_it() {
    for call in ["socket", "exec", "write"] {
        let place = Place::of(Who::Nobody);
        let mut broker = place.start("", "");
        let peer = place.peer(&[]);
        let owner = place.owner("5", &[]);
        place.wait_until("up", |report| report["links"][0]["state"] == "up");
        let answer = place.ask(&question(call));
        assert_eq!(answer, "", "{call} is allowed");
        assert_eq!(broker.ends().signal(), Some(Signal::SIGSYS as i32), "{call}");
        drop((peer, owner));
    }
}

#[test]
fn without_confinement_the_same_calls_are_made() {
    let place = Place::of(Who::Nobody);
    let broker = place.start("confine = false", "");
    for call in ["socket", "exec", "write", "read"] {
        assert_eq!(place.ask(&question(call)), "{\"forbidden\":\"done\"}\n", "{call}");
    }
    broker.terminate(&place);
}

#[test]
fn files_that_the_filter_would_let_it_read_are_out_of_reach() {
    let place = Place::of(Who::Nobody);
    let broker = place.start("", "");
    // As far as the kernel offers Landlock.
    let wanted = match place.report()["confinement"]["landlock_abi"].is_i64() {
        true => "{\"forbidden\":\"refused: Permission denied (os error 13)\"}\n",
        false => "{\"forbidden\":\"done\"}\n",
    };
    assert_eq!(place.ask(&question("read")), wanted);
    broker.terminate(&place);
}
