//! Numbers across runs, with their errors: of the measurement, and over the seeds.

use serde::Serialize;

use super::text::{digits, with_errors};

/// A number across several runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RunStatistics {
    /// The mean; NaN if the number of any run is not finite, or if there are no runs.
    pub mean: f64,
    /// The standard deviation, with the number of runs minus one as the divisor; none for a single run.
    pub deviation: Option<f64>,
    /// Half of the 95 % confidence interval of the mean, by Student's t distribution; none for a single run.
    pub interval: Option<f64>,
    /// The number of each run.
    pub values: Vec<f64>,
}

impl RunStatistics {
    pub(super) fn of(values: Vec<f64>) -> Self {
        let count = values.len() as f64;
        // 0/0 for no values, which is NaN as it should be.
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = (values.len() > 1).then(|| (squares / (count - 1.0)).sqrt());
        let interval = deviation.map(|deviation| student_t(values.len() - 1) * deviation / count.sqrt());
        Self { mean, deviation, interval, values }
    }

    /// Shares as percentages.
    pub(super) fn percent(&self) -> Self {
        Self::of(self.values.iter().map(|value| 100.0 * value).collect())
    }

    /// The standard error of the mean over seeds. A single run takes the deviation from `usual`.
    fn standard_error(&self, usual: Option<f64>) -> Option<f64> {
        self.deviation.or(usual).map(|deviation| deviation / (self.values.len() as f64).sqrt())
    }

    /// Why there is no mean.
    fn why_none(&self) -> Option<String> {
        let wild = self.values.iter().filter(|value| !value.is_finite()).count();
        match (self.values.len(), self.mean.is_finite()) {
            (0, _) => Some("–".into()),
            (_, true) => None,
            (1, _) => Some("not finite".into()),
            (count, _) => Some(format!("not finite in {wild} of {count}")),
        }
    }
}

impl std::fmt::Display for RunStatistics {
    /// Mean ± half of the interval.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.why_none(), self.interval) {
            (Some(reason), _) => f.write_str(&reason),
            (None, None) => f.write_str(&digits(self.mean)),
            (None, Some(interval)) => {
                let (mean, errors) = with_errors(self.mean, &[interval]);
                write!(f, "{mean} ± {}", errors.concat())
            }
        }
    }
}

/// How many standard errors the 95 % interval of a mean reaches to each side, by Student's t distribution with so many
/// degrees of freedom, at least one.
fn student_t(freedom: usize) -> f64 {
    // With t = √ν tan θ, the probability of |T| < t is a finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4).
    let within = |angle: f64| {
        let (sine, cosine) = angle.sin_cos();
        let odd = freedom % 2 == 1;
        let (mut term, mut sum) = if odd { (cosine, 0.0) } else { (1.0, 1.0) };
        if odd && freedom > 1 {
            sum = term;
        }
        let first = if odd { 3 } else { 2 };
        for k in (first..freedom.saturating_sub(1)).step_by(2) {
            term *= (k - 1) as f64 / k as f64 * cosine * cosine;
            sum += term;
        }
        if odd { (angle + sine * sum) / std::f64::consts::FRAC_PI_2 } else { sine * sum }
    };
    let (mut low, mut high) = (0.0, std::f64::consts::FRAC_PI_2);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if within(middle) < 0.95 { low = middle } else { high = middle }
    }
    (freedom as f64).sqrt() * low.tan()
}

/// A measured number of one run.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Measurement {
    pub value: f64,
    /// The standard error of a mean, or the residual of an eigenvalue, where it is known.
    pub error: Option<f64>,
    /// Whether it is within the tolerance that was requested.
    pub converged: bool,
}

impl Measurement {
    pub fn new(value: f64, error: Option<f64>) -> Self {
        Self { value, error: error.filter(|error| error.is_finite()), converged: true }
    }
}

/// A measured number across several runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct MeasuredStatistics {
    /// The numbers and their interval over seeds.
    #[serde(flatten)]
    pub runs: RunStatistics,
    /// The error of the measurement of one run, as the root of the mean square over the runs: the standard error of a
    /// mean over random probes, the residual of an eigenvalue. None where no run has one. Runs that are measured with
    /// the same probes share this error, so the mean over runs does not reduce it.
    pub measurement_error: Option<f64>,
    /// How many runs have eigenvalues whose residuals are above the tolerance.
    pub not_converged: usize,
}

impl MeasuredStatistics {
    pub(super) fn of(found: &[Measurement]) -> Self {
        let errors: Vec<f64> = found.iter().filter_map(|one| one.error).collect();
        let square = errors.iter().map(|error| error * error).sum::<f64>() / errors.len() as f64;
        Self {
            runs: RunStatistics::of(found.iter().map(|one| one.value).collect()),
            measurement_error: (!errors.is_empty()).then(|| square.sqrt()),
            not_converged: found.iter().filter(|one| !one.converged).count(),
        }
    }

    /// Mean and its error, of the measurement and over seeds together.
    pub(super) fn mean(&self) -> MeanError {
        let errors = [self.measurement_error, self.runs.standard_error(None)];
        let error = errors.into_iter().flatten().reduce(f64::hypot);
        MeanError { mean: self.runs.mean, error }
    }
}

impl std::fmt::Display for MeasuredStatistics {
    /// `86 ± 21, seeds ± 0.041`: the mean, the error of the measurement and the interval over seeds.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(reason) = self.runs.why_none() {
            return f.write_str(&reason);
        }
        let errors = [("± ", self.measurement_error), ("seeds ± ", self.runs.interval)];
        let errors: Vec<(&str, f64)> = errors.into_iter().filter_map(|(name, error)| Some((name, error?))).collect();
        let (mean, texts) = with_errors(self.runs.mean, &errors.iter().map(|(_, error)| *error).collect::<Vec<_>>());
        f.write_str(&mean)?;
        for (index, ((name, _), text)) in errors.iter().zip(texts).enumerate() {
            let gap = if index == 0 && *name == "± " { " " } else { ", " };
            write!(f, "{gap}{name}{text}")?;
        }
        match (self.not_converged, self.runs.values.len()) {
            (0, _) => Ok(()),
            (wild, count) if wild == count => write!(f, "; not within the tolerance"),
            (wild, count) => write!(f, "; {wild} of {count} not within the tolerance"),
        }
    }
}

/// A mean and its standard error, where it is known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct MeanError {
    pub mean: f64,
    pub error: Option<f64>,
}

impl MeanError {
    /// Whether two means differ by more than twice the error of their difference. None if an error is not known.
    pub fn is_apart_from(&self, other: &Self) -> Option<bool> {
        let error = self.error?.hypot(other.error?);
        Some((self.mean - other.mean).abs() > 2.0 * error)
    }
}

/// The means of several groups with their errors over seeds. A group of a single run counts as if its runs differed as
/// much as those of the other groups.
pub(super) fn means(statistics: &[RunStatistics]) -> Vec<MeanError> {
    let known: Vec<f64> = statistics.iter().filter_map(|of| of.deviation).filter(|of| of.is_finite()).collect();
    let square = known.iter().map(|deviation| deviation * deviation).sum::<f64>() / known.len() as f64;
    let usual = (!known.is_empty()).then(|| square.sqrt());
    statistics.iter().map(|of| MeanError { mean: of.mean, error: of.standard_error(usual) }).collect()
}

/// The best of several groups, if it is better than each other one by more than the error.
pub(super) fn best(means: &[MeanError], highest: bool) -> Option<usize> {
    let finite = || means.iter().enumerate().filter(|(_, of)| of.mean.is_finite());
    let key = |of: &MeanError| if highest { of.mean } else { -of.mean };
    let (best, first) = finite().max_by(|(_, a), (_, b)| key(a).total_cmp(&key(b)))?;
    let mut others = finite().filter(|(other, _)| *other != best).peekable();
    (others.peek().is_some() && others.all(|(_, other)| first.is_apart_from(other) == Some(true))).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_students_distribution() {
        // scipy.stats.t.ppf(0.975, freedom)
        for (freedom, expected) in [
            (1, 12.706204736),
            (2, 4.302652730),
            (3, 3.182446305),
            (4, 2.776445105),
            (5, 2.570581836),
            (9, 2.262157163),
            (10, 2.228138852),
            (29, 2.045229642),
            (1000, 1.962339081),
        ] {
            assert!((student_t(freedom) - expected).abs() < 1e-7, "{freedom}: {}", student_t(freedom));
        }
        let found = RunStatistics::of(vec![1.0, 2.0, 3.0, 4.0]);
        assert!((found.interval.unwrap() - 3.182446305 * (5.0f64 / 3.0).sqrt() / 2.0).abs() < 1e-8);
        assert_eq!(found.to_string(), "2.5 ± 2.1");
        assert_eq!(RunStatistics::of(vec![1.5]).interval, None);
    }
}
