//! How testpmd is started so that it needs neither hugepages nor a terminal, and what it says at
//! its end.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use vhost_pci_tests::Process;

use crate::cpu;
use crate::link::{Link, SOON};

/// Entries of each of testpmd's rings.
pub const RING: u64 = 1024;

/// What testpmd sends into the link.
pub enum Source {
    /// The packets of a capture file, once, none dropped.
    Pcap(PathBuf),
    /// The same, and what comes back is written to another capture file.
    Echoed { from: PathBuf, to: PathBuf },
    /// Its own IPv4/UDP packets of this length, as fast as it can; it drops what does not fit.
    Txonly(usize),
}

/// A running testpmd.
pub struct Testpmd(Process);

/// What it has forwarded, all ports together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Totals {
    pub received: u64,
    pub transmitted: u64,
    pub dropped: u64,
}

impl Testpmd {
    /// Starts it as the owner of the link. `options` are added to those of `net_virtio_user`.
    pub fn start(link: &Link, source: &Source, options: &str) -> Result<Self> {
        // Testpmd writes to a terminal or else into a buffer, which it loses when it is killed.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "dpdk-testpmd"]);
        // Where DPDK keeps its files, rather than in /var/run/dpdk for ever.
        command.env("RUNTIME_DIRECTORY", link.path(""));
        let cpu = cpu::of_testpmd()?;
        command.args(["--lcores", &format!("0@{cpu},1@{cpu}"), "--no-pci", "--no-telemetry"]);
        // Without hugepages DPDK's memory is one memfd, which it can share.
        command.args(["--no-huge", "-m", "256", "--file-prefix", "owner"]);
        match source {
            Source::Pcap(path) => {
                command.args(["--vdev", &format!("net_pcap0,rx_pcap={}", path.display())]);
            }
            Source::Echoed { from, to } => {
                let files = format!("rx_pcap={},tx_pcap={}", from.display(), to.display());
                command.args(["--vdev", &format!("net_pcap0,{files}")]);
            }
            Source::Txonly(_) => {}
        }
        // For `vectorized=1`, which does nothing without.
        command.arg("--force-max-simd-bitwidth=512");
        let socket = link.path("owner.sock");
        let virtio = format!("net_virtio_user0,path={},queue_size={RING}{options}", socket.display());
        command.args(["--vdev", &virtio, "--", "--nb-cores=1", "--total-num-mbufs=16384", "--no-mlockall"]);
        command.args([format!("--rxd={RING}"), format!("--txd={RING}")]);
        // A period makes it run until it is told to end, rather than until its input ends.
        command.args(["--stats-period", "3600"]);
        match source {
            Source::Pcap(_) | Source::Echoed { .. } => {
                let commands = link.path("testpmd.commands");
                // What does not fit is tried again for up to 20 s.
                fs::write(&commands, "set fwd io retry\nset burst tx delay 10 retry 2000000\n")?;
                command.arg("--cmdline-file").arg(commands);
                // Or it reads packets and throws them away before it begins.
                command.arg("--no-flush-rx");
            }
            Source::Txonly(len) => {
                command.args(["--forward-mode=txonly", &format!("--txpkts={len}")]);
            }
        }
        Ok(Self(Process::spawn("testpmd", command, &link.path("testpmd.log"))?))
    }

    /// Ends it in good order. Gives its totals.
    pub fn finish(mut self) -> Result<Totals> {
        // Its exit status depends on its version: some end by the signal after all is done.
        let status = self.0.terminate(SOON)?;
        let log = self.0.log();
        totals(&log).with_context(|| format!("testpmd ended ({status}) without its totals:\n{log}"))
    }
}

fn totals(log: &str) -> Option<Totals> {
    let (_, accumulated) = log.split_once("Accumulated forward statistics for all ports")?;
    let number = |name: &str| {
        let mut words = accumulated.split_whitespace().skip_while(|word| *word != name);
        words.nth(1)?.parse().ok()
    };
    Some(Totals {
        received: number("RX-packets:")?,
        transmitted: number("TX-packets:")?,
        dropped: number("TX-dropped:")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_those_of_all_ports() {
        let log = "
  ---------------------- Forward statistics for port 0  ----------------------
  RX-packets: 1              RX-dropped: 0             RX-total: 1
  TX-packets: 0              TX-dropped: 0             TX-total: 0
  ----------------------------------------------------------------------------

  +++++++++++++++ Accumulated forward statistics for all ports+++++++++++++++
  RX-packets: 107328         RX-dropped: 0             RX-total: 107328
  TX-packets: 107300         TX-dropped: 28            TX-total: 107328
  ++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++
";
        let expected = Totals { received: 107_328, transmitted: 107_300, dropped: 28 };
        assert_eq!(totals(log), Some(expected));
        assert_eq!(totals("Bye...\n"), None);
    }
}
