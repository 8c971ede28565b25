//! An owner that breaks its ring: the peer's driver refuses, the broker counts and names it, the
//! owner's VMM is told, and another link goes on.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use guest_driver_model::net::{OwnerConfig, OwnerLayout, OwnerPort};
use guest_driver_model::owner::{Kicks, OwnerMemory, OwnerVmm};
use guest_driver_model::programs::device::DeviceArgs;
use guest_driver_model::programs::peer_loop::{PeerArgs, run_until};
use guest_driver_model::programs::sink::{Check, Sink};
use guest_driver_model::programs::stop::Stop;
use vhost_pci_switch::config::{Config, Confine, LinkConfig, OneWay, Rates, WiringPolicy};
use vhost_pci_switch::control::client;
use vhost_pci_switch::kind;
use vhost_pci_switch::link::report::LinkReport;
use vhost_pci_switch::runtime::broker::Broker;

const LONG: Duration = Duration::from_secs(20);
const IOVA: u64 = 1 << 32;

fn config(folder: &Path) -> Config {
    let link = |name: &str| LinkConfig {
        name: name.into(),
        owner_socket: folder.join(format!("{name}-owner")),
        peer_socket: folder.join(format!("{name}-peer")),
        window_len: 64 << 20,
        device: kind::net::device(1, false),
        one_way: OneWay::Refuse,
        max_mappings: 16,
        memory_regions: 8,
        unsealed_memory: false,
        migration: true,
        rates: Rates::default(),
        wiring: WiringPolicy::Direct,
        doorbell_socket: None,
        owner_admission: Default::default(),
        peer_admission: Default::default(),
    };
    Config {
        control_socket: folder.join("control"),
        group: None,
        confirm_timeout: Duration::from_secs(5),
        confine: Confine::Off,
        links: vec![link("good"), link("bad")],
    }
}

fn wait_for(control: &Path, what: &str, is_so: impl Fn(&[LinkReport]) -> bool) -> Vec<LinkReport> {
    let end = Instant::now() + LONG;
    loop {
        let links = client::status(control).unwrap().links;
        if is_so(&links) {
            return links;
        }
        assert!(Instant::now() < end, "{what} did not happen: {links:#?}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// An owner that sends nothing by itself.
struct Owner {
    memory: OwnerMemory,
    layout: OwnerLayout,
    port: OwnerPort,
    vmm: OwnerVmm,
}

impl Owner {
    fn start(socket: &Path) -> Self {
        let memory = OwnerMemory::new(8 << 20, IOVA).unwrap();
        let layout = OwnerLayout::new(OwnerConfig::default(), 0, memory.len()).unwrap();
        let port = OwnerPort::new(memory.shared(), &layout, IOVA).unwrap();
        let places: Vec<_> = layout.vrings().iter().map(|vring| vring.places).collect();
        let mut vmm = OwnerVmm::connect(socket, 2).unwrap();
        vmm.start(layout.config().features(), &memory, &places, |_| 0).unwrap();
        Self { memory, layout, port, vmm }
    }

    /// Sends a packet and waits until the peer has used it.
    fn send_one(&mut self) {
        let frame = [0_u8; 64];
        assert_eq!(self.port.tx_burst(0, [&frame[..]]).unwrap(), 1);
        self.vmm.kick(1);
        let end = Instant::now() + LONG;
        while self.port.reap_transmitted(0).unwrap() > 0 {
            assert!(Instant::now() < end, "the packet was not used");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn a_ring_fault_is_counted_with_its_kind_and_the_other_link_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let broker = Broker::start(&config).unwrap();
    let stop = Stop::default();
    thread::scope(|scope| {
        for link in &config.links {
            let socket: PathBuf = link.peer_socket.clone();
            let stop = &stop;
            scope.spawn(move || {
                let device = DeviceArgs { socket: Some(socket), ..DeviceArgs::default() };
                let args = PeerArgs { device, ..PeerArgs::default() };
                run_until(&args, "sink", &mut Sink::new(Check::None), stop).unwrap();
            });
        }
        let mut good = Owner::start(&config.links[0].owner_socket);
        let mut bad = Owner::start(&config.links[1].owner_socket);
        wait_for(&config.control_socket, "both links up with drivers", |links| {
            links.iter().all(|link| link.state == "up" && link.peer.driver.is_some())
        });
        good.send_one();
        bad.send_one();

        // The transmit queue's available index leaps ahead (virtio 1.3, 2.7.6).
        let avail = bad.layout.vrings()[1].places.avail;
        bad.memory.shared().store_u16(avail + 2, 40_000).unwrap();
        bad.vmm.kick(1);
        let links = wait_for(&config.control_socket, "the fault counted", |links| {
            links[1].counters.faults.get("ring_avail_jump") == Some(&1)
        });
        assert!(links[0].counters.faults.is_empty());
        assert_eq!(links[1].state, "up");
        good.send_one();

        // Restarted with a good ring it works again.
        bad.vmm.stop().unwrap();
        bad.port = OwnerPort::new(bad.memory.shared(), &bad.layout, IOVA).unwrap();
        let places: Vec<_> = bad.layout.vrings().iter().map(|vring| vring.places).collect();
        bad.vmm.start(bad.layout.config().features(), &bad.memory, &places, |_| 0).unwrap();
        bad.send_one();
        stop.request();
    });
    drop(broker);
}
