//! What chains came to, and how it is printed.

use std::fmt::Write;

use anyhow::ensure;
use serde_json::{Value, json};

/// A VM on the way.
#[derive(Clone, Debug)]
pub struct Hop {
    /// What it runs.
    pub program: String,
    /// Its processor time.
    pub cpu_seconds: f64,
    /// Packets that it passed on.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes that it copied.
    pub copied_bytes: u64,
    /// Packets that it dropped.
    pub dropped: u64,
    /// Rings that it found broken.
    pub faults: u64,
    /// How often it slept.
    pub sleeps: u64,
    /// Notifications that were lost.
    pub rescued: u64,
}

impl Hop {
    fn per_cpu_second(&self) -> f64 {
        self.packets as f64 / self.cpu_seconds
    }
}

/// One chain.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// In the order of the packets.
    pub hops: Vec<Hop>,
    /// How long the source sent.
    pub seconds: f64,
    /// Packets that it sent.
    pub sent: u64,
    /// Packets that arrived at the end.
    pub received: u64,
    /// Those of them with a wrong byte, as far as they were looked at.
    pub corrupted: u64,
    /// Those that came out of order.
    pub reordered: u64,
    /// Every byte of each was looked at.
    pub checked: bool,
    /// Processor time of the broker meanwhile.
    pub broker_cpu_seconds: f64,
}

impl Measured {
    /// Packets that went through one hop in a second of processor time: of all hops together.
    fn per_cpu_second(&self) -> f64 {
        self.sent as f64 * self.hops.len() as f64 / self.hops.iter().map(|hop| hop.cpu_seconds).sum::<f64>()
    }

    fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.received)
    }

    /// What to say while others are measured.
    pub fn line(&self) -> String {
        format!(
            "{} hops: {:.2} M packets/s, {:.2} M packets through a hop in a second of processor time",
            self.hops.len(),
            self.sent as f64 / self.seconds / 1e6,
            self.per_cpu_second() / 1e6
        )
    }
}

/// All chains.
#[derive(Debug)]
pub struct Report {
    /// Length of each frame, bytes.
    pub size: usize,
    /// Entries of each ring.
    pub ring_size: u16,
    /// Packed ones.
    pub packed: bool,
    /// How hops waited.
    pub wait: String,
    /// By number of hops, as asked for.
    pub chains: Vec<Measured>,
}

impl Report {
    /// For people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{} B frames, {} rings of {}, --wait {}; packets per second of processor time, in millions\n\n\
             {:>4}  {:>9}  {:>8}  {:>8}  {:>12}  {:>6}  {:>6}  of each hop\n",
            self.size,
            if self.packed { "packed" } else { "split" },
            self.ring_size,
            self.wait,
            "hops",
            "packets/s",
            "a hop",
            "to first",
            "copied B/pkt",
            "lost",
            "broker"
        );
        let first = self.chains.first().map_or(1.0, Measured::per_cpu_second);
        for chain in &self.chains {
            let each: Vec<_> =
                chain.hops.iter().map(|hop| format!("{:.2}", hop.per_cpu_second() / 1e6)).collect();
            let copied: u64 = chain.hops.iter().map(|hop| hop.copied_bytes).sum();
            // Writing to a String does not fail.
            let _ = writeln!(
                text,
                "{:>4}  {:>9.2}  {:>8.2}  {:>8.2}  {:>12.1}  {:>6}  {:>5.1}%  {}",
                chain.hops.len(),
                chain.sent as f64 / chain.seconds / 1e6,
                chain.per_cpu_second() / 1e6,
                chain.per_cpu_second() / first,
                copied as f64 / chain.sent.max(1) as f64,
                chain.lost(),
                100.0 * chain.broker_cpu_seconds / chain.seconds,
                each.join(" ")
            );
        }
        text
    }

    /// For programs.
    pub fn object(&self) -> Value {
        let first = self.chains.first().map_or(1.0, Measured::per_cpu_second);
        let hop = |hop: &Hop| {
            json!({
                "program": hop.program,
                "cpu_seconds": hop.cpu_seconds,
                "packets": hop.packets,
                "packets_per_cpu_second": hop.per_cpu_second(),
                "copies_per_packet": hop.copied_bytes as f64 / hop.bytes.max(1) as f64,
                "dropped": hop.dropped,
                "faults": hop.faults,
                "sleeps": hop.sleeps,
                "rescued": hop.rescued,
            })
        };
        let chain = |chain: &Measured| {
            json!({
                "hops": chain.hops.len(),
                "seconds": chain.seconds,
                "sent": chain.sent,
                "received": chain.received,
                "lost": chain.lost(),
                "corrupted": chain.corrupted,
                "reordered": chain.reordered,
                "all_checked": chain.checked,
                "packets_per_second": chain.sent as f64 / chain.seconds,
                "packets_per_cpu_second_and_hop": chain.per_cpu_second(),
                "relative_to_first": chain.per_cpu_second() / first,
                "broker_cpu_seconds": chain.broker_cpu_seconds,
                "each_hop": chain.hops.iter().map(hop).collect::<Vec<_>>(),
            })
        };
        json!({
            "size": self.size,
            "ring_size": self.ring_size,
            "packed": self.packed,
            "wait": self.wait,
            "chains": self.chains.iter().map(chain).collect::<Vec<_>>(),
        })
    }

    /// Whether every packet arrived, whole, in order, and with the copies that it should take.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> anyhow::Result<()> {
        for chain in &self.chains {
            let hops = chain.hops.len();
            ensure!(
                chain.received == chain.sent,
                "{hops} hops: {} packets were sent, {} arrived",
                chain.sent,
                chain.received
            );
            ensure!(chain.corrupted == 0, "{hops} hops: {} packets with a wrong byte", chain.corrupted);
            ensure!(chain.reordered == 0, "{hops} hops: {} packets out of order", chain.reordered);
            for (hop, at) in chain.hops.iter().zip(1..) {
                // A peer copies each byte once, an owner none.
                let copies = if at % 2 == 1 { hop.bytes } else { 0 };
                ensure!(
                    hop.copied_bytes == copies,
                    "hop {at} of {hops}: {} bytes were copied of {}",
                    hop.copied_bytes,
                    hop.bytes
                );
                ensure!(
                    (hop.packets, hop.dropped, hop.faults, hop.rescued) == (chain.sent, 0, 0, 0),
                    "hop {at} of {hops}: {hop:?}"
                );
            }
        }
        Ok(())
    }
}
