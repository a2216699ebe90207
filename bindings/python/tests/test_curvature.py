"""Curvature of PyTorch models against the whole Hessian."""

import gc
import json
import weakref

import pytest
import torch
from models import images, resnet8
from torch import nn
from torch.nn.functional import cross_entropy

import polder


def tiny(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def data(count=12, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(0, 3, (count,), generator=generator)


def whole_hessian(model, batch):
    """The Hessian in the order of the flat vector: matrices and vectors as the parameters come."""
    names, shapes = zip(*[(name, param.shape) for name, param in model.named_parameters()])
    flat = torch.cat([param.detach().flatten() for param in model.parameters()])

    def loss(w):
        parts = torch.split(w, [shape.numel() for shape in shapes])
        named = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes)}
        return cross_entropy(torch.func.functional_call(model, named, (batch[0],)), batch[1])

    return loss(flat).item(), torch.func.grad(loss)(flat), torch.func.hessian(loss)(flat)


def test_measures_are_those_of_the_whole_hessian():
    model, batch = tiny(), data()
    loss, gradient, hessian = whole_hessian(model, batch)
    measured = polder.curvature(model, cross_entropy, batch)
    values, vectors = torch.linalg.eigh(hessian)
    assert measured.loss() == pytest.approx(loss, rel=1e-12)
    assert measured.gradient_norm() == pytest.approx(gradient.norm().item(), rel=1e-12)
    v = gradient / gradient.norm()
    assert measured.along_gradient() == pytest.approx((v @ hessian @ v).item(), rel=1e-10)

    found = measured.eigenvalues(3, tolerance=1e-8, vectors=True)
    assert found.values == pytest.approx(values.flip(0)[:3].tolist(), rel=1e-8)
    first = torch.cat([part.flatten() for part in found.vectors[0]])
    assert abs(first @ vectors[:, -1]).item() == pytest.approx(1, abs=1e-8)
    assert [part.shape for part in found.vectors[0]] == [param.shape for param in model.parameters()]
    power = measured.eigenvalues(1, steps=2000, tolerance=1e-8, method="power")
    largest = max(values.tolist(), key=abs)
    assert power.values == pytest.approx([largest], rel=1e-6)

    trace = hessian.trace().item()
    estimate = measured.trace(400, seed=2)
    assert abs(estimate.value - trace) < 4 * estimate.standard_error
    assert measured.trace(3 * hessian.shape[0], method="hutch++").value == pytest.approx(trace, rel=1e-6)
    blocks = measured.traces(400, seed=2)
    start = 0
    for param, block in zip(model.parameters(), blocks, strict=True):
        part = slice(start, start + param.numel())
        start += param.numel()
        assert abs(block.value - hessian[part, part].trace().item()) < 5 * block.standard_error + 1e-12
    normalised = measured.normalized_trace(400, seed=2)
    assert normalised.value == pytest.approx(estimate.value / gradient.norm().item(), rel=1e-9)

    spectrum = measured.spectrum(20, steps=hessian.shape[0])
    assert sum(spectrum.weights) == pytest.approx(1, abs=1e-9)
    total = hessian.shape[0] * sum(node * weight for node, weight in zip(*spectrum))
    assert abs(total - trace) < 4 * estimate.standard_error * (400 / 20) ** 0.5
    density = spectrum.density([x / 50 for x in range(-100, 200)], sigma=0.05)
    assert sum(density) / 50 == pytest.approx(1, abs=0.02)

    rise = measured.sharpness(0.1)
    assert 0 < rise.one_step <= rise.largest


def test_everything_is_left_as_it_was():
    model, batch = resnet8(), images(6)
    before = [value.clone() for value in model.state_dict().values()]
    pointers = [param.data_ptr() for param in model.parameters()]
    measured = polder.curvature(model, cross_entropy, batch)
    measured.trace(2)
    measured.sharpness(0.05, steps=2)
    assert pointers == [param.data_ptr() for param in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(param.grad is None for param in model.parameters())


def test_batches_are_weighted_by_their_size():
    model, batch = tiny(), data(10)
    parts = [(batch[0][:7], batch[1][:7]), (batch[0][7:], batch[1][7:])]
    whole, split = (polder.curvature(model, cross_entropy, of) for of in (batch, parts))
    assert split.loss() == pytest.approx(whole.loss(), rel=1e-12)
    assert split.gradient_norm() == pytest.approx(whole.gradient_norm(), rel=1e-12)
    assert split.trace(4).value == pytest.approx(whole.trace(4).value, rel=1e-10)


def test_a_closure_in_single_precision_beside_an_optimizer():
    from polder.torch import SAM

    model, batch = tiny(torch.float32), data(dtype=torch.float32)
    optimizer = SAM(model.parameters(), lr=0.1)

    def loss():
        return cross_entropy(model(batch[0]), batch[1])

    for _ in range(3):
        optimizer.step(loss)
    _, gradient, hessian = whole_hessian(model, batch)
    measured = polder.curvature(loss, params=model.parameters())
    assert measured.gradient_norm() == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert measured.eigenvalues(1).values == pytest.approx([torch.linalg.eigvalsh(hessian)[-1].item()], rel=1e-3)
    optimizer.step(loss)


def test_weights_are_those_of_the_measurement():
    model, batch = tiny(), data()
    measured = polder.curvature(model, cross_entropy, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    after = [param.detach().clone() for param in model.parameters()]
    assert measured.loss() == pytest.approx(whole_hessian(model, batch)[0], rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(after, model.parameters()))


def test_a_measurement_is_freed_with_its_model():
    model = tiny()
    measured = polder.curvature(model, cross_entropy, data())
    measured.trace(1)
    alive = weakref.ref(model)
    del measured, model
    gc.collect()
    assert alive() is None


def test_dropout_is_one_function():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    measured = polder.curvature(model, cross_entropy, data())
    state = torch.random.get_rng_state()
    assert measured.trace(2, seed=1) == measured.trace(2, seed=1)
    found = measured.eigenvalues(1, tolerance=1e-6)
    assert found.residuals[0] < 1e-5 * found.values[0]
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_measurement_around_another_and_exceptions_of_progress():
    measured = polder.curvature(tiny(), cross_entropy, data())
    with pytest.raises(RuntimeError, match="a measurement is in progress"):
        measured.trace(2, progress=lambda done: measured.gradient_norm())
    with pytest.raises(KeyError, match="told"):
        measured.spectrum(1, steps=2, progress=lambda done: (_ for _ in ()).throw(KeyError("told")))
    assert measured.gradient_norm() > 0


def test_what_cannot_be_measured_is_refused():
    model, batch = tiny(), data()
    with pytest.raises(TypeError, match="needs a criterion and data"):
        polder.curvature(model)
    with pytest.raises(TypeError, match="needs params"):
        polder.curvature(lambda: torch.zeros(()))
    with pytest.raises(ValueError, match="no batch"):
        polder.curvature(model, cross_entropy, [])
    measured = polder.curvature(model, cross_entropy, (batch[0] * float("nan"), batch[1]))
    with pytest.raises(ArithmeticError, match="finite"):
        measured.trace(1)
    with pytest.raises(ValueError, match="method: 'exact'"):
        measured.trace(method="exact")

    def broken():
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        polder.curvature(broken, params=model.parameters()).gradient_norm()


def test_a_landscape_is_evaluated_and_drawn(tmp_path):
    model, batch = tiny(), data()
    pictures = polder.landscape(
        model, cross_entropy, batch, folder=tmp_path / "two", points=5, reach=0.5, subject="tiny"
    )
    assert {picture.suffix for picture in pictures} >= {".svg"} and all(picture.stat().st_size for picture in pictures)
    assert not list((tmp_path / "two").glob("accuracy*")) and not list((tmp_path / "two").glob("*.part"))
    lines = (tmp_path / "two" / "landscape.csv").read_text().splitlines()
    assert lines[0] == "x,y,loss,accuracy" and len(lines) == 26
    middle = next(line for line in lines if line.startswith("0.0,0.0,"))
    loss = whole_hessian(model, batch)[0]
    assert float(middle.split(",")[2]) == pytest.approx(loss, rel=1e-12)
    assert json.loads((tmp_path / "two" / "landscape.json").read_text())["axes"][0]["values"][0] == -0.5

    measured = polder.curvature(model, cross_entropy, batch)
    along = measured.eigenvalues(1, tolerance=1e-8, vectors=True)
    measured.landscape(tmp_path / "one", points=3, reach=1e-3, dimensions=1, directions=along.vectors)
    rows = [line.split(",") for line in (tmp_path / "one" / "landscape.csv").read_text().splitlines()[1:]]
    low, middle, high = (float(row[1]) for row in rows)
    assert (low + high - 2 * middle) / 1e-6 == pytest.approx(along.values[0], rel=1e-3)
    with pytest.raises(FileExistsError, match="holds a landscape already"):
        measured.landscape(tmp_path / "one")
