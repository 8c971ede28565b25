//! The configuration file: any text. A file that is taken can be run, and one that is not has its
//! mistakes in the order of its lines.
#![no_main]

use std::collections::BTreeSet;

use libfuzzer_sys::fuzz_target;
use vhost_pci_device::abi::{MAX_OWNER_CONFIG, MAX_VRINGS};
use vhost_pci_switch::config::{self, MAX_SOCKET_PATH, MAX_WINDOW};
use vhost_pci_switch::link::Link;

fuzz_target!(|text: &str| {
    let lines = text.lines().count();
    let config = match config::parse(text) {
        Ok(config) => config,
        Err(mistakes) => {
            assert!(!mistakes.is_empty());
            assert!(mistakes.is_sorted_by_key(|mistake| mistake.line));
            for mistake in mistakes {
                assert!((1..=lines.max(1) + 1).contains(&mistake.line), "{mistake} of {lines} lines");
                assert!(!mistake.message.is_empty());
            }
            return;
        }
    };
    assert!(!config.links.is_empty());
    let mut sockets = BTreeSet::from([config.control_socket.clone()]);
    let mut names = BTreeSet::new();
    for link in &config.links {
        assert!(names.insert(link.name.clone()), "'{}' twice", link.name);
        let paths = [Some(&link.owner_socket), Some(&link.peer_socket), link.doorbell_socket.as_ref()];
        for path in paths.into_iter().flatten() {
            assert!(path.is_absolute() && path.as_os_str().len() <= MAX_SOCKET_PATH);
            assert!(sockets.insert(path.clone()), "{} twice", path.display());
        }
        assert!(link.window_len.is_power_of_two() && link.window_len <= MAX_WINDOW);
        assert!((1..=MAX_VRINGS).contains(&link.device.vrings));
        assert!(link.device.config.len() <= MAX_OWNER_CONFIG as usize);
        Link::new(link.clone(), config.confirm_timeout, 2).expect("a configuration can be run");
    }
});
