//! What a broker keeps when its VMMs have gone: nothing that grows with how often they came.
//!
//! All that this process allocates is counted, the front-ends of the test included, which keep nothing either.
#![allow(clippy::unwrap_used, clippy::panic, dead_code)]

#[path = "bad_input/iommu_owner.rs"]
mod iommu_owner;
#[path = "bad_input/raw.rs"]
mod raw;

use std::alloc::System;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use iommu_owner::{BACKEND_REQ, BEHIND, BUFFERS, IOMMU_PUSH, PAGE, PUSH, Peer, owner, push};
use raw::{IOTLB_MSG, Raw, memfd};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use vhost_pci_device::abi;
use vhost_pci_switch::config::{self, Config};
use vhost_pci_switch::control::client;
use vhost_pci_switch::link::report::LinkReport;
use vhost_pci_switch::runtime::broker::Broker;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Rounds before the broker has met all that it meets, and those that are judged.
const FIRST: usize = 20;
const JUDGED: usize = 100;
/// Bytes that a round may leave behind, on average: less than anything that is kept for each.
const LEFT: i64 = 4;
const PATIENCE: Duration = Duration::from_secs(30);

fn in_use() -> i64 {
    let stats = ALLOCATOR.stats();
    i64::try_from(stats.bytes_allocated).unwrap() - i64::try_from(stats.bytes_deallocated).unwrap()
}

/// The least that was in use in a while: threads that end take a moment to give back what they had.
fn at_rest() -> i64 {
    let samples = (0..100).map(|_| {
        thread::sleep(Duration::from_millis(2));
        in_use()
    });
    samples.min().unwrap()
}

fn broker(folder: &Path) -> (Config, Broker) {
    let at = |name: &str| folder.join(name).display().to_string();
    let text = format!(
        "control_socket = \"{}\"\n[[link]]\nname = \"one\"\nowner_socket = \"{}\"\npeer_socket = \"{}\"\nwindow = \"64M\"\n\
         connections_per_second = 1000000\nunsealed_memory = true\n",
        at("control"),
        at("owner"),
        at("peer")
    );
    let config = config::parse(&text).unwrap();
    let broker = Broker::start(&config).unwrap();
    (config, broker)
}

fn wait_until(config: &Config, what: &str, so: impl Fn(&LinkReport) -> bool) {
    let end = Instant::now() + PATIENCE;
    loop {
        let report = client::status(&config.control_socket).unwrap().links.swap_remove(0);
        if so(&report) {
            return;
        }
        assert!(Instant::now() < end, "{what}: {report:#?}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// What is in use after so many rounds more.
fn leaves_behind(config: &Config, mut round: impl FnMut(&Config)) {
    let mut rounds = |count: usize| {
        for _ in 0..count {
            round(config);
            wait_until(config, "gone", |report| {
                report.owner.state == "absent" && report.peer.state == "absent"
            });
        }
        at_rest()
    };
    let before = rounds(FIRST);
    let after = rounds(JUDGED);
    let most = LEFT * i64::try_from(JUDGED).unwrap();
    assert!(
        after - before <= most,
        "{before} bytes in use after {FIRST} rounds, {after} after {JUDGED} more"
    );
}

/// One test: another's front-ends would be counted, too.
#[test]
fn nothing_that_vmms_and_guests_said_is_kept_when_they_have_gone() {
    let folder = tempfile::tempdir().unwrap();
    let (config, _broker) = broker(folder.path());

    // Both go, the owner without a word, after it was asked for its mappings.
    leaves_behind(&config, |config| {
        let mut peer = Peer::start(&config.links[0].peer_socket);
        let (mut owner, mut channel) = owner(&config.links[0].owner_socket, BACKEND_REQ, memfd());
        owner.start_at_iovas();
        owner.tells_rings(&mut channel);
        wait_until(config, "up", |report| report.state == "up");
        let fetched = peer.gives(abi::CTRL_FETCH, BUFFERS, 64);
        let (iova, _) = iommu_owner::next_miss(&mut channel);
        assert!(owner.done(IOTLB_MSG, &iommu_owner::update(iova, PAGE, BEHIND), &[]));
        iommu_owner::answer(&channel, &raw::longs(&[0]));
        assert_eq!(peer.status(fetched), abi::CTRL_OK);
        drop(owner);
        peer.leaves();
    });

    // One that pushes many mappings and takes some back.
    leaves_behind(&config, |config| {
        let peer = Peer::start(&config.links[0].peer_socket);
        let mut owner: Raw = {
            let (mut owner, _) = owner(&config.links[0].owner_socket, PUSH, memfd());
            let rings = (iommu_owner::RINGS, 2 * PAGE, raw::FRONTEND, 3);
            let buffers = (0..60).map(|page| (BUFFERS + 2 * page * PAGE, PAGE, BEHIND + page * PAGE, 3));
            let entries: Vec<_> = std::iter::once(rings).chain(buffers).collect();
            assert!(owner.done(IOMMU_PUSH, &push(0, &entries), &[]));
            owner.start_at_iovas();
            owner
        };
        wait_until(config, "up", |report| report.state == "up");
        assert!(owner.done(IOMMU_PUSH, &push(0, &[(BUFFERS, 20 * PAGE, 0, 0)]), &[]));
        drop(owner);
        peer.leaves();
    });

    // One that connects and says nothing, and one without a peer.
    leaves_behind(&config, |config| {
        drop(Raw::connect(&config.links[0].peer_socket));
        let (owner, _channel) = owner(&config.links[0].owner_socket, BACKEND_REQ, memfd());
        drop(owner);
    });
}
