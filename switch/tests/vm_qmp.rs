//! `plug` and `unplug` with QMP sockets that are no QEMU's: what they are told, in which order, and what becomes of
//! it when one answers an error, hangs, talks nonsense or vanishes.
#![allow(clippy::unwrap_used, clippy::panic, dead_code)]

#[path = "confinement/bench.rs"]
mod bench;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use bench::{Place, Running, Who, text};
use serde_json::{Value, json};

/// What it does at a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Refuse,
    Hang,
    Vanish,
    Nonsense,
    /// The guest does not let go: no event comes.
    Keep,
    /// It does when nobody waits for it any more.
    Late,
}

/// At this command, in this way. `greeting`: before any.
type Script = Option<(&'static str, Way)>;

/// Something at a QMP socket, which does what it is told but for its script.
struct Fake {
    name: &'static str,
    vm: Arc<Vm>,
}

/// What it was told, and has.
#[derive(Default)]
struct Vm {
    heard: Mutex<Vec<String>>,
    /// The last device_add's arguments.
    device: Mutex<Value>,
    /// Kinds of what there is of the link.
    has: Mutex<BTreeSet<String>>,
}

impl Vm {
    /// Does a command. An error: QEMU's class and words.
    fn does(&self, what: &str, arguments: &Value) -> Result<(), (&str, String)> {
        let Some((kind, verb)) = what.split_once(['_', '-']) else { return Ok(()) };
        let mut has = self.has.lock().unwrap();
        let id = &arguments["id"];
        match verb {
            "add" if !has.insert(kind.into()) => Err(("GenericError", format!("Duplicate {kind} {id}"))),
            "del" | "remove" if !has.remove(kind) => Err(match kind {
                "device" => ("DeviceNotFound", format!("Device {id} not found")),
                _ => ("GenericError", format!("{kind} {id} not found")),
            }),
            _ => Ok(()),
        }
    }
}

impl Fake {
    fn start(place: &Place, name: &'static str, script: Script) -> Self {
        let listener = UnixListener::bind(place.at(name)).unwrap();
        let fake = Self { name, vm: Arc::default() };
        let vm = Arc::clone(&fake.vm);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // One at a time, as QEMU.
                serve(&stream, name, script, &vm);
            }
        });
        fake
    }

    fn heard(&self) -> Vec<String> {
        std::mem::take(&mut *self.vm.heard.lock().unwrap())
    }
}

/// Does it in this way, and says whether the connection goes on.
fn misbehave(mut stream: &UnixStream, way: Way) -> bool {
    match way {
        Way::Refuse => {
            let error = json!({"error": {"class": "GenericError", "desc": "Bus 'rp' is full"}});
            writeln!(stream, "{error}").is_ok()
        }
        Way::Hang | Way::Keep | Way::Late => {
            // Until the other side has had enough.
            let _ = std::io::copy(&mut &*stream, &mut std::io::sink());
            false
        }
        Way::Vanish => false,
        Way::Nonsense => {
            let _ = stream.write_all(b"220 mail.example ESMTP\n");
            let _ = std::io::copy(&mut &*stream, &mut std::io::sink());
            false
        }
    }
}

fn serve(mut stream: &UnixStream, name: &str, script: Script, vm: &Vm) {
    if let Some(("greeting", way)) = script
        && !misbehave(stream, way)
    {
        return;
    }
    let version = json!({"qemu": {"major": 11, "minor": 1, "micro": 3}, "package": ""});
    writeln!(stream, "{}", json!({"QMP": {"version": version, "capabilities": ["oob"]}})).unwrap();
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        let command: Value = serde_json::from_str(&line).unwrap();
        let what = command["execute"].as_str().unwrap();
        if what != "qmp_capabilities" {
            vm.heard.lock().unwrap().push(format!("{name} {what}"));
        }
        if what == "device_add" {
            *vm.device.lock().unwrap() = command["arguments"].clone();
        }
        // One that no library knows, and one of another device.
        let time = json!({"seconds": 1, "microseconds": 2});
        let event = |name: &str, data: Value| json!({"event": name, "data": data, "timestamp": time});
        let _ = writeln!(stream, "{}", event("NETDEV_VHOST_USER_NEWS", json!({"netdev-id": "x"})));
        let _ = writeln!(stream, "{}", event("DEVICE_DELETED", json!({"path": "/machine/y", "device": "y"})));
        let scripted = script.filter(|(command, _)| *command == what).map(|(_, way)| way);
        if let Some(way) = scripted.filter(|way| !matches!(way, Way::Keep | Way::Late)) {
            if !misbehave(stream, way) {
                return;
            }
            continue;
        }
        if let Err((class, desc)) = vm.does(what, &command["arguments"]) {
            let _ = writeln!(stream, "{}", json!({"error": {"class": class, "desc": desc}}));
            continue;
        }
        if scripted == Some(Way::Keep) {
            vm.has.lock().unwrap().insert("device".into());
        }
        let _ = writeln!(stream, "{}", json!({"return": {}}));
        if what == "device_del" && scripted.is_none() {
            let data = json!({"path": "/machine/z", "device": command["arguments"]["id"]});
            let _ = writeln!(stream, "{}", event("DEVICE_DELETED", data));
        }
    }
}

struct Bed {
    place: Place,
    broker: Running,
    owner: Fake,
    peer: Fake,
}

impl Bed {
    fn new(owner: Script, peer: Script) -> Self {
        let place = Place::of(Who::Tester);
        let broker = place.start("", "");
        place.config("", &[("link", ""), ("late", "queue_pairs = 2")]);
        let (owner, peer) = (Fake::start(&place, "owner", owner), Fake::start(&place, "peer", peer));
        Self { place, broker, owner, peer }
    }

    /// What is said to the broker alone.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.place.program();
        command.args(args).arg("--control-socket").arg(self.place.at("control"));
        command
    }

    fn say(&self, args: &[&str]) -> Output {
        let mut command = self.command(args);
        command.arg("--owner-qmp").arg(self.place.at("owner")).args(["--owner-bus", "rp"]);
        command.arg("--peer-qmp").arg(self.place.at("peer")).args(["--peer-bus", "rp"]);
        command.output().unwrap()
    }

    fn done(&self, args: &[&str]) {
        let output = self.say(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    }

    fn refused(&self, args: &[&str]) -> String {
        let output = self.say(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", text(&output.stdout));
        text(&output.stderr)
    }

    fn has_link(&self) -> bool {
        let report = self.place.report();
        report["links"].as_array().unwrap().iter().any(|link| link["name"] == "late")
    }
}

const CARD: [&str; 3] = ["owner chardev-add", "owner netdev_add", "owner device_add"];
const NO_CARD: [&str; 3] = ["owner device_del", "owner netdev_del", "owner chardev-remove"];
const PEER: [&str; 2] = ["peer chardev-add", "peer device_add"];

#[test]
fn both_vms_are_told_what_to_add_and_what_to_remove_among_events_that_nobody_knows() {
    let bed = Bed::new(None, None);
    bed.done(&["plug", "late", "--owner-option", "ats=on"]);
    assert_eq!(
        (bed.owner.heard(), bed.peer.heard()),
        (CARD.map(str::to_owned).to_vec(), PEER.map(str::to_owned).to_vec())
    );
    let device = bed.owner.vm.device.lock().unwrap().clone();
    assert_eq!(
        device,
        json!({"driver": "virtio-net-pci", "bus": "rp", "id": "vp-late-owner", "netdev": "vp-late-owner",
            "disable-legacy": "on", "mq": true, "vectors": 6, "ats": true})
    );
    assert_eq!(bed.peer.vm.device.lock().unwrap()["num_vqs"], 5);
    assert!(bed.has_link());
    bed.done(&["unplug", "late"]);
    assert_eq!(bed.owner.heard(), NO_CARD);
    assert_eq!(bed.peer.heard(), ["peer device_del", "peer netdev_del", "peer chardev-remove"]);
    assert!(!bed.has_link());
    bed.broker.terminate(&bed.place);
}

#[test]
fn what_a_vm_refuses_is_said_in_its_words_and_all_before_it_is_taken_back() {
    for (step, command) in ["chardev-add", "netdev_add", "device_add"].into_iter().enumerate() {
        let bed = Bed::new(Some((command, Way::Refuse)), None);
        let said = bed.refused(&["plug", "late"]);
        for words in [
            "the owner's VM (",
            &format!("{command}: Bus 'rp' is full"),
            "the peer's device was unplugged again; the link was unplugged again",
        ] {
            assert!(said.contains(words), "no '{words}' in {said}");
        }
        let owner = bed.owner.heard();
        assert_eq!(owner[..=step], CARD[..=step]);
        if step > 0 {
            assert_eq!(owner.last().unwrap(), "owner chardev-remove");
        }
        assert_eq!(bed.peer.heard().last().unwrap(), "peer chardev-remove");
        assert!(!bed.has_link() && !bed.place.at("late-owner").exists());
    }
    let bed = Bed::new(None, Some(("device_add", Way::Refuse)));
    let said = bed.refused(&["plug", "late"]);
    assert!(said.contains("the peer's VM (") && said.contains("device_add: Bus 'rp' is full"), "{said}");
    assert_eq!(bed.owner.heard(), [""; 0], "the owner's was not its turn");
    assert!(!bed.has_link());
}

#[test]
fn a_vm_that_hangs_is_given_up_after_a_while() {
    let bed = Bed::new(Some(("device_add", Way::Hang)), None);
    let from = Instant::now();
    let said = bed.refused(&["plug", "late"]);
    assert!(said.contains("device_add: QEMU did not answer within 10 s"), "{said}");
    assert!(from.elapsed() < Duration::from_secs(20));
    assert!(said.contains("the peer's device was unplugged again; the link was unplugged again"), "{said}");
    assert!(!bed.has_link());
}

#[test]
fn a_socket_where_nobody_greets_changes_nothing() {
    for (way, words) in [
        (
            Way::Hang,
            "the greeting: QEMU did not answer within 10 s: a QMP socket serves one client at a time",
        ),
        (Way::Vanish, "the greeting: the connection broke"),
        (Way::Nonsense, "the greeting: the connection broke"),
    ] {
        let bed = Bed::new(Some(("greeting", way)), None);
        let said = bed.refused(&["plug", "late"]);
        assert!(said.contains(words) && said.contains("the owner's VM"), "{way:?}: {said}");
        assert_eq!(bed.peer.heard(), [""; 0]);
        assert!(!bed.has_link());
        // Without it, as if there had been nothing.
        std::fs::remove_file(bed.place.at("owner")).unwrap();
        assert!(bed.refused(&["plug", "late"]).contains("nobody answers at"));
    }
}

#[test]
fn a_vm_that_vanishes_or_talks_nonsense_in_the_middle_takes_the_rest_back() {
    for way in [Way::Vanish, Way::Nonsense] {
        for command in ["chardev-add", "netdev_add", "device_add"] {
            let bed = Bed::new(Some((command, way)), None);
            let said = bed.refused(&["plug", "late"]);
            assert!(said.contains(&format!("{command}: the connection broke")), "{said}");
            assert_eq!(bed.peer.heard().last().unwrap(), "peer chardev-remove");
            assert!(!bed.has_link());
        }
    }
    // Also while a guest is waited for.
    let bed = Bed::new(None, Some(("device_del", Way::Vanish)));
    bed.done(&["plug", "late"]);
    let said = bed.refused(&["unplug", "late"]);
    assert!(
        said.contains("the peer's VM") && said.contains("the owner's device was plugged again"),
        "{said}"
    );
    assert!(bed.has_link());
}

#[test]
fn a_guest_that_keeps_its_device_keeps_the_link() {
    let keeps = Some(("device_del", Way::Keep));
    let bed = Bed::new(keeps, None);
    bed.done(&["plug", "late"]);
    let said = bed.refused(&["unplug", "late", "--guest-timeout", "0.3"]);
    assert!(said.contains("the guest did not let go of vp-late-owner within 0.3 s"), "{said}");
    assert!(said.contains("nothing else was changed"), "{said}");
    assert_eq!(bed.peer.heard(), PEER, "the peer's was not its turn");
    assert!(bed.has_link());

    let bed = Bed::new(None, keeps);
    bed.done(&["plug", "late"]);
    let _ = bed.owner.heard();
    let said = bed.refused(&["unplug", "late", "--guest-timeout", "0.3"]);
    assert!(
        said.contains("the peer's VM")
            && said.contains("the owner's device was plugged again; the link stays"),
        "{said}"
    );
    assert_eq!(bed.owner.heard(), [NO_CARD, CARD].concat());
    assert!(bed.has_link());
    // A plug whose rollback a guest holds up says so.
    let bed = Bed::new(Some(("device_add", Way::Refuse)), keeps);
    let said = bed.refused(&["plug", "late", "--guest-timeout", "0.3"]);
    assert!(
        said.contains("and the peer's device could not be unplugged again: device_del: the guest"),
        "{said}"
    );
    assert!(said.contains("the link was unplugged again") && !bed.has_link(), "{said}");
}

#[test]
fn what_a_guest_let_go_of_too_late_is_removed_at_the_next_unplug() {
    let late = Some(("device_del", Way::Late));
    for (owner, peer) in [(late, None), (None, late)] {
        let bed = Bed::new(owner, peer);
        bed.done(&["plug", "late"]);
        let said = bed.refused(&["unplug", "late", "--guest-timeout", "0.3"]);
        assert!(said.contains("did not let go") && bed.has_link(), "{said}");
        let fake = if owner.is_some() { &bed.owner } else { &bed.peer };
        let _ = fake.heard();
        // The other's guest is as quick as ever.
        let other = if owner.is_some() { &bed.peer } else { &bed.owner };
        assert!(other.vm.has.lock().unwrap().contains("device"));
        bed.done(&["unplug", "late"]);
        assert_eq!(
            fake.heard(),
            ["device_del", "netdev_del", "chardev-remove"].map(|what| format!("{} {what}", fake.name))
        );
        assert!(!bed.has_link() && fake.vm.has.lock().unwrap().is_empty());
        // Nothing is in the way.
        bed.done(&["plug", "late"]);
    }
}

#[test]
fn a_vm_that_has_nothing_of_the_link_is_a_mistake() {
    let bed = Bed::new(None, None);
    assert!(bed.command(&["plug", "late"]).output().unwrap().status.success());
    let said = bed.refused(&["unplug", "late"]);
    assert!(said.contains("the owner's VM") && said.contains("not found"), "{said}");
    assert!(said.contains("nothing else was changed") && bed.has_link(), "{said}");
}

#[test]
fn an_unknown_link_is_no_vms_business() {
    let bed = Bed::new(None, None);
    assert!(bed.refused(&["unplug", "none"]).contains("no link 'none'"));
    assert!(bed.refused(&["plug", "none"]).contains("no link 'none'; it has: link, late"));
    assert_eq!((bed.owner.heard(), bed.peer.heard()), (vec![], vec![]));
}
