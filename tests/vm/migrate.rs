//! The owner moves from one QEMU to another, ten times, while one TCP connection and checked datagrams go
//! on. What the peer's driver wrote and did not mark would stay behind with the old QEMU: so it is looked for where
//! nothing else would bring it. Full-sized datagrams that the owner's kernel has received and nobody has read
//! are pages which the peer alone has written; a program that is held from before the first copy of all memory until
//! the move is over reads them then, and the kernel checks each. (Nothing is asked of a guest while it moves: it would answer elsewhere.)
//!
//! That this is found is shown each time: at the end the peer's driver is one that leaves out marking
//! payload, and the test has to fail.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use vhost_pci_tests::{Guest, Sandbox};

use crate::setup::{Mode, Setup};
use crate::testbed::{COMMAND, OWNER, PEER, Testbed};
use crate::{Scenario, option};

pub const SCENARIO: Scenario = Scenario {
    name: "migrate",
    shows: "the owner moves between two QEMUs ten times under TCP and checked datagrams, a move is given up and one fails; \
            a driver that does not mark what it writes is found out",
    run,
};

/// What the scenario can be told, each with a value.
pub const OPTIONS: [&str; 1] = ["--break"];

const MOVES: u32 = 10;
/// How long a move may take.
const MOVE: Duration = Duration::from_secs(60);
/// How long traffic may take to go on.
const RESUME: Duration = Duration::from_secs(20);
/// Between two questions about a move.
const LOOK: Duration = Duration::from_millis(10);
/// Bytes that a program of the owner's writes all the time, so that there is always something to be copied.
const CHURN: u64 = 4_000_000;
/// Bytes a second.
const BANDWIDTH: u64 = 128 << 20;
/// The same of a move that is not to come to its end.
const SLOW: u64 = 8 << 20;
/// Bytes of datagrams that the owner's kernel keeps for a program that does not read: all of a move.
const KEPT: u64 = 32 << 20;
/// How long the guest may stand still for the last of it, milliseconds, when it is to come to its end: at first
/// not at all, so that what is written is copied again and again.
const DOWNTIME: u64 = 100;
/// Datagrams that come for the program that is held when all memory was copied once.
const HELD: u64 = 60;
/// The driver that leaves out marking one kind of write.
fn unlogged(kind: &str) -> String {
    format!("VHOST_PCI_UNLOGGED={kind} vhost-pci-guest")
}

/// Of `datagrams`, in a guest.
#[derive(Clone, Copy, Debug, Default, serde::Deserialize)]
#[serde(default)]
struct Datagrams {
    sent: u64,
    received: u64,
    reordered: u64,
    corrupted: u64,
    gap_ms: u64,
}

fn run(sandbox: &Sandbox) -> Result<()> {
    let broken = option("--break");
    // Packed rings: of split ones QEMU copies what a device writes to them by itself.
    let setup = Setup { owner_mib: 256, packed: true, ..Mode::Interrupt.into() };
    let mut bed = Testbed::boot(sandbox, setup)?;
    bed.start_owner_network()?;
    match &broken {
        Some(kind) => bed.start_peer_program(&unlogged(kind))?,
        None => bed.start_peer_network()?,
    }
    bed.wait_for_traffic()?;
    let mut move_by_move = Moves { bed, number: 0 };
    let result = move_by_move.all(broken.is_some());
    result.or_else(|error| move_by_move.bed.explain(&format!("{error:#}")))
}

struct Moves<'s> {
    bed: Testbed<'s>,
    /// QEMUs of the owner besides the first.
    number: u32,
}

/// How a move went.
struct Moved {
    /// As QEMU says.
    downtime_ms: u64,
    total_ms: u64,
    rounds: u64,
    /// The longest time without a datagram at the peer.
    gap_ms: u64,
    held: u64,
}

impl Moves<'_> {
    fn all(&mut self, is_broken: bool) -> Result<()> {
        self.refuses_to_move_the_peer()?;
        self.start_traffic()?;
        if !is_broken {
            self.given_up()?;
            self.fails()?;
        }
        for number in 1..=MOVES {
            let moved = self.go().with_context(|| format!("move {number}"))?;
            println!(
                "move {number:2}: downtime {:3} ms, {} ms in all, memory copied in {} rounds; {} ms without datagrams; {} held \
                 ones whole",
                moved.downtime_ms, moved.total_ms, moved.rounds, moved.gap_ms, moved.held
            );
        }
        self.end_traffic()?;
        let status = self.bed.status()?;
        let link = &status["links"][0];
        ensure!(link["counters"]["takeovers"] == MOVES, "takeovers: {}", link["counters"]["takeovers"]);
        ensure!(link["dirty_log"].is_null() && link["waiting_owner"].is_null(), "after all moves: {link}");
        self.bed.check_broker()?;
        self.finds_out()
    }

    /// What keeps the peer's VM from moving its VMM says when it is asked to.
    fn refuses_to_move_the_peer(&mut self) -> Result<()> {
        let uri = format!("unix:{}", self.bed.sandbox().dir().join("nowhere.sock").display());
        match self.bed.peer.qmp("migrate", &json!({"uri": uri})) {
            Ok(_) => bail!("the peer's QEMU takes an order to move its VM"),
            Err(error) => {
                let text = format!("{error:#}");
                let says = text.lines().next().unwrap_or_default().to_owned();
                ensure!(says.contains("non-migratable"), "the peer's QEMU says: {text}");
                println!("the peer is not moved: {says}");
                Ok(())
            }
        }
    }

    /// Datagrams both ways, more of them to the owner for the program that is held, and one TCP connection.
    fn start_traffic(&mut self) -> Result<()> {
        self.bed.owner.sh_ok(&format!("echo {KEPT} >/proc/sys/net/core/rmem_default"), COMMAND)?;
        // A frame as long as can be: its buffer has no room for what Linux writes beside shorter ones.
        for (guest, here, there) in [(&mut self.bed.owner, OWNER, PEER), (&mut self.bed.peer, PEER, OWNER)] {
            let start: String = [(6000, "datagrams", 200), (6001, "held", 150)]
                .map(|(port, name, rate)| {
                    format!(
                        "vhost-pci-guest datagrams --here {here}:{port} --there {there}:{port} --rate {rate} --size 1472 \
                         >/tmp/{name}.json 2>/tmp/{name}.log &\necho $! >/tmp/{name}.pid\n"
                    )
                })
                .concat();
            guest.sh_ok(&start, COMMAND)?;
            guest.sh_ok("tail -c 1000000 /bin/vhost-pci-guest >/tmp/file", COMMAND)?;
        }
        let listen = "mkfifo /tmp/tcp.fifo\n\
            (exec 9<>/tmp/tcp.fifo; nc -l -p 5001 <&9 | sha256sum >/tmp/sum.new; mv /tmp/sum.new /tmp/sum) >/dev/null 2>&1 &\n\
            for i in $(seq 100); do netstat -ltn | grep -q :5001 && exit 0; sleep 0.1; done; exit 1";
        self.bed.peer.sh_ok(listen, COMMAND)?;
        let send = format!(
            "(n=0; while [ ! -e /tmp/stop ]; do cat /tmp/file; n=$((n + 1)); echo $n >/tmp/files; sleep 0.3; done \
             | nc {PEER} 5001) >/dev/null 2>/tmp/nc.log &"
        );
        self.bed.owner.sh_ok(&send, COMMAND)?;
        let churn = format!(
            "(while :; do head -c {CHURN} /dev/zero >/tmp/churn; sleep 0.02; done) >/dev/null 2>&1 &"
        );
        self.bed.owner.sh_ok(&churn, COMMAND)?;
        self.flows()
    }

    /// The connection that was there from the first move to the last has carried what was sent.
    fn end_traffic(&mut self) -> Result<()> {
        self.bed.owner.sh_ok("touch /tmp/stop", COMMAND)?;
        let sum = "for i in $(seq 300); do [ -e /tmp/sum ] && break; sleep 0.1; done; cat /tmp/sum";
        let received = self.bed.peer.sh_ok(sum, COMMAND)?;
        let files = self.bed.owner.sh_ok("cat /tmp/files", COMMAND)?;
        let sent = format!("for i in $(seq {files}); do cat /tmp/file; done | sha256sum");
        let sent = self.bed.peer.sh_ok(&sent, COMMAND)?;
        ensure!(sent == received, "the TCP connection: SHA-256 sent {sent}, received {received}");
        println!("one TCP connection over all moves: {files} MB, SHA-256 equal: {}…", &sent[..16]);
        Ok(())
    }

    fn flows(&mut self) -> Result<()> {
        for (name, guest) in [("owner", &mut self.bed.owner), ("peer", &mut self.bed.peer)] {
            let before = datagrams(guest, "datagrams")?;
            wait(RESUME, || Ok(datagrams(guest, "datagrams")?.received > before.received + 20))
                .with_context(|| format!("datagrams to the {name}"))?;
        }
        Ok(())
    }

    fn wait_for_link(&mut self, logs: bool) -> Result<()> {
        wait(RESUME, || {
            let status = self.bed.status()?;
            let link = &status["links"][0];
            Ok(link["state"] == "up" && link["dirty_log"].is_null() != logs)
        })
        .context(if logs {
            "the link is not up with a log"
        } else {
            "the link is not up without a log"
        })
    }

    /// Begins to move the owner, at so many bytes a second.
    fn begin(&mut self, bandwidth: u64) -> Result<Guest> {
        self.number += 1;
        let socket = self.bed.sandbox().dir().join(format!("move-{}.sock", self.number));
        let uri = format!("unix:{}", socket.display());
        let mut destination = self.bed.spawn_destination(self.number, &uri)?;
        // It listens by then, and its card has greeted the broker.
        destination.qmp("query-status", &json!({}))?;
        let status = self.bed.status()?;
        ensure!(status["links"][0]["waiting_owner"]["state"] == "connected", "no VMM waits: {status}");
        let owner = &mut self.bed.owner;
        owner.qmp("migrate-set-parameters", &json!({"max-bandwidth": bandwidth, "downtime-limit": 0}))?;
        owner.qmp("migrate", &json!({"uri": uri}))?;
        Ok(destination)
    }

    fn go(&mut self) -> Result<Moved> {
        self.bed.peer.sh_ok("kill -USR1 $(cat /tmp/datagrams.pid)", COMMAND)?;
        self.hold(true)?;
        let before = datagrams(&mut self.bed.owner, "held")?;
        let mut destination = self.begin(BANDWIDTH)?;
        if self.copied_once()? {
            // Slower than memory is written.
            self.bed.owner.qmp("migrate-set-parameters", &json!({"max-bandwidth": SLOW / 4}))?;
            let sent = datagrams(&mut self.bed.peer, "held")?.sent;
            wait(RESUME, || Ok(datagrams(&mut self.bed.peer, "held")?.sent >= sent + HELD))?;
        }
        let last = json!({"downtime-limit": DOWNTIME, "max-bandwidth": BANDWIDTH});
        self.bed.owner.qmp("migrate-set-parameters", &last)?;
        let migration = self.ended()?;
        ensure!(migration["status"] == "completed", "it is {migration}");
        wait(MOVE, || Ok(destination.qmp("query-status", &json!({}))?["status"] == "running"))
            .context("the destination does not run")?;
        self.bed.owner.moved_to(destination);
        self.wait_for_link(false)?;
        let gap = datagrams(&mut self.bed.peer, "datagrams")?.gap_ms;
        self.hold(false)?;
        // More than can be new.
        wait(RESUME, || Ok(datagrams(&mut self.bed.owner, "held")?.received >= before.received + HELD))
            .context("the program that was held receives too little")?;
        let held = datagrams(&mut self.bed.owner, "held")?.received - before.received;
        self.flows()?;
        self.judge()?;
        Ok(Moved {
            downtime_ms: migration["downtime"].as_u64().context("no downtime")?,
            total_ms: migration["total-time"].as_u64().context("no time")?,
            rounds: rounds(&migration),
            gap_ms: gap,
            held,
        })
    }

    /// Waits until all memory was copied once. Whether the owner has not moved by then: for a moment there may have
    /// been nothing more to be copied.
    fn copied_once(&mut self) -> Result<bool> {
        let mut last = Value::Null;
        wait(MOVE, || {
            last = self.bed.owner.qmp("query-migrate", &json!({}))?;
            ensure!(last["status"] != "failed", "it is {last}");
            Ok(rounds(&last) >= 2 || last["status"] == "completed")
        })
        .context("all memory is not copied once")?;
        Ok(last["status"] == "active")
    }

    /// Holds the owner's program, or lets it go on.
    fn hold(&mut self, held: bool) -> Result<()> {
        let signal = if held { "STOP" } else { "CONT" };
        self.bed.owner.sh_ok(&format!("kill -{signal} $(cat /tmp/held.pid)"), COMMAND).map(drop)
    }

    fn ended(&mut self) -> Result<Value> {
        let mut last = Value::Null;
        wait(MOVE, || {
            last = self.bed.owner.qmp("query-migrate", &json!({}))?;
            Ok(["completed", "failed", "cancelled"].iter().any(|end| last["status"] == *end))
        })
        .context("it does not end")?;
        Ok(last)
    }

    /// Nothing came that was not sent.
    fn judge(&mut self) -> Result<()> {
        for (name, guest) in [("owner", &mut self.bed.owner), ("peer", &mut self.bed.peer)] {
            for flow in ["datagrams", "held"] {
                let Datagrams { reordered, corrupted, .. } = datagrams(guest, flow)?;
                ensure!(
                    (reordered, corrupted) == (0, 0),
                    "{flow} of the {name}: {reordered} twice or late, {corrupted} corrupted"
                );
            }
            let bad = guest.sh_ok(
                "awk '/^(Udp|Tcp):/ {if (at[$1]) n += $at[$1]\n\
                 else for (i = 1; i <= NF; i++) if ($i == \"InCsumErrors\") at[$1] = i}\n\
                 END {print n + 0}' /proc/net/snmp",
                COMMAND,
            )?;
            ensure!(bad == "0", "the {name}'s kernel has found {bad} packets with a wrong checksum");
        }
        Ok(())
    }

    /// The operator changes his mind.
    fn given_up(&mut self) -> Result<()> {
        let destination = self.begin(SLOW)?;
        self.wait_for_link(true)?;
        self.bed.owner.qmp("migrate_cancel", &json!({}))?;
        let migration = self.ended()?;
        ensure!(migration["status"] == "cancelled", "it is {migration}");
        drop(destination);
        self.goes_on("given up")
    }

    /// The destination dies.
    fn fails(&mut self) -> Result<()> {
        let mut destination = self.begin(SLOW)?;
        self.wait_for_link(true)?;
        destination.kill()?;
        let migration = self.ended()?;
        ensure!(migration["status"] == "failed", "it is {migration}");
        self.goes_on("failed, as its destination was killed")
    }

    fn goes_on(&mut self, what: &str) -> Result<()> {
        self.wait_for_link(false)?;
        self.flows()?;
        self.judge()?;
        let status = self.bed.status()?;
        ensure!(status["links"][0]["counters"]["takeovers"] == 0, "another has the link: {status}");
        println!("a move that is {what}: the link is up, without a log, and traffic goes on where it was");
        Ok(())
    }

    /// With a driver that does not mark payload all this fails.
    fn finds_out(&mut self) -> Result<()> {
        self.bed.peer.sh_ok("kill $(pidof vhost-pci-guest | tr ' ' '\\n' | sort -n | head -n 1); ip link del vp0 2>/dev/null; true", COMMAND)?;
        wait(RESUME, || Ok(self.bed.peer.sh("ip link show vp0", COMMAND)?.code != 0))
            .context("the interface stays")?;
        self.bed.start_peer_program(&unlogged("payload"))?;
        self.flows()?;
        self.judge()?;
        // A move that was too quick shows nothing.
        for _ in 0..3 {
            if let Err(failed) = self.go() {
                let Err(error) = self.judge() else {
                    return Err(failed.context("a move failed, and not for what was not marked"));
                };
                let text = format!("{error:#}");
                ensure!(text.contains("corrupted") || text.contains("wrong checksum"), "{text}");
                println!(
                    "a driver that does not mark payload is found out: {}",
                    text.lines().next().unwrap_or_default()
                );
                return Ok(());
            }
        }
        bail!("a driver that does not mark payload was not found out")
    }
}

fn rounds(migration: &Value) -> u64 {
    migration["ram"]["dirty-sync-count"].as_u64().unwrap_or(0)
}

fn datagrams(guest: &mut Guest, flow: &str) -> Result<Datagrams> {
    // The last line may be half there.
    let text = guest.sh_ok(&format!("tail -n 2 /tmp/{flow}.json | head -n 1"), COMMAND)?;
    if text.is_empty() {
        return Ok(Datagrams::default());
    }
    serde_json::from_str(&text).with_context(|| format!("{flow}: {text}"))
}

fn wait(most: Duration, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !is_so()? {
        ensure!(start.elapsed() < most, "not so after {most:?}");
        std::thread::sleep(LOOK);
    }
    Ok(())
}
