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
