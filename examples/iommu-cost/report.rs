//! What the figures are called, what each means, and with which floor it is compared; and
//! the two ways to print that.

use serde::Serialize;

use crate::cpu;
use crate::measure::{Figures, TABLES, table_name};
use crate::samples::Summary;

/// A figure.
#[derive(Debug, Serialize)]
pub struct Row {
    name: String,
    unit: &'static str,
    means: String,
    #[serde(flatten)]
    summary: Summary,
    ratios: Vec<Ratio>,
}

/// A figure as a multiple of its floor, of rounds' medians.
#[derive(Debug, Serialize)]
pub struct Ratio {
    over: String,
    #[serde(flatten)]
    summary: Summary,
}

/// Everything that is printed.
#[derive(Debug, Serialize)]
pub struct Report {
    machine: Machine,
    rounds: usize,
    shown: u64,
    /// Host's side and guest's side have a processor each.
    pinned: bool,
    seconds: f64,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Machine {
    processors: usize,
    model: String,
    kernel: String,
    /// Processes that could run, on average of a minute, when the measurement ended.
    load: f64,
}

const MICROSECONDS: &str = "us";
const NANOSECONDS: &str = "ns";

/// Floors, in the order in which they build on each other.
const FLOORS: [(&str, &str); 11] = [
    ("floor.map", "mmap(MAP_FIXED) of a file's page, nothing else"),
    ("floor.unmap", "mmap(MAP_FIXED) of nothing over it"),
    ("floor.unmap_used", "the same while a thread uses the page"),
    ("floor.socket", "Unix socket, 20 bytes there and back, two processes"),
    ("floor.socket_used", "the same while a thread of the other process uses a page"),
    ("floor.middle", "the same through a third process: A-B-C-B-A"),
    ("floor.middle_unmap", "A-B-C-B-A, and C unmaps a page before it answers"),
    ("floor.middle_unmap_used", "the same while a thread of C uses the page"),
    ("floor.middle_twice", "A-B-C-B-C-B-A, and C unmaps a page before it answers first"),
    ("floor.middle_twice_used", "the same while a thread of C uses the page"),
    (
        "floor.doorbell_map",
        "C: eventfd to B, B: socket with a descriptor to C, C: mmap, answer to B, B: word in shared memory that C polls",
    ),
];

/// Operations of a link: name, meaning, and floors, of which some are sums.
const OPERATIONS: [(&str, &str, &[&[&str]]); 4] = [
    ("push", "owner maps a page in its IOMMU, nothing is shown: message and answer", &[&["floor.socket"]]),
    (
        "map",
        "peer asks for a page that the owner has mapped: doorbell to answer seen",
        &[&["floor.doorbell_map"], &["floor.map", "floor.socket"]],
    ),
    (
        "unmap",
        "owner unmaps a page that is mapped in the window: message to answer",
        &[&["floor.middle_unmap"], &["floor.unmap", "floor.socket"]],
    ),
    (
        "revoke",
        "the same while a thread of the peer uses the page",
        &[&["floor.middle_unmap_used"], &["floor.unmap_used", "floor.socket_used"]],
    ),
];

impl Report {
    /// From the figures of so many rounds, with so many pages shown besides.
    pub fn new(figures: &Figures, rounds: usize, shown: u64, seconds: f64) -> Self {
        let mut rows = Vec::new();
        for table in TABLES {
            let load = table_name("load", table);
            let far = if table.1 { ", half of them far away" } else { "" };
            for (what, means, floors) in [
                ("load", "a dependent load at random from an array as large as the mappings", &[][..]),
                ("hit", "translation, range hit last", &[][..]),
                ("random", "translation at random", &[&[load.as_str()][..]][..]),
                ("chained", "the same, the next address depends on the result", &[&[load.as_str()][..]][..]),
            ] {
                let means = format!("{means} ({} mappings{far})", table.0);
                rows.extend(row(figures, &table_name(what, table), NANOSECONDS, means, floors));
            }
        }
        for (name, means) in FLOORS {
            rows.extend(row(figures, name, MICROSECONDS, means.into(), &[]));
        }
        for (link, vmm) in [("strict", "strict VMM"), ("qemu", "VMM like QEMU")] {
            for (name, means, floors) in OPERATIONS {
                let means = format!("{vmm}: {means}");
                // A VMM that is not strict has to be asked again when it has answered.
                let again: &[&[&str]] = match (link, name) {
                    ("qemu", "unmap") => &[&["floor.middle_twice"], &["floor.unmap", "floor.socket"]],
                    ("qemu", "revoke") => {
                        &[&["floor.middle_twice_used"], &["floor.unmap_used", "floor.socket_used"]]
                    }
                    _ => floors,
                };
                rows.extend(row(figures, &format!("{link}.{name}"), MICROSECONDS, means, again));
            }
        }
        Self { machine: Machine::this(), rounds, shown, pinned: cpu::kept().is_some(), seconds, rows }
    }

    /// For people.
    pub fn table(&self) -> String {
        let machine = &self.machine;
        let mut text = format!(
            "{} x {}, Linux {}, load {:.1}; {} rounds, {:.0} s; {} other pages in the window; {}\n\n\
             {:<26} {:>9} {:>9} {:>9} {:>9}     times the floor (least to most of rounds)\n",
            machine.processors,
            machine.model,
            machine.kernel,
            machine.load,
            self.rounds,
            self.seconds,
            self.shown,
            if self.pinned {
                "host's side and guest's side have a processor each"
            } else {
                "threads run anywhere"
            },
            "",
            "median",
            "least",
            "99.9 %",
            "most"
        );
        for row in &self.rows {
            let Summary { median, min, p99_9, max, .. } = row.summary;
            text +=
                &format!("{:<26} {median:>9.2} {min:>9.2} {p99_9:>9.1} {max:>9.1} {}", row.name, row.unit);
            for (index, Ratio { over, summary }) in row.ratios.iter().enumerate() {
                let Summary { median, min, max, .. } = summary;
                let gap = if index == 0 { "  " } else { "; " };
                text += &format!("{gap}{median:.2} x {over} ({min:.2} to {max:.2})");
            }
            text += "\n";
        }
        text += "\nWhat they are:\n";
        for row in &self.rows {
            text += &format!("{:<26} {}\n", row.name, row.means);
        }
        text
    }
}

fn row(figures: &Figures, name: &str, unit: &'static str, means: String, floors: &[&[&str]]) -> Option<Row> {
    let samples = figures.named(name)?;
    let mut ratios = Vec::new();
    for parts in floors {
        let mut parts_of = parts.iter().filter_map(|part| figures.named(part));
        let first = parts_of.next()?.clone();
        let whole = parts_of.fold(first, |sum, part| sum.plus(part));
        ratios.push(Ratio { over: parts.join(" + "), summary: samples.over(&whole) });
    }
    Some(Row { name: name.into(), unit, means, summary: samples.summary(), ratios })
}

impl Machine {
    fn this() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo");
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            processors: cpu.lines().filter(|line| line.starts_with("processor")).count(),
            model: model.map_or("unknown", |(_, model)| model).trim().into(),
            kernel: read("/proc/sys/kernel/osrelease").trim().into(),
            load: read("/proc/loadavg").split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
        }
    }
}
