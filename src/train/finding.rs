//! What measures of curvature find, and how it is written to and read from JSON.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::options::to_json;
use super::{CurvatureSettings, MOST_FINDINGS, Measure, TrainError, if_there, read_text};
use crate::curvature::{Density, Estimate, Passes, Rise};
use crate::kernels::batch_norm::Mode;
use crate::settings::{Choice, Configurable};

/// What a mean is taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MeanOver {
    /// Random probes.
    Probes,
    /// Parts of the images.
    Parts,
}

/// What a measure found. Written to and read from JSON as an object that depends on the kind of finding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "Entry", into = "Entry")]
pub enum Finding {
    /// A number without a sampling error.
    Number(f64),
    /// A number that rounding may have moved.
    Rounded {
        /// The number.
        value: f64,
        /// By how much.
        rounding_error: f64,
    },
    /// A mean.
    Mean(Estimate, MeanOver),
    /// The mean share of the rise that one step finds, over the parts of the images whose loss rises.
    Ratio {
        /// The mean.
        mean: Estimate,
        /// The parts whose loss does not rise, which have no such share.
        not_risen: usize,
    },
    /// Nothing, for this reason.
    None(String),
    /// Nothing, because something was not finite.
    NotFinite,
    /// How far the loss rises within the radius.
    Rise {
        /// After one step and at most.
        rise: Rise,
        /// The radius.
        rho: f64,
        /// Steps of ascent.
        steps: usize,
    },
    /// The radius times the largest gradient norm within it.
    Steepest {
        /// That product.
        value: f64,
        /// The radius.
        rho: f64,
        /// Steps of ascent.
        steps: usize,
    },
    /// A mean over random probes for each tensor, by its name.
    Layers(Vec<(String, Estimate)>),
    /// Numbers of local minima and maxima along random lines.
    Extrema {
        /// Of minima.
        minima: Distribution,
        /// Of maxima.
        maxima: Distribution,
    },
    /// Eigenvalues, each with its residual.
    Eigenvalues {
        /// The largest first.
        pairs: Vec<(f64, f64)>,
        /// Whether as many were found as were requested, with residuals within the tolerance.
        converged: bool,
    },
    /// The density of the eigenvalues.
    Density(Density),
}

/// How often each count occurred.
#[derive(Debug, Clone, PartialEq)]
pub struct Distribution {
    /// The mean count.
    pub mean: Estimate,
    /// How many lines had 0, 1, 2, … of them.
    pub histogram: Vec<usize>,
}

impl Distribution {
    pub(super) fn of(counts: &[usize]) -> Self {
        let mut histogram = vec![0; counts.iter().max().map_or(0, |most| most + 1)];
        counts.iter().for_each(|&count| histogram[count] += 1);
        let counts: Vec<f64> = counts.iter().map(|&count| count as f64).collect();
        Self { mean: Estimate::of(&counts), histogram }
    }
}

impl Finding {
    /// The reason of [`Finding::NotFinite`].
    pub const NOT_FINITE: &str = "the loss or its derivatives at or around these weights are not finite";

    pub(super) fn eigenvalues(pairs: Vec<(f64, f64)>, settings: &CurvatureSettings) -> Self {
        let largest = pairs.iter().fold(0.0f64, |largest, (value, _)| largest.max(value.abs()));
        let within = pairs.iter().all(|(_, residual)| *residual <= settings.tolerance * largest);
        Self::Eigenvalues { converged: within && pairs.len() == settings.top, pairs }
    }

    /// λ1/λ5, a ratio that papers report, of eigenvalues in algebraic order. None if λ5 is negative, or zero within its
    /// residual, because the ratio then says nothing.
    pub fn first_over_fifth(pairs: &[(f64, f64)]) -> Option<f64> {
        let mut pairs = pairs.to_vec();
        pairs.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        let (fifth, residual) = *pairs.get(4)?;
        (fifth > 0.0 && (residual.is_nan() || fifth > residual))
            .then(|| pairs[0].0 / fifth)
            .filter(|ratio| ratio.is_finite())
    }

    /// Its main number: the value, the largest eigenvalue; none for other findings.
    pub fn value(&self) -> Option<f64> {
        match self {
            Self::Number(value) | Self::Rounded { value, .. } | Self::Steepest { value, .. } => Some(*value),
            Self::Mean(mean, _) | Self::Ratio { mean, .. } => Some(mean.value),
            Self::Rise { rise, .. } => Some(rise.largest),
            Self::Eigenvalues { pairs, .. } => pairs.first().map(|(value, _)| *value),
            Self::None(_) | Self::NotFinite | Self::Layers(_) | Self::Extrema { .. } | Self::Density(_) => None,
        }
    }

    /// Its numbers, each with its own name within the measure (often empty), and a standard error or residual if it has
    /// one. A density has no numbers.
    pub fn numbers(&self) -> Vec<(String, f64, Option<f64>)> {
        let of = |name: &str, estimate: &Estimate| (name.to_string(), estimate.value, estimate.standard_error);
        match self {
            Self::Number(value) | Self::Steepest { value, .. } => vec![(String::new(), *value, None)],
            Self::Rounded { value, rounding_error } => vec![(String::new(), *value, Some(*rounding_error))],
            Self::Mean(mean, _) | Self::Ratio { mean, .. } => vec![of("", mean)],
            Self::Rise { rise, .. } => {
                vec![(String::new(), rise.largest, None), ("one-step".into(), rise.one_step, None)]
            }
            Self::Layers(layers) => layers.iter().map(|(name, estimate)| of(name, estimate)).collect(),
            Self::Extrema { minima, maxima } => vec![of("minima", &minima.mean), of("maxima", &maxima.mean)],
            Self::Eigenvalues { pairs, .. } => {
                let numbered = pairs.iter().enumerate();
                numbered.map(|(index, (value, residual))| (format!("{}", index + 1), *value, Some(*residual))).collect()
            }
            Self::None(_) | Self::NotFinite | Self::Density(_) => Vec::new(),
        }
    }
}

/// A number in JSON, which has no numbers that are not finite: null stands for them.
#[derive(Clone, Copy, Serialize)]
struct Number(f64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Option::<f64>::deserialize(deserializer).map(|value| Self(value.unwrap_or(f64::NAN)))
    }
}

/// An estimate in JSON.
#[derive(Clone, Serialize, Deserialize)]
struct Sampled {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    histogram: Vec<usize>,
    #[serde(default)]
    standard_error: Option<f64>,
    value: Number,
}

impl Sampled {
    fn of(estimate: &Estimate) -> Self {
        Self { histogram: Vec::new(), standard_error: estimate.standard_error, value: Number(estimate.value) }
    }

    fn distribution(found: Distribution) -> Self {
        Self { histogram: found.histogram, ..Self::of(&found.mean) }
    }

    fn estimate(&self, probes: usize) -> Estimate {
        Estimate { value: self.value.0, standard_error: self.standard_error, probes }
    }
}

/// A finding in JSON. Which keys there are depends on its kind. The keys are in alphabetical order.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Entry {
    #[serde(skip_serializing_if = "Option::is_none")]
    ascent_steps: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    converged: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_over_fifth: Option<Number>,
    #[serde(skip_serializing_if = "Option::is_none")]
    layers: Option<BTreeMap<String, Sampled>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lines: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    maxima: Option<Sampled>,
    #[serde(skip_serializing_if = "Option::is_none")]
    minima: Option<Sampled>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nodes: Option<Vec<Number>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_risen: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    one_step: Option<Number>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parts: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    probes: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    residuals: Option<Vec<Number>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rho: Option<Number>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rounding_error: Option<Number>,
    #[serde(skip_serializing_if = "Option::is_none")]
    standard_error: Option<Number>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<Number>,
    #[serde(skip_serializing_if = "Option::is_none")]
    values: Option<Vec<Number>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weights: Option<Vec<Number>>,
}

impl From<Finding> for Entry {
    fn from(finding: Finding) -> Self {
        let number = |value: f64| Some(Number(value));
        let numbers = |values: &[f64]| Some(values.iter().copied().map(Number).collect());
        // Null stands for a value that is not there.
        let nothing = |reason: &str| Self { value: number(f64::NAN), reason: Some(reason.into()), ..Self::default() };
        match finding {
            Finding::Number(value) => Self { value: number(value), ..Self::default() },
            Finding::Rounded { value, rounding_error } => {
                Self { value: number(value), rounding_error: number(rounding_error), ..Self::default() }
            }
            Finding::Ratio { mean, not_risen } => {
                Self { not_risen: Some(not_risen), ..Finding::Mean(mean, MeanOver::Parts).into() }
            }
            Finding::Mean(Estimate { value, standard_error, probes: count }, over) => Self {
                value: number(value),
                standard_error: number(standard_error.unwrap_or(f64::NAN)),
                probes: (over == MeanOver::Probes).then_some(count),
                parts: (over == MeanOver::Parts).then_some(count),
                ..Self::default()
            },
            Finding::None(reason) => nothing(&reason),
            Finding::NotFinite => nothing(Finding::NOT_FINITE),
            Finding::Rise { rise: Rise { one_step, largest }, rho, steps } => Self {
                value: number(largest),
                one_step: number(one_step),
                ascent_steps: Some(steps),
                rho: number(rho),
                ..Self::default()
            },
            Finding::Steepest { value, rho, steps } => {
                Self { value: number(value), ascent_steps: Some(steps), rho: number(rho), ..Self::default() }
            }
            Finding::Layers(layers) => Self {
                probes: Some(layers.first().map_or(0, |(_, estimate)| estimate.probes)),
                layers: Some(layers.iter().map(|(name, estimate)| (name.clone(), Sampled::of(estimate))).collect()),
                ..Self::default()
            },
            Finding::Extrema { minima, maxima } => Self {
                lines: Some(minima.mean.probes),
                minima: Some(Sampled::distribution(minima)),
                maxima: Some(Sampled::distribution(maxima)),
                ..Self::default()
            },
            Finding::Eigenvalues { pairs, converged } => Self {
                values: Some(pairs.iter().map(|(value, _)| Number(*value)).collect()),
                residuals: Some(pairs.iter().map(|(_, residual)| Number(*residual)).collect()),
                first_over_fifth: number(Finding::first_over_fifth(&pairs).unwrap_or(f64::NAN)),
                converged: Some(converged),
                ..Self::default()
            },
            Finding::Density(Density { nodes, weights }) => {
                Self { nodes: numbers(&nodes), weights: numbers(&weights), ..Self::default() }
            }
        }
    }
}

impl From<Entry> for Finding {
    /// The kind of finding follows from the keys. A key that is missing counts as a number that is not known.
    fn from(entry: Entry) -> Self {
        let number = |value: Option<Number>| value.map_or(f64::NAN, |number| number.0);
        let numbers = |values: Option<Vec<Number>>| values.into_iter().flatten().map(|number| number.0).collect();
        let probes = entry.probes.or(entry.parts).unwrap_or_default();
        if let Some(layers) = entry.layers {
            let estimate = |(name, sampled): (String, Sampled)| (name, sampled.estimate(probes));
            return Self::Layers(layers.into_iter().map(estimate).collect());
        }
        if let (Some(minima), Some(maxima)) = (&entry.minima, &entry.maxima) {
            let lines = entry.lines.unwrap_or_default();
            let of = |sampled: &Sampled| Distribution {
                mean: sampled.estimate(lines),
                histogram: sampled.histogram.clone(),
            };
            return Self::Extrema { minima: of(minima), maxima: of(maxima) };
        }
        if let Some(values) = entry.values {
            let residuals = entry.residuals.into_iter().flatten().map(|number| number.0);
            let residuals = residuals.chain(std::iter::repeat(f64::NAN));
            let pairs = values.into_iter().map(|value| value.0).zip(residuals).collect();
            // Of a file that does not say so, nothing is known to be open.
            return Self::Eigenvalues { pairs, converged: entry.converged.unwrap_or(true) };
        }
        if entry.nodes.is_some() {
            return Self::Density(Density { nodes: numbers(entry.nodes), weights: numbers(entry.weights) });
        }
        let value = number(entry.value);
        if let Some(reason) = entry.reason {
            return if reason == Self::NOT_FINITE { Self::NotFinite } else { Self::None(reason) };
        }
        let (rho, steps) = (number(entry.rho), entry.ascent_steps.unwrap_or_default());
        if let Some(one_step) = entry.one_step {
            return Self::Rise { rise: Rise { one_step: one_step.0, largest: value }, rho, steps };
        }
        if entry.ascent_steps.is_some() {
            return Self::Steepest { value, rho, steps };
        }
        if entry.probes.is_some() || entry.parts.is_some() {
            let over = if entry.parts.is_some() { MeanOver::Parts } else { MeanOver::Probes };
            let standard_error = entry.standard_error.map(|error| error.0);
            let mean = Estimate { value, standard_error, probes };
            return match entry.not_risen {
                Some(not_risen) => Self::Ratio { mean, not_risen },
                None => Self::Mean(mean, over),
            };
        }
        if let Some(Number(rounding_error)) = entry.rounding_error {
            return Self::Rounded { value, rounding_error };
        }
        if value.is_nan() { Self::None("not known".into()) } else { Self::Number(value) }
    }
}

/// What was found, measure by measure.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Findings {
    /// In a fixed order, whatever the order in which they were requested.
    pub list: Vec<(Measure, Finding)>,
    /// How many gradients and products it took, over all of the images or over a part of them.
    pub passes: Passes,
    /// How many losses without their gradients.
    pub losses: u64,
}

impl Findings {
    /// By the names of the measures, as JSON has them.
    pub fn by_name(&self) -> BTreeMap<String, Finding> {
        self.list.iter().map(|(measure, finding)| (measure.to_string(), finding.clone())).collect()
    }
}

impl CurvatureFile {
    /// Reads `curvature.json`; none if there is no such file.
    ///
    /// # Errors
    /// The file; [`TrainError::Results`] for another content.
    pub fn read(path: &Path) -> Result<Option<Self>, TrainError> {
        let Some(text) = if_there(read_text(path, MOST_FINDINGS))? else { return Ok(None) };
        let unusable = |error: serde_json::Error| TrainError::Results { path: path.into(), reason: error.to_string() };
        serde_json::from_str(&text).map(Some).map_err(unusable)
    }

    /// What differs between how these measures would be taken and how those of another file were; none if they can
    /// stand in one. Of the settings, only those are compared that both some of these measures and some of the others
    /// use.
    pub fn difference(&self, measures: &[Measure], other: &Self) -> Option<String> {
        let differs = [
            ("weights", self.weights != other.weights),
            ("`split`", self.split != other.split),
            ("`samples`", self.samples != other.samples),
            ("images", self.images != other.images),
        ];
        let mine = |name: &str| measures.iter().any(|&measure| self.uses(measure, name));
        let differs_in = |name: &String| self.settings.get(name) != other.settings.get(name);
        let setting = || self.settings.keys().find(|name| differs_in(name) && mine(name) && other.used(name));
        let of_setting = || setting().map(|name| format!("`{}`", name.replace('_', "-")));
        differs.iter().find(|(_, differs)| *differs).map(|(name, _)| (*name).to_string()).or_else(of_setting)
    }

    /// Whether a measure depends on a setting. What is not known to be without effect counts as used.
    fn uses(&self, measure: Measure, setting: &str) -> bool {
        use Measure::*;
        match setting {
            "probes" => {
                matches!(measure, Trace | NormalizedTrace | HutchPlusPlus | LayerTraces | Extrema | Spectrum)
            }
            "steps" => matches!(measure, TopEigenvalues | PowerIteration | Spectrum),
            "top" | "tolerance" => matches!(measure, TopEigenvalues | PowerIteration),
            "rho" => matches!(measure, VhvDifference | Sharpness | MSharpness | ApproximationRatio | Gnr),
            "ascent_steps" => matches!(measure, Sharpness | MSharpness | ApproximationRatio | Gnr),
            "seed" => !matches!(measure, GradNorm | Vhv | VhvDifference),
            // The mean over all images does not depend on how they are divided, unless each part has its statistics.
            "batch_size" => self.has_batch_statistics() || matches!(measure, MSharpness | ApproximationRatio),
            _ => true,
        }
    }

    /// Whether a measure of this file depends on a setting.
    fn used(&self, setting: &str) -> bool {
        self.list().iter().any(|(measure, _)| self.uses(*measure, setting))
    }

    /// Takes over the findings of a file that these do not have, with the settings that they depend on, and counts its
    /// passes.
    pub fn add(&mut self, other: Self) {
        let known: Vec<String> = other.settings.keys().filter(|name| other.used(name)).cloned().collect();
        for name in known {
            self.settings.extend(other.settings.get(&name).map(|value| (name, value.clone())));
        }
        let measures = self.measures.get_or_insert_default();
        for (name, finding) in other.measures.into_iter().flatten() {
            measures.entry(name).or_insert(finding);
        }
        for (name, count) in other.passes {
            *self.passes.entry(name).or_default() += count;
        }
    }

    /// The findings in their fixed order, with their measures.
    pub fn list(&self) -> Vec<(Measure, Finding)> {
        let found = self.measures.iter().flatten();
        let mut list: Vec<_> = found.filter_map(|(name, found)| Some((name.parse().ok()?, found.clone()))).collect();
        list.sort_by_key(|(measure, _)| Measure::ALL.iter().position(|other| other == measure));
        list
    }
}

/// `curvature.json`: what was measured, over what, and how. A file that another program wrote needs `measures` alone.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct CurvatureFile {
    /// Run, model and data, for the title of a picture. Empty where they are not known.
    #[serde(default)]
    pub subject: String,
    /// Number of images.
    pub samples: Option<u64>,
    /// The split that they belong to.
    #[serde(default)]
    pub split: String,
    /// Gradients and products with the Hessian that it took.
    #[serde(default)]
    pub passes: BTreeMap<String, u64>,
    /// The checksum of the weights.
    pub weights: Option<String>,
    /// The checksum of the images and labels.
    #[serde(default)]
    pub images: Option<String>,
    /// How it was measured: [`CurvatureSettings`], the images per pass and the statistics of batch norm.
    #[serde(default)]
    pub settings: BTreeMap<String, serde_json::Value>,
    /// The findings by the names of the measures; `None` in a file that is something else.
    pub measures: Option<BTreeMap<String, Finding>>,
}

impl CurvatureFile {
    const BATCH_NORM: &str = "bn";

    /// The file of these findings over `samples` images of a split, in passes of `batch_size` images, with the
    /// checksums of weights and images.
    pub fn new(
        found: &Findings,
        settings: &CurvatureSettings,
        (samples, split): (usize, &str),
        (batch_size, batch_norm): (usize, Mode),
        [weights, images]: [String; 2],
    ) -> Self {
        let Passes { gradients, products } = found.passes;
        let options = CurvatureSettings::OPTIONS.iter().filter(|option| option.name != "measure");
        let value = |name| settings.get(name).map_or(serde_json::Value::Null, |value| to_json(&value));
        let mut all: BTreeMap<String, serde_json::Value> =
            options.map(|option| (option.name.replace('-', "_"), value(option.name))).collect();
        all.insert("batch_size".into(), batch_size.into());
        all.insert(Self::BATCH_NORM.into(), if batch_norm == Mode::Train { "train" } else { "eval" }.into());
        Self {
            subject: String::new(),
            samples: Some(samples as u64),
            split: split.into(),
            passes: [("gradients", gradients), ("losses", found.losses), ("products", products)]
                .map(|(name, count)| (name.to_string(), count))
                .into(),
            weights: Some(weights),
            images: Some(images),
            settings: all,
            measures: Some(found.by_name()),
        }
    }

    /// Whether batch norm used the statistics of each batch.
    pub fn has_batch_statistics(&self) -> bool {
        self.settings.get(Self::BATCH_NORM).and_then(serde_json::Value::as_str) == Some("train")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_to_the_fifth_eigenvalue_needs_a_positive_one() {
        let ratio = |fifth, residual| {
            let pairs = [(fifth, residual), (8.0, 0.1), (4.0, 0.1), (2.0, 0.1), (3.0, 0.1)];
            Finding::first_over_fifth(&pairs)
        };
        assert_eq!(ratio(1.0, 0.1), Some(8.0));
        assert_eq!(ratio(1.0, f64::NAN), Some(8.0), "a residual that is not known");
        for (fifth, residual) in [(-1.0, 0.1), (0.0, 0.0), (0.05, 0.1), (f64::NAN, 0.1), (1e-320, 0.0)] {
            assert_eq!(ratio(fifth, residual), None, "{fifth} ± {residual}");
        }
        assert_eq!(Finding::first_over_fifth(&[(4.0, 0.1)]), None);
    }

    fn estimate(value: f64, standard_error: Option<f64>, probes: usize) -> Estimate {
        Estimate { value, standard_error, probes }
    }

    #[test]
    fn a_finding_is_read_as_it_was_written() {
        let one = estimate(1.5, Some(0.25), 7);
        let findings = [
            (Finding::Number(-2.5), r#"{"value":-2.5}"#),
            (Finding::Mean(one, MeanOver::Probes), r#"{"probes":7,"standard_error":0.25,"value":1.5}"#),
            (
                Finding::Mean(estimate(2.0, None, 1), MeanOver::Parts),
                r#"{"parts":1,"standard_error":null,"value":2.0}"#,
            ),
            (Finding::Rounded { value: 3.0, rounding_error: 0.5 }, r#"{"rounding_error":0.5,"value":3.0}"#),
            (
                Finding::Ratio { mean: estimate(0.75, Some(0.25), 3), not_risen: 1 },
                r#"{"not_risen":1,"parts":3,"standard_error":0.25,"value":0.75}"#,
            ),
            (Finding::None("the gradient is zero".into()), r#"{"reason":"the gradient is zero","value":null}"#),
            (
                Finding::Rise { rise: Rise { one_step: 0.5, largest: 0.75 }, rho: 0.05, steps: 20 },
                r#"{"ascent_steps":20,"one_step":0.5,"rho":0.05,"value":0.75}"#,
            ),
            (Finding::Steepest { value: 0.125, rho: 0.05, steps: 3 }, r#"{"ascent_steps":3,"rho":0.05,"value":0.125}"#),
            (
                Finding::Layers(vec![("conv".into(), one), ("fc".into(), one)]),
                r#"{"layers":{"conv":{"standard_error":0.25,"value":1.5},"fc":{"standard_error":0.25,"value":1.5}},"probes":7}"#,
            ),
            (
                Finding::Extrema { minima: Distribution::of(&[0, 0]), maxima: Distribution::of(&[1, 3]) },
                r#"{"lines":2,"maxima":{"histogram":[0,1,0,1],"standard_error":1.0,"value":2.0},"minima":{"histogram":[2],"standard_error":0.0,"value":0.0}}"#,
            ),
            (
                Finding::Eigenvalues { pairs: vec![(4.0, 0.1), (2.0, 0.2)], converged: true },
                r#"{"converged":true,"first_over_fifth":null,"residuals":[0.1,0.2],"values":[4.0,2.0]}"#,
            ),
            (
                Finding::Density(Density { nodes: vec![-1.0, 2.0], weights: vec![0.25, 0.75] }),
                r#"{"nodes":[-1.0,2.0],"weights":[0.25,0.75]}"#,
            ),
        ];
        for (finding, text) in findings {
            assert_eq!(serde_json::to_string(&finding).unwrap(), text);
            assert_eq!(serde_json::from_str::<Finding>(text).unwrap(), finding);
        }
        let text = serde_json::to_string(&Finding::NotFinite).unwrap();
        assert!(text.contains("\"value\":null") && text.contains("not finite"), "{text}");
        assert_eq!(serde_json::from_str::<Finding>(&text).unwrap(), Finding::NotFinite);
    }

    #[test]
    fn the_ratio_of_eigenvalues_is_of_their_algebraic_order() {
        let pairs = |values: [f64; 5]| values.map(|value| (value, 0.01)).to_vec();
        assert_eq!(Finding::first_over_fifth(&pairs([-9.0, 8.0, 4.0, 2.0, 1.0])), None, "the fifth is negative");
        assert_eq!(Finding::first_over_fifth(&pairs([2.0, 8.0, 4.0, 3.0, 1.0])), Some(8.0));
        assert_eq!(Finding::first_over_fifth(&pairs([8.0, 4.0, 2.0, 1.0, 0.005])), None, "zero within its residual");
        assert_eq!(Finding::first_over_fifth(&pairs([8.0, 4.0, 2.0, 1.0, 0.5])[..4]), None);
    }
}
