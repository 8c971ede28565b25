//! A link between two real virtual machines: the broker, the owner with its kernel's virtio-net,
//! and the peer whose `vhost-pci-guest tap` gives it a network interface.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vhost_pci_tests::{Guest, Output, Process, Sandbox};

use crate::setup::{Mode, Setup};

pub const BOOT: Duration = Duration::from_secs(120);
pub const COMMAND: Duration = Duration::from_secs(60);

/// The owner's address; the network is a /24.
pub const OWNER: &str = "10.0.0.1";
/// The peer's address.
pub const PEER: &str = "10.0.0.2";

pub struct Testbed<'s> {
    sandbox: &'s Sandbox,
    setup: Setup,
    broker: Process,
    /// How many there were.
    brokers: u32,
    pub owner: Guest,
    pub peer: Guest,
}

impl<'s> Testbed<'s> {
    /// Starts everything and waits until both guests have their network interface.
    pub fn start(sandbox: &'s Sandbox, setup: impl Into<Setup>) -> Result<Self> {
        let mut testbed = Self::boot(sandbox, setup)?;
        testbed.start_owner_network()?;
        testbed.start_peer_network()?;
        Ok(testbed)
    }

    /// Starts the broker and both guests, and nothing in them.
    pub fn boot(sandbox: &'s Sandbox, setup: impl Into<Setup>) -> Result<Self> {
        let setup = setup.into();
        let config = sandbox.dir().join("broker.toml");
        fs::write(&config, setup.broker_config(sandbox))?;
        let broker = start_broker(sandbox, "broker")?;
        let mut owner = setup.spawn_owner(sandbox)?;
        let mut peer = setup.spawn_peer(sandbox)?;
        owner.wait_ready(BOOT)?;
        peer.wait_ready(BOOT)?;
        Ok(Self { sandbox, setup, broker, brokers: 1, owner, peer })
    }

    /// Another QEMU for the owner's VM, which waits for its state.
    pub fn spawn_destination(&self, number: u32, uri: &str) -> Result<Guest> {
        self.setup.spawn_destination(self.sandbox, number, uri)
    }

    /// The broker's process.
    pub fn broker(&mut self) -> &mut Process {
        &mut self.broker
    }

    /// Gives the peer's VM a device with a connection to the present broker.
    pub fn replug_peer(&mut self) -> Result<()> {
        self.setup.replug_peer(self.sandbox, &mut self.peer)
    }

    /// Starts another broker, after the present one has ended.
    pub fn start_broker(&mut self) -> Result<()> {
        self.brokers += 1;
        self.broker = start_broker(self.sandbox, &format!("broker-{}", self.brokers))?;
        Ok(())
    }

    /// Gives the owner's interface its address; needed again after each start of the guest.
    pub fn start_owner_network(&mut self) -> Result<()> {
        let up = format!("ip addr add {OWNER}/24 dev eth0 && ip link set eth0 up");
        self.owner.sh_ok(&up, COMMAND).map(drop)
    }

    /// Starts the peer's driver and gives its interface an address.
    pub fn start_peer_network(&mut self) -> Result<()> {
        self.start_peer_program("vhost-pci-guest")
    }

    /// The same by this program, which may have an environment before it.
    pub fn start_peer_program(&mut self, program: &str) -> Result<()> {
        let mode = match self.setup.mode {
            Mode::Poll => "--wait poll",
            Mode::Interrupt => "--vfio --wait interrupt",
        };
        let reconnect = if self.setup.reconnect { "--reconnect " } else { "" };
        let up = format!(
            "{program} tap --device auto {mode} {reconnect}--ifname vp0 --json >/tmp/tap.log 2>&1 &\n\
             for i in $(seq 100); do ip link show vp0 >/dev/null 2>&1 && break; sleep 0.1; done\n\
             ip link set vp0 address 02:00:00:00:00:02 && ip addr add {PEER}/24 dev vp0 && ip link set vp0 up || {{ cat /tmp/tap.log; exit 1; }}"
        );
        self.peer.sh_ok(&up, COMMAND).map(drop)
    }

    /// Kills the peer's VMM and starts another, without a driver.
    pub fn boot_peer(&mut self) -> Result<()> {
        self.peer.kill()?;
        self.peer = self.setup.spawn_peer(self.sandbox)?;
        self.peer.wait_ready(BOOT).map(drop)
    }

    /// Kills the owner's VMM and starts another, of this kind, without a driver.
    pub fn boot_owner(&mut self, setup: Setup) -> Result<()> {
        self.owner.kill()?;
        self.setup = setup;
        self.owner = self.setup.spawn_owner(self.sandbox)?;
        self.owner.wait_ready(BOOT).map(drop)
    }

    /// Kills the peer's VMM and starts another, while the owner goes on.
    pub fn replace_peer(&mut self) -> Result<()> {
        self.peer.kill()?;
        self.peer = self.setup.spawn_peer(self.sandbox)?;
        self.peer.wait_ready(BOOT)?;
        self.start_peer_network()
    }

    /// Kills the owner's VMM and starts another, while the peer goes on.
    pub fn replace_owner(&mut self) -> Result<()> {
        self.owner.kill()?;
        self.owner = self.setup.spawn_owner(self.sandbox)?;
        self.owner.wait_ready(BOOT)?;
        self.start_owner_network()
    }

    /// Pings the peer from the owner; fails if one of `count` is lost. Gives busybox's line of
    /// minimum/average/maximum.
    pub fn ping(&mut self, count: u32) -> Result<String> {
        self.ping_every(count, 0.05)
    }

    /// The same, with so many seconds between two pings.
    pub fn ping_every(&mut self, count: u32, interval: f64) -> Result<String> {
        let command = format!("ping -c {count} -i {interval} -W 5 {PEER}");
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

    /// Where the sockets and logs are.
    pub fn sandbox(&self) -> &Sandbox {
        self.sandbox
    }

    /// `vhost-pci-switch status --json`.
    pub fn status(&self) -> Result<Value> {
        status_of(self.sandbox)
    }

    /// Checks that the broker touched no packet that it was not asked to, and had no fault; prints its
    /// counters.
    pub fn check_broker(&mut self) -> Result<()> {
        ensure!(self.broker.exited()?.is_none(), "the broker ended:\n{}", self.broker.log());
        let status = self.status()?;
        let counters = &status["links"][0]["counters"];
        // What the peer's driver had it copy: nothing, if the owner has no IOMMU.
        let asked = counters["fetches"].as_u64().zip(counters["stores"].as_u64());
        let asked = asked.map(|(fetches, stores)| fetches + stores);
        let packets = status["packets"].as_u64();
        ensure!(
            packets.is_some() && packets == asked,
            "packets through the broker: {packets:?}, not {asked:?}"
        );
        ensure!(status["guest_bytes_mapped"] == 0, "{} bytes mapped", status["guest_bytes_mapped"]);
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

    /// How often the broker's threads have gone to sleep until now: at least once for each thing
    /// that one of them did.
    pub fn broker_switches(&self) -> Result<u64> {
        self.broker.voluntary_switches()
    }

    /// What the broker wrote.
    pub fn broker_log(&self) -> String {
        self.broker.log()
    }

    /// An error with everything that may explain it.
    pub fn explain(&mut self, what: &str) -> Result<()> {
        let text = |output: Result<Output>| {
            output.map_or_else(|error| error.to_string(), |output| output.text.trim_end().to_owned())
        };
        let logs = "tail -n 20 /tmp/*.log; ip addr show vp0";
        let (owner, peer) = (text(self.owner.sh(logs, COMMAND)), text(self.peer.sh(logs, COMMAND)));
        let status = self.status().map_or_else(|error| error.to_string(), |status| status.to_string());
        let broker = self.broker.log();
        anyhow::bail!("{what}\nthe owner:\n{owner}\nthe peer:\n{peer}\nstatus: {status}\nbroker:\n{broker}")
    }
}

/// `vhost-pci-switch status --json` of the sandbox's broker.
pub fn status_of(sandbox: &Sandbox) -> Result<Value> {
    let mut command = Command::new(sandbox.program("vhost-pci-switch")?);
    let socket: PathBuf = sandbox.dir().join("control.sock");
    let output = command.args(["status", "--json", "--control-socket"]).arg(socket).output()?;
    ensure!(output.status.success(), "status: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// A broker by the sandbox's configuration. What it writes goes to `NAME.log`.
pub fn start_broker(sandbox: &Sandbox, name: &str) -> Result<Process> {
    let mut command = sandbox.command_of_nobody("vhost-pci-switch")?;
    command.arg("run").arg("--config").arg(sandbox.dir().join("broker.toml"));
    let mut broker = sandbox.process(name, command)?;
    broker.wait_log("the broker listens", COMMAND)?;
    Ok(broker)
}
