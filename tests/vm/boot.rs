//! Shows that the virtual machines themselves do what the other scenarios build on: boot, commands,
//! modules, files, reboot, and errors that say what went wrong.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vhost_pci_tests::{Guest, Sandbox};

use crate::Scenario;

pub const SCENARIO: Scenario = Scenario {
    name: "boot",
    shows: "two guests boot, one with an IOMMU, load modules, run commands; one reboots, one is killed",
    run,
};

const BOOT: Duration = Duration::from_secs(60);
const COMMAND: Duration = Duration::from_secs(20);

fn run(sandbox: &Sandbox) -> Result<()> {
    let given = sandbox.dir().join("given");
    fs::write(&given, "from the host\n")?;
    let modules = ["virtio_net", "tun", "vfio-pci"];
    let mut owner = sandbox.guest("owner").modules(modules).spawn()?;
    let mut peer = sandbox
        .guest("peer")
        .args(["-device", "intel-iommu,intremap=on"])
        .kernel_arg("intel_iommu=on")
        .modules(modules)
        .file("/etc/given/file", &given)
        .spawn()?;
    for (name, guest) in [("owner", &mut owner), ("peer", &mut peer)] {
        println!("{name}: ready {:.1} s after both were started", guest.wait_ready(BOOT)?.as_secs_f64());
        println!("{name}: {}", guest.sh_ok("echo $(hostname), $(uname -r), $(nproc) CPU", COMMAND)?);
        let loaded = guest.sh_ok("echo $(lsmod | cut -d ' ' -f 1)", COMMAND)?;
        println!("{name}: {loaded}");
        for module in modules {
            let module = module.replace('-', "_");
            ensure!(loaded.split(' ').any(|name| name == module), "{module} is not loaded");
        }
    }

    let groups = "ls /sys/kernel/iommu_groups | wc -l";
    let (without, with) = (owner.sh_ok(groups, COMMAND)?, peer.sh_ok(groups, COMMAND)?);
    println!("IOMMU groups: owner {without}, peer {with}");
    ensure!(without == "0" && with != "0", "only the peer should have an IOMMU");
    ensure!(peer.sh_ok("cat /etc/given/file", COMMAND)? == "from the host", "the file's content");

    commands_end_as_they_say(&mut owner)?;

    peer.sh_ok("touch /tmp/before; sleep 1000 >/dev/null 2>&1 &", COMMAND)?;
    println!("peer: rebooted in {:.1} s", peer.reboot(BOOT)?.as_secs_f64());
    let state = peer.sh_ok("echo $(ls /tmp) $(pidof sleep)", COMMAND)?;
    ensure!(state.is_empty(), "left from before the reboot: {state}");
    ensure!(peer.quit(COMMAND)?.success(), "QEMU should end in good order");

    owner.kill()?;
    let error = owner.sh("true", COMMAND).err().context("a killed guest answered")?;
    println!("a killed guest's error: {error:#}");
    Ok(())
}

fn commands_end_as_they_say(guest: &mut Guest) -> Result<()> {
    let several_lines = "for word in a 'b  c'; do\n  echo \"$word\"\ndone\nexit 3";
    let output = guest.sh(several_lines, COMMAND)?;
    ensure!(output.code == 3 && output.text == "a\nb  c\n", "{output:?}");

    let output = guest.sh("printf 'no newline'; kill -9 $$", COMMAND)?;
    ensure!(output.code == 137 && output.text == "no newline", "{output:?}");

    let bytes = guest.sh("head -c 100000 /dev/zero | tr '\\0' x; echo >&2", COMMAND)?.text.len();
    ensure!(bytes == 100_001, "{bytes} bytes instead of 100001");

    let error = guest.sh_ok("ls /nonesuch", COMMAND).err().context("it should fail")?;
    let error = format!("{error:#}");
    ensure!(
        error.contains("owner") && error.contains("`ls /nonesuch`") && error.contains("No such file"),
        "{error}"
    );

    let slow = guest.sh("sleep 1; echo late", Duration::from_millis(100));
    ensure!(slow.is_err(), "{slow:?}");
    ensure!(guest.sh_ok("echo next", COMMAND)? == "next", "the late answer was taken for the next one");
    Ok(())
}
