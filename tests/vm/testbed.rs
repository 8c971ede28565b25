//! A link between two real virtual machines: the broker, the owner with its kernel's virtio-net,
//! and the peer whose `vhost-pci-guest tap` gives it a network interface.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vhost_pci_tests::{Guest, Process, Sandbox};

pub const BOOT: Duration = Duration::from_secs(120);
pub const COMMAND: Duration = Duration::from_secs(60);

/// The owner's address; the network is a /24.
pub const OWNER: &str = "10.0.0.1";
/// The peer's address.
pub const PEER: &str = "10.0.0.2";

/// How the peer's driver learns of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It polls, through sysfs.
    Poll,
    /// It waits for MSI-X interrupts, through VFIO behind a virtual IOMMU.
    Interrupt,
}

impl Mode {
    pub const ALL: [Self; 2] = [Self::Poll, Self::Interrupt];

    /// Pairs of queues of the link; an owner with one CPU sets up all and enables the first.
    const fn pairs(self) -> u16 {
        match self {
            Self::Poll => 1,
            Self::Interrupt => 2,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Poll => "poll",
            Self::Interrupt => "interrupt",
        }
    }
}

pub struct Testbed<'s> {
    sandbox: &'s Sandbox,
    mode: Mode,
    broker: Process,
    pub owner: Guest,
    pub peer: Guest,
}

impl<'s> Testbed<'s> {
    /// Starts everything and waits until both guests have their network interface.
    pub fn start(sandbox: &'s Sandbox, mode: Mode) -> Result<Self> {
        let socket = |name: &str| sandbox.dir().join(name).display().to_string();
        let config = sandbox.dir().join("broker.toml");
        let text = format!(
            "control_socket = {:?}\n[[link]]\nname = \"vm\"\nowner_socket = {:?}\npeer_socket = {:?}\n\
             queue_pairs = {}\n",
            socket("control.sock"),
            socket("owner.sock"),
            socket("peer.sock"),
            mode.pairs(),
        );
        fs::write(&config, text)?;
        let mut command = Command::new(sandbox.program("vhost-pci-switch")?);
        command.arg("run").arg("--config").arg(&config);
        let mut broker = sandbox.process("broker", command)?;
        broker.wait_log("the broker listens", COMMAND)?;

        let mut owner = spawn_owner(sandbox, mode)?;
        let mut peer = spawn_peer(sandbox, mode)?;
        owner.wait_ready(BOOT)?;
        peer.wait_ready(BOOT)?;
        let mut testbed = Self { sandbox, mode, broker, owner, peer };
        testbed.start_owner_network()?;
        testbed.start_peer_network()?;
        Ok(testbed)
    }

    /// Gives the owner's interface its address; needed again after each start of the guest.
    pub fn start_owner_network(&mut self) -> Result<()> {
        let up = format!("ip addr add {OWNER}/24 dev eth0 && ip link set eth0 up");
        self.owner.sh_ok(&up, COMMAND).map(drop)
    }

    /// Starts the peer's driver and gives its interface an address.
    pub fn start_peer_network(&mut self) -> Result<()> {
        let mode = match self.mode {
            Mode::Poll => "--mode poll",
            Mode::Interrupt => "--vfio --mode interrupt",
        };
        let up = format!(
            "vhost-pci-guest tap --device auto {mode} --ifname vp0 >/tmp/tap.log 2>&1 &\n\
             for i in $(seq 100); do ip link show vp0 >/dev/null 2>&1 && break; sleep 0.1; done\n\
             ip link set vp0 address 02:00:00:00:00:02 && ip addr add {PEER}/24 dev vp0 && ip link set vp0 up || {{ cat /tmp/tap.log; exit 1; }}"
        );
        self.peer.sh_ok(&up, COMMAND).map(drop)
    }

    /// Kills the peer's VMM and starts another, while the owner goes on.
    pub fn replace_peer(&mut self) -> Result<()> {
        self.peer.kill()?;
        self.peer = spawn_peer(self.sandbox, self.mode)?;
        self.peer.wait_ready(BOOT)?;
        self.start_peer_network()
    }

    /// Kills the owner's VMM and starts another, while the peer goes on.
    pub fn replace_owner(&mut self) -> Result<()> {
        self.owner.kill()?;
        self.owner = spawn_owner(self.sandbox, self.mode)?;
        self.owner.wait_ready(BOOT)?;
        self.start_owner_network()
    }

    /// Pings the peer from the owner; fails if one of `count` is lost. Gives busybox's line of
    /// minimum/average/maximum.
    pub fn ping(&mut self, count: u32) -> Result<String> {
        let command = format!("ping -c {count} -i 0.05 -W 5 {PEER}");
        let output = self.owner.sh(&command, COMMAND + Duration::from_secs(count.into()))?;
        let received = format!("{count} packets transmitted, {count} packets received");
        if !output.text.contains(&received) {
            self.explain(&format!("`{command}` lost packets:\n{}", output.text))?;
        }
        let times = output.text.lines().find(|line| line.starts_with("round-trip"));
        Ok(times.context("ping printed no times")?.to_owned())
    }

    /// Waits until a ping is answered, as after a restart of one side.
    pub fn wait_for_traffic(&mut self) -> Result<Duration> {
        let from = Instant::now();
        let command = format!(
            "for i in $(seq 60); do ping -c 1 -W 1 {PEER} >/dev/null 2>&1 && exit 0; sleep 0.2; done; exit 1"
        );
        if self.owner.sh(&command, COMMAND * 2)?.code != 0 {
            self.explain("no ping is answered")?;
        }
        Ok(from.elapsed())
    }

    /// `vhost-pci-switch status --json`.
    pub fn status(&self) -> Result<Value> {
        let mut command = Command::new(self.sandbox.program("vhost-pci-switch")?);
        let socket: PathBuf = self.sandbox.dir().join("control.sock");
        let output = command.args(["status", "--json", "--control-socket"]).arg(socket).output()?;
        ensure!(output.status.success(), "status: {}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Checks that the broker touched no packet and had no fault; prints its counters.
    pub fn check_broker(&mut self) -> Result<()> {
        ensure!(self.broker.exited()?.is_none(), "the broker ended:\n{}", self.broker.log());
        let status = self.status()?;
        ensure!(status["packets"] == 0, "packets through the broker: {}", status["packets"]);
        ensure!(status["guest_bytes_mapped"] == 0, "{} bytes mapped", status["guest_bytes_mapped"]);
        let counters = &status["links"][0]["counters"];
        ensure!(counters["faults"] == serde_json::json!({}), "faults: {}", counters["faults"]);
        println!(
            "broker: packets {}, guest memory mapped {} B, notifications relayed {} ({} kicks, {} calls), \
             mappings made {}, revoked {}",
            status["packets"],
            status["guest_bytes_mapped"],
            counters["notifications_relayed"],
            counters["kicks_relayed"],
            counters["calls_relayed"],
            counters["mappings_made"],
            counters["mappings_revoked"],
        );
        Ok(())
    }

    /// An error with everything that may explain it.
    pub fn explain(&mut self, what: &str) -> Result<()> {
        let tap = self.peer.sh("cat /tmp/tap.log; ip addr show vp0", COMMAND);
        let tap = tap.map_or_else(|error| error.to_string(), |output| output.text);
        let status = self.status().map_or_else(|error| error.to_string(), |status| status.to_string());
        anyhow::bail!("{what}\nthe peer's driver:\n{tap}\nstatus: {status}\nbroker:\n{}", self.broker.log())
    }
}

fn spawn_owner(sandbox: &Sandbox, mode: Mode) -> Result<Guest> {
    let chardev = format!("socket,id=vp,path={}", sandbox.dir().join("owner.sock").display());
    sandbox
        .guest("owner")
        .args(["-chardev", &chardev])
        .args(["-netdev", &format!("vhost-user,id=net,chardev=vp,queues={}", mode.pairs())])
        .args(["-device", &format!("virtio-net-pci,netdev=net,disable-legacy=on{}", mq(mode))])
        .modules(["virtio_net"])
        .spawn()
}

/// What makes QEMU's network card a multiqueue one: two vectors a pair, and two more.
fn mq(mode: Mode) -> String {
    match mode.pairs() {
        1 => String::new(),
        pairs => format!(",mq=on,vectors={}", 2 * pairs + 2),
    }
}

fn spawn_peer(sandbox: &Sandbox, mode: Mode) -> Result<Guest> {
    let chardev = format!("socket,id=vp,path={}", sandbox.dir().join("peer.sock").display());
    let queues = 1 + 2 * mode.pairs();
    let device =
        format!("vhost-user-test-device-pci,chardev=vp,virtio-id=38,num_vqs={queues},config_size=64");
    let guest = sandbox
        .guest("peer")
        .args(["-chardev", &chardev])
        .file("/bin/vhost-pci-guest", sandbox.guest_program("vhost-pci-guest")?);
    match mode {
        Mode::Poll => guest.args(["-device", &device]).modules(["tun"]).spawn(),
        Mode::Interrupt => guest
            .args(["-device", "intel-iommu,intremap=on,device-iotlb=on,caching-mode=on"])
            .args(["-device", &format!("{device},iommu_platform=on,ats=on")])
            .kernel_arg("intel_iommu=on")
            .modules(["tun", "vfio-pci"])
            .spawn(),
    }
}
