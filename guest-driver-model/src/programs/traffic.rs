//! What a program has moved, and how it says so: once a second and at the end.

use std::io::Write;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::bridge::counters::PortReport;
use super::pattern::Checker;
use super::ping::{Pinged, RoundTrips};
use super::waiting::Sleeps;
use super::wire::Sent;
use crate::reach::Demand;

/// Counters since the program's start. Bytes are those of frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Packets sent to the other VM.
    pub tx_packets: u64,
    /// Packets received from it.
    pub rx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets that are missing among those received.
    pub lost: u64,
    /// Packets received after a later one, or twice.
    pub reordered: u64,
    /// Packets received with a wrong byte.
    pub corrupted: u64,
    /// Packets received of which every byte was looked at, these included.
    pub checked: u64,
    /// Packets dropped here: the other end of the program, or no buffer of the other
    /// VM, could take them.
    pub dropped: u64,
    /// Packets sent, or dropped when they were to be, that are to be cut: segments longer than one on
    /// a wire.
    pub tx_long: u64,
    /// The same of those received.
    pub rx_long: u64,
    /// Of those dropped: packets received with a header that cannot be theirs.
    pub bad_headers: u64,
    /// Bytes of frames that were copied, each time that they were, by who counts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copied_bytes: Option<u64>,
    /// Times that the other side broke a vring.
    pub faults: u64,
    /// Times that a link came up.
    pub links: u64,
    /// Ranges that the device was asked to map.
    pub maps_asked: u64,
    /// Buffers that the device fetched.
    pub fetched: u64,
    /// Their bytes.
    pub fetched_bytes: u64,
    /// Buffers that the device stored.
    pub stored: u64,
    /// Their bytes.
    pub stored_bytes: u64,
    /// Requests that the device could not carry out, and was asked again for.
    pub put_off: u64,
    /// Times that the mapping table was read because it had changed.
    pub table_reads: u64,
    /// Times that the program slept until notified.
    pub sleeps: u64,
    /// Of these, those that a notification, or other input, ended.
    pub notified: u64,
    /// Of these, those that the clock ended although there was work: a notification was
    /// lost.
    pub rescued: u64,
}

impl Traffic {
    /// These counters with what the checkers of the received packets found.
    pub fn judged_by(self, checkers: &[Checker]) -> Self {
        checkers.iter().map(Checker::verdict).fold(self, |sum, verdict| Self {
            lost: sum.lost + verdict.lost,
            reordered: sum.reordered + verdict.reordered,
            corrupted: sum.corrupted + verdict.corrupted,
            checked: sum.checked + verdict.intact + verdict.corrupted,
            ..sum
        })
    }

    /// These counters with what the device was asked for.
    pub fn with_demand(self, demand: Demand) -> Self {
        Self {
            maps_asked: demand.maps,
            fetched: demand.fetched,
            fetched_bytes: demand.fetched_bytes,
            stored: demand.stored,
            stored_bytes: demand.stored_bytes,
            put_off: demand.put_off,
            table_reads: demand.table_reads,
            ..self
        }
    }

    /// These counters with how the program slept.
    pub fn with_sleeps(self, sleeps: Sleeps) -> Self {
        Self { sleeps: sleeps.count, notified: sleeps.notified, rescued: sleeps.rescued, ..self }
    }

    /// Bytes copied for each packet that was sent, where that is counted.
    pub fn copied_per_packet(&self) -> Option<f64> {
        self.copied_bytes.map(|bytes| bytes as f64 / self.tx_packets.max(1) as f64)
    }

    /// The same, for the end of a line.
    fn copied(&self) -> String {
        self.copied_per_packet().map_or(String::new(), |bytes| format!("; {bytes:.1} bytes copied a packet"))
    }

    /// What was asked of the device, if anything: for the end of a line.
    fn demand(&self) -> String {
        if self.maps_asked + self.fetched + self.stored + self.put_off + self.table_reads == 0 {
            return String::new();
        }
        format!(
            "; maps asked {}, fetched {} ({} bytes), stored {} ({} bytes), put off {}, tables read {}",
            self.maps_asked,
            self.fetched,
            self.fetched_bytes,
            self.stored,
            self.stored_bytes,
            self.put_off,
            self.table_reads
        )
    }

    /// Counts what a ping moved.
    pub fn count_pinged(&mut self, pinged: Pinged) {
        self.tx_packets += pinged.sent as u64;
        self.tx_bytes += pinged.sent_bytes as u64;
        self.rx_packets += pinged.received as u64;
        self.rx_bytes += pinged.received_bytes as u64;
    }

    /// Counts what became of frames that were to be sent.
    pub fn count_sent(&mut self, sent: Sent) {
        self.tx_packets += (sent.done - sent.dropped) as u64;
        self.tx_bytes += sent.bytes;
        self.dropped += sent.dropped as u64;
    }
}

/// Whether and how to report.
#[derive(Clone, Debug, clap::Args)]
pub struct ReportArgs {
    /// Print a line with packet and bit rates once a second
    #[arg(long)]
    pub report: bool,
    /// Print one JSON object with all counters at the end
    #[arg(long)]
    pub json: bool,
    /// Print one JSON object with all counters (since the start) once a second, and at
    /// the end
    #[arg(long)]
    pub json_lines: bool,
    /// Between two of these lines
    #[arg(long, default_value_t = 1000, value_name = "MILLISECONDS")]
    pub report_every_ms: u64,
}

impl Default for ReportArgs {
    fn default() -> Self {
        Self { report: false, json: false, json_lines: false, report_every_ms: 1000 }
    }
}

/// Reports.
pub struct Reporter {
    args: ReportArgs,
    name: &'static str,
    /// When the first packet had passed.
    start: Option<Instant>,
    last: Instant,
    before: Traffic,
}

/// A JSON line.
#[derive(Serialize)]
struct Line<'a> {
    program: &'a str,
    /// Seconds since the first packet.
    seconds: f64,
    #[serde(flatten)]
    traffic: Traffic,
    #[serde(skip_serializing_if = "Option::is_none")]
    copied_per_packet: Option<f64>,
    /// The last line of the program.
    end: bool,
    #[serde(flatten)]
    more: More<'a>,
}

/// What only some programs have to say.
#[derive(Clone, Copy, Default, Serialize)]
struct More<'a> {
    /// How long packets took to come back.
    #[serde(skip_serializing_if = "Option::is_none")]
    round_trips: Option<&'a RoundTrips>,
    /// The ports of a bridge.
    #[serde(skip_serializing_if = "Option::is_none")]
    ports: Option<&'a [PortReport]>,
}

impl Reporter {
    /// A reporter for the program of this name.
    pub fn new(args: &ReportArgs, name: &'static str) -> Self {
        Self { args: args.clone(), name, start: None, last: Instant::now(), before: Traffic::default() }
    }

    /// To be called often. Returns how long ago the first packet passed or was dropped.
    pub fn tick(&mut self, traffic: &Traffic) -> Duration {
        self.tick_with(traffic, None)
    }

    /// The same of a bridge, of whose ports `ports` tells if that is wanted.
    pub fn tick_ports(&mut self, traffic: &Traffic, ports: impl FnOnce() -> Vec<PortReport>) -> Duration {
        let is_due = self.args.json_lines && self.is_due(Instant::now());
        let ports = is_due.then(ports);
        self.tick_with(traffic, ports.as_deref())
    }

    /// Whether it is time for the next line.
    fn is_due(&self, now: Instant) -> bool {
        now.duration_since(self.last) >= Duration::from_millis(self.args.report_every_ms)
    }

    fn tick_with(&mut self, traffic: &Traffic, ports: Option<&[PortReport]>) -> Duration {
        let now = Instant::now();
        let passed_or_dropped = traffic.tx_packets + traffic.rx_packets + traffic.dropped;
        if self.start.is_none() && passed_or_dropped > 0 {
            self.start = Some(now);
        }
        if self.is_due(now) {
            if self.args.report {
                self.print(&self.rates(traffic, now.duration_since(self.last)));
            }
            if self.args.json_lines {
                self.print_json(traffic, false, More { ports, ..More::default() });
            }
            self.last = now;
            self.before = *traffic;
        }
        self.start.map_or(Duration::ZERO, |start| now.duration_since(start))
    }

    /// The program ends.
    pub fn end(&self, traffic: &Traffic) {
        self.end_with(traffic, More::default());
    }

    /// The bridge ends, and this is what passed its ports.
    pub fn end_with_ports(&self, traffic: &Traffic, ports: &[PortReport]) {
        self.end_with(traffic, More { ports: Some(ports), ..More::default() });
    }

    /// The program ends, and this is how long its packets took to come back.
    pub fn end_with_round_trips(&self, traffic: &Traffic, round_trips: &RoundTrips) {
        self.end_with(traffic, More { round_trips: Some(round_trips), ..More::default() });
    }

    fn end_with(&self, traffic: &Traffic, more: More<'_>) {
        if self.args.json || self.args.json_lines {
            self.print_json(traffic, true, more);
        } else {
            self.print(&format!(
                "{}: sent {} packets, received {}; lost {}, reordered {}, corrupted {}, dropped {}, faults {}{}{}",
                self.name,
                traffic.tx_packets,
                traffic.rx_packets,
                traffic.lost,
                traffic.reordered,
                traffic.corrupted,
                traffic.dropped,
                traffic.faults,
                traffic.copied(),
                traffic.demand()
            ));
            if let Some(round_trips) = more.round_trips {
                self.print(&format!("{}: {}", self.name, round_trips.text()));
            }
            for port in more.ports.unwrap_or_default() {
                self.print(&format!("{}: {}", self.name, port.text()));
            }
        }
    }

    fn rates(&self, now: &Traffic, passed: Duration) -> String {
        let seconds = passed.as_secs_f64();
        let way =
            |packets: u64, bytes: u64| (packets as f64 / seconds / 1e6, bytes as f64 * 8.0 / seconds / 1e9);
        let before = &self.before;
        let (tx, tx_bits) = way(now.tx_packets - before.tx_packets, now.tx_bytes - before.tx_bytes);
        let (rx, rx_bits) = way(now.rx_packets - before.rx_packets, now.rx_bytes - before.rx_bytes);
        format!(
            "{}: tx {tx:.3} Mpps {tx_bits:.3} Gbit/s  rx {rx:.3} Mpps {rx_bits:.3} Gbit/s  lost {} corrupted {} dropped {}{}",
            self.name,
            now.lost,
            now.corrupted,
            now.dropped,
            now.demand()
        )
    }

    fn print_json(&self, traffic: &Traffic, end: bool, more: More<'_>) {
        let seconds = self.start.map_or(0.0, |start| start.elapsed().as_secs_f64());
        let copied_per_packet = traffic.copied_per_packet();
        let traffic = *traffic;
        let line = Line { program: self.name, seconds, traffic, copied_per_packet, end, more };
        if let Ok(text) = serde_json::to_string(&line) {
            self.print(&text);
        }
    }

    /// Whoever stops reading has seen enough: that is no reason to stop.
    fn print(&self, line: &str) {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_json_line_has_the_counters_at_its_top() {
        let traffic = Traffic { tx_packets: 3, corrupted: 1, ..Traffic::default() };
        let line = Line {
            program: "sink",
            seconds: 1.5,
            traffic,
            copied_per_packet: None,
            end: true,
            more: More::default(),
        };
        let value = serde_json::to_value(&line).unwrap();
        assert_eq!(value["tx_packets"], 3);
        assert_eq!(value["corrupted"], 1);
        assert_eq!(value["end"], true);
        assert!(value.get("copied_bytes").is_none(), "of who does not count them");
        let traffic = Traffic { tx_packets: 4, copied_bytes: Some(256), ..Traffic::default() };
        assert_eq!(serde_json::to_value(traffic).unwrap()["copied_bytes"], 256);
        assert_eq!(traffic.copied(), "; 64.0 bytes copied a packet");
    }

    #[test]
    fn what_the_device_was_asked_for_is_told_if_there_was_anything() {
        let traffic = Traffic { rx_packets: 3, ..Traffic::default() };
        assert_eq!(traffic.demand(), "");
        let demand = Demand { maps: 1, fetched: 2, fetched_bytes: 3, stored: 4, ..Demand::default() };
        let demand = Demand { stored_bytes: 5, put_off: 6, table_reads: 7, ..demand };
        let line = traffic.with_demand(demand).demand();
        assert_eq!(line, "; maps asked 1, fetched 2 (3 bytes), stored 4 (5 bytes), put off 6, tables read 7");
        let value = serde_json::to_value(traffic.with_demand(demand)).unwrap();
        assert_eq!(
            (&value["rx_packets"], &value["maps_asked"], &value["table_reads"]),
            (&3.into(), &1.into(), &7.into())
        );
    }

    #[test]
    fn time_counts_from_the_first_packet() {
        let mut reporter = Reporter::new(&ReportArgs::default(), "test");
        assert_eq!(reporter.tick(&Traffic::default()), Duration::ZERO);
        let one = Traffic { rx_packets: 1, ..Traffic::default() };
        assert_eq!(reporter.tick(&one), Duration::ZERO);
        std::thread::sleep(Duration::from_millis(2));
        assert!(reporter.tick(&one) >= Duration::from_millis(2));
    }
}
