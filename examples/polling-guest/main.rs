//! The whole of a peer's data path: a polling guest, in the manner of DPDK, that counts the packets
//! of the owner and sends each back.
//!
//! In a guest: `polling-guest` (as root). Without a VM, at a broker's peer socket:
//! `polling-guest PEER_SOCKET`.
#![forbid(unsafe_code)]

use std::path::Path;
use std::time::{Duration, Instant};

use guest_driver_model::link::LinkPage;
use guest_driver_model::net::{PacketBurst, PeerPort, receive_vring, transmit_vring};
use guest_driver_model::transport::Transport;
use guest_driver_model::transport::model::ModelTransport;
use guest_driver_model::transport::sysfs::SysfsTransport;
use vhost_pci_device::abi::queue_of_vring;

const BURST: usize = 32;

fn main() -> anyhow::Result<()> {
    // 1. The device. Its window is in this process from here on.
    let device: Box<dyn Transport> = match std::env::args().nth(1) {
        Some(socket) => Box::new(ModelTransport::connect(Path::new(&socket))?),
        None => Box::new(SysfsTransport::open(None)?),
    };
    let page = LinkPage::new(device.window(), device.config())?;
    let mut burst = PacketBurst::with_capacity(BURST, 2048);

    loop {
        // 2. A link that is up: where the owner's rings and buffers are.
        device.check()?;
        let port = page.snapshot().ok().and_then(|link| PeerPort::new(device.window(), &page, &link).ok());
        let Some(mut port) = port else {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        // The owner need not kick: this side looks.
        for vring in 0..2 * port.pairs() {
            let _ = port.set_kicks(vring, false);
        }
        println!("serving generation {}", port.generation());

        // 3. Bursts, until the link changes.
        let mut report = Instant::now();
        while page.generation() == port.generation() {
            for pair in 0..port.pairs() {
                burst.clear();
                // A broken vring stays quiet until the link changes.
                if port.rx_burst(pair, &mut burst, BURST).unwrap_or(0) == 0 {
                    continue;
                }
                let _ = port.tx_burst(pair, burst.iter());
                for vring in [transmit_vring(pair), receive_vring(pair)] {
                    if port.needs_call(vring) {
                        device.doorbell(queue_of_vring(vring));
                    }
                }
            }
            if report.elapsed() > Duration::from_secs(1) {
                report = Instant::now();
                device.check()?;
                println!("{:?}", port.counters());
            }
        }
    }
}
