//! A virtual function in front of the owner's memory: the peer's card, whose far side is the test, sends out
//! of the owner's buffers and receives into them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vhost_pci_tests::{Guest, Sandbox};

use crate::Scenario;
use crate::programs::Program;
use crate::setup::{Iommu, Mode, OwnerDriver, Setup};
use crate::testbed::{COMMAND, OWNER, PEER, Testbed};
use crate::vf_far_side::{FarSide, PORT};

pub const SCENARIO: Scenario = Scenario {
    name: "vf",
    shows: "a NIC's virtual function in the peer works in the owner's memory: no byte copied, no address beyond, nothing taken back that it holds",
    run,
};

const FRAMES: u64 = 10_000;
/// Frames a second, so that the owner's socket has room for all that comes.
const RATE: u64 = 2_000;
const SOON: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(50);
/// Frames of an owner behind an IOMMU, and when the card goes astray.
const STATIC_FRAMES: u64 = 5_000;
const STRAY_AFTER: u64 = 2_000;

fn run(sandbox: &Sandbox) -> Result<()> {
    let setup = Setup { vf: true, owner_mib: 256, ..Mode::Interrupt.into() };
    let far = FarSide::start(sandbox)?;
    let mut testbed = Testbed::boot(sandbox, setup)?;
    let result = scenario(&mut testbed, &far, setup);
    result.or_else(|error| testbed.explain(&format!("{error:#}")))?;
    far.end()
}

fn scenario(testbed: &mut Testbed<'_>, far: &FarSide, setup: Setup) -> Result<()> {
    let card = virtual_function(&mut testbed.peer)?;
    testbed.start_owner_network()?;

    let vf = format!("vf --nic {card} --wait interrupt --json-lines");
    let program = Program::start(&mut testbed.peer, &vf)?;
    traffic(testbed, far, &program)?;
    reset_in_flight(testbed, far, &program, &card)?;
    revocation(testbed, far, &program)?;
    let lines = program.end(&mut testbed.peer)?;
    println!("vf: {}", lines.last().context("no line of the driver's")?);
    ensure!(lines.last().is_some_and(|line| line["end"] == true && line["copied_bytes"] == 0));
    testbed.check_broker()?;

    // Of this owner most of the memory is not for its card, and so not for ours.
    testbed.boot_owner(Setup { iommu: Iommu::Intel, driver: OwnerDriver::Vfio, ..setup })?;
    astray(testbed, far, &format!("{vf} --stray-after {STRAY_AFTER}"))?;
    unplugged(testbed, &vf)?;
    testbed.check_broker()
}

/// Makes the virtual function, tries what cannot be, and leaves it without a driver.
fn virtual_function(peer: &mut Guest) -> Result<String> {
    let card = peer.sh_ok("basename $(dirname /sys/bus/pci/devices/*/sriov_totalvfs)", COMMAND)?;
    let refusal = |peer: &mut Guest, nic: &str| -> Result<String> {
        let output = peer.sh(&format!("vhost-pci-guest vf --nic {nic} 2>&1"), COMMAND)?;
        ensure!(output.code != 0, "it took {nic}");
        println!("vf: {}", output.text.trim());
        Ok(output.text)
    };
    ensure!(refusal(peer, "0000:99:00.0")?.contains("no such PCI device"));
    let folder = format!("/sys/bus/pci/devices/{card}");
    // Its driver has to be up before it takes the number.
    peer.sh_ok(
        &format!(
            "for i in $(seq 50); do echo 1 >{folder}/sriov_numvfs && break; sleep 0.1; done 2>/dev/null"
        ),
        COMMAND,
    )?;
    let function = peer.sh_ok(&format!("basename $(readlink {folder}/virtfn0)"), COMMAND)?;
    let text = refusal(peer, &function)?;
    ensure!(text.contains("the driver virtio-pci has it") && text.contains("driver_override"), "{text}");
    peer.sh_ok(&format!("echo {function} >/sys/bus/pci/devices/{function}/driver/unbind"), COMMAND)?;
    Ok(function)
}

/// Datagrams of the owner's kernel out, and of the far side's in.
fn traffic(testbed: &mut Testbed<'_>, far: &FarSide, vf: &Program) -> Result<()> {
    wait(&mut testbed.peer, vf, "links", |line| line["links"] == 1)?;
    let command = format!("datagrams --here {OWNER}:{PORT} --there {PEER}:{PORT} --size 1200 --rate {RATE}");
    let owner = Program::start(&mut testbed.owner, &command)?;
    let from = Instant::now();
    let enough = |line: &Value| count(line, "received") >= FRAMES && count(line, "sent") >= FRAMES;
    let line = wait(&mut testbed.owner, &owner, "datagrams", enough)?;
    let seen = far.seen();
    let moved = wait(&mut testbed.peer, vf, "frames", |line| count(line, "tx_packets") >= FRAMES)?;
    println!("owner: {line}\nfar side: {seen:?}\nvf: {moved}\nafter {:.1} s", from.elapsed().as_secs_f64());
    for kind in ["lost", "reordered", "corrupted"] {
        ensure!(line[kind] == 0, "the owner: {kind}: {}", line[kind]);
    }
    ensure!(seen.came.intact >= FRAMES && seen.came.lost + seen.came.corrupted + seen.came.reordered == 0);
    ensure!(seen.strange == 0, "{} frames that nobody sent", seen.strange);
    ensure!(moved["copied_bytes"] == 0 && moved["dropped"] == 0, "{moved}");
    println!(
        "{} frames out and {} in, each byte checked: payload bytes copied by the peer's CPU: {}",
        seen.came.intact,
        count(&line, "received"),
        moved["copied_bytes"]
    );
    Ok(())
}

/// Somebody resets the card in the midst of traffic.
fn reset_in_flight(testbed: &mut Testbed<'_>, far: &FarSide, vf: &Program, card: &str) -> Result<()> {
    testbed.peer.sh_ok(&format!("echo 1 >/sys/bus/pci/devices/{card}/reset"), COMMAND)?;
    let line = wait(&mut testbed.peer, vf, "reset", |line| count(line, "nic_resets") > 0)?;
    let before = far.seen();
    wait_for("traffic after the card's reset", || Ok(far.seen().came.intact > before.came.intact + 1_000))?;
    let seen = far.seen();
    ensure!(seen.came.corrupted == 0 && seen.strange == 0, "{seen:?}");
    println!(
        "the card was reset in mid-flight: {} buffers lent anew, 0 frames corrupted",
        line["given_back"]
    );
    Ok(())
}

/// The owner's driver lets go of its card while our card cannot get rid of what it holds.
fn revocation(testbed: &mut Testbed<'_>, far: &FarSide, vf: &Program) -> Result<()> {
    far.pause(true);
    let held = stuck(&mut testbed.peer, vf)?;
    let before = testbed.status()?;
    testbed.peer.sh_ok("kill -STOP $(pidof vhost-pci-guest)", COMMAND)?;
    // Its VM stands still while it waits.
    let device = testbed.owner.sh_ok("basename $(readlink -f /sys/class/net/eth0/device)", COMMAND)?;
    testbed.owner.sh_ok(
        &format!(
            "kill $(pidof vhost-pci-guest)\n\
             (sleep 0.5; echo {device} >/sys/bus/virtio/drivers/virtio_net/unbind; echo done >/tmp/unbound) >/dev/null 2>&1 &"
        ),
        COMMAND,
    )?;
    let link = |status: &Value| status["links"][0].clone();
    wait_for("the broker to wait", || Ok(link(&testbed.status()?)["window"]["phase"] == "releasing"))?;
    let waits = link(&testbed.status()?);
    println!(
        "the owner takes back what the card holds ({} buffers to send): phase {}, {} B mapped, asked to release {}, released {}",
        held["lent_tx"],
        waits["window"]["phase"],
        waits["window"]["mapped_bytes"],
        waits["counters"]["releases_asked"],
        waits["counters"]["releases_given"],
    );
    ensure!(
        waits["window"]["mapped_bytes"] == link(&before)["window"]["mapped_bytes"],
        "something was unmapped"
    );
    ensure!(waits["counters"]["mappings_revoked"] == link(&before)["counters"]["mappings_revoked"]);
    ensure!(waits["counters"]["releases_given"] == 0 && waits["counters"]["releases_asked"] == 1);

    testbed.peer.sh_ok("kill -CONT $(pidof vhost-pci-guest)", COMMAND)?;
    wait_for("the window to be empty", || Ok(link(&testbed.status()?)["window"]["mapped_bytes"] == 0))?;
    let unbound = "for i in $(seq 100); do [ -e /tmp/unbound ] && exit 0; sleep 0.1; done; exit 1";
    testbed.owner.sh_ok(unbound, COMMAND)?;
    let line = wait(&mut testbed.peer, vf, "release", |line| count(line, "releases") > 0)?;
    println!("vf: {line}");
    ensure!(line["held_at_release"] == 0, "the card still held {} buffers", line["held_at_release"]);
    let given_back = count(&line, "given_back") - count(&held, "given_back");
    ensure!(given_back >= count(&held, "lent_tx"), "the card kept what it held");
    let counters = link(&testbed.status()?)["counters"].clone();
    ensure!(counters["releases_given"] == 1 && counters["faults"] == serde_json::json!({}), "{counters}");
    println!("the card gave {given_back} buffers back, then the owner was answered");

    far.pause(false);
    testbed.owner.sh_ok(&format!("echo {device} >/sys/bus/virtio/drivers/virtio_net/bind"), COMMAND)?;
    wait(&mut testbed.peer, vf, "links", |line| line["links"] == 2)?;
    testbed.start_owner_network()?;
    let output = testbed.owner.sh(&format!("arping -c 3 -w 10 -I eth0 {PEER}"), COMMAND)?;
    ensure!(output.code == 0, "nothing comes through the link that is back: {}", output.text);
    Ok(())
}

/// The card reads behind what it was let.
fn astray(testbed: &mut Testbed<'_>, far: &FarSide, vf: &str) -> Result<()> {
    let vf = Program::start(&mut testbed.peer, vf)?;
    let command = "vfio-owner --device auto --mode echo-check --json-lines --report-every-ms 250";
    let owner = Program::start(&mut testbed.owner, command)?;
    let started = owner.wait_lines(&mut testbed.owner, 1, COMMAND)?;
    let line = wait(&mut testbed.owner, &owner, "frames", |line| count(line, "rx_packets") >= STATIC_FRAMES)?;
    let tried = wait(&mut testbed.peer, &vf, "stray", |line| {
        line["strays_sent"] == 1 || count(line, "nic_resets") > 0
    })?;
    let window = testbed.status()?["links"][0]["window"]["mapped_bytes"].clone();
    println!(
        "owner: {line}\nvf: {tried}\nthe owner mapped {} B, the window shows {window} B",
        started["mapped_bytes"]
    );
    ensure!(window == started["mapped_bytes"], "the card reaches something else than the owner mapped");
    ensure!(line["corrupted"] == 0 && tried["copied_bytes"] == 0, "something is wrong");
    let faults = testbed.peer.sh_ok("dmesg | grep 'DMAR:.*fault addr' | tail -n 1", COMMAND)?;
    println!("the card was to read at {:#x}; the peer's kernel: {faults}", count(&tried, "stray_at"));
    ensure!(
        faults.contains("DMA Read") && faults.contains(&format!("{:#x}", count(&tried, "stray_at"))),
        "the IOMMU of the peer saw no fault there"
    );
    // QEMU's card does not mind, and sends zeros.
    wait_for("what the card sent", || Ok(tried["strays_sent"] == 0 || far.seen().blank == 1))?;
    ensure!(far.seen().strange == 0, "a frame from beyond was sent: {:?}", far.seen());
    owner.end(&mut testbed.owner)?;
    let lines = vf.end(&mut testbed.peer)?;
    let last = lines.last().context("no line of the driver's")?;
    println!("vf: {last}");
    ensure!(last["held_at_release"] == 0 && last["copied_bytes"] == 0);
    Ok(())
}

/// The card's other function takes it away: its kernel waits for the program that has it, which lets it go.
fn unplugged(testbed: &mut Testbed<'_>, vf: &str) -> Result<()> {
    let peer = &mut testbed.peer;
    let program = Program::start(peer, vf)?;
    program.wait_lines(peer, 1, COMMAND)?;
    let number = peer.sh_ok("echo /sys/bus/pci/devices/*/sriov_numvfs", COMMAND)?;
    peer.sh_ok(&format!("(echo 0 >{number}; echo done >/tmp/unplugged) >/dev/null 2>&1 &"), COMMAND)?;
    let gone = "for i in $(seq 200); do [ -e /tmp/unplugged ] && cat /tmp/vf.code && exit 0; sleep 0.1; done; exit 1";
    let output = peer.sh(gone, COMMAND)?;
    let said = program.messages(peer)?;
    ensure!(output.code == 0, "the kernel does not get the card back; the program wrote:\n{said}");
    let said = said.lines().last().context("no line of the driver's")?;
    println!("vf: {said}");
    ensure!(said.contains("the kernel wants the card back") && output.text.trim() != "0", "{said}");
    ensure!(peer.sh_ok(&format!("cat {number}"), COMMAND)? == "0");
    Ok(())
}

fn count(line: &Value, what: &str) -> u64 {
    line[what].as_u64().unwrap_or(0)
}

/// Waits until the card holds packets and gets rid of none.
fn stuck(guest: &mut Guest, program: &Program) -> Result<Value> {
    let deadline = Instant::now() + SOON;
    loop {
        let lines = program.lines(guest)?;
        if let [.., before, last] = lines.as_slice()
            && count(last, "lent_tx") > 0
            && before["tx_packets"] == last["tx_packets"]
        {
            return Ok(last.clone());
        }
        ensure!(Instant::now() < deadline, "the card gets rid of all that it is to send");
        std::thread::sleep(PAUSE);
    }
}

/// The program's first line of which this is true.
fn wait(guest: &mut Guest, program: &Program, what: &str, is: impl Fn(&Value) -> bool) -> Result<Value> {
    let deadline = Instant::now() + SOON;
    loop {
        let last = program.lines(guest)?.pop().unwrap_or_default();
        if is(&last) {
            return Ok(last);
        }
        ensure!(Instant::now() < deadline, "{what} do not come: {last}");
        std::thread::sleep(PAUSE);
    }
}

fn wait_for(what: &str, mut is: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !is()? {
        ensure!(Instant::now() < deadline, "waiting in vain for {what}");
        std::thread::sleep(PAUSE);
    }
    Ok(())
}
