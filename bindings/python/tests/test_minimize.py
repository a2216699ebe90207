"""The methods on arrays of other libraries."""

import numpy as np
import pytest

import polder


def bowl(x):
    """½(10 x² + y²)"""
    scale = np.array([10.0, 1.0], dtype=x.dtype)
    return 0.5 * (scale * x * x).sum(), scale * x


def test_an_array_is_changed_in_place_without_a_copy():
    x = np.array([1.0, 1.0])
    seen = []

    def fun(at):
        seen.append(at.ctypes.data)
        return bowl(at)

    # SAM at (1, 1), rho 0.1: the golden direction.
    found = polder.minimize(fun, x, "sam", steps=1, lr=1.0, rho=0.1)
    assert found.x is x
    np.testing.assert_allclose(1 - x, [10.99503719, 1.00995037], rtol=1e-8)
    assert seen[0] == x.ctypes.data and seen[1] != x.ctypes.data
    assert found.fun == 5.5 and found.steps == 1 and found.skipped == 0
    assert found.telemetry["gradient_norm"] == pytest.approx(np.sqrt(101))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", [entry["name"] for entry in polder._polder.methods()])
def test_every_method_goes_down(method, dtype):
    x = np.full((3, 2), 2.0, dtype=dtype)
    options = {} if method in ("sgd", "adamw", "muon", "sa-sgd", "sa-sam", "gnr", "gam") else {"rho": 0.01}

    def fun(at):
        return 0.5 * (at * at).sum(), at.copy()

    # Muon's updates are as long for a small gradient as for a large one.
    lr = 0.1 if method == "muon" else 0.05
    found = polder.minimize(fun, x, method, steps=200, lr=lr, hessp=lambda at, p: p.copy(), **options)
    assert found.skipped == 0 and found.fun < 0.05 * 12, found


def test_a_schedule_and_a_callback():
    rates, losses = [], []

    def lr(step):
        rates.append(step)
        return 0.1 / (1 + step)

    def callback(step, loss):
        losses.append(loss)
        return step == 4

    found = polder.minimize(bowl, np.ones(2), "sgd", steps=100, lr=lr, callback=callback)
    assert rates == [0, 1, 2, 3] and found.steps == 4 and losses[0] == 5.5


def test_a_read_only_array_is_copied():
    x = np.ones(2)
    x.flags.writeable = False
    found = polder.minimize(bowl, x, "sgd", steps=5, lr=0.01)
    assert (x == 1).all() and (found.x < 1).all()


def test_points_may_be_kept_after_the_call():
    kept = []

    def fun(at):
        kept.append(at)
        return bowl(at)

    polder.minimize(fun, np.ones(2), "sam", steps=2)
    assert all(np.isfinite(point).all() and point.base is not None for point in kept)


@pytest.mark.parametrize("start", [np.array(1.0), np.asfortranarray(np.ones((3, 2))), np.ones(8)[::2]])
def test_arrays_of_any_form(start):
    found = polder.minimize(lambda at: (0.5 * (at * at).sum(), at.copy()), start, "sgd", steps=1, lr=0.5)
    np.testing.assert_allclose(found.x, np.full(start.shape, 0.5))


def test_steps_that_are_not_finite_are_skipped():
    def fun(at):
        return float("nan"), at.copy()

    x = np.ones(4)
    found = polder.minimize(fun, x, "cr-sam", steps=3)
    assert found.skipped == 3 and (x == 1).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: polder.minimize(bowl, np.ones(2), "newton"), ValueError, "method: 'newton', expected one of sgd"),
        (lambda: polder.minimize(bowl, np.ones(2), "sam", sigma=1), TypeError, "sam has no option 'sigma'"),
        (lambda: polder.minimize(bowl, np.ones(2), "sam", rho=-1), ValueError, "rho"),
        (lambda: polder.minimize(bowl, np.ones(2), "sam", base="adam"), ValueError, "base: 'adam'"),
        (lambda: polder.minimize(bowl, np.ones(2, dtype=int)), TypeError, "x0 is int64"),
        (lambda: polder.minimize(bowl, np.ones(0)), ValueError, "x0 is empty"),
        (lambda: polder.minimize(lambda x: (0, np.ones(3)), np.ones(2)), ValueError, r"shape \(3,\), expected \(2,\)"),
        (lambda: polder.minimize(bowl, np.ones(2), "gnr"), ValueError, "gnr needs hessp"),
        (lambda: polder.minimize(bowl, np.ones(2), "sgd", lr=-1.0), ValueError, "lr: -1"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_tensors_of_torch():
    torch = pytest.importorskip("torch")
    start = torch.ones(2, dtype=torch.float64)

    def fun(at):
        assert isinstance(at, torch.Tensor)
        scale = torch.tensor([10.0, 1.0], dtype=torch.float64)
        return 0.5 * (scale * at * at).sum(), scale * at

    found = polder.minimize(fun, start, "sam", steps=1, lr=1.0, rho=0.1)
    torch.testing.assert_close(
        1 - found.x, torch.tensor([10.99503719, 1.00995037], dtype=torch.float64), rtol=1e-8, atol=0
    )
    assert torch.equal(start, torch.ones(2, dtype=torch.float64))


def test_arrays_of_jax():
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp

    addresses = []

    def loss(x):
        return 0.5 * (jnp.array([10.0, 1.0]) * x * x).sum()

    gradient = jax.jit(jax.value_and_grad(loss))

    def fun(at):
        addresses.append(at.unsafe_buffer_pointer())
        return gradient(at)

    found = polder.minimize(fun, jnp.ones(2), "sam", steps=3, lr=0.05, rho=0.1)
    x = np.ones(2)
    polder.minimize(bowl, x, "sam", steps=3, lr=0.05, rho=0.1)
    np.testing.assert_allclose(np.asarray(found.x), x, rtol=1e-12)
    assert isinstance(found.x, jax.Array) and len(set(addresses)) == 2, "JAX works on the memory of the kernels"
