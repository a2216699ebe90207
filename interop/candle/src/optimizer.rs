//! The optimizer of a list of variables.

use candle_core::{DType, Tensor, Var};
use candle_nn::VarMap;
use polder::device::Buffer;
use polder::optim::{self, Base, METHODS, Settings};
use polder::settings::SettingError;

use crate::error::{Error, Result};
use crate::loss::{Loss, Parameter};
use crate::tensor::{self, Weight};

/// The variables of a map in the order of their names, without batch norm's running statistics.
///
/// `VarMap::all_vars` has another order in every process. Sums over all weights then differ in their last bits, so a
/// run would not repeat.
///
/// # Errors
/// [`Error::Poisoned`].
pub fn trainable(map: &VarMap) -> Result<Vec<Var>> {
    let map = map.data().lock().map_err(|_| Error::Poisoned)?;
    let is_statistic = |name: &str| matches!(name.rsplit('.').next(), Some("running_mean" | "running_var"));
    let mut named: Vec<(&String, &Var)> = map.iter().filter(|(name, _)| !is_statistic(name)).collect();
    named.sort_unstable_by_key(|(name, _)| *name);
    Ok(named.into_iter().map(|(_, var)| var.clone()).collect())
}

/// The settings of a method by its name, such as `cr-sam`, and a list of its options, such as `rho=0.1 alpha=0.02`;
/// polder's `docs/methods.md` lists them. Without a base it is SGD with a momentum of 0.9; for the names `sgd`,
/// `adamw` and `muon` it is what the name says. [`Settings`] has public fields for the rest, such as Muon's matrices.
///
/// # Errors
/// [`Error::Method`], [`Error::Option`], [`Error::Setting`], and [`Error::Base`] for `sgd`, `adamw` and `muon` with
/// another base.
pub fn settings<T: Weight>(name: &str, options: &str, base: Option<Base>) -> Result<Settings<T>> {
    let entry = optim::find(name).ok_or_else(|| {
        let known: Vec<&str> = METHODS.iter().map(|entry| entry.name).collect();
        Error::Method { name: name.into(), known: known.join(", ") }
    })?;
    let mut method = T::method(entry);
    for part in options.split_ascii_whitespace() {
        let (option, value) = part.split_once('=').ok_or_else(|| Error::Option { text: part.into() })?;
        let declared = method.options().iter().find(|declared| declared.name == option);
        let declared = declared.ok_or_else(|| SettingError::Unknown { name: option.into() })?;
        method.set(option, &declared.parse(value)?)?;
    }
    let base = match (entry.base, base) {
        (own, None) => own.and_then(Base::from_name).unwrap_or(Base::sgd(0.9)),
        (Some(own), Some(base)) if base != Base::External && base.name() != own => {
            return Err(Error::Base { method: name.into() });
        }
        (_, Some(base)) => base,
    };
    Ok(Settings::boxed(method, base))
}

/// A sharpness-aware optimizer of variables of candle.
///
/// The variables always hold the weights, except while a step calls its closure. They may be changed between steps.
pub struct Optimizer<T: Weight> {
    // Fields are dropped in this order: everything of polder before candle's device, which owns the stream.
    inner: optim::Optimizer<T>,
    weights: Buffer<T>,
    parameters: Vec<Parameter>,
    learning_rate: f64,
    _device: candle_core::Device,
}

impl<T: Weight> Optimizer<T> {
    /// An optimizer of these variables, which have the type `T` and lie on one device.
    ///
    /// # Errors
    /// [`Error::NoVariables`]; [`Error::Variable`] for a variable of another type or device, one that is not
    /// contiguous, one that is there twice, and `f64` on a GPU; [`Error::Device`] for a device that polder cannot use;
    /// [`Error::LearningRate`]; those of polder for settings that contradict each other.
    pub fn new(vars: Vec<Var>, settings: Settings<T>, learning_rate: f64) -> Result<Self> {
        let of = vars.first().ok_or(Error::NoVariables)?.device().clone();
        for (index, var) in vars.iter().enumerate() {
            check::<T>(&vars[..index], var, &of).map_err(|reason| Error::Variable {
                index,
                shape: var.dims().to_vec(),
                reason,
            })?;
        }
        let device = tensor::device(&of)?;
        let mut len = 0;
        let mut parameters = Vec::with_capacity(vars.len());
        for var in vars {
            let place = len..len + var.elem_count();
            len = place.end;
            parameters.push(Parameter { var, place, used: true, moved: false });
        }
        let inner = optim::Optimizer::new(&device, len, settings)?;
        let mut made = Self { inner, weights: device.zeros(len)?, parameters, learning_rate: 0.0, _device: of };
        made.set_learning_rate(learning_rate)?;
        Ok(made)
    }

    /// One step. The closure computes the loss of one mini-batch with the current values of the variables; it is called
    /// once for each pass of the method, and must compute the same loss each time. Answers the loss of the first pass.
    ///
    /// A variable that the loss does not depend on keeps its value. Batch norm's running statistics follow every pass,
    /// because the closure runs the whole model each time. If a loss or a gradient is not finite, the
    /// variables keep every bit, and the step is counted as skipped. If the step fails, they keep every bit too.
    ///
    /// # Errors
    /// Those of the closure; [`Error::Loss`] unless it returns one floating-point number; those of polder.
    pub fn step(&mut self, closure: impl FnMut() -> candle_core::Result<Tensor>) -> Result<Tensor> {
        let Self { inner, weights, parameters, learning_rate, .. } = self;
        for Parameter { var, place, moved, .. } in parameters.iter_mut() {
            tensor::read(var, weights.slice_mut(place.clone())?)?;
            *moved = false;
        }
        let (len, address) = (weights.len(), weights.view().address());
        let mut loss = Loss { parameters, len, weights: address, closure, moved: false, first: None, failed: None };
        let taken = inner.step(&mut loss, weights.view_mut(), *learning_rate);
        let Loss { parameters, first, failed, .. } = loss;
        // The others were not moved, so they hold their values.
        for Parameter { var, place, .. } in parameters.iter().filter(|parameter| parameter.used || parameter.moved) {
            tensor::write(weights.slice(place.clone())?, var)?;
        }
        if let Some(error) = failed {
            return Err(error);
        }
        taken?;
        first.ok_or(Error::NoGradient)
    }

    /// The learning rate.
    pub fn learning_rate(&self) -> f64 {
        self.learning_rate
    }

    /// Sets the learning rate of the steps that follow.
    ///
    /// # Errors
    /// [`Error::LearningRate`] for one that is not finite.
    pub fn set_learning_rate(&mut self, lr: f64) -> Result<()> {
        if !lr.is_finite() {
            return Err(Error::LearningRate { lr });
        }
        self.learning_rate = lr;
        Ok(())
    }

    /// polder's optimizer, with its telemetry and state.
    pub fn inner(&self) -> &optim::Optimizer<T> {
        &self.inner
    }

    /// polder's optimizer, to scale ρ, to observe steps and to restore its state.
    pub fn inner_mut(&mut self) -> &mut optim::Optimizer<T> {
        &mut self.inner
    }
}

/// Why a variable cannot be trained together with those before it, if it cannot.
fn check<T: Weight>(before: &[Var], var: &Var, device: &candle_core::Device) -> std::result::Result<(), String> {
    if var.dtype() != T::DTYPE {
        return Err(format!("it has the type {:?}, expected {:?}", var.dtype(), T::DTYPE));
    }
    if !var.device().same_device(device) {
        return Err(format!("it lies on {:?}, the first one on {:?}", var.device().location(), device.location()));
    }
    if !device.is_cpu() && T::DTYPE == DType::F64 {
        return Err("polder has double precision on the CPU only".into());
    }
    if !var.is_contiguous() {
        return Err("it is not contiguous".into());
    }
    if before.iter().any(|other| other.id() == var.id()) {
        return Err("it is in the list twice".into());
    }
    Ok(())
}
