//! The figures as a picture: two panels a class, pairs and forwarders, a group of bars a packet
//! size, the best set-up of each kind of contender as a bar, whiskers from its slowest window to its
//! fastest, and what the hardware allows as lines. Plain SVG, on white, so that it can be read on a dark
//! page, too.

use std::fmt::Write;

use crate::contender::Kind;
use crate::floors;
use crate::probe::Class;
use crate::report::Row;

/// In pixels, as all lengths here.
const WIDTH: f64 = 800.0;
const LEFT: f64 = 48.0;
const RIGHT: f64 = 30.0;
/// Height of the bars' field, and what is above and below it in a panel.
const FIELD: f64 = 260.0;
const ABOVE: f64 = 54.0;
const BELOW: f64 = 50.0;
/// Lines of the legend.
const LEGEND_LINE: f64 = 22.0;
const LEGEND_COLUMN: f64 = 188.0;
const LEGEND_COLUMNS: usize = 4;
/// Between groups, and the widest bar.
const GAP: f64 = 34.0;
const BAR: f64 = 44.0;
/// Colours that can be told apart by everyone (Okabe and Ito).
const COLOURS: [&str; 7] = ["#0072b2", "#e69f00", "#d55e00", "#009e73", "#56b4e9", "#cc79a7", "#f0e442"];
const FLOOR_COLOUR: &str = "#333333";
/// Of numbers: a white rim, so that a line behind one does not cross it out.
const RIM: &str = "stroke=\"#ffffff\" stroke-width=\"4\" stroke-linejoin=\"round\" paint-order=\"stroke\"";

/// The picture.
pub fn svg(rows: &[Row]) -> String {
    let (floors, bars): (Vec<_>, Vec<_>) = rows.iter().partition(|row| row.kind == Kind::Floor);
    let kinds: Vec<_> =
        Kind::ALL.into_iter().filter(|kind| bars.iter().any(|row| row.kind == *kind)).collect();
    let mut sizes: Vec<_> = bars.iter().map(|row| row.size).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let best = |class: Class| {
        let of = |kind: Kind, size: usize| {
            let rows = bars.iter().filter(|row| (row.kind, row.size, row.class) == (kind, size, class));
            rows.copied().max_by(|one, other| one.median.total_cmp(&other.median))
        };
        kinds.iter().flat_map(|kind| sizes.iter().filter_map(|size| of(*kind, *size))).collect::<Vec<_>>()
    };
    // A class in which most were not measured compares nothing.
    let mut classes = Class::ALL.map(|class| (class, best(class))).to_vec();
    let most = classes.iter().map(|(_, bars)| bars.len()).max().unwrap_or(0);
    classes.retain(|(_, bars)| 2 * bars.len() > most);
    // Nor do windows during which the processors moved, if there are others.
    if classes.len() > 1 {
        classes.retain(|(class, _)| *class != Class::Mixed);
    }
    let legend = 20.0 + LEGEND_LINE * (kinds.len() + 1).div_ceil(LEGEND_COLUMNS) as f64;
    let mut panels = Vec::new();
    for (class, bars) in classes {
        for part in PARTS {
            let bars: Vec<_> = bars.iter().copied().filter(|row| (part.has)(row.kind)).collect();
            if !bars.is_empty() {
                panels.push((class, part, bars));
            }
        }
    }
    let height = legend + panels.len() as f64 * (ABOVE + FIELD + BELOW);
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\" \
         fill=\"#111111\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>"
    );
    draw_legend(&kinds, &mut text);
    for (nth, (class, part, bars)) in panels.into_iter().enumerate() {
        let top = legend + nth as f64 * (ABOVE + FIELD + BELOW) + ABOVE;
        let floors = floors.iter().copied().filter(|row| part.has_floor && row.class == class).collect();
        let kinds: Vec<_> = kinds.iter().copied().filter(|kind| (part.has)(*kind)).collect();
        Panel { top, class, part, bars, floors }.draw(&kinds, &sizes, &mut text);
    }
    text + "</svg>\n"
}

fn draw_legend(kinds: &[Kind], text: &mut String) {
    let place = |at: usize| {
        let (column, line) = (at % LEGEND_COLUMNS, at / LEGEND_COLUMNS);
        (LEFT + column as f64 * LEGEND_COLUMN, 16.0 + line as f64 * LEGEND_LINE)
    };
    for (at, kind) in kinds.iter().enumerate() {
        let (x, y) = place(at);
        let _ = writeln!(
            text,
            "<rect x=\"{x}\" y=\"{y}\" width=\"14\" height=\"14\" fill=\"{}\"/><text x=\"{}\" y=\"{}\">{}</text>",
            colour(*kind),
            x + 20.0,
            y + 12.0,
            kind.label()
        );
    }
    let (x, y) = place(kinds.len());
    let _ = writeln!(
        text,
        "<line x1=\"{x}\" x2=\"{}\" y1=\"{}\" y2=\"{}\" stroke=\"{FLOOR_COLOUR}\" stroke-width=\"2\" \
         stroke-dasharray=\"5 3\"/><text x=\"{}\" y=\"{}\">bare ring, with copies</text>",
        x + 14.0,
        y + 7.0,
        y + 7.0,
        x + 20.0,
        y + 12.0
    );
}

/// The same in each picture.
fn colour(kind: Kind) -> &'static str {
    let at = Kind::ALL.iter().position(|other| *other == kind);
    at.and_then(|at| COLOURS.get(at)).copied().unwrap_or(FLOOR_COLOUR)
}

/// What has a panel of its own.
#[derive(Clone, Copy)]
struct Part {
    title: &'static str,
    has: fn(Kind) -> bool,
    /// What a bare ring reaches is beside it.
    has_floor: bool,
}

const PARTS: [Part; 2] = [
    Part {
        title: "one sender, one receiver",
        has: |kind| !matches!(kind, Kind::OurSwitch | Kind::Switch),
        has_floor: true,
    },
    Part {
        title: "a forwarder, both ways together",
        has: |kind| matches!(kind, Kind::OurSwitch | Kind::Switch),
        has_floor: false,
    },
];

/// One class.
struct Panel<'a> {
    /// Of the bars' field.
    top: f64,
    class: Class,
    part: Part,
    bars: Vec<&'a Row>,
    floors: Vec<&'a Row>,
}

impl Panel<'_> {
    fn draw(&self, kinds: &[Kind], sizes: &[usize], text: &mut String) {
        let ring = |size: usize| {
            let rings = self.floors.iter().filter(|row| row.size == size && floors::is_ring(row.contender));
            rings.max_by(|one, other| one.median.total_cmp(&other.median))
        };
        let rings = sizes.iter().filter_map(|size| ring(*size)).map(|row| row.median);
        let highest = self.bars.iter().map(|row| row.max).chain(rings).fold(1.0, f64::max);
        let step = step(highest);
        let top_value = (highest / step).ceil() * step;
        let y = |value: f64| self.top + FIELD * (1.0 - value / top_value);
        let right = WIDTH - RIGHT;
        let _ = writeln!(
            text,
            "<text x=\"{LEFT}\" y=\"{}\" font-size=\"14\" font-weight=\"bold\">{}: million packets a \
             second; processors {} each other</text>",
            self.top - 30.0,
            self.part.title,
            match self.class {
                Class::Near => "near",
                Class::Middle => "neither near nor far from",
                Class::Far => "far from",
                Class::Mixed => "now near, now far from",
            }
        );
        for line in 0..=(top_value / step).round() as u32 {
            let value = f64::from(line) * step;
            let _ = writeln!(
                text,
                "<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{0:.1}\" y2=\"{0:.1}\" stroke=\"#dddddd\"/>\
                 <text x=\"{1}\" y=\"{2:.1}\" text-anchor=\"end\">{value}</text>",
                y(value),
                LEFT - 8.0,
                y(value) + 4.0
            );
        }
        let group = (right - LEFT) / sizes.len().max(1) as f64;
        let bar = ((group - GAP) / kinds.len().max(1) as f64).min(BAR);
        for (nth, size) in sizes.iter().enumerate() {
            let middle = LEFT + group * (nth as f64 + 0.5);
            let first = middle - bar * kinds.len() as f64 / 2.0;
            let _ = writeln!(
                text,
                "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-weight=\"bold\">{size} B</text>",
                self.top + FIELD + 22.0
            );
            if let Some(row) = ring(*size) {
                let (from, to) = (first - GAP / 3.0, first + bar * kinds.len() as f64 + GAP / 3.0);
                let _ = writeln!(
                    text,
                    "<line x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{0:.1}\" y2=\"{0:.1}\" stroke=\"{FLOOR_COLOUR}\" \
                     stroke-width=\"2\" stroke-dasharray=\"5 3\"/>\
                     <text x=\"{3:.1}\" y=\"{1:.1}\" text-anchor=\"start\" font-size=\"11\" {RIM}>{2:.1}</text>",
                    y(row.median),
                    y(row.median) + 4.0,
                    row.median,
                    to - 2.0
                );
            }
            for (at, kind) in kinds.iter().enumerate() {
                let row = self.bars.iter().find(|row| (row.size, row.kind) == (*size, *kind));
                if let Some(row) = row {
                    draw_bar(row, first + bar * at as f64, bar, colour(*kind), &y, text);
                }
            }
        }
    }
}

/// A bar, its whisker, and its number, which stands above both.
fn draw_bar(row: &Row, x: f64, width: f64, colour: &str, y: &dyn Fn(f64) -> f64, text: &mut String) {
    let (top, bottom, middle) = (y(row.median), y(0.0), x + width / 2.0);
    let (left, inner, height) = (x + 2.0, width - 4.0, bottom - top);
    let (low, high) = (y(row.min), y(row.max));
    let (from, to) = (middle - 5.0, middle + 5.0);
    let _ = writeln!(
        text,
        "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{inner:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>\
         <path d=\"M{middle:.1} {low:.1}V{high:.1}M{from:.1} {low:.1}H{to:.1}M{from:.1} {high:.1}H{to:.1}\" \
         stroke=\"#111111\" fill=\"none\"/>\
         <text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"11\" {RIM}>{:.1}</text>",
        high - 5.0,
        row.median
    );
}

/// Between two lines of the grid: 1, 2 or 5 times a power of ten, for 4 to 10 lines.
fn step(highest: f64) -> f64 {
    let power = 10_f64.powf((highest / 4.0).log10().floor());
    [5.0, 2.0, 1.0].iter().map(|factor| factor * power).find(|step| highest / step >= 4.0).unwrap_or(power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_between_four_and_ten_lines() {
        for highest in [1.0, 3.9, 4.0, 9.9, 27.0, 41.0, 99.0, 100.0, 397.0] {
            let lines = highest / step(highest);
            assert!((4.0..=10.0).contains(&lines), "{highest}: {lines}");
        }
    }
}
