//! Figures: what was measured, by rounds, and what they come to.

use serde::Serialize;

/// One figure's measurements. Those of one round were made within milliseconds of
/// those of every other figure's same round, so that quotients of rounds mean something on a
/// machine whose speed changes.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    rounds: Vec<Vec<f64>>,
}

/// What measurements come to, in their unit.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Summary {
    /// How many.
    pub count: usize,
    /// The middle one.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The one that one in a thousand exceeds.
    pub p99_9: f64,
    /// The largest.
    pub max: f64,
}

impl Samples {
    /// Begins a round.
    pub fn begin_round(&mut self) {
        self.rounds.push(Vec::new());
    }

    /// Adds a measurement to the round.
    pub fn add(&mut self, value: f64) {
        if let Some(round) = self.rounds.last_mut() {
            round.push(value);
        }
    }

    /// All rounds together.
    pub fn summary(&self) -> Summary {
        Summary::of(self.rounds.iter().flatten().copied().collect())
    }

    /// By how much this is more than `floor`, round by round: of medians.
    pub fn over(&self, floor: &Samples) -> Summary {
        let pairs = self.rounds.iter().zip(&floor.rounds);
        Summary::of(pairs.map(|(round, floor)| median(round) / median(floor)).collect())
    }

    /// The sums of two figures' medians, a round each: a figure that is made of both.
    pub fn plus(&self, other: &Samples) -> Samples {
        let pairs = self.rounds.iter().zip(&other.rounds);
        Samples { rounds: pairs.map(|(one, other)| vec![median(one) + median(other)]).collect() }
    }
}

fn median(values: &[f64]) -> f64 {
    Summary::of(values.to_vec()).median
}

impl Summary {
    fn of(mut values: Vec<f64>) -> Self {
        values.retain(|value| value.is_finite());
        values.sort_by(f64::total_cmp);
        let count = values.len();
        // NaN where nothing was measured.
        let at = |place: usize| values.get(place).copied().unwrap_or(f64::NAN);
        let last = count.saturating_sub(1);
        let p99_9 = at((count as f64 * 0.999).ceil() as usize - usize::from(count > 0));
        Self { count, median: at(count / 2), min: at(0), p99_9, max: at(last) }
    }
}
