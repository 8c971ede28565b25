//! Figures: what was measured, by batches, and what they come to.

/// Times, in microseconds, of some batches.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    batches: Vec<Vec<f64>>,
}

impl Samples {
    /// Begins a batch.
    pub fn begin(&mut self) {
        self.batches.push(Vec::new());
    }

    /// Adds to the batch.
    pub fn add(&mut self, times: Vec<f64>) {
        if let Some(batch) = self.batches.last_mut() {
            batch.extend(times);
        }
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.batches.iter().map(Vec::len).sum()
    }

    /// The time that this part of all does not exceed: 0 the least, 0.5 the median, 1 the most.
    /// NaN if there are none.
    pub fn quantile(&self, part: f64) -> f64 {
        quantile(self.batches.iter().flatten().copied().collect(), part)
    }

    /// How many times as long as `floor` this takes: the median of the batches' quotients of
    /// medians. What was measured in one batch was measured at about the same time.
    pub fn over(&self, floor: &Samples) -> f64 {
        let pairs = self.batches.iter().zip(&floor.batches);
        let quotient = |(one, other): (&Vec<f64>, &Vec<f64>)| median(one) / median(other);
        quantile(pairs.map(quotient).collect(), 0.5)
    }
}

fn median(values: &[f64]) -> f64 {
    quantile(values.to_vec(), 0.5)
}

fn quantile(mut values: Vec<f64>, part: f64) -> f64 {
    values.retain(|value| value.is_finite());
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values.get((last as f64 * part).round() as usize).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(batches: &[&[f64]]) -> Samples {
        Samples { batches: batches.iter().map(|batch| batch.to_vec()).collect() }
    }

    #[test]
    fn quantiles_are_over_all_batches() {
        let samples = samples(&[&[3.0, 1.0], &[2.0, f64::NAN]]);
        assert_eq!([0.0, 0.5, 1.0].map(|part| samples.quantile(part)), [1.0, 2.0, 3.0]);
        assert!(Samples::default().quantile(0.5).is_nan());
    }

    #[test]
    fn a_quotient_compares_what_was_measured_in_the_same_batch() {
        // A machine that became ten times slower in between.
        let (slow, fast) = (samples(&[&[2.0], &[20.0], &[2.0]]), samples(&[&[1.0], &[10.0], &[1.0]]));
        assert!((slow.over(&fast) - 2.0).abs() < 1e-9);
    }
}
