//! 64 MiB of TCP each way between the two guests' network stacks.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vhost_pci_tests::{Guest, Sandbox};

use crate::Scenario;
use crate::setup::Mode;
use crate::testbed::{COMMAND, OWNER, PEER, Testbed};

pub const SCENARIO: Scenario = Scenario {
    name: "tcp",
    shows: "64 MiB of TCP each way between two VMs' network stacks, SHA-256 equal, polling and with interrupts",
    run,
};

const BYTES: u64 = 64 << 20;
const TRANSFER: Duration = Duration::from_secs(120);

fn run(sandbox: &Sandbox) -> Result<()> {
    for mode in Mode::ALL {
        let mut testbed = Testbed::start(sandbox, mode)?;
        testbed.wait_for_traffic()?;
        let Testbed { owner, peer, .. } = &mut testbed;
        transfer(&format!("{}: owner to peer", mode.name()), owner, peer, PEER, BYTES)?;
        transfer(&format!("{}: peer to owner", mode.name()), peer, owner, OWNER, BYTES)?;
        testbed.check_broker()?;
    }
    Ok(())
}

/// Sends a file of random bytes; both ends work out its SHA-256.
pub fn transfer(what: &str, from: &mut Guest, to: &mut Guest, address: &str, bytes: u64) -> Result<()> {
    let make = format!("head -c {bytes} /dev/urandom >/tmp/out && sha256sum </tmp/out");
    let sent = from.sh_ok(&make, TRANSFER)?;
    // The receiver's input must not end before the sender's, or busybox's nc hangs up at once.
    let listen = "rm -f /tmp/fifo /tmp/sum; mkfifo /tmp/fifo\n\
        (exec 9<>/tmp/fifo; nc -l -p 5001 <&9 | sha256sum >/tmp/sum.new; mv /tmp/sum.new /tmp/sum) >/dev/null 2>&1 &\n\
        for i in $(seq 100); do netstat -ltn | grep -q :5001 && exit 0; sleep 0.1; done; exit 1";
    to.sh_ok(listen, COMMAND)?;
    let started = Instant::now();
    from.sh_ok(&format!("timeout {} nc {address} 5001 </tmp/out", TRANSFER.as_secs()), TRANSFER + COMMAND)?;
    let took = started.elapsed().as_secs_f64();
    let wait = "for i in $(seq 300); do [ -e /tmp/sum ] && break; sleep 0.1; done; cat /tmp/sum";
    let received = to.sh_ok(wait, TRANSFER)?;
    from.sh_ok("rm /tmp/out", COMMAND)?;
    let sum = |text: &str| text.split_whitespace().next().map(str::to_owned);
    let (sent, received) = (sum(&sent).context("no sum")?, sum(&received).context("no sum")?);
    ensure!(sent == received, "{what}: SHA-256 sent {sent}, received {received}");
    println!("{what}: {} KiB in {took:.1} s, SHA-256 equal: {}…", bytes >> 10, &sent[..16]);
    Ok(())
}
