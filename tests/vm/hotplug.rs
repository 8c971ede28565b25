//! A link and its devices come and go in two running virtual machines.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use vhost_pci_tests::{Guest, Process, Sandbox, Usage};

use crate::Scenario;
use crate::beside::{self, Beside};
use crate::testbed::{BOOT, COMMAND, OWNER, PEER, start_broker, status_of};

pub const SCENARIO: Scenario = Scenario {
    name: "hotplug",
    shows: "a link is plugged into two running VMs, used, unplugged, 20 times, half of them under traffic: nothing is left behind, and another link loses nothing",
    run,
};

const ROUNDS: u32 = 20;
/// Rounds after which everything has its usual size.
const FIRST_ROUNDS: u32 = 4;
/// What the broker's memory may have grown by in the other rounds, KiB.
const GROWTH: u64 = 1024;
const LINK: &str = "late";
/// How long threads may take to end.
const SETTLE: Duration = Duration::from_secs(10);

struct Bed<'s> {
    sandbox: &'s Sandbox,
    broker: Process,
    owner: Guest,
    peer: Guest,
}

/// What processes have, and what the broker says of its links.
#[derive(Debug)]
struct State {
    /// The broker, its guardian, its opener.
    processes: Vec<Usage>,
    /// Descriptors of the VMs.
    vms: Vec<u64>,
    links: Vec<(String, u64)>,
}

fn run(sandbox: &Sandbox) -> Result<()> {
    let mut bed = Bed::start(sandbox)?;
    let beside = Beside::start(sandbox)?;
    let pings = beside.pings(sandbox)?;
    fs::write(sandbox.dir().join("broker.toml"), config(sandbox, true))?;
    let mut before = None;
    for round in 1..=ROUNDS {
        let from = Instant::now();
        bed.plug()?;
        let plugged = from.elapsed();
        let times = bed.ping()?;
        let used = from.elapsed();
        let under_traffic = round % 2 == 0;
        if under_traffic {
            bed.owner.sh_ok(&format!("ping -i 0.002 {PEER} >/tmp/flood 2>&1 &"), COMMAND)?;
        }
        if under_traffic {
            let flows = "for i in $(seq 100); do \
                [ $(grep -c 'bytes from' /tmp/flood) -gt 5 ] && exit 0; sleep 0.05; done; exit 1";
            bed.owner.sh_ok(flows, COMMAND).context("no traffic before the link is unplugged")?;
        }
        bed.unplug()?;
        println!(
            "round {round}: plugged in {:.1} s, traffic {:.1} s later, {times}, unplugged in {:.1} s{}",
            plugged.as_secs_f64(),
            (used - plugged).as_secs_f64(),
            (from.elapsed() - used).as_secs_f64(),
            if under_traffic { " under traffic" } else { "" }
        );
        if under_traffic {
            bed.owner.sh_ok("kill $(pidof ping) 2>/dev/null; true", COMMAND)?;
        }
        for socket in ["late-owner.sock", "late-peer.sock"] {
            ensure!(!sandbox.dir().join(socket).exists(), "{socket} is left behind");
        }
        if round == FIRST_ROUNDS {
            before = Some(bed.state()?);
        }
    }
    let before = before.context("no state")?;
    let after = bed.settled(&before)?;
    println!("before {before:?}\nafter  {after:?}");
    let trips = pings.end()?;
    println!(
        "another link meanwhile: {} round trips, 0 lost, {:.1} ms at most",
        trips.count,
        trips.max_ns as f64 / 1e6
    );
    beside.end()?;
    ensure!(bed.broker.exited()?.is_none(), "the broker ended:\n{}", bed.broker.log());
    bed.peer.sh_ok("pidof vhost-pci-guest", COMMAND).context("the peer's driver ended")?;
    Ok(())
}

fn config(sandbox: &Sandbox, with_late: bool) -> String {
    let link = |name: &str, owner: &str, peer: &str| {
        let socket = |name: &str| sandbox.dir().join(name).display().to_string();
        format!(
            "[[link]]\nname = {name:?}\nowner_socket = {:?}\npeer_socket = {:?}\n",
            socket(owner),
            socket(peer)
        )
    };
    let late = if with_late { link(LINK, "late-owner.sock", "late-peer.sock") } else { String::new() };
    let control = sandbox.dir().join("control.sock").display().to_string();
    format!(
        "control_socket = {control:?}\n{}{late}",
        link("beside", beside::OWNER_SOCKET, beside::PEER_SOCKET)
    )
}

impl<'s> Bed<'s> {
    /// A broker without the link, and two VMs with a free port each.
    fn start(sandbox: &'s Sandbox) -> Result<Self> {
        fs::write(sandbox.dir().join("broker.toml"), config(sandbox, false))?;
        let broker = start_broker(sandbox, "broker")?;
        let program = sandbox.guest_program("vhost-pci-guest")?;
        let with_port = |name: &str| {
            let qmp = format!("unix:{},server=on,wait=off", qmp(sandbox, name).display());
            // As in setup.rs: where Linux puts the large BAR of what is plugged later.
            sandbox.guest(name).kernel_arg("pci=no_e820").args(["-qmp", &qmp])
        };
        // With room for the window, which the BIOS has to leave at the start.
        let port = ["-device", "pcie-root-port,id=free,chassis=1,slot=1,pref64-reserve=2G"];
        let mut owner = with_port("owner").args(port).modules(["virtio_net"]).spawn()?;
        let mut peer = with_port("peer")
            .args(["-device", "intel-iommu,intremap=on,device-iotlb=on,caching-mode=on"])
            .kernel_arg("intel_iommu=on")
            .args(port)
            .modules(["tun", "vfio-pci"])
            .file("/bin/vhost-pci-guest", program)
            .spawn()?;
        owner.wait_ready(BOOT)?;
        peer.wait_ready(BOOT)?;
        // There is no device yet.
        let tap = format!(
            "vhost-pci-guest tap --device auto --vfio --wait interrupt --wait-for-device --ifname vp0 >/tmp/tap.log 2>&1 &\n\
             for i in $(seq 100); do ip link show vp0 >/dev/null 2>&1 && break; sleep 0.1; done\n\
             ip link set vp0 address 02:00:00:00:00:02 && ip addr add {PEER}/24 dev vp0 && ip link set vp0 up || {{ cat /tmp/tap.log; exit 1; }}"
        );
        peer.sh_ok(&tap, COMMAND)?;
        Ok(Self { sandbox, broker, owner, peer })
    }

    fn say(&self, args: &[&str]) -> Result<()> {
        let mut command = Command::new(self.sandbox.program("vhost-pci-switch")?);
        command.args(args).arg("--control-socket").arg(self.sandbox.dir().join("control.sock"));
        for (option, name) in [("--owner-qmp", "owner"), ("--peer-qmp", "peer")] {
            command.arg(option).arg(qmp(self.sandbox, name));
        }
        command.args(["--owner-bus", "free", "--peer-bus", "free"]);
        for option in [
            "--peer-option=iommu_platform=on",
            "--peer-option=ats=on",
            "--owner-option=mac=02:00:00:00:00:01",
        ] {
            command.arg(option);
        }
        let output = command.output()?;
        if !output.status.success() {
            bail!("{args:?}: {}\n{}", String::from_utf8_lossy(&output.stderr), self.broker.log());
        }
        Ok(())
    }

    fn plug(&mut self) -> Result<()> {
        self.say(&["plug", LINK])
    }

    fn unplug(&mut self) -> Result<()> {
        let said = self.say(&["unplug", LINK]);
        if said.is_err() {
            println!("{}", self.peer.sh("cat /tmp/tap.log; dmesg | tail -n 20", COMMAND)?.text);
        }
        said
    }

    /// The owner has a card, which gets its address, and the peer answers. Gives the times.
    fn ping(&mut self) -> Result<String> {
        let command = format!(
            "for i in $(seq 300); do [ -e /sys/class/net/eth0 ] && break; sleep 0.05; done\n\
             ip addr add {OWNER}/24 dev eth0 && ip link set eth0 up || exit 1\n\
             for i in $(seq 100); do ping -c 1 -W 1 {PEER} >/dev/null 2>&1 && break; sleep 0.05; done\n\
             ping -c 10 -i 0.02 -W 5 {PEER}"
        );
        let output = self.owner.sh(&command, COMMAND * 3)?;
        if !output.text.contains("10 packets transmitted, 10 packets received") {
            let peer = self
                .peer
                .sh(
                    "cat /tmp/tap.log; ip addr show vp0; ls /sys/bus/pci/devices; dmesg | tail -n 30",
                    COMMAND,
                )?
                .text;
            bail!(
                "pings are lost:\n{}\nthe peer:\n{peer}\nstatus: {}\n{}",
                output.text,
                status_of(self.sandbox)?,
                self.broker.log()
            );
        }
        let times = output.text.lines().find(|line| line.starts_with("round-trip"));
        Ok(times.context("ping printed no times")?.to_owned())
    }

    fn state(&mut self) -> Result<State> {
        let status = status_of(self.sandbox)?;
        let pid = |key: &str| status[key].as_u64().and_then(|pid| u32::try_from(pid).ok());
        let processes = ["pid", "guardian", "opener"];
        let processes = processes.iter().map(|key| Usage::of(pid(key).with_context(|| format!("no {key}"))?));
        let links = status["links"].as_array().context("no links")?;
        let link = |link: &Value| Some((link["name"].as_str()?.to_owned(), link["generation"].as_u64()?));
        Ok(State {
            processes: processes.collect::<Result<_>>()?,
            vms: [self.owner.qemu().pid(), self.peer.qemu().pid()]
                .iter()
                .map(|pid| Ok(Usage::of(*pid)?.descriptors))
                .collect::<Result<_>>()?,
            links: links.iter().filter_map(link).collect(),
        })
    }

    /// The state when everything is as before; an error if that does not come.
    fn settled(&mut self, before: &State) -> Result<State> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let now = self.state()?;
            ensure!(now.links == before.links, "status: {:?}, now {:?}", before.links, now.links);
            let processes = now.processes.iter().zip(&before.processes);
            let within = processes.clone().all(|(now, before)| {
                now.is_within(before) && now.anonymous_kib <= before.anonymous_kib + GROWTH
            });
            if within && now.vms.iter().zip(&before.vms).all(|(now, before)| now <= before) {
                return Ok(now);
            }
            ensure!(Instant::now() < deadline, "something is left behind: before {before:?}, now {now:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn qmp(sandbox: &Sandbox, name: &str) -> PathBuf {
    sandbox.dir().join(format!("{name}.qmp"))
}
