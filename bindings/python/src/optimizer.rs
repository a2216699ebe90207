//! Optimizers over tensors of another framework.

use std::sync::{Mutex, MutexGuard, TryLockError};

use polder::arena::{Initial, Layout, Matrix, TensorKind};
use polder::device::{Buffer, Device, Scalar, Slice, SliceMut};
use polder::kernels::gather::Gather;
use polder::kernels::vector::Reduction;
use polder::optim::{self, Base, Context, Entry, Group, METHODS, Method, Optimizer, Settings};
use polder::settings::{SettingError, SettingKind, SettingValue};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::Failure;
use crate::objective::{Functions, Places, open};

/// The methods: for each its name, summary, own base optimizer if it has no other, options, and gradients and exact
/// products with the Hessian of a step with default settings.
#[pyfunction]
pub fn methods(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    METHODS.iter().map(|entry| description(py, entry)).collect()
}

/// The key of the random directions of a seed.
#[pyfunction]
pub fn direction_seed(seed: u64) -> u64 {
    optim::direction_seed(seed)
}

/// Fails for options that the method does not have, that are out of range or contradict each other, and for those that
/// need a base optimizer of this library if it is an `external` one.
#[pyfunction]
pub fn check_options(method: &str, options: Options, external: bool) -> Result<(), Failure> {
    let found = configured((find(method)?.new)(), &options, None)?;
    found.check()?;
    found.check_combination()?;
    if external && found.needs_base() {
        let message = format!("base: {method} needs a base optimizer of this library, 'sgd', 'adamw' or 'muon'");
        return Err(Failure(PyValueError::new_err(message)));
    }
    Ok(())
}

fn find(method: &str) -> Result<&'static Entry, Failure> {
    let missing = || Failure(PyValueError::new_err(format!("method {method}: there is no such method")));
    optim::find(method).ok_or_else(missing)
}

fn description<'py>(py: Python<'py>, entry: &Entry) -> PyResult<Bound<'py, PyDict>> {
    let (method, found) = ((entry.new)(), PyDict::new(py));
    let mut options = Vec::new();
    for option in method.options() {
        let described = PyDict::new(py);
        described.set_item("name", option.name.replace('-', "_"))?;
        described.set_item("help", option.help())?;
        described.set_item("otherwise", option.otherwise)?;
        let words: Vec<&str> = match option.kind {
            SettingKind::Word(words) => words.iter().map(|word| word.name).collect(),
            _ => Vec::new(),
        };
        described.set_item("words", words)?;
        let kind = match option.kind {
            SettingKind::Flag => "bool",
            SettingKind::Count => "int",
            SettingKind::Number => "float",
            _ => "str",
        };
        described.set_item("kind", kind)?;
        match (option.default)() {
            SettingValue::Flag(value) => described.set_item("default", value)?,
            SettingValue::Count(value) => described.set_item("default", value)?,
            SettingValue::Number(value) => described.set_item("default", value)?,
            SettingValue::Absent => described.set_item("default", py.None())?,
            value => described.set_item("default", value.to_string())?,
        }
        options.push(described);
    }
    found.set_item("name", entry.name)?;
    found.set_item("summary", entry.summary)?;
    found.set_item("base", entry.base)?;
    found.set_item("computes_rate", method.own_rate().is_some())?;
    found.set_item("options", options)?;
    found.set_item("gradients", method.passes().gradients)?;
    found.set_item("products", method.passes().products)?;
    Ok(found)
}

/// A group of tensors with its own update: their place in the flat vector, and the numbers of the base optimizer.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct TensorGroup {
    start: usize,
    end: usize,
    lr: f64,
    weight_decay: f64,
    #[pyo3(default)]
    momentum: f64,
    #[pyo3(default)]
    nesterov: bool,
    #[pyo3(default)]
    betas: (f64, f64),
    #[pyo3(default)]
    eps: f64,
}

impl TensorGroup {
    /// Fails as PyTorch's optimizers do.
    fn check(&self) -> Result<(), Failure> {
        let Self { lr, weight_decay, momentum, betas: (beta1, beta2), eps, .. } = *self;
        let numbers = [("lr", lr), ("weight_decay", weight_decay), ("momentum", momentum), ("eps", eps)];
        let refuse = |name: &str, found: f64, expected: &str| {
            Err(Failure(PyValueError::new_err(format!("{name}: {found}, expected {expected}"))))
        };
        for (name, number) in numbers {
            if !(number >= 0.0 && number.is_finite()) {
                return refuse(name, number, "a finite number, 0 or more");
            }
        }
        for beta in [beta1, beta2] {
            if !(0.0..1.0).contains(&beta) {
                return refuse("betas", beta, "numbers from 0 to below 1");
            }
        }
        Ok(())
    }
}

/// What a method takes from the run that it trains.
#[derive(Clone, Copy)]
struct Given {
    /// So many of the first elements are weights of layers.
    matrices: usize,
    /// So many elements behind them are parameters of normalisation; the others follow.
    normalisation: usize,
    /// The seed of random directions.
    seed: u64,
    /// The relative error of the losses.
    loss_error: f64,
}

/// Makes the method of an entry with its default settings.
type Make<T> = fn(&Entry) -> Box<dyn Method<T>>;

/// The options of a method, each as a text.
type Options = Vec<(String, String)>;

struct Typed<T: Scalar> {
    device: Device,
    places: Places,
    optimizer: Optimizer<T>,
    make: Make<T>,
    entry: &'static Entry,
    given: Given,
    gather: Gather,
    reduction: Reduction,
}

impl<T: Scalar> Typed<T> {
    fn method(&self, options: &Options) -> Result<Box<dyn Method<T>>, Failure> {
        configured((self.make)(self.entry), options, Some(self.given))
    }

    /// Runs `work` with the functions as the objective.
    fn with<R>(
        &mut self,
        evaluate: &Py<PyAny>,
        product: Option<&Py<PyAny>>,
        work: impl FnOnce(&mut Optimizer<T>, &mut Functions<'_>) -> polder::device::Result<R>,
    ) -> Result<R, Failure> {
        let Self { device, places, optimizer, gather, reduction, .. } = self;
        let mut functions =
            Functions { device, places, gather, reduction, evaluate, loss: None, product, raised: None };
        let result = work(optimizer, &mut functions);
        functions.result(result)
    }

    fn step(
        &mut self,
        weights: u64,
        evaluate: &Py<PyAny>,
        product: Option<&Py<PyAny>>,
        groups: &[TensorGroup],
    ) -> Result<(), Failure> {
        let base = self.optimizer.settings().base;
        let groups: Vec<Group<'_>> = groups
            .iter()
            .map(|group| {
                let TensorGroup { momentum, nesterov, betas: (beta1, beta2), eps, .. } = *group;
                Group {
                    place: group.start..group.end,
                    base: match base {
                        Base::AdamW { .. } => Base::AdamW { beta1, beta2, eps },
                        Base::Muon { .. } => Base::Muon { momentum },
                        _ => Base::Sgd { momentum, nesterov },
                    },
                    weight_decay: group.weight_decay,
                    lr: group.lr.into(),
                }
            })
            .collect();
        let (device, len) = (self.device.clone(), self.places.len);
        // SAFETY: the Python half passes the address of its own flat vector.
        let weights = unsafe { SliceMut::from_raw(&device, weights, len) }?;
        self.with(evaluate, product, |optimizer, functions| optimizer.step_groups(functions, weights, &groups))
    }

    fn direction(
        &mut self,
        weights: u64,
        out: u64,
        evaluate: &Py<PyAny>,
        product: Option<&Py<PyAny>>,
    ) -> Result<(), Failure> {
        let (device, len) = (self.device.clone(), self.places.len);
        // SAFETY: the Python half passes the addresses of its own flat vectors.
        let (weights, out) =
            unsafe { (Slice::from_raw(&device, weights, len)?, SliceMut::from_raw(&device, out, len)?) };
        self.with(evaluate, product, |optimizer, functions| optimizer.direction_into(functions, weights, out))
    }

    fn state(&self) -> Result<SmallState, Failure> {
        let state = self.optimizer.state();
        Ok((state.scalars.to_vec()?, state.counters.to_vec()?, state.attempts))
    }

    fn set_state(&mut self, (scalars, counters, attempts): &SmallState) -> Result<(), Failure> {
        let state = self.optimizer.state_mut();
        // Both lengths are checked before anything is written.
        if counters.len() != state.counters.len() {
            let found = format!("{} counters, expected {}", counters.len(), state.counters.len());
            return Err(Failure(PyValueError::new_err(found)));
        }
        state.scalars.write(scalars)?;
        state.counters.write(counters)?;
        state.attempts = *attempts;
        Ok(())
    }
}

/// The numbers of an optimizer's state: what the method keeps, counters, and steps asked for.
type SmallState = (Vec<f64>, Vec<u32>, u64);

fn configured<T: Scalar>(
    mut method: Box<dyn Method<T>>,
    options: &Options,
    given: Option<Given>,
) -> Result<Box<dyn Method<T>>, Failure> {
    if let Some(Given { matrices, normalisation, seed, loss_error }) = given {
        // The layout tells ASAM which elements are weights, SAM-ON which ones are normalisation, and nothing else.
        let tensor = |name: &str, kind| (name.into(), kind, Initial::Constant(0.0));
        let weights = tensor("weights", TensorKind::Linear { inputs: matrices, outputs: 1 });
        let layout = Layout::new(vec![weights, tensor("normalisation", TensorKind::Scale(normalisation))]);
        method.prepare(&Context { layout: &layout, seed, loss_error });
    }
    let every = method.options();
    for (name, text) in options {
        let name = name.replace('_', "-");
        let option = every.iter().find(|option| option.name == name);
        let option = option.ok_or_else(|| SettingError::Unknown { name: name.clone() })?;
        method.set(&name, &option.parse(text)?)?;
    }
    Ok(method)
}

enum AnyType {
    F32(Typed<f32>),
    F64(Typed<f64>),
}

macro_rules! typed {
    ($lock:expr, $inner:ident => $work:expr) => {
        match &mut *$lock {
            AnyType::F32($inner) => $work,
            AnyType::F64($inner) => $work,
        }
    };
}

/// An optimizer over a flat vector of weights that the caller owns.
#[pyclass(frozen)]
pub struct Engine {
    inner: Mutex<AnyType>,
}

impl Engine {
    fn lock(&self) -> Result<MutexGuard<'_, AnyType>, Failure> {
        self.inner.try_lock().map_err(|error| {
            let reason = match error {
                TryLockError::WouldBlock => "the optimizer is in use: by another thread, or by its own closure",
                TryLockError::Poisoned(_) => "the optimizer cannot be used any more, because a step of it had a fault",
            };
            Failure(PyRuntimeError::new_err(reason))
        })
    }
}

fn build<T: Scalar>(
    device: Device,
    (entry, make): (&'static Entry, Make<T>),
    options: &Options,
    (base, matrices): (Base, Vec<Matrix>),
    lengths: &[usize],
    given: Given,
    mut allocate: impl FnMut(&str, usize) -> Result<u64, Failure>,
) -> Result<Typed<T>, Failure> {
    let places = Places::new(lengths);
    let method = configured(make(entry), options, Some(given))?;
    let mut failed = None;
    let settings = Settings { matrices, ..Settings::boxed(method, base) };
    let optimizer = Optimizer::with_memory(&device, places.len, settings, |part, len| {
        if len == 0 {
            return device.zeros(0);
        }
        let address = allocate(part.name(), len).unwrap_or_else(|failure| {
            failed = Some(failure);
            0
        });
        // SAFETY: the Python half allocates zeros and keeps them alive as long as the engine.
        unsafe { Buffer::from_raw(&device, address, len) }
    });
    if let Some(failure) = failed {
        return Err(failure);
    }
    let (gather, reduction) = (Gather::new(&device)?, Reduction::new(&device)?);
    Ok(Typed { optimizer: optimizer?, device, places, make, entry, given, gather, reduction })
}

#[pymethods]
impl Engine {
    /// An optimizer for tensors of these lengths. `place` is as in [`open`], `base` is "sgd", "adamw", "muon" or
    /// "external". `parts` counts elements: first come the weights of layers, which ASAM scales, then the
    /// normalisation, which SAM-ON perturbs. `matrices` lists those for Muon: first element, rows, columns.
    /// `allocate(part, elements)` answers with the address of zeros, which stay alive as long as the engine; they lie
    /// at multiples of 16.
    #[new]
    fn new(
        place: (String, usize, usize),
        double: bool,
        method: &str,
        options: Options,
        base: &str,
        lengths: Vec<usize>,
        parts: (usize, usize),
        matrices: Vec<(usize, usize, usize)>,
        seed: u64,
        loss_error: f64,
        allocate: &Bound<'_, PyAny>,
    ) -> Result<Self, Failure> {
        let entry = find(method)?;
        let base = match base {
            "sgd" => Base::sgd(0.0),
            "adamw" => Base::ADAMW,
            "muon" => Base::MUON,
            "external" => Base::External,
            other => return Err(Failure(PyValueError::new_err(format!("base {other}: expected sgd, adamw or muon")))),
        };
        let device = open((&place.0, place.1, place.2))?;
        let matrix = |(offset, rows, columns)| Matrix { offset, rows, columns };
        let base = (base, matrices.into_iter().map(matrix).collect());
        let allocate = |part: &str, len: usize| Ok(allocate.call1((part, len))?.extract()?);
        let given = Given { matrices: parts.0, normalisation: parts.1, seed, loss_error };
        let typed = if double {
            let made: (_, Make<f64>) = (entry, |entry| (entry.new_f64)());
            AnyType::F64(build(device, made, &options, base, &lengths, given, allocate)?)
        } else {
            let made: (_, Make<f32>) = (entry, |entry| (entry.new)());
            AnyType::F32(build(device, made, &options, base, &lengths, given, allocate)?)
        };
        Ok(Self { inner: Mutex::new(typed) })
    }

    /// Gradients and exact products with the Hessian of one step.
    fn passes(&self) -> Result<(u64, u64), Failure> {
        let passes = typed!(self.lock()?, inner => inner.optimizer.settings().method.passes());
        Ok((passes.gradients, passes.products))
    }

    /// Changes options of the method between two steps.
    fn set_options(&self, options: Options) -> Result<(), Failure> {
        typed!(self.lock()?, inner => {
            let method = inner.method(&options)?;
            Ok(inner.optimizer.set_method(method)?)
        })
    }

    /// One step: the passes of the method, and the update of the weights.
    #[pyo3(signature = (weights, evaluate, product, groups))]
    fn step(
        &self,
        py: Python<'_>,
        weights: u64,
        evaluate: Py<PyAny>,
        product: Option<Py<PyAny>>,
        groups: Vec<TensorGroup>,
    ) -> Result<(), Failure> {
        groups.iter().try_for_each(TensorGroup::check)?;
        py.detach(|| typed!(self.lock()?, inner => inner.step(weights, &evaluate, product.as_ref(), &groups)))
    }

    /// The passes of one step. The direction to follow goes to `out`.
    #[pyo3(signature = (weights, out, evaluate, product))]
    fn direction(
        &self,
        py: Python<'_>,
        weights: u64,
        out: u64,
        evaluate: Py<PyAny>,
        product: Option<Py<PyAny>>,
    ) -> Result<(), Failure> {
        py.detach(|| typed!(self.lock()?, inner => inner.direction(weights, out, &evaluate, product.as_ref())))
    }

    /// Whether the newest step was skipped because something was not finite. Waits for the device.
    fn skipped(&self) -> Result<bool, Failure> {
        typed!(self.lock()?, inner => Ok(inner.optimizer.skipped().to_vec()? != [0]))
    }

    /// The numbers of the newest step. Waits for the device.
    fn telemetry<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyDict>, Failure> {
        let found = typed!(self.lock()?, inner => inner.optimizer.telemetry()?);
        let numbers = PyDict::new(py);
        numbers.set_item("loss", found.loss)?;
        numbers.set_item("gradient_norm", found.gradient_norm)?;
        if let Some(rate) = found.own_rate {
            numbers.set_item("lr", rate)?;
        }
        for (name, value) in found.method {
            numbers.set_item(name, value)?;
        }
        for (name, count) in found.counters {
            numbers.set_item(name, count)?;
        }
        numbers.set_item("skipped", found.skipped)?;
        Ok(numbers)
    }

    /// The numbers that a checkpoint must hold beside the vectors: what the method keeps, counters, and steps asked
    /// for.
    fn state(&self) -> Result<SmallState, Failure> {
        typed!(self.lock()?, inner => inner.state())
    }

    /// Restores the numbers of [`Engine::state`].
    fn set_state(&self, state: SmallState) -> Result<(), Failure> {
        typed!(self.lock()?, inner => inner.set_state(&state))
    }
}
