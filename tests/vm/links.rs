//! Several links of one broker, between guests that may have a side of more than one of them.
//!
//! Owns: the broker's configuration, and what of a QEMU's command line is a side of a link. The guests
//! are the scenario's.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vhost_pci_tests::{GuestConfig, Process, Sandbox};

use crate::testbed::{start_broker, status_of};

/// Modules of a guest whose program reaches its devices through VFIO, and has a tap.
pub const PEER_MODULES: [&str; 2] = ["tun", "vfio-pci"];

/// A broker with a link of each name.
pub struct Links<'s> {
    sandbox: &'s Sandbox,
    names: Vec<&'static str>,
    broker: Process,
}

impl<'s> Links<'s> {
    /// Starts the broker.
    pub fn start(sandbox: &'s Sandbox, names: &[&'static str]) -> Result<Self> {
        let socket = |name: &str| sandbox.dir().join(name).display().to_string();
        let mut config = format!("control_socket = {:?}\n", socket("control.sock"));
        for name in names {
            let (owner, peer) = (socket(&format!("{name}-owner.sock")), socket(&format!("{name}-peer.sock")));
            config +=
                &format!("[[link]]\nname = {name:?}\nowner_socket = {owner:?}\npeer_socket = {peer:?}\n");
        }
        fs::write(sandbox.dir().join("broker.toml"), config)?;
        let broker = start_broker(sandbox, "broker")?;
        Ok(Self { sandbox, names: names.to_vec(), broker })
    }

    /// A guest with the project's program in it.
    pub fn guest(&self, name: &str, memory_mib: u32) -> Result<GuestConfig<'s>> {
        let program = self.sandbox.guest_program("vhost-pci-guest")?;
        Ok(self.sandbox.guest(name).memory_mib(memory_mib).file("/bin/vhost-pci-guest", program))
    }

    /// The guest is an owner: its card is at the link. `card` is more of the card's options.
    pub fn owner<'g>(&self, guest: GuestConfig<'g>, link: &str, card: &str) -> GuestConfig<'g> {
        let socket = self.sandbox.dir().join(format!("{link}-owner.sock"));
        guest.args([
            "-chardev".to_owned(),
            format!("socket,id={link}-owner,path={}", socket.display()),
            "-netdev".to_owned(),
            format!("vhost-user,id={link}-net,chardev={link}-owner"),
            "-device".to_owned(),
            format!("virtio-net-pci,netdev={link}-net,disable-legacy=on{card}"),
        ])
    }

    /// The guest has an IOMMU, which its programs need for interrupts. To come before all devices.
    pub fn with_iommu<'g>(&self, guest: GuestConfig<'g>) -> GuestConfig<'g> {
        guest
            .args(["-device", "intel-iommu,intremap=on,device-iotlb=on,caching-mode=on"])
            .kernel_arg("intel_iommu=on")
            .kernel_arg("iommu.strict=1")
    }

    /// The guest, which has an IOMMU, is a peer: it has the link's device.
    pub fn peer<'g>(&self, guest: GuestConfig<'g>, link: &str) -> GuestConfig<'g> {
        let socket = self.sandbox.dir().join(format!("{link}-peer.sock"));
        guest.args([
            "-chardev".to_owned(),
            format!("socket,id={link}-peer,path={}", socket.display()),
            "-device".to_owned(),
            format!(
                "vhost-user-test-device-pci,chardev={link}-peer,virtio-id=38,num_vqs=3,config_size=64,\
                 iommu_platform=on,ats=on"
            ),
        ])
    }

    /// `vhost-pci-switch status --json`.
    pub fn status(&self) -> Result<Value> {
        status_of(self.sandbox)
    }

    /// Whether this link is up.
    pub fn is_up(&self, link: &str) -> Result<bool> {
        let status = self.status()?;
        let links = status["links"].as_array().context("no links in the status")?;
        Ok(links.iter().any(|entry| entry["name"] == link && entry["state"] == "up"))
    }

    /// Bytes of its owner that this link's peer has.
    pub fn mapped_bytes(&self, link: &str) -> Result<u64> {
        let status = self.status()?;
        let links = status["links"].as_array().context("no links in the status")?;
        let link = links.iter().find(|entry| entry["name"] == link).context("no such link in the status")?;
        link["window"]["mapped_bytes"].as_u64().context("no number of bytes in the status")
    }

    /// Checks that the broker touched no packet and met no fault; prints its counters.
    pub fn check_broker(&mut self) -> Result<()> {
        ensure!(self.broker.exited()?.is_none(), "the broker ended:\n{}", self.broker.log());
        let status = self.status()?;
        ensure!(status["packets"] == 0, "packets through the broker: {}", status["packets"]);
        ensure!(status["guest_bytes_mapped"] == 0, "{} bytes mapped", status["guest_bytes_mapped"]);
        let links = status["links"].as_array().context("no links in the status")?;
        ensure!(links.len() == self.names.len(), "{} links", links.len());
        for link in links {
            let (name, counters) = (&link["name"], &link["counters"]);
            ensure!(counters["faults"] == serde_json::json!({}), "{name}: faults: {}", counters["faults"]);
            println!(
                "broker: link {name} is {}, packets 0, notifications relayed {} ({} kicks, {} calls)",
                link["state"],
                counters["notifications_relayed"],
                counters["kicks_relayed"],
                counters["calls_relayed"]
            );
        }
        Ok(())
    }

    /// How often the broker's threads have gone to sleep until now.
    pub fn broker_switches(&self) -> Result<u64> {
        self.broker.voluntary_switches()
    }
}
