//! Optimizers with a callback as their objective, by the names of the methods.

use std::ffi::{CString, c_char, c_void};
use std::sync::{Mutex, MutexGuard, OnceLock, TryLockError};

use polder::arena::Matrix;
use polder::device::{Device, Scalar};
use polder::optim::{self, Base, METHODS, Method, Optimizer, Settings};
use polder::settings::{Choice, Configurable, Setting, SettingError};
use polder::{settings, words};

use crate::device::{checked_type, polder_device, polder_type};
use crate::error::{Failure, Result, give, guard, object, polder_status, text};
use crate::objective::{Callbacks, polder_objective};

words! {
    /// The rule that follows a method's direction.
    enum BaseName {
        /// SGD with momentum
        Sgd = "sgd",
        /// AdamW
        AdamW = "adamw",
        /// Muon for matrices, AdamW for the rest
        Muon = "muon",
    }
}

settings! {
    /// What an optimizer has beside the options of its method.
    struct Common {
        /// The base optimizer
        base: Option<BaseName> = None, else "sgd";
        /// SGD's or Muon's momentum
        momentum: Option<f64> = None, else "0.9; muon 0.95; methods with their own 0", in below_one;
        /// Whether SGD looks ahead
        nesterov: bool = false;
        /// AdamW's decay of the first moment
        beta1: f64 = 0.9, in below_one;
        /// AdamW's decay of the second moment
        beta2: f64 = 0.999, in below_one;
        /// Added to the root of AdamW's second moment
        eps: f64 = 1e-8, in positive;
        /// The matrices for Muon: OFFSET:ROWSxCOLUMNS of each, with commas between them
        matrices: Option<String> = None, else "none";
        /// Weight decay
        weight_decay: f64 = 0.0, in not_negative;
        /// How many of the first weights are decayed
        decay_length: Option<usize> = None, else "all";
        /// The largest norm of the combined gradient
        clip: Option<f64> = None, else "no limit", in positive;
    }
}

/// Sets the options in `list`, such as `rho=0.1 momentum=0.9`: those of the method, and the common ones.
fn configure<T: Scalar>(method: &mut dyn Method<T>, common: &mut Common, list: &str) -> Result<()> {
    for part in list.split_ascii_whitespace() {
        let Some((name, value)) = part.split_once('=') else {
            return Err(Failure::argument(format!("`options`: {part}, expected name=value")));
        };
        let of = |options: &'static [Setting]| options.iter().find(|option| option.name == name);
        match (of(method.options()), of(Common::OPTIONS)) {
            (Some(option), _) => method.set(name, &option.parse(value)?)?,
            (None, Some(option)) => common.set(name, &option.parse(value)?)?,
            (None, None) => return Err(SettingError::Unknown { name: name.into() }.into()),
        }
    }
    Ok(())
}

/// The matrices in a text such as `0:64x27,1728:64x576`.
fn parse_matrices(text: &str) -> Result<Vec<Matrix>> {
    let parse = |part: &str| {
        let (offset, shape) = part.split_once(':')?;
        let (rows, columns) = shape.split_once('x')?;
        let number = |text: &str| text.parse().ok();
        Some(Matrix { offset: number(offset)?, rows: number(rows)?, columns: number(columns)? })
    };
    let of =
        |part| parse(part).ok_or_else(|| Failure::argument(format!("matrices: {part}, expected OFFSET:ROWSxCOLUMNS")));
    text.split(',').map(of).collect()
}

fn build<T: Scalar>(
    device: &Device,
    length: usize,
    mut method: Box<dyn Method<T>>,
    own_base: Option<&str>,
    list: &str,
) -> Result<Optimizer<T>> {
    let mut common = Common::default();
    configure(&mut *method, &mut common, list)?;
    let own = own_base.and_then(BaseName::from_word);
    if let (Some(own), Some(given)) = (own, common.base)
        && own != given
    {
        return Err(Failure::argument(format!("base: has no meaning for {own}")));
    }
    let Common { momentum, nesterov, beta1, beta2, eps, weight_decay, decay_length, clip, .. } = common;
    let base = match own.or(common.base).unwrap_or(BaseName::Sgd) {
        BaseName::Sgd => {
            let usual = if method.has_momentum() { 0.0 } else { 0.9 };
            Base::Sgd { momentum: momentum.unwrap_or(usual), nesterov }
        }
        BaseName::AdamW => Base::AdamW { beta1, beta2, eps },
        BaseName::Muon => Base::Muon { momentum: momentum.unwrap_or(0.95) },
    };
    let matrices = common.matrices.as_deref().map_or(Ok(Vec::new()), parse_matrices)?;
    let decay_len = decay_length.unwrap_or(usize::MAX);
    let settings = Settings { weight_decay, decay_len, clip, matrices, ..Settings::boxed(method, base) };
    Ok(Optimizer::new(device, length, settings)?)
}

enum Typed {
    F32(Optimizer<f32>),
    F64(Optimizer<f64>),
}

/// Evaluates an expression with the optimizer of either type.
macro_rules! of_type {
    ($typed:expr, $optimizer:ident => $body:expr) => {
        match $typed {
            Typed::F32($optimizer) => $body,
            Typed::F64($optimizer) => $body,
        }
    };
}

/// An optimizer for a vector of weights of the caller.
pub struct polder_optimizer {
    on: polder_device,
    method: &'static str,
    length: usize,
    optimizer: Mutex<Typed>,
}

impl polder_optimizer {
    fn lock(&self) -> Result<MutexGuard<'_, Typed>> {
        self.optimizer.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => Failure::busy("optimizer"),
            TryLockError::Poisoned(_) => {
                let reason = "the optimizer cannot be used any more, because a step of it had a fault".into();
                Failure { status: polder_status::Panic, reason }
            }
        })
    }
}

/// Number of methods.
#[unsafe(no_mangle)]
pub extern "C" fn polder_method_count() -> usize {
    METHODS.len()
}

/// The name of method number `index`, such as "cr-sam"; NULL if there is none.
#[unsafe(no_mangle)]
pub extern "C" fn polder_method_name(index: usize) -> *const c_char {
    static NAMES: OnceLock<Vec<CString>> = OnceLock::new();
    let names =
        NAMES.get_or_init(|| METHODS.iter().map(|method| CString::new(method.name).unwrap_or_default()).collect());
    names.get(index).map_or(std::ptr::null(), |name| name.as_ptr())
}

/// An optimizer for `length` weights of the type `dtype` (a `polder_type`) on a device.
///
/// `method` is a name such as "sam", "cr-sam" or "adamw". `options` is NULL or a list such as "rho=0.1 momentum=0.9":
/// the options of the method (docs/methods.md lists them) and base (sgd, adamw or muon), momentum, nesterov, beta1,
/// beta2, eps, weight-decay, decay-length, clip, matrices. Muon needs to know the matrices among the weights, stored
/// row by row: "matrices=0:64x27,1728:64x576" are one of 64 rows and 27 columns from weight 0 on, and a second one.
///
/// # Safety
/// `device` is NULL or a live device; the texts are NULL or end with a zero byte; `optimizer` is NULL or valid for a
/// pointer to be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_optimizer_new(
    device: *const polder_device,
    dtype: i32,
    length: usize,
    method: *const c_char,
    options: *const c_char,
    optimizer: *mut *mut polder_optimizer,
) -> polder_status {
    guard(|| {
        // SAFETY: the caller's.
        unsafe { give("optimizer", optimizer, std::ptr::null_mut())? };
        // SAFETY: the caller's.
        let (on, name) = unsafe { (object("device", device)?, text("method", method)?) };
        // SAFETY: the caller's.
        let options = if options.is_null() { "" } else { unsafe { text("options", options)? } };
        let entry = optim::find(name).ok_or_else(|| {
            let known: Vec<&str> = METHODS.iter().map(|method| method.name).collect();
            Failure::argument(format!("`method`: {name}, expected one of {}", known.join(", ")))
        })?;
        let device = on.device.clone();
        let typed = match checked_type(dtype)? {
            polder_type::F32 => Typed::F32(build(&device, length, (entry.new)(), entry.base, options)?),
            polder_type::F64 => Typed::F64(build(&device, length, (entry.new_f64)(), entry.base, options)?),
        };
        let (on, typed) = (polder_device::new(device)?, Mutex::new(typed));
        let made = polder_optimizer { on, method: entry.name, length, optimizer: typed };
        // SAFETY: as above.
        unsafe { give("optimizer", optimizer, Box::into_raw(Box::new(made))) }
    })
}

/// One step with the learning rate `lr`: the method's passes through the objective at the weights and around them, and
/// the update of the weights in place. If a loss or a gradient is not finite, or a callback fails, no bit of the
/// weights changes.
///
/// # Safety
/// `optimizer` is NULL or a live optimizer; `objective` is NULL or as `polder_objective` says; `weights` are as many
/// numbers as the optimizer is for, on its device, which nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_optimizer_step(
    optimizer: *const polder_optimizer,
    objective: *const polder_objective,
    weights: *mut c_void,
    lr: f64,
) -> polder_status {
    guard(|| {
        // SAFETY: the caller's.
        let of = unsafe { object("optimizer", optimizer)? };
        // SAFETY: the caller's.
        let mut callbacks = unsafe { Callbacks::new(objective, of.length)? };
        if !lr.is_finite() {
            return Err(Failure::argument(format!("`lr`: {lr}, expected a finite number")));
        }
        let mut optimizer = of.lock()?;
        let taken = of_type!(&mut *optimizer, optimizer => {
            // SAFETY: the caller's.
            let weights = unsafe { of.on.write("weights", weights, of.length)? };
            optimizer.step(&mut callbacks, weights, lr)
        });
        callbacks.result(taken)
    })
}

/// Multiplies the method's rho in the steps that follow, as a schedule asks.
///
/// # Safety
/// `optimizer` is NULL or a live optimizer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_optimizer_scale_rho(optimizer: *const polder_optimizer, factor: f64) -> polder_status {
    guard(|| {
        // SAFETY: the caller's.
        let of = unsafe { object("optimizer", optimizer)? };
        if !(factor >= 0.0 && factor.is_finite()) {
            return Err(Failure::argument(format!("`factor`: {factor}, expected a finite number, 0 or more")));
        }
        of_type!(&mut *of.lock()?, optimizer => optimizer.scale_rho(factor));
        Ok(())
    })
}

/// A number of the newest step: "loss", "gradient-norm", "skipped" (steps skipped since the start), or a number or
/// counter of the method, such as "rho" of SA-SAM. Waits for the device.
///
/// # Safety
/// `optimizer` is NULL or a live optimizer; `name` is NULL or ends with a zero byte; `value` is NULL or valid for a
/// number to be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_optimizer_get(
    optimizer: *const polder_optimizer,
    name: *const c_char,
    value: *mut f64,
) -> polder_status {
    guard(|| {
        // SAFETY: the caller's.
        let (of, name) = unsafe { (object("optimizer", optimizer)?, text("name", name)?) };
        let telemetry = of_type!(&*of.lock()?, optimizer => optimizer.telemetry()?);
        let found = match name {
            "loss" => Some(telemetry.loss),
            "gradient-norm" => Some(telemetry.gradient_norm),
            "skipped" => Some(telemetry.skipped.into()),
            name => telemetry.get(name).or(telemetry.count(name).map(f64::from)),
        };
        let found = found.ok_or_else(|| Failure::argument(format!("`name`: the method has no number {name}")))?;
        // SAFETY: the caller's.
        unsafe { give("value", value, found) }
    })
}

/// The number of bytes of the optimizer's state, for `polder_optimizer_state_get`. It does not change while the
/// optimizer lives.
///
/// # Safety
/// `optimizer` is NULL or a live optimizer; `bytes` is NULL or valid for a number to be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_optimizer_state_size(
    optimizer: *const polder_optimizer,
    bytes: *mut usize,
) -> polder_status {
    guard(|| {
        // SAFETY: the caller's.
        let of = unsafe { object("optimizer", optimizer)? };
        let size = of_type!(&*of.lock()?, optimizer => optimizer.snapshot_len(of.method));
        // SAFETY: the caller's.
        unsafe { give("bytes", bytes, size) }
    })
}

/// Writes all that the steps that follow depend on to `state`, for a checkpoint: momenta, what the method keeps, and
/// the factor of `polder_optimizer_scale_rho`. The weights are not part of it. `bytes` is the number that
/// `polder_optimizer_state_size` gives. Waits for the device.
///
/// # Safety
/// `optimizer` is NULL or a live optimizer; `state` is NULL or valid for `bytes` bytes to be written, in the host's
/// memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_optimizer_state_get(
    optimizer: *const polder_optimizer,
    state: *mut c_void,
    bytes: usize,
) -> polder_status {
    guard(|| {
        // SAFETY: the caller's.
        let of = unsafe { object("optimizer", optimizer)? };
        if state.is_null() {
            return Err(Failure::null("state"));
        }
        let snapshot = of_type!(&*of.lock()?, optimizer => optimizer.snapshot(of.method)?);
        if bytes != snapshot.len() {
            return Err(Failure::argument(format!("`bytes`: {bytes}, expected {}", snapshot.len())));
        }
        // SAFETY: the caller's, and the two do not overlap.
        unsafe { snapshot.as_ptr().copy_to_nonoverlapping(state.cast(), bytes) };
        Ok(())
    })
}

/// Takes over a state from `polder_optimizer_state_get`. The steps that follow then have the same bits as those of the
/// optimizer that wrote it, if the weights and the options are the same too. A state of another method, base, type or
/// length, and one with missing or changed bytes, is answered with `POLDER_STATUS_ARGUMENT`, and nothing changes. Until
/// the next step `polder_optimizer_get` knows only counters.
///
/// # Safety
/// `optimizer` is NULL or a live optimizer; `state` is NULL or valid for `bytes` bytes to be read, in the host's
/// memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_optimizer_state_set(
    optimizer: *const polder_optimizer,
    state: *const c_void,
    bytes: usize,
) -> polder_status {
    guard(|| {
        // SAFETY: the caller's.
        let of = unsafe { object("optimizer", optimizer)? };
        if state.is_null() {
            return Err(Failure::null("state"));
        }
        if bytes > isize::MAX as usize {
            return Err(Failure::argument(format!("`bytes`: {bytes}, more than an address space has")));
        }
        // SAFETY: the caller's.
        let state = unsafe { std::slice::from_raw_parts(state.cast(), bytes) };
        of_type!(&mut *of.lock()?, optimizer => optimizer.restore(of.method, state)?);
        Ok(())
    })
}

/// Gives an optimizer up. NULL does nothing.
///
/// # Safety
/// `optimizer` is NULL, or a live optimizer that nobody uses any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_optimizer_free(optimizer: *mut polder_optimizer) {
    guard(|| {
        if !optimizer.is_null() {
            // SAFETY: `polder_optimizer_new` made it with a box, and the caller gives it up.
            drop(unsafe { Box::from_raw(optimizer) });
        }
        Ok(())
    });
}
