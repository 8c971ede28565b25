//! The control socket: any bytes. The answer is one line of JSON, or none, and the client's thread ends.
#![no_main]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use vhost_pci_fuzz::broker::{Running, config};
use vhost_pci_fuzz::census::Census;
use vhost_pci_switch::config::parse;
use vhost_pci_switch::confine::Confinement;
use vhost_pci_switch::control::server::About;
use vhost_pci_switch::control::{Answer, server};
use vhost_pci_switch::runtime::Pass;
use vhost_pci_switch::runtime::links::Links;

/// A broker with one link.
fn broker() -> (Arc<About>, Running) {
    let link = Running::start(config()).for_many();
    let text =
        "control_socket = \"/c\"\n[[link]]\nname = \"fuzz\"\nowner_socket = \"/o\"\npeer_socket = \"/p\"\n";
    let links = vec![(config(), link.port().clone())];
    let links = Links::of(&parse(text).expect("a configuration"), links).expect("descriptors");
    let about = About { links: Arc::new(links), confinement: Confinement::unconfined() };
    (Arc::new(about), link)
}

thread_local! {
    static BROKER: RefCell<Option<(Arc<About>, Running)>> = const { RefCell::new(None) };
}

fuzz_target!(|bytes: &[u8]| {
    BROKER.with_borrow_mut(|place| {
        // A client has unplugged the link: its end is looked at before another begins.
        place.take_if(|(about, _)| about.links.ports().is_empty());
        let (about, _) = place.get_or_insert_with(broker);
        ask(about, bytes);
    });
});

fn ask(about: &Arc<About>, bytes: &[u8]) {
    let before = Census::take();
    let (mut client, ours) = UnixStream::pair().expect("descriptors");
    server::serve(ours, Pass::default(), about);
    client.set_read_timeout(Some(Duration::from_secs(4))).expect("a timeout");
    // The broker may have had enough.
    let _ = client.write_all(bytes);
    let _ = client.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    if client.read_to_end(&mut answer).is_ok() && !answer.is_empty() {
        assert_eq!(answer.iter().position(|byte| *byte == b'\n'), Some(answer.len() - 1));
        match serde_json::from_slice(&answer).expect("an answer") {
            Answer::Status(report) => assert!(report.links.len() <= 1),
            Answer::Error(error) => assert!(!error.is_empty()),
            // What a debug build's tests ask for.
            _ => {}
        }
    }
    drop(client);
    before.is_as_before();
}
