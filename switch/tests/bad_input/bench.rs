//! A broker with three links in a folder of its own. One test at a time, since the
//! log and the descriptors are the process's.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost_pci_switch::config::{self, Config};
use vhost_pci_switch::control::client;
use vhost_pci_switch::link::report::LinkReport;
use vhost_pci_switch::runtime::broker::Broker;

use crate::raw::Raw;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());
const PATIENCE: Duration = Duration::from_secs(30);

struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

pub struct Bench {
    config: Config,
    // Dropped in this order.
    _broker: Broker,
    _folder: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Bench {
    pub fn start() -> Self {
        static SUBSCRIBE: Once = Once::new();
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        SUBSCRIBE.call_once(|| tracing_subscriber::fmt().with_ansi(false).with_writer(|| Log).init());
        LOG.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let mut text = format!("control_socket = \"{}\"\n", at("control"));
        for link in ["left", "right"] {
            let (owner, peer) = (at(&format!("{link}-owner")), at(&format!("{link}-peer")));
            text += &format!(
                "[[link]]\nname = \"{link}\"\nowner_socket = \"{owner}\"\npeer_socket = \"{peer}\"\nwindow = \"64M\"\n\
                 connections_per_second = 1000000\nunsealed_memory = true\n"
            );
        }
        let (owner, peer) = (at("disk-owner"), at("disk-peer"));
        text += &format!(
            "[[link]]\nname = \"disk\"\nowner_socket = \"{owner}\"\npeer_socket = \"{peer}\"\n\
             profile = \"block\"\nsize = \"8M\"\n"
        );
        let config = config::parse(&text).unwrap();
        let broker = Broker::start(&config).unwrap();
        Self { config, _broker: broker, _folder: folder, _turn: turn }
    }

    /// The sockets of the link that is misused: owner's, peer's.
    pub fn left(&self) -> (PathBuf, PathBuf) {
        self.sockets(0)
    }

    pub fn sockets(&self, link: usize) -> (PathBuf, PathBuf) {
        let link = &self.config.links[link];
        (link.owner_socket.clone(), link.peer_socket.clone())
    }

    pub fn report(&self, link: usize) -> LinkReport {
        client::status(&self.config.control_socket).unwrap().links.swap_remove(link)
    }

    /// Bytes of guests' memory that this process has mapped, as the kernel says.
    pub fn guest_bytes_mapped(&self) -> u64 {
        client::status(&self.config.control_socket).unwrap().guest_bytes_mapped
    }

    pub fn faults(&self) -> BTreeMap<String, u64> {
        self.report(0).counters.faults
    }

    /// Waits until the left link's report is so.
    pub fn wait_until(&self, what: &str, mut so: impl FnMut(&LinkReport) -> bool) {
        let end = Instant::now() + PATIENCE;
        loop {
            let report = self.report(0);
            if so(&report) {
                return;
            }
            assert!(Instant::now() < end, "{what}: {report:#?}\n{}", log());
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The right link comes up with fresh front-ends, and goes down again; the left
    /// one's trouble is none of its own.
    pub fn right_link_works(&self) {
        let link = &self.config.links[1];
        let (mut peer, window) = Raw::peer(&link.peer_socket);
        let mut owner = Raw::owner(&link.owner_socket);
        let end = Instant::now() + PATIENCE;
        while self.report(1).state != "up" {
            assert!(Instant::now() < end, "{:#?}\n{}", self.report(1), log());
            thread::sleep(Duration::from_millis(2));
        }
        owner.owner_stops();
        owner.half_close();
        owner.closed();
        peer.half_close();
        peer.closed();
        drop(peer);
        assert!(window.join().unwrap().len() >= 4, "three areas and a region were mapped");
        assert!(self.report(1).counters.faults.is_empty());
    }

    /// Waits until the process has so many descriptors again.
    pub fn descriptors_are(&self, count: usize) {
        let end = Instant::now() + PATIENCE;
        while descriptors() != count {
            assert!(
                Instant::now() < end,
                "{count} descriptors before, {} now: {:#?}",
                descriptors(),
                kinds()
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for a log line that names the left link and has these words.
    pub fn logged(&self, words: &str) {
        let end = Instant::now() + PATIENCE;
        let found = || log().lines().any(|line| line.contains("link=left") && line.contains(words));
        while !found() {
            assert!(Instant::now() < end, "no line of the left link with '{words}' in\n{}", log());
            thread::sleep(Duration::from_millis(2));
        }
    }
}

pub fn log() -> String {
    String::from_utf8_lossy(&LOG.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
}

/// Descriptors of this process.
fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Descriptors of this process when nothing is on its way: what other threads are
/// about to close is not counted.
pub fn settled_descriptors() -> usize {
    let samples = (0..50).map(|_| {
        thread::sleep(Duration::from_millis(1));
        descriptors()
    });
    samples.min().unwrap()
}

fn kinds() -> Vec<PathBuf> {
    let entries = fs::read_dir("/proc/self/fd").unwrap();
    entries.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok()).collect()
}
