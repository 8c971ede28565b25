//! What the kernel says of a running broker, thread by thread, and what `status` says.

use std::thread;

use nix::unistd::geteuid;
use serde_json::json;

use crate::bench::{NOBODY, Place, Running, Who, field, text, threads};

const NO_CAPABILITY: &str = "0000000000000000";

/// Every thread has given up everything. Gives how many there are.
fn nothing_is_left(broker: &Running) -> usize {
    let threads = threads(broker.pid());
    for thread in &threads {
        let name = field(thread, "Name");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(thread, set), NO_CAPABILITY, "{set} of '{name}'");
        }
        assert_eq!(field(thread, "NoNewPrivs"), "1", "of '{name}'");
        assert_eq!(field(thread, "Seccomp"), "2", "of '{name}': it is not filtered");
    }
    threads.len()
}

#[test]
fn no_thread_of_a_broker_with_a_link_that_is_up_has_any_privilege() {
    for who in [Who::Nobody, Who::Tester] {
        let place = Place::of(who);
        let broker = place.start("confine = \"require\"", "");
        let before = nothing_is_left(&broker);
        let peer = place.peer(&["--wait", "interrupt"]);
        let owner = place.owner("2", &["--wait", "interrupt"]);
        place.wait_until("up", |report| report["links"][0]["state"] == "up");
        // Sessions, answers, relay: they began after the filter.
        assert!(nothing_is_left(&broker) >= before + 3);
        let process = &threads(broker.pid())[0];
        if geteuid().is_root() {
            let uid = if who == Who::Nobody { NOBODY } else { 0 };
            assert_eq!(field(process, "Uid"), [uid.to_string().as_str(); 4].join("\t"));
        }
        if geteuid().is_root() && who == Who::Tester {
            assert_eq!(field(process, "CapBnd"), NO_CAPABILITY);
        }
        assert_eq!(owner.ended()["lost"], 0);
        peer.terminate();
        broker.terminate(&place);
    }
}

#[test]
fn status_says_what_is_active() {
    let place = Place::of(Who::Nobody);
    let broker = place.start("", "");
    let confinement = &place.report()["confinement"];
    assert_eq!(confinement["policy"], "best_effort");
    assert_eq!((&confinement["no_capabilities"], &confinement["no_new_privs"]), (&json!(true), &json!(true)));
    assert!(confinement["system_calls"].as_u64().unwrap() > 40, "{confinement}");
    let shown = text(&place.status(false).stdout);
    let line = shown.lines().find(|line| line.starts_with("confinement: ")).unwrap();
    let count = &confinement["system_calls"];
    assert!(line.starts_with(&format!("confinement: seccomp {count} system calls, ")), "{line}");
    assert!(line.contains("no capabilities, no_new_privs"), "{line}");
    // As far as the kernel offers it.
    match confinement["landlock_abi"].as_i64() {
        Some(abi) => assert!(line.contains(&format!("landlock ABI {abi}, ")), "{line}"),
        None => assert!(line.contains("missing landlock: "), "{line}"),
    }
    broker.terminate(&place);
}

#[test]
fn a_broker_that_is_not_to_be_confined_is_not_and_says_so() {
    let place = Place::of(Who::Nobody);
    let broker = place.start("confine = false", "");
    assert!(broker.log().contains("confine = false"));
    for thread in threads(broker.pid()) {
        assert_eq!((field(&thread, "NoNewPrivs"), field(&thread, "Seccomp")), ("0", "0"));
    }
    assert!(text(&place.status(false).stdout).contains("confinement: off\n"));
    assert_eq!(place.report()["confinement"]["policy"], "off");
    broker.terminate(&place);
}

/// Starts the broker from a thread for which the kernel has no Landlock, and waits for `outcome`.
fn without_landlock<T: Send>(outcome: impl FnOnce() -> T + Send) -> T {
    use nix::libc::{ENOSYS, SYS_landlock_create_ruleset};
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
    let filter: BpfProgram = SeccompFilter::new(
        [(SYS_landlock_create_ruleset, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(u32::try_from(ENOSYS).unwrap()),
        std::env::consts::ARCH.try_into().unwrap(),
    )
    .unwrap()
    .try_into()
    .unwrap();
    // What the thread starts inherits its filter.
    thread::scope(|scope| {
        let started = scope.spawn(|| {
            apply_filter(&filter).unwrap();
            outcome()
        });
        started.join().unwrap()
    })
}

#[test]
fn a_layer_that_is_missing_is_named_and_stops_a_broker_that_requires_it() {
    let place = Place::of(Who::Nobody);
    let required = place.broker("confine = \"require\"", "").output_without_landlock();
    assert_eq!(required.status.code(), Some(1));
    let errors = text(&required.stderr);
    assert!(
        errors.contains("confine = \"require\"")
            && errors.contains("landlock: this kernel was built without it")
            && errors.contains("confine = true"),
        "{errors}"
    );
    assert!(["control", "link-owner", "link-peer"].iter().all(|name| !place.at(name).exists()));

    let broker = without_landlock(|| place.start("", ""));
    broker.logs("confined in part");
    let confinement = &place.report()["confinement"];
    assert_eq!(confinement["landlock_abi"], json!(null));
    assert!(confinement["missing"][0].as_str().unwrap().starts_with("landlock: "), "{confinement}");
    assert!(confinement["system_calls"].is_u64());
    assert!(text(&place.status(false).stdout).contains("missing landlock: "));
    broker.terminate(&place);
}

trait WithoutLandlock {
    fn output_without_landlock(&mut self) -> std::process::Output;
}

impl WithoutLandlock for std::process::Command {
    fn output_without_landlock(&mut self) -> std::process::Output {
        without_landlock(|| self.output().unwrap())
    }
}
