//! What the two guests send each other while they are struck: datagrams that a program checks, and
//! one TCP connection each way after the other, by which a file goes that the other guest has, too.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use vhost_pci_tests::Guest;

use crate::testbed::COMMAND;

/// What a guest has received since its programs were started.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Received {
    /// Datagrams.
    pub received: u64,
    pub lost: u64,
    /// Later than a later one, or twice.
    pub reordered: u64,
    pub corrupted: u64,
    /// The longest time without one since [`begin`].
    pub gap_ms: u64,
    /// Files that came whole, with the right SHA-256.
    pub whole: u64,
    /// Files of which the first part came, and nothing else.
    pub cut: u64,
    /// Files that are none.
    pub wrong: u64,
    /// What the guest's kernel has dropped for its checksum.
    pub bad_checksums: u64,
}

impl Received {
    /// These and those of another guest, or of one that was.
    pub fn and(self, other: Self) -> Self {
        Self {
            received: self.received + other.received,
            lost: self.lost + other.lost,
            reordered: self.reordered + other.reordered,
            corrupted: self.corrupted + other.corrupted,
            gap_ms: self.gap_ms.max(other.gap_ms),
            whole: self.whole + other.whole,
            cut: self.cut + other.cut,
            wrong: self.wrong + other.wrong,
            bad_checksums: self.bad_checksums + other.bad_checksums,
        }
    }
}

/// The file: both guests have it, and nobody could make it up.
const FILE: &str = "/tmp/file";
const MAKE_FILE: &str = "tail -c 1000000 /bin/vhost-pci-guest >/tmp/file";
/// Takes connections, one after the other, and compares what came.
const TCP_IN: &str = r#"
want=$(sha256sum <FILE) total=$(wc -c <FILE) whole=0 cut=0 wrong=0
mkfifo /tmp/tcp.fifo
# The receiver's input must not end before the sender's, or nc hangs up at once.
exec 9<>/tmp/tcp.fifo
while :; do
    timeout 30 nc -l -p 5001 <&9 >/tmp/tcp.in 2>/dev/null
    size=$(wc -c </tmp/tcp.in)
    if [ "$size" = "$total" ] && [ "$(sha256sum </tmp/tcp.in)" = "$want" ]; then whole=$((whole + 1))
    elif [ "$size" = 0 ]; then continue
    elif [ "$size" -lt "$total" ] && head -c "$size" FILE | cmp -s - /tmp/tcp.in; then cut=$((cut + 1))
    else wrong=$((wrong + 1)); fi
    echo "{\"whole\":$whole,\"cut\":$cut,\"wrong\":$wrong}" >/tmp/tcp.new
    mv /tmp/tcp.new /tmp/tcp.json
done
"#;
/// Sends it, over and over.
const TCP_OUT: &str = "while :; do timeout 30 nc THERE 5001 <FILE >/dev/null 2>&1; sleep 0.2; done\n";

/// Starts both in a guest that has its network.
pub fn start(guest: &mut Guest, here: &str, there: &str) -> Result<()> {
    guest.sh_ok(MAKE_FILE, COMMAND)?;
    for (name, script) in [("in", TCP_IN), ("out", TCP_OUT)] {
        let script = script.replace("FILE", FILE).replace("THERE", there);
        let start = format!(
            "cat >/tmp/tcp-{name} <<'END'\n{script}END\nsh /tmp/tcp-{name} </dev/null >/tmp/tcp-{name}.log 2>&1 &"
        );
        guest.sh_ok(&start, COMMAND)?;
    }
    let datagrams = format!(
        "vhost-pci-guest datagrams --here {here}:6000 --there {there}:6000 --rate 400 --size 1000 \
         >/tmp/datagrams.json 2>/tmp/datagrams.log &\necho $! >/tmp/datagrams.pid"
    );
    guest.sh_ok(&datagrams, COMMAND).map(drop)
}

/// From now on the longest time without a datagram is looked for.
pub fn begin(guest: &mut Guest) -> Result<()> {
    guest.sh_ok("kill -USR1 $(cat /tmp/datagrams.pid)", COMMAND).map(drop)
}

/// What has come until now.
pub fn look(guest: &mut Guest) -> Result<Received> {
    // The last line may be half there.
    let command = "echo \"datagrams $(tail -n 2 /tmp/datagrams.json | head -n 1)\"\n\
                   echo \"files $(cat /tmp/tcp.json 2>/dev/null)\"\n\
                   awk '/^(Udp|Tcp):/ {if (at[$1]) n += $at[$1]\n\
                        else for (i = 1; i <= NF; i++) if ($i == \"InCsumErrors\") at[$1] = i}\n\
                        END {print \"checksums \" n + 0}' /proc/net/snmp";
    let text = guest.sh_ok(command, COMMAND)?;
    let part = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    let counts = |name: &str| match part(name) {
        // Nothing has come by then.
        "" => Ok(Received::default()),
        json => serde_json::from_str(json).with_context(|| format!("the guest counts: {text}")),
    };
    let (datagrams, files): (Received, Received) = (counts("datagrams")?, counts("files")?);
    let bad_checksums = part("checksums").parse().with_context(|| format!("the guest counts: {text}"))?;
    Ok(Received { bad_checksums, ..datagrams.and(files) })
}

/// Waits until more datagrams have come than that.
pub fn wait_for_more(guest: &mut Guest, than: Received, timeout: Duration) -> Result<Received> {
    wait(guest, timeout, "no datagram comes", |now| now.received > than.received)
}

/// Waits until another file has come whole.
pub fn wait_for_file(guest: &mut Guest, than: Received, timeout: Duration) -> Result<Received> {
    wait(guest, timeout, "no file comes whole", |now| now.whole > than.whole)
}

fn wait(guest: &mut Guest, most: Duration, what: &str, so: impl Fn(Received) -> bool) -> Result<Received> {
    let start = Instant::now();
    loop {
        let now = look(guest)?;
        if so(now) {
            return Ok(now);
        }
        if start.elapsed() > most {
            let log = guest.sh("cat /tmp/datagrams.log; ps | grep -c '[n]c '", COMMAND)?.text;
            bail!("{what} after {most:?}: {now:?}\n{log}");
        }
        ensure!(guest.qemu().exited()?.is_none(), "QEMU ended");
        std::thread::sleep(Duration::from_millis(50));
    }
}
