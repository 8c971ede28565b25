//! What a bridge counts by port, and how it says so.

use serde::Serialize;

/// Why frames went nowhere: of a port where they came from, but for the last two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// Shorter than a frame's header, or from no address of a station, or with a header that cannot be theirs.
    pub bad: u64,
    /// To an address whose frames no bridge forwards.
    pub reserved: u64,
    /// More than may be flooded in a second.
    pub storm: u64,
    /// Come back from where their station is not, while it is held where it is.
    #[serde(rename = "loop")]
    pub looped: u64,
    /// No link of those that they were for is up, or it went while they were copied.
    pub no_link: u64,
    /// To this port, whose owner had no buffer for them.
    pub full: u64,
    /// To this port, none of whose owner's buffers could ever take them, or whose driver does not accept
    /// what their headers ask.
    pub refused: u64,
}

impl Dropped {
    /// All together.
    pub fn sum(&self) -> u64 {
        let Self { bad, reserved, storm, looped, no_link, full, refused } = *self;
        bad + reserved + storm + looped + no_link + full + refused
    }

    /// Those that there are, for a line.
    fn text(&self) -> String {
        let Self { bad, reserved, storm, looped, no_link, full, refused } = *self;
        let all = [
            ("bad", bad),
            ("reserved", reserved),
            ("storm", storm),
            ("loop", looped),
            ("no link", no_link),
            ("full", full),
            ("refused", refused),
        ];
        let there = all.iter().filter(|(_, count)| *count > 0);
        let texts: Vec<_> = there.map(|(name, count)| format!("{name} {count}")).collect();
        if texts.is_empty() { String::new() } else { format!(" ({})", texts.join(", ")) }
    }
}

/// What passed a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PortCounters {
    /// Packets that its owner sent.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Packets that its owner has got, copies included.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Packets that its owner sent and that were copied to all others.
    pub flooded: u64,
    /// Packets that its owner sent to a station behind the same port: they are there.
    pub filtered: u64,
    /// Stations that were learned here.
    pub learned: u64,
    /// Of these, those that came from another port.
    pub moved: u64,
    /// Frames of stations that were not learned, because the port's share of the table is used up.
    pub not_learned: u64,
    /// Packets that went nowhere.
    pub dropped: Dropped,
}

/// A port as it is told of.
#[derive(Clone, Debug, Serialize)]
pub struct PortReport {
    /// Its device.
    pub port: String,
    /// Whether its link is up.
    pub up: bool,
    /// Stations known behind it.
    pub stations: usize,
    /// What passed it.
    #[serde(flatten)]
    pub counters: PortCounters,
}

impl PortReport {
    /// A line.
    pub fn text(&self) -> String {
        let PortCounters { rx_packets, tx_packets, flooded, learned, moved, dropped, .. } = self.counters;
        format!(
            "port {}{}: in {rx_packets}, out {tx_packets}, flooded {flooded}, dropped {}{}; stations {}, learned {learned}, moved {moved}",
            self.port,
            if self.up { "" } else { " (down)" },
            dropped.sum(),
            dropped.text(),
            self.stations,
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_port_is_told_of_with_the_reasons_that_there_were() {
        let dropped = Dropped { looped: 2, full: 1, ..Dropped::default() };
        let counters = PortCounters { rx_packets: 9, tx_packets: 4, dropped, ..PortCounters::default() };
        let report = PortReport { port: "0000:00:03.0".to_owned(), up: false, stations: 1, counters };
        assert_eq!(
            report.text(),
            "port 0000:00:03.0 (down): in 9, out 4, flooded 0, dropped 3 (loop 2, full 1); stations 1, learned 0, moved 0"
        );
        let value = serde_json::to_value(&report).unwrap();
        assert_eq!((&value["rx_packets"], &value["dropped"]["loop"]), (&9.into(), &2.into()));
    }
}
