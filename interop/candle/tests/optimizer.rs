//! polder's optimizers on variables of candle, against the same methods written with candle's own operations.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use polder::objective::Passes;
use polder::optim::work::{G0, G1};
use polder::optim::{Asam, Base, CrSam, Direction, METHODS, Method, Needs, RSam, Sam, Settings, Step, Vector};
use polder_candle::{Error, Optimizer, Weight, settings, trainable};

const LR: f64 = 0.05;
const DECAY: f64 = 0.02;

/// Numbers between −1 and 1 that look random.
fn numbers(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn tensor(shape: &[usize], seed: u64, dtype: DType) -> Tensor {
    let values = numbers(shape.iter().product(), seed);
    Tensor::from_vec(values, shape, &Device::Cpu).and_then(|tensor| tensor.to_dtype(dtype)).unwrap()
}

/// A network with one hidden layer, and a mini-batch. The gradients of its matrices are transposed views.
struct Mlp {
    vars: Vec<Var>,
    x: Tensor,
    y: Tensor,
}

impl Mlp {
    fn new(dtype: DType) -> Self {
        let shapes: [&[usize]; 4] = [&[7, 5], &[7], &[3, 7], &[3]];
        let make =
            |(seed, shape): (usize, &&[usize])| Var::from_tensor(&tensor(shape, seed as u64 + 1, dtype)).unwrap();
        let vars = shapes.iter().enumerate().map(make).collect();
        Self { vars, x: tensor(&[11, 5], 20, dtype), y: tensor(&[11, 3], 21, dtype) }
    }

    fn loss(&self) -> Result<Tensor> {
        let [w1, b1, w2, b2] = &self.vars[..] else { unreachable!("four variables") };
        let hidden = self.x.matmul(&w1.t()?)?.broadcast_add(b1)?.tanh()?;
        (hidden.matmul(&w2.t()?)?.broadcast_add(b2)? - &self.y)?.sqr()?.mean_all()
    }

    fn values(&self) -> Vec<f64> {
        values(&self.vars)
    }
}

fn values(vars: &[Var]) -> Vec<f64> {
    let flat = |var: &Var| var.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
    vars.iter().flat_map(|var| flat(var).unwrap()).collect()
}

fn bits(vars: &[Var]) -> Vec<u64> {
    values(vars).into_iter().map(f64::to_bits).collect()
}

// ---- The methods in candle ------------------------------------------------------------------------------------------

type Tensors = Vec<Tensor>;

/// Loss and gradients with the variables at `at`.
fn gradients_at(mlp: &Mlp, at: &[Tensor]) -> Result<(f64, Tensors)> {
    for (var, value) in mlp.vars.iter().zip(at) {
        var.set(value)?;
    }
    let loss = mlp.loss()?;
    let gradients = loss.backward()?;
    Ok((loss.to_scalar()?, mlp.vars.iter().map(|var| gradients.get(var).unwrap().clone()).collect()))
}

/// Σ c v over pairs, tensor by tensor.
fn combine(terms: &[(f64, &Tensors)]) -> Result<Tensors> {
    let sum = |k: usize| {
        let start = (&terms[0].1[k] * terms[0].0)?;
        terms[1..].iter().try_fold(start, |sum, (c, vectors)| sum + (&vectors[k] * *c)?)
    };
    (0..terms[0].1.len()).map(sum).collect()
}

fn norm(vectors: &[Tensor]) -> Result<f64> {
    let squares = |vector: &Tensor| vector.sqr()?.sum_all()?.to_scalar::<f64>();
    Ok(vectors.iter().map(squares).sum::<Result<f64>>()?.sqrt())
}

fn sam(mlp: &Mlp, w: &Tensors, rho: f64) -> Result<Tensors> {
    let (_, g) = gradients_at(mlp, w)?;
    let point = combine(&[(1.0, w), (rho / (norm(&g)? + 1e-12), &g)])?;
    Ok(gradients_at(mlp, &point)?.1)
}

fn asam(mlp: &Mlp, w: &Tensors, rho: f64, eta: f64) -> Result<Tensors> {
    let (_, g) = gradients_at(mlp, w)?;
    let scale = |w: &Tensor, g: &Tensor| (w.abs()? + eta)? * g;
    let scaled: Tensors = w.iter().zip(&g).map(|(w, g)| scale(w, g)).collect::<Result<_>>()?;
    let twice: Tensors = w.iter().zip(&scaled).map(|(w, g)| scale(w, g)).collect::<Result<_>>()?;
    let point = combine(&[(1.0, w), (rho / (norm(&scaled)? + 1e-12), &twice)])?;
    Ok(gradients_at(mlp, &point)?.1)
}

fn cr_sam(mlp: &Mlp, w: &Tensors, rho: f64, alpha: f64, beta: f64) -> Result<Tensors> {
    let (loss, g) = gradients_at(mlp, w)?;
    let radius = rho / (norm(&g)? + 1e-12);
    let (loss_plus, plus) = gradients_at(mlp, &combine(&[(1.0, w), (radius, &g)])?)?;
    let (loss_minus, minus) = gradients_at(mlp, &combine(&[(1.0, w), (-radius, &g)])?)?;
    let (a, b) = (loss_plus + loss_minus - 2.0 * loss, loss_plus - loss_minus);
    assert!(a > 1e-3 && b > 1e-3, "both terms are in use: {a} {b}");
    let (alpha, beta) = (alpha / a, beta / b);
    combine(&[(-2.0 * alpha, &g), (1.0 + alpha + beta, &plus), (alpha - beta, &minus)])
}

/// Five steps of a direction with SGD or AdamW.
fn reference(direction: impl Fn(&Mlp, &Tensors) -> Result<Tensors>, adamw: bool) -> Result<Vec<f64>> {
    let mlp = Mlp::new(DType::F64);
    let mut w: Tensors = mlp.vars.iter().map(|var| var.as_tensor().copy()).collect::<Result<_>>()?;
    let zeros: Tensors = w.iter().map(Tensor::zeros_like).collect::<Result<_>>()?;
    let (mut m, mut v) = (zeros.clone(), zeros);
    for t in 1..=5 {
        let g = direction(&mlp, &w)?;
        if adamw {
            m = combine(&[(0.9, &m), (0.1, &g)])?;
            let squares = g.iter().map(Tensor::sqr).collect::<Result<_>>()?;
            v = combine(&[(0.999, &v), (1.0 - 0.999, &squares)])?;
            let (first, second) = (1.0 - 0.9f64.powi(t), (1.0 - 0.999f64.powi(t)).sqrt());
            let step = |(m, v): (&Tensor, &Tensor)| m / ((v.sqrt()? / second)? + 1e-8)?;
            let steps = m.iter().zip(&v).map(step).collect::<Result<_>>()?;
            w = combine(&[(1.0 - LR * DECAY, &w), (-LR / first, &steps)])?;
        } else {
            m = combine(&[(0.9, &m), (1.0, &g), (DECAY, &w)])?;
            w = combine(&[(1.0, &w), (-LR, &m)])?;
        }
    }
    w.iter().map(|w| w.flatten_all()?.to_vec1::<f64>()).collect::<Result<Vec<_>>>().map(|all| all.concat())
}

fn trained<T: Weight>(settings: Settings<T>) -> Vec<f64> {
    let mlp = Mlp::new(T::DTYPE);
    let settings = Settings { weight_decay: DECAY, ..settings };
    let mut optimizer = Optimizer::new(mlp.vars.clone(), settings, LR).unwrap();
    for _ in 0..5 {
        optimizer.step(|| mlp.loss()).unwrap();
    }
    assert_eq!(optimizer.inner().telemetry().unwrap().skipped, 0);
    mlp.values()
}

/// The largest difference, relative to the largest number.
fn difference(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    found.iter().zip(expected).fold(0.0, |most: f64, (a, b)| most.max((a - b).abs())) / largest
}

#[test]
fn methods_equal_candle_operations() {
    let sgd = Base::sgd(0.9);
    let start = Mlp::new(DType::F64).values();
    let cases = [
        ("SAM", trained::<f64>(Settings::new(Sam::new(0.1), sgd)), reference(|mlp, w| sam(mlp, w, 0.1), false)),
        (
            "SAM on AdamW",
            trained::<f64>(Settings::new(Sam::new(0.1), Base::ADAMW)),
            reference(|mlp, w| sam(mlp, w, 0.1), true),
        ),
        (
            "ASAM",
            trained::<f64>(Settings::new(Asam { rho: 0.5, eta: 0.01, ..Asam::default() }, sgd)),
            reference(|mlp, w| asam(mlp, w, 0.5, 0.01), false),
        ),
        (
            "CR-SAM",
            trained::<f64>(Settings::new(CrSam { rho: 0.3, ..CrSam::default() }, sgd)),
            reference(|mlp, w| cr_sam(mlp, w, 0.3, 0.02, 0.01), false),
        ),
        (
            "CR-SAM on AdamW by name",
            trained::<f64>(settings("cr-sam", "rho=0.3", Some(Base::ADAMW)).unwrap()),
            reference(|mlp, w| cr_sam(mlp, w, 0.3, 0.02, 0.01), true),
        ),
    ];
    for (name, found, expected) in cases {
        let expected = expected.unwrap();
        assert!(difference(&expected, &start) > 1e-2, "{name}: the steps move the weights");
        let error = difference(&found, &expected);
        println!("{name}: {error:.1e}");
        assert!(error < 1e-12, "{name}: {error:e}");
    }
}

#[test]
fn single_precision_follows_double() {
    let single = trained::<f32>(settings("sam", "rho=0.1", None).unwrap());
    let double = trained::<f64>(settings("sam", "rho=0.1", None).unwrap());
    assert!(difference(&single, &double) < 1e-5);
}

#[test]
fn every_method_takes_steps() {
    for entry in METHODS {
        let mlp = Mlp::new(DType::F32);
        let start = mlp.loss().unwrap().to_scalar::<f32>().unwrap();
        // candle has no second derivatives, so GNR takes the difference of two gradients, and Sassha has none to take.
        if entry.name == "sassha" {
            continue;
        }
        let options = if entry.name == "gnr" { "hvp=difference" } else { "" };
        let settings = settings(entry.name, options, None).unwrap();
        let mut optimizer = Optimizer::<f32>::new(mlp.vars.clone(), settings, 0.01).unwrap();
        for _ in 0..20 {
            optimizer.step(|| mlp.loss()).unwrap_or_else(|error| panic!("{}: {error}", entry.name));
        }
        let end = mlp.loss().unwrap().to_scalar::<f32>().unwrap();
        assert!(end < start, "{}: {start} to {end}", entry.name);
    }
}

#[test]
fn products_with_the_hessian_are_refused() {
    let mlp = Mlp::new(DType::F64);
    let settings = settings("gnr", "hvp=exact", None).unwrap();
    let mut optimizer = Optimizer::<f64>::new(mlp.vars.clone(), settings, LR).unwrap();
    let before = bits(&mlp.vars);
    let error = optimizer.step(|| mlp.loss()).unwrap_err();
    assert_eq!(error.to_string(), "Objective::pass: this objective has no exact product with its Hessian");
    assert_eq!(bits(&mlp.vars), before);
}

polder::settings! {
    /// A method that returns to the weights after a pass elsewhere, and follows the gradient there.
    #[derive(Debug)]
    struct Return {}
}

impl<T: Weight> Method<T> for Return {
    fn passes(&self) -> Passes {
        Passes { gradients: 3, products: 0 }
    }
    fn needs(&self) -> Needs {
        Needs::vectors(3)
    }
    fn direction(&self, step: &mut Step<'_, T>) -> polder::device::Result<Direction> {
        step.gradient_at_weights()?;
        step.gradient_displaced(Vector::Weights, G0, 0, 0.5, 1, G1)?;
        step.gradient(Vector::Weights, 2, G1)?;
        Ok(Direction::along(G1))
    }
}

#[test]
fn a_pass_may_return_to_the_weights() {
    let plain = trained::<f64>(settings("sgd", "", None).unwrap());
    assert_eq!(trained::<f64>(Settings::new(Return {}, Base::sgd(0.9))), plain);
}

#[test]
fn the_first_loss_is_returned() {
    let mlp = Mlp::new(DType::F64);
    let before = mlp.loss().unwrap().to_scalar::<f64>().unwrap();
    let mut optimizer = Optimizer::<f64>::new(mlp.vars.clone(), settings("sam", "", None).unwrap(), LR).unwrap();
    let mut calls = 0;
    let loss = optimizer.step(|| {
        calls += 1;
        mlp.loss()
    });
    assert_eq!(loss.unwrap().to_scalar::<f64>().unwrap(), before);
    assert_eq!(optimizer.inner().telemetry().unwrap().loss, before);
    assert_eq!(calls, 2);
}

#[test]
fn variables_may_change_between_steps() {
    let [first, second] = [Mlp::new(DType::F64), Mlp::new(DType::F64)];
    let plain = || settings::<f64>("sam", "", Some(Base::sgd(0.0))).unwrap();
    let mut optimizer = Optimizer::new(first.vars.clone(), plain(), LR).unwrap();
    optimizer.step(|| first.loss()).unwrap();
    let loaded = tensor(&[7, 5], 30, DType::F64);
    for var in [&first.vars[0], &second.vars[0]] {
        var.set(&loaded).unwrap();
    }
    for k in 1..4 {
        second.vars[k].set(&first.vars[k].copy().unwrap()).unwrap();
    }
    optimizer.step(|| first.loss()).unwrap();
    // Without momentum, an optimizer that was made just now takes the same step.
    Optimizer::new(second.vars.clone(), plain(), LR).unwrap().step(|| second.loss()).unwrap();
    assert_eq!(bits(&first.vars), bits(&second.vars));
}

/// A variable that the closure itself changes, as batch norm does with its running statistics, and one that nobody
/// uses, with weight decay.
#[test]
fn unused_variables_keep_their_values() {
    let methods: [fn() -> Settings<f64>; 2] =
        [|| Settings::new(Sam::new(0.1), Base::sgd(0.9)), || Settings::new(RSam::default(), Base::ADAMW)];
    for (index, settings) in methods.into_iter().enumerate() {
        let mlp = Mlp::new(DType::F64);
        let counter = Var::zeros((), DType::F64, &Device::Cpu).unwrap();
        let unused = Var::from_tensor(&tensor(&[4], 40, DType::F64)).unwrap();
        let vars = [&mlp.vars[..2], &[counter.clone(), unused.clone()], &mlp.vars[2..]].concat();
        let mut optimizer = Optimizer::new(vars, Settings { weight_decay: 0.1, ..settings() }, LR).unwrap();
        let mut take_steps = |count| {
            for _ in 0..count {
                let counted = || {
                    counter.set(&(counter.as_tensor() + 1.0)?)?;
                    mlp.loss()
                };
                optimizer.step(counted).unwrap();
            }
        };
        // R-SAM's first pass of all moves every variable, because it cannot know yet which of them are used.
        take_steps(index);
        let (count, kept) = (counter.to_scalar::<f64>().unwrap(), bits(std::slice::from_ref(&unused)));
        take_steps(3);
        assert_eq!(counter.to_scalar::<f64>().unwrap() - count, 6.0);
        assert_eq!(bits(std::slice::from_ref(&unused)), kept);
    }
}

#[test]
fn a_step_that_is_not_finite_keeps_every_bit() {
    // Added, the poison leaves the gradient as it is.
    let poisons: [fn(Tensor) -> Result<Tensor>; 3] =
        [|loss| loss * f64::NAN, |loss| loss * f64::INFINITY, |loss| loss + f64::INFINITY];
    for (pass, poison) in (0..2).flat_map(|pass| poisons.map(|poison| (pass, poison))) {
        let mlp = Mlp::new(DType::F64);
        let settings = settings("sam", "", Some(Base::ADAMW)).unwrap();
        let mut optimizer =
            Optimizer::<f64>::new(mlp.vars.clone(), Settings { weight_decay: 0.1, ..settings }, LR).unwrap();
        optimizer.step(|| mlp.loss()).unwrap();
        let before = bits(&mlp.vars);
        let mut count = 0;
        let poisoned = || {
            count += 1;
            if count == pass + 1 { poison(mlp.loss()?) } else { mlp.loss() }
        };
        optimizer.step(poisoned).unwrap();
        assert_eq!(count, 2);
        assert_eq!(bits(&mlp.vars), before, "pass {pass}");
        assert_eq!(optimizer.inner().telemetry().unwrap().skipped, 1);
        optimizer.step(|| mlp.loss()).unwrap();
        assert_ne!(bits(&mlp.vars), before);
    }
}

#[test]
fn a_step_that_fails_keeps_every_bit() {
    let mlp = Mlp::new(DType::F64);
    let mut optimizer = Optimizer::<f64>::new(mlp.vars.clone(), settings("sam", "", None).unwrap(), LR).unwrap();
    let before = bits(&mlp.vars);
    let mut count = 0;
    let failing = || {
        count += 1;
        if count == 2 { Err(candle_core::Error::Msg("the data are gone".into())) } else { mlp.loss() }
    };
    let error = optimizer.step(failing).unwrap_err();
    assert!(matches!(error, Error::Candle(_)) && error.to_string().starts_with("the data are gone"), "{error}");
    assert_eq!(bits(&mlp.vars), before);

    let error = optimizer.step(|| Ok(mlp.x.clone())).unwrap_err();
    let expected = "the loss has the shape [11, 5] and the type F64, expected one floating-point number";
    assert_eq!(error.to_string(), expected);
    assert_eq!(bits(&mlp.vars), before);
}

#[test]
fn wrong_variables_and_settings_are_refused() {
    let refused = |vars: Vec<Var>, lr: f64| {
        let made = Optimizer::<f32>::new(vars, settings("sam", "", None).unwrap(), lr);
        made.err().map(|error| error.to_string()).unwrap_or_default()
    };
    let var = |dtype| Var::ones((2, 3), dtype, &Device::Cpu).unwrap();
    let good = var(DType::F32);
    assert_eq!(refused(vec![good.clone()], 0.1), "");
    assert_eq!(refused(vec![], 0.1), "there are no variables to train");
    assert_eq!(
        refused(vec![good.clone(), var(DType::F64)], 0.1),
        "variable 1 of shape [2, 3]: it has the type F64, expected F32"
    );
    assert_eq!(refused(vec![good.clone(), good.clone()], 0.1), "variable 1 of shape [2, 3]: it is in the list twice");
    assert_eq!(refused(vec![good.clone()], f64::NAN), "the learning rate is NaN, expected a finite number");

    let text = |name: &str, options: &str, base| settings::<f32>(name, options, base).unwrap_err().to_string();
    assert!(text("lion", "", None).starts_with("method lion: expected one of sgd, adamw, muon, sam, "));
    assert_eq!(text("sam", "rho", None), "option rho: expected name=value");
    assert_eq!(text("sam", "eta=1", None), "eta: unknown option");
    assert!(text("sam", "rho=-1", None).starts_with("rho: -1, expected a finite number"));
    assert_eq!(
        text("adamw", "", Some(Base::sgd(0.9))),
        "method adamw: it is a base optimizer itself, and another base was given"
    );
    assert_eq!(settings::<f32>("adamw", "", None).unwrap().base, Base::ADAMW);
    assert_eq!(settings::<f32>("sam", "", None).unwrap().base, Base::sgd(0.9));
}

#[test]
fn trainable_variables_are_in_the_order_of_their_names() {
    let map = VarMap::new();
    let builder = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    for name in ["c", "a", "b"] {
        candle_nn::batch_norm(3, 1e-5, builder.pp(name)).unwrap();
        candle_nn::linear(2, 3, builder.pp(format!("{name}.linear"))).unwrap();
    }
    let found: Vec<_> = trainable(&map).unwrap().iter().map(|var| var.id()).collect();
    let data = map.data().lock().unwrap();
    let names = ["a", "b", "c"].map(|name| {
        ["bias", "linear.bias", "linear.weight", "weight"].map(|tensor| data[&format!("{name}.{tensor}")].id())
    });
    assert_eq!(found, names.concat());
    assert_eq!(data.len(), 18, "with the running statistics");
}
