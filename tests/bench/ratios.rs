//! The ratios that have a target, by name. Medians of one run, within one class.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::contender::Kind;
use crate::probe::Class;
use crate::report::Row;

/// A ratio.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// None if one side was not measured in that class.
    value: Option<f64>,
    /// At least so much is wanted.
    target: f64,
    /// Whether it is.
    met: bool,
    /// Windows above and below the line.
    windows: [usize; 2],
}

impl Ratio {
    fn new(above: Option<&Row>, below: Option<&Row>, target: f64) -> Self {
        let value = above.zip(below).map(|(above, below)| above.median / below.median);
        let windows = [above, below].map(|row| row.map_or(0, |row| row.windows));
        Self { value, target, met: value.is_some_and(|value| value >= target), windows }
    }

    /// For people.
    pub fn text(&self) -> String {
        let Self { value, target, met, windows: [above, below] } = self;
        let Some(value) = value else { return format!("not measured (target {target})") };
        let verdict = if *met { "met" } else { "missed" };
        format!("{value:5.2}  target {target} {verdict} ({above} and {below} windows)")
    }
}

/// All of those that there are contenders for.
pub fn all(rows: &[Row]) -> BTreeMap<String, Ratio> {
    let at = |class: Class, size: usize, wanted: &dyn Fn(&Row) -> bool| {
        let rows = rows.iter().filter(|row| (row.class, row.size) == (class, size) && wanted(row));
        rows.max_by(|one, other| one.median.total_cmp(&other.median))
    };
    let of = |kind: Kind| move |row: &Row| row.kind == kind;
    let (ours, memif, vhost) = (of(Kind::Ours), of(Kind::Memif), of(Kind::Vhost));
    let peer = |row: &Row| matches!(row.kind, Kind::Memif | Kind::Vhost);
    let ring = |row: &Row| row.contender == "SPSC ring";
    let mut all = BTreeMap::new();
    let mut add =
        |name: String, class, size, above: &dyn Fn(&Row) -> bool, below: &dyn Fn(&Row) -> bool, target| {
            all.insert(name, Ratio::new(at(class, size, above), at(class, size, below), target));
        };
    add("near_64_copy_over_best_memif".into(), Class::Near, 64, &ours, &memif, 1.3);
    add("near_64_copy_over_best_vhost".into(), Class::Near, 64, &ours, &vhost, 2.0);
    add("near_1500_copy_over_best_memif".into(), Class::Near, 1500, &ours, &memif, 1.1);
    add("near_1500_copy_over_spsc_copy_floor".into(), Class::Near, 1500, &ours, &ring, 0.8);
    for size in [64, 1500] {
        add(format!("far_{size}_copy_over_best_peer"), Class::Far, size, &ours, &peer, 1.5);
    }
    // The sender is the packed one, whatever it could agree on with us.
    let packed = |row: &Row| row.contender == "vhost packed";
    for size in [64, 256, 1500] {
        let name = format!("near_{size}_same_sender_ours_over_vhost");
        add(name, Class::Near, size, &of(Kind::Mixed), &packed, 1.25);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(contender: &'static str, kind: Kind, class: Class, median: f64) -> Row {
        let (size, windows) = (64, 3);
        Row {
            contender,
            kind,
            order: 0,
            size,
            class,
            median,
            min: 0.0,
            max: 0.0,
            windows,
            gigabytes_per_second: 0.0,
        }
    }

    #[test]
    fn the_best_of_a_kind_is_compared_and_only_within_a_class() {
        let rows = [
            row("ours copy", Kind::Ours, Class::Near, 30.0),
            row("memif copy", Kind::Memif, Class::Near, 20.0),
            row("memif zero-copy", Kind::Memif, Class::Near, 10.0),
            row("memif zero-copy", Kind::Memif, Class::Far, 100.0),
        ];
        let all = all(&rows);
        let expected = Ratio { value: Some(1.5), target: 1.3, met: true, windows: [3, 3] };
        assert_eq!(all.get("near_64_copy_over_best_memif"), Some(&expected));
        let missing = all.get("far_64_copy_over_best_peer").and_then(|ratio| ratio.value);
        assert_eq!(missing, None);
    }
}
