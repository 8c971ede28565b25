//! Another kind of owner device on the same machinery: a disk. The owner's unmodified QEMU has a
//! `vhost-user-blk-pci`, from which its guest boots its root file system; the peer's guest program serves it
//! from a disk of the peer's own.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vhost_pci_tests::{Guest, Process, Sandbox};

use crate::Scenario;
use crate::programs::{Program, run as run_in};
use crate::testbed::{BOOT, COMMAND, start_broker, status_of};

pub const SCENARIO: Scenario = Scenario {
    name: "blk",
    shows: "the owner boots from a disk that the peer serves; checked writes, several in flight; a reboot; the peer's program is killed amid writes",
    run,
};

/// Bytes of the disk, as the broker's configuration has them.
const SIZE: &str = "64M";
/// Bytes of the file that is checked, of which each block is written several times.
const CHECK: &str = "disk-check --blocks 768 --threads 4";
/// Writes of each thread.
const WRITES: u64 = 400;
const KILLS: u32 = 3;
/// Writes between two kills.
const BETWEEN: u64 = 300;

fn run(sandbox: &Sandbox) -> Result<()> {
    let disk = root_disk(sandbox)?;
    let socket = |name: &str| sandbox.dir().join(name).display().to_string();
    let config = format!(
        "control_socket = {:?}\n[[link]]\nname = \"vm\"\nowner_socket = {:?}\npeer_socket = {:?}\n\
         profile = \"block\"\nsize = \"{SIZE}\"\nnum_queues = 2\n",
        socket("control.sock"),
        socket("owner.sock"),
        socket("peer.sock"),
    );
    fs::write(sandbox.dir().join("broker.toml"), config)?;
    let broker = start_broker(sandbox, "broker")?;
    let from = Instant::now();
    let owner = sandbox
        .guest("owner")
        .args([
            "-smp",
            "2",
            "-chardev",
            &format!("socket,id=vp,path={},reconnect-ms=100", socket("owner.sock")),
        ])
        .args(["-device", "vhost-user-blk-pci,chardev=vp,disable-legacy=on,num-queues=2"])
        .modules(["virtio_blk"])
        .kernel_arg("vp.root=/dev/vda")
        .spawn()?;
    let peer = sandbox
        .guest("peer")
        .args(["-chardev", &format!("socket,id=vp,path={}", socket("peer.sock"))])
        .args(["-device", "vhost-user-test-device-pci,chardev=vp,virtio-id=38,num_vqs=3,config_size=64"])
        .args(["-drive", &format!("file={},if=none,id=disk,format=raw", disk.display())])
        .args(["-device", "virtio-blk-pci,drive=disk,disable-legacy=on"])
        .file("/bin/vhost-pci-guest", sandbox.guest_program("vhost-pci-guest")?)
        .modules(["virtio_blk"])
        .spawn()?;
    let mut bed = Bed { sandbox, broker, owner, peer };
    let result = scenario(&mut bed, from);
    result.with_context(|| bed.explain())
}

struct Bed<'s> {
    sandbox: &'s Sandbox,
    broker: Process,
    owner: Guest,
    peer: Guest,
}

fn scenario(bed: &mut Bed<'_>, from: Instant) -> Result<()> {
    bed.peer.wait_ready(BOOT)?;
    let refused = bed
        .peer
        .sh("truncate -s 1M /tmp/small; vhost-pci-guest blk --device auto --disk /tmp/small", COMMAND)?;
    ensure!(
        refused.code != 0 && refused.text.contains("the owner is told that it has 67108864"),
        "a disk of another size is served: {}",
        refused.text
    );
    let mut driver = bed.start_driver()?;
    bed.owner.wait_ready(BOOT)?;
    let root = bed.owner.sh_ok("grep ' / ext4' /proc/mounts; cat /sys/block/vda/serial", COMMAND)?;
    ensure!(root.starts_with("/dev/vda / ext4") && root.ends_with("vda"), "it runs from {root:?}");
    println!(
        "the owner runs from the peer's disk {:.1} s after the start of both",
        from.elapsed().as_secs_f64()
    );

    let file = "--file /first";
    let written = run_in(&mut bed.owner, &format!("{CHECK} {file} --seed 1 --writes {WRITES}"), BOOT)?;
    ensure!(written["wrong"] == 0, "{written}");
    println!("written: {written}");
    let took = bed.owner.reboot(BOOT)?;
    let again = verify(&mut bed.owner, &format!("{file} --seed 1"), &written)?;
    println!(
        "after a reboot of {:.1} s: {} blocks looked at, {} wrong",
        took.as_secs_f64(),
        again["reads"],
        again["wrong"]
    );

    let file = "--file /second --seed 2";
    let writer = Program::start(&mut bed.owner, &format!("{CHECK} {file}"))?;
    for round in 1..=KILLS {
        bed.wait_written(&writer, BETWEEN)?;
        // It may take the kernel a moment: it is in the middle of a write.
        let gone = "until [ -s /tmp/blk.code ]; do sleep 0.02; done";
        bed.peer.sh_ok(&format!("kill -9 $(pidof vhost-pci-guest); {gone}"), COMMAND)?;
        driver = bed.start_driver()?;
        let at = bed.wait_written(&writer, BETWEEN)?;
        println!("the peer's program killed {round}: {at} writes, and they go on");
    }
    let lines = writer.end(&mut bed.owner)?;
    let written = lines.last().context("the writer said nothing")?;
    ensure!(written["wrong"] == 0, "{written}");
    println!("written: {written}");
    bed.owner.reboot(BOOT)?;
    let again = verify(&mut bed.owner, file, written)?;
    println!("after a reboot: {} blocks looked at, {} wrong", again["reads"], again["wrong"]);
    verify(
        &mut bed.owner,
        "--file /first --seed 1",
        &serde_json::json!({"writes": [WRITES, WRITES, WRITES, WRITES]}),
    )?;

    let lines = driver.end(&mut bed.peer)?;
    let served = lines.last().context("the peer's program said nothing")?;
    println!("served by the last one: {served}");
    for count in ["failed", "refused", "faults", "fetched_bytes"] {
        ensure!(served[count] == 0, "{count} is not 0: {served}");
    }
    ensure!(served["flushes"].as_u64() > Some(0) && served["read_bytes"].as_u64() > Some(0), "{served}");
    bed.check_broker()
}

/// Looks whether a file has what was written to it.
fn verify(owner: &mut Guest, file: &str, written: &Value) -> Result<Value> {
    let writes = written["writes"].as_array().context("no number of writes")?;
    let writes: Vec<_> = writes.iter().map(Value::to_string).collect();
    let again = run_in(owner, &format!("{CHECK} {file} --verify {}", writes.join(",")), COMMAND)?;
    ensure!(again["wrong"] == 0, "{again}");
    Ok(again)
}

impl Bed<'_> {
    fn start_driver(&mut self) -> Result<Program> {
        Program::start(&mut self.peer, "blk --device auto --disk /dev/vda --idle-us 50 --json")
    }

    /// Waits until so many writes more are done, and gives how many there are.
    fn wait_written(&mut self, writer: &Program, more: u64) -> Result<u64> {
        let count = |lines: Vec<Value>| lines.last().and_then(|line| line["written"].as_u64()).unwrap_or(0);
        let before = count(writer.lines(&mut self.owner)?);
        let deadline = Instant::now() + BOOT;
        loop {
            let now = count(writer.lines(&mut self.owner)?);
            if now >= before + more {
                return Ok(now);
            }
            ensure!(writer.is_running(&mut self.owner)?, "the writer ended");
            ensure!(Instant::now() < deadline, "no writes after {now}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn check_broker(&mut self) -> Result<()> {
        ensure!(self.broker.exited()?.is_none(), "the broker ended:\n{}", self.broker.log());
        let status = status_of(self.sandbox)?;
        let link = &status["links"][0];
        ensure!(link["device"] == "block", "{}", link["device"]);
        ensure!(status["packets"] == 0 && status["guest_bytes_mapped"] == 0, "{status}");
        ensure!(link["counters"]["faults"] == serde_json::json!({}), "{}", link["counters"]["faults"]);
        println!(
            "broker: requests' bytes copied {}, guest memory mapped {} B, notifications relayed {}",
            status["packets"], status["guest_bytes_mapped"], link["counters"]["notifications_relayed"],
        );
        Ok(())
    }

    fn explain(&mut self) -> String {
        let text =
            |guest: &mut Guest| match guest.sh("tail -n 20 /tmp/*.log /tmp/*.out", Duration::from_secs(5)) {
                Ok(output) => output.text,
                Err(error) => format!("{error:#}"),
            };
        let peer = text(&mut self.peer);
        let status =
            status_of(self.sandbox).map_or_else(|error| error.to_string(), |status| status.to_string());
        format!("the peer:\n{peer}\nstatus: {status}\nbroker:\n{}", self.broker.log())
    }
}

/// Makes the image of a disk with a root file system: busybox, the programs, and the same `/init` as the
/// guests' first file system has.
fn root_disk(sandbox: &Sandbox) -> Result<PathBuf> {
    let root = sandbox.dir().join("root");
    for folder in ["bin", "sbin", "dev", "proc", "sys", "tmp", "root"] {
        fs::create_dir_all(root.join(folder))?;
    }
    let busybox = root.join("bin/busybox");
    fs::copy(sandbox.unpacked("usr/bin/busybox"), &busybox)?;
    let applets = Command::new(&busybox).arg("--list").output()?;
    for applet in String::from_utf8(applets.stdout)?.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    fs::copy(sandbox.guest_program("vhost-pci-guest")?, root.join("bin/vhost-pci-guest"))?;
    let init = root.join("init");
    fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("vm/init"), &init)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let image = sandbox.dir().join("root.img");
    let mut command = sandbox.unpacked_program("usr/sbin/mke2fs");
    let made = command.args(["-q", "-t", "ext4", "-d"]).arg(&root).arg(&image).arg(SIZE).output()?;
    ensure!(made.status.success(), "mke2fs: {}", String::from_utf8_lossy(&made.stderr));
    Ok(image)
}
