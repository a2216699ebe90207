//! Curvature of a network's loss over images: all measures, at any weights.

use std::sync::atomic::AtomicBool;

use super::images::{Assembly, Batch, DeviceImages};
use super::{Distribution, Finding, Findings, MeanOver, Measure, TrainError};
use crate::curvature::{Curvature, Eigenpair, Estimate, Rise};
use crate::data::{ImageShape, Images};
use crate::device::{self, Buffer, Device, Error, Slice};
use crate::kernels::batch_norm::Mode;
use crate::kernels::image::{BatchShape, Normalization};
use crate::objective::{Accumulator, Wrapped};
use crate::plan::{Network, Plan, PlanOptions, Shape};
use crate::settings::{Choice, Configurable};
use crate::{settings, words};

settings! {
    /// What to measure, and how closely.
    #[derive(Debug, Clone, PartialEq)]
    pub struct CurvatureSettings {
        /// What to measure
        measure: Vec<Measure> = vec![Measure::GradNorm, Measure::Trace, Measure::NormalizedTrace];
        /// Random directions for traces, spectrum and extrema
        probes: usize = 100, in at_least(1);
        /// How many eigenvalues
        top: usize = 5, as "K", in at_least(1);
        /// Lanczos steps for each probe of the spectrum, and at most so many for eigenvalues. For power iteration:
        /// products per eigenvalue
        steps: usize = 80, in at_least(1);
        /// Eigenvalues are found when no residual is more than this share of the largest
        tolerance: f64 = 1e-4, as "T", in not_negative;
        /// Radius for sharpness measures
        rho: f64 = 0.05, as "RHO", in positive;
        /// Steps of ascent for sharpness measures
        ascent_steps: usize = 20, in at_least(1);
        /// Seed of the random directions
        seed: u64 = 0;
    }
}

impl CurvatureSettings {
    /// Fails for a value out of its range and for values that contradict each other.
    ///
    /// # Errors
    /// [`TrainError::Setting`].
    pub fn check_combination(&self) -> Result<(), TrainError> {
        self.check()?;
        if self.measure.contains(&Measure::TopEigenvalues) && self.top > self.steps {
            return Err(TrainError::setting("top", format!("{}, expected at most `steps` {}", self.top, self.steps)));
        }
        if self.measure.contains(&Measure::HutchPlusPlus) && self.probes < 3 {
            return Err(TrainError::setting("probes", format!("{}, expected at least 3 for hutch++", self.probes)));
        }
        Ok(())
    }
}

words! {
    /// The statistics that batch norm normalises with.
    pub enum BatchNormName {
        /// Running statistics
        Eval = "eval",
        /// Each batch's statistics
        Train = "train",
    }
}

impl BatchNormName {
    /// The mode of the kernels.
    pub fn mode(self) -> Mode {
        match self {
            Self::Eval => Mode::Eval,
            Self::Train => Mode::Train,
        }
    }
}

/// A network and the images over which its mean loss is measured, in parts.
pub struct CurvatureMeter {
    plan: Plan<f32>,
    images: DeviceImages,
    shape: BatchShape,
    normalization: Normalization,
    /// 0, 1, 2, …: the index of every image, and the first ones again where they do not fill the last part.
    order: Buffer<u32>,
    accumulator: Accumulator<f32>,
}

impl CurvatureMeter {
    /// Plans the network for parts of `batch_size` of these images, which errors call `name`. The last part may have
    /// fewer. With [`Mode::Train`] each part is normalised with its own statistics, and all parts must be whole.
    ///
    /// # Errors
    /// [`TrainError::Setting`] if the images do not divide into parts that must be whole; a network that does not fit
    /// the images; too little memory on the device, or for pictures that stay in files, which are decoded here.
    pub fn new(
        device: &Device,
        network: Network<'_>,
        (name, images): (&str, &Images),
        normalization: Normalization,
        batch_size: usize,
        batch_norm: Mode,
    ) -> Result<Self, TrainError> {
        let (samples, batch) = (images.len(), batch_size.min(images.len()));
        if batch_norm == Mode::Train && !samples.is_multiple_of(batch) {
            let reason = format!("{batch}, expected a divisor of the {samples} images with `bn` train");
            return Err(TrainError::setting("batch-size", reason));
        }
        let ImageShape { height, width, channels } = images.shape;
        let shape = Shape { batch, height, width, channels };
        let (graph, logits) = network(shape, images.classes).map_err(TrainError::plan(name))?;
        let options = PlanOptions { batch_norm, ..PlanOptions::training() };
        let plan = Plan::new(device, graph, logits, options).map_err(TrainError::plan(name))?;
        let order: Vec<u32> = (0..samples.next_multiple_of(batch)).map(|index| (index % samples) as u32).collect();
        let shares = (0..samples).step_by(batch).map(|first| batch.min(samples - first) as f64 / samples as f64);
        Ok(Self {
            accumulator: Accumulator::weighted(device, plan.parameters().len(), shares.collect())?,
            plan,
            images: DeviceImages::all(device, images)?,
            shape: BatchShape { batch, height, width, channels },
            normalization,
            order: device.upload(&order)?,
        })
    }

    /// The default number of images per pass.
    pub const USUAL_PART: usize = 200;

    /// The most images that are used by default: 1,000, or for the approximation ratio 5,000, as in CR-SAM's section 3.
    pub fn usual_samples(measures: &[Measure]) -> usize {
        if measures.contains(&Measure::ApproximationRatio) { 5000 } else { 1000 }
    }

    /// The plan that it runs.
    pub fn plan(&self) -> &Plan<f32> {
        &self.plan
    }

    /// Calls `measure` with the mean loss over all images at these weights and running statistics, which have the
    /// lengths of the plan's layouts ([`Plan::parameters`], [`Plan::statistics_layout`]).
    ///
    /// # Errors
    /// Slices of another length or device; those of the measurement.
    pub fn at<R>(
        &mut self,
        weights: Slice<'_, f32>,
        statistics: Slice<'_, f32>,
        measure: impl FnOnce(&mut Curvature<'_, f32>) -> device::Result<R>,
    ) -> Result<R, TrainError> {
        self.at_until(&AtomicBool::new(false), weights, statistics, measure)
    }

    /// The same, and ends with [`Error::Stopped`] before the next pass over a part when `stop` is set.
    ///
    /// # Errors
    /// As [`CurvatureMeter::at`].
    pub fn at_until<R>(
        &mut self,
        stop: &AtomicBool,
        weights: Slice<'_, f32>,
        statistics: Slice<'_, f32>,
        measure: impl FnOnce(&mut Curvature<'_, f32>) -> device::Result<R>,
    ) -> Result<R, TrainError> {
        self.plan.set_statistics(statistics)?;
        let (pixels, labels) = self.images.views();
        let mut images = Wrapped(Batch {
            plan: &mut self.plan,
            shape: self.shape,
            pixels,
            labels,
            order: self.order.view(),
            samples: self.images.count,
            stop: Some(stop),
            clock: None,
            normalization: &self.normalization,
            assembly: &mut Assembly::Pass(None),
            mixer: None,
            draws: None,
        });
        let mut all = self.accumulator.over(&mut images);
        Ok(measure(&mut Curvature::new(&mut all, weights)?)?)
    }

    /// Calls `measure` with the loss of each part separately, and returns the results in the order of the parts. Ends
    /// as [`CurvatureMeter::at_until`] does.
    ///
    /// # Errors
    /// As [`CurvatureMeter::at`].
    fn at_each_part<R>(
        &mut self,
        stop: &AtomicBool,
        weights: Slice<'_, f32>,
        statistics: Slice<'_, f32>,
        mut measure: impl FnMut(&mut Curvature<'_, f32>) -> device::Result<R>,
    ) -> Result<Vec<R>, TrainError> {
        self.plan.set_statistics(statistics)?;
        let (pixels, labels) = self.images.views();
        let part = self.shape.batch;
        let found = (0..self.order.len() / part).map(|number| {
            let mut images = Wrapped(Batch {
                plan: &mut self.plan,
                shape: self.shape,
                pixels,
                labels,
                order: self.order.slice(number * part..(number + 1) * part)?,
                samples: part.min(self.images.count - number * part),
                stop: Some(stop),
                clock: None,
                normalization: &self.normalization,
                assembly: &mut Assembly::Pass(None),
                mixer: None,
                draws: None,
            });
            Ok(measure(&mut Curvature::new(&mut images, weights)?)?)
        });
        found.collect()
    }

    /// Takes these measures at these weights and running statistics. A measure that meets a number that is not finite
    /// gives [`Finding::NotFinite`], and the others continue. `progress` receives the measure, its steps done, and its
    /// number of steps.
    ///
    /// # Errors
    /// Slices of another length or device; failures of the device; [`Error::Stopped`] soon after `stop` is set.
    pub fn measure(
        &mut self,
        stop: &AtomicBool,
        weights: Slice<'_, f32>,
        statistics: Slice<'_, f32>,
        settings: &CurvatureSettings,
        progress: &mut dyn FnMut(Measure, usize, usize),
    ) -> Result<Findings, TrainError> {
        let tensors = self.plan.parameters().tensors();
        let tensors: Vec<_> = tensors.iter().map(|tensor| (tensor.name.clone(), tensor.range())).collect();
        let mut found =
            self.at_until(stop, weights, statistics, |curvature| measure(curvature, settings, &tensors, progress))?;
        let CurvatureSettings { rho, ascent_steps, seed, .. } = *settings;
        let wants = |measure: &Measure| settings.measure.contains(measure);
        let of_parts: Vec<Measure> =
            [Measure::MSharpness, Measure::ApproximationRatio].into_iter().filter(wants).collect();
        if of_parts.is_empty() {
            return Ok(found);
        }
        let (parts, mut done) = (self.order.len() / self.shape.batch, 0);
        let rises = self.at_each_part(stop, weights, statistics, |part| {
            let rise = part.rise(rho, ascent_steps, seed);
            done += 1;
            progress(of_parts[0], done, parts);
            found.passes.gradients += part.passes().gradients;
            found.losses += part.losses();
            rise
        });
        let rises = match rises {
            Err(TrainError::Device(Error::NotFinite { .. })) => {
                found.list.extend(of_parts.iter().map(|&measure| (measure, Finding::NotFinite)));
                return Ok(found);
            }
            rises => rises?,
        };
        for measure in of_parts {
            let ratios: Vec<f64> = rises.iter().filter_map(Rise::approximation_ratio).collect();
            let finding = match measure {
                Measure::MSharpness => {
                    let largest: Vec<f64> = rises.iter().map(|rise| rise.largest).collect();
                    Finding::Mean(Estimate::of(&largest), MeanOver::Parts)
                }
                _ if ratios.is_empty() => Finding::None("the loss does not rise".into()),
                _ => Finding::Ratio { mean: Estimate::of(&ratios), not_risen: rises.len() - ratios.len() },
            };
            found.list.push((measure, finding));
        }
        Ok(found)
    }
}

/// A number that is not finite, or a gradient of zero, leaves a measure without a result. Other errors are passed on.
fn settled<R>(found: device::Result<R>) -> device::Result<Result<R, Finding>> {
    match found {
        Ok(found) => Ok(Ok(found)),
        Err(Error::NotFinite { .. }) => Ok(Err(Finding::NotFinite)),
        Err(Error::ZeroGradient { .. }) => Ok(Err(Finding::None("the gradient is zero".into()))),
        Err(other) => Err(other),
    }
}

/// Takes the requested measures in a fixed order, except those of parts.
fn measure(
    curvature: &mut Curvature<'_, f32>,
    settings: &CurvatureSettings,
    tensors: &[(String, std::ops::Range<usize>)],
    progress: &mut dyn FnMut(Measure, usize, usize),
) -> device::Result<Findings> {
    let CurvatureSettings { probes, steps, seed, top, tolerance, rho, ascent_steps, .. } = *settings;
    let wants = |measure: Measure| settings.measure.contains(&measure);
    // Gradient norm and trace are also needed for the normalised trace.
    let either = |measure: Measure| wants(measure) || wants(Measure::NormalizedTrace);
    let norm = if either(Measure::GradNorm) { Some(settled(curvature.gradient_norm())?) } else { None };
    let trace = match either(Measure::Trace) {
        true => Some(settled(curvature.trace(probes, seed, |done| progress(Measure::Trace, done, probes)))?),
        false => None,
    };
    let mut list = Vec::new();
    for measure in Measure::ALL.iter().copied().filter(|&measure| wants(measure)) {
        let on =
            |of: usize| move |progress: &mut dyn FnMut(Measure, usize, usize), done: usize| progress(measure, done, of);
        let pairs = |pairs: Vec<Eigenpair<f32>>| {
            Finding::eigenvalues(pairs.iter().map(|pair| (pair.value, pair.residual)).collect(), settings)
        };
        let found = match measure {
            Measure::GradNorm => match &norm {
                Some(norm) => Ok(norm.clone().map_or_else(|failed| failed, Finding::Number)),
                None => continue,
            },
            Measure::Trace => match &trace {
                Some(trace) => {
                    Ok(trace.clone().map_or_else(|failed| failed, |trace| Finding::Mean(trace, MeanOver::Probes)))
                }
                None => continue,
            },
            Measure::NormalizedTrace => match (&norm, &trace) {
                (Some(Ok(norm)), Some(Ok(_))) if *norm == 0.0 => Ok(Finding::None("the gradient is zero".into())),
                (Some(Ok(norm)), Some(Ok(trace))) => Ok(Finding::Mean(trace.over(*norm), MeanOver::Probes)),
                (Some(Err(failed)), _) | (_, Some(Err(failed))) => Ok(failed.clone()),
                _ => continue,
            },
            Measure::HutchPlusPlus => {
                let on = on(probes);
                let trace = curvature.trace_hutch_plus_plus(probes, seed, |done| on(progress, done));
                trace.map(|trace| Finding::Mean(trace, MeanOver::Probes))
            }
            Measure::LayerTraces => {
                let (parts, on): (Vec<_>, _) = (tensors.iter().map(|(_, range)| range.clone()).collect(), on(probes));
                let names = tensors.iter().map(|(name, _)| name.clone());
                let traces = curvature.traces(&parts, probes, seed, |done| on(progress, done));
                traces.map(|traces| Finding::Layers(names.zip(traces).collect()))
            }
            Measure::Vhv => curvature.along_gradient().map(Finding::Number),
            Measure::VhvDifference => curvature
                .along_gradient_by_difference(rho)
                .map(|found| Finding::Rounded { value: found.value, rounding_error: found.rounding_error }),
            Measure::Sharpness => {
                let rise = curvature.rise(rho, ascent_steps, seed);
                rise.map(|rise| Finding::Rise { rise, rho, steps: ascent_steps })
            }
            Measure::Gnr => {
                let value = curvature.steepest(rho, ascent_steps, seed);
                value.map(|value| Finding::Steepest { value, rho, steps: ascent_steps })
            }
            Measure::Extrema => {
                let on = on(probes);
                let found = curvature.extrema(probes, (10, 0.01), seed, |done| on(progress, done));
                found.map(|found| Finding::Extrema {
                    minima: Distribution::of(&found.minima),
                    maxima: Distribution::of(&found.maxima),
                })
            }
            Measure::TopEigenvalues => {
                let on = on(steps);
                curvature.top_eigenvalues(top, (steps, tolerance), seed, |done| on(progress, done)).map(pairs)
            }
            Measure::PowerIteration => {
                let on = on(top.saturating_mul(steps));
                curvature.power_iteration(top, (steps, tolerance), seed, |done| on(progress, done)).map(pairs)
            }
            Measure::Spectrum => {
                let on = on(probes.saturating_mul(steps));
                curvature.spectral_density(probes, steps, seed, |done| on(progress, done)).map(Finding::Density)
            }
            Measure::MSharpness | Measure::ApproximationRatio => continue,
        };
        list.push((measure, settled(found)?.unwrap_or_else(|failed| failed)));
    }
    Ok(Findings { list, passes: curvature.passes(), losses: curvature.losses() })
}
