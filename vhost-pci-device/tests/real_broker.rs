//! The project's own broker, and its own models of a peer's driver and of an owner: packets
//! through the device's window, there and back.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::Parser;
use guest_driver_model::programs::generate::{GenArgs, Generate};
use guest_driver_model::programs::owner::{self, OwnerArgs};
use guest_driver_model::programs::peer_loop::{PeerProgram, run_on};
use guest_driver_model::programs::stop::Stop;
use guest_driver_model::programs::traffic::Traffic;
use guest_driver_model::shm::SharedMemory;
use guest_driver_model::transport::{Transport, TransportError};
use support::eventually;
use support::guest::Guest;
use support::vmm::FakeVmm;
use vhost_pci_device::abi::{self, DeviceConfig};
use vhost_pci_device::{Device, Options};
use vhost_pci_switch::config;
use vhost_pci_switch::control::client;
use vhost_pci_switch::runtime::broker::Broker;

/// A driver's view of the device, without a VM in between.
struct InProcess {
    guest: Guest,
    config: DeviceConfig,
    window: SharedMemory,
}

impl Transport for InProcess {
    fn name(&self) -> &str {
        "the embeddable device"
    }
    fn config(&self) -> &DeviceConfig {
        &self.config
    }
    fn window(&self) -> &SharedMemory {
        &self.window
    }
    fn doorbell(&self, queue: u16) {
        self.guest.notify(queue);
    }
    fn interrupt_fd(&self, _: u16) -> Option<BorrowedFd<'_>> {
        None
    }
    fn check(&self) -> Result<(), TransportError> {
        Ok(())
    }
}

#[derive(Parser)]
struct PeerLine {
    #[command(flatten)]
    args: GenArgs,
}

#[derive(Parser)]
struct OwnerLine {
    #[command(flatten)]
    args: OwnerArgs,
}

fn configuration(folder: &Path) -> config::Config {
    let at = |name: &str| folder.join(name).display().to_string();
    config::parse(&format!(
        "control_socket = \"{}\"\n[[link]]\nname = \"one\"\nowner_socket = \"{}\"\npeer_socket = \"{}\"\nwindow = \"128M\"\n",
        at("control"),
        at("owner"),
        at("peer"),
    ))
    .unwrap()
}

#[test]
fn packets_go_through_the_window_both_ways_and_notifications_past_the_broker() {
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start(&configuration(folder.path())).unwrap();
    let vmm = FakeVmm::new();
    let device = Device::connect(&folder.path().join("peer"), vmm.clone(), Options { requester_id: 0x18 });
    let device = Arc::new(device.unwrap());
    vmm.attach(&device);
    let guest = Guest::new(device.clone(), vmm.clone());
    guest.start();

    let window = support::sys::window(&device, &vmm.slots());
    eventually("the link area", || window.load_u32(abi::LINK_OFFSET).unwrap() == abi::LINK_MAGIC);
    let mut bytes = [0; abi::CONFIG_LEN];
    device.bar_read(0, 0x2000, &mut bytes);
    let transport = InProcess { guest, config: zerocopy::transmute!(bytes), window };

    let (owner_stop, peer_stop) = (Stop::default(), Stop::default());
    let owner = thread::spawn({
        let (stop, socket) = (owner_stop.clone(), folder.path().join("owner").display().to_string());
        let words = "owner --mode both --check pattern --memory-mib 16 --wait interrupt --socket";
        let args = OwnerLine::parse_from(words.split(' ').chain([socket.as_str()])).args;
        move || owner::run_until(&args, &stop)
    });
    let peer = thread::spawn({
        let stop = peer_stop.clone();
        let args = PeerLine::parse_from("gen --check pattern".split(' ')).args;
        move || {
            let mut program = Generate::new(&args);
            let _ = run_on(&transport, &args.peer, "gen", &mut program, &stop);
            (transport, program.traffic())
        }
    });
    let link = || client::status(&folder.path().join("control")).unwrap().links.remove(0);
    eventually("both directions of both vrings go past the broker", || {
        let snapshot = device.snapshot();
        let direct = link().vrings.iter().all(|vring| vring.kicks == "direct" && vring.calls == "direct");
        (snapshot.wired_interrupts, snapshot.wired_notifications) == (2, 2) && direct
    });
    assert!(link().window.largest_mapped_bytes >= 16 << 20, "all of the owner's memory is shown");
    thread::sleep(Duration::from_millis(500));
    owner_stop.request();
    owner.join().unwrap().unwrap();
    peer_stop.request();
    let (transport, traffic) = peer.join().unwrap();
    let Traffic { lost, reordered, corrupted, faults, .. } = traffic;
    assert_eq!((lost, reordered, corrupted, faults), (0, 0, 0, 0), "{traffic:?}");
    assert!(traffic.rx_packets > 1000 && traffic.tx_packets > 1000, "{traffic:?}");

    // At once, and while the broker is in the middle of mapping.
    for round in 0..30 {
        transport.guest.set_status(0);
        assert_eq!(transport.guest.window_load(abi::LINK_OFFSET), Ok(0));
        transport.guest.start();
        thread::sleep(Duration::from_micros(100 * round));
    }
    eventually("the link area", || transport.guest.window_load(abi::LINK_OFFSET).unwrap() != 0);
    transport.guest.set_status(0);
    eventually("the broker knows that the window is closed", || link().window.phase == "closed");
    let link = link();
    assert_eq!(
        link.counters.peer_connections, 1,
        "and found no fault with the peer: {:?}",
        link.counters.faults
    );
    drop(broker);
    eventually("the broker's end is seen", || !device.snapshot().connected);
}
