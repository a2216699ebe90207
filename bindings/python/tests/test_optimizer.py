"""What `torch.optim.Optimizer` promises, for the sharpness-aware ones."""

import copy
import gc
import inspect
import io
import os
import resource
import subprocess
import sys
import unittest.mock

import pytest
import torch
from models import images, resnet8
from torch import nn
from torch.nn.functional import cross_entropy

import polder.torch
from polder.torch import (
    ASAM,
    CRSAM,
    GNR,
    GSAM,
    MSAM,
    SAM,
    SASAM,
    SGD,
    WSAM,
    AdamW,
    FriendlySAM,
    LookSAM,
    RandomSAM,
    RSAM,
    SAMPa,
    Sassha,
)

# More of the base takes part in their steps than following a direction.
NEEDS_OUR_BASE = (MSAM, WSAM, SAMPa)
# They differentiate twice, so the closure leaves `backward` to them.
DIFFERENTIATES = (GNR, Sassha)
CLASSES = [getattr(polder.torch, name) for name in polder.torch.__all__ if name != "SharpnessAware"]


def optimizer_of(cls, model, **options):
    if not cls._method["computes_rate"]:
        options.setdefault("lr", 0.01)
    return cls(model.parameters(), **options)


def closure_of(optimizer, model, batch, backward=True):
    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(batch[0]), batch[1])
        if backward:
            loss.backward()
        return loss

    return closure


def train(optimizer, model, steps, first=0):
    for step in range(first, first + steps):
        batch = images(4, seed=step, dtype=next(model.parameters()).dtype)
        optimizer.step(closure_of(optimizer, model, batch, backward=not isinstance(optimizer, DIFFERENTIATES)))


def small_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(432, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 10)
    ).to(dtype)  # fmt: skip


def bits(model):
    return [value.clone() for value in model.state_dict().values()]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- Long tensors, whose gradients stay where PyTorch has put them


def long_model(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(432, 160), nn.BatchNorm1d(160), nn.Tanh(), nn.Linear(160, 420), nn.Linear(420, 10)
    ).to(dtype)  # fmt: skip


def gathered(optimizer):
    """Lets it copy every gradient."""
    holds = polder.torch._Memory.holds

    def copies(memory, addresses, keep):
        holds(memory, addresses, keep)
        return False

    return unittest.mock.patch.object(polder.torch._Memory, "holds", copies)


@pytest.mark.parametrize("base", ["sgd", "adamw", torch.optim.SGD])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_stay_give_the_bits_of_copied_ones(cls, base, dtype):
    if base not in bases(cls):
        pytest.skip("the method has another base")
    left, copied = long_model(dtype), long_model(dtype)
    optimizer = optimizer_of(cls, left, base=base)
    train(optimizer, left, 4)
    assert optimizer._memory._own
    with gathered(optimizer):
        train(optimizer_of(cls, copied, base=base), copied, 4)
    assert same_bits(bits(left), bits(copied))


@pytest.mark.parametrize("cls", [SAM, CRSAM])
def test_a_closure_may_put_its_gradients_into_one_memory(cls):
    own, one = long_model(), long_model()
    train(optimizer_of(cls, own), own, 3)
    optimizer = optimizer_of(cls, one)
    memory = [torch.empty_like(param) for param in one.parameters()]
    for step in range(3):
        plain = closure_of(optimizer, one, images(4, seed=step, dtype=torch.float32))

        def closure(plain=plain):
            loss = plain()
            for param, place in zip(one.parameters(), memory, strict=True):
                param.grad = place.copy_(param.grad)
            return loss

        optimizer.step(closure)
    assert same_bits(bits(own), bits(one))
    assert optimizer._memory._own is False


def test_a_closure_that_begins_to_share_memory_is_noticed():
    model = long_model()
    optimizer = optimizer_of(CRSAM, model)
    train(optimizer, model, 2)
    before = bits(model)[:2]
    memory = [torch.empty_like(param) for param in model.parameters()]
    plain = closure_of(optimizer, model, images(4, dtype=torch.float32))

    def closure():
        loss = plain()
        for param, place in zip(model.parameters(), memory, strict=True):
            param.grad = place.copy_(param.grad)
        return loss

    with pytest.raises(RuntimeError, match="same memory"):
        optimizer.step(closure)
    assert same_bits(bits(model)[:2], before)
    optimizer.step(closure)
    assert not same_bits(bits(model)[:2], before)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_two_calls_keep_the_first_gradient_of_long_tensors(set_to_none):
    one, two = long_model(), long_model()
    train(optimizer_of(GSAM, one), one, 3)
    optimizer = optimizer_of(GSAM, two)
    for step in range(3):
        inputs, labels = images(4, seed=step, dtype=torch.float32)
        for finish in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad(set_to_none=set_to_none)
            cross_entropy(two(inputs), labels).backward()
            finish()
    assert same_bits(bits(one), bits(two))


# ---- The weights


@pytest.mark.parametrize("cls", CLASSES)
def test_a_zero_update_leaves_every_bit(cls):
    model = small_model()
    batch = images(4, dtype=torch.float32)
    if cls._method["computes_rate"]:
        # There is no rate to be zero, but a step that is not finite has no update either.
        optimizer = optimizer_of(cls, model)
        batch = batch[0] * float("nan"), batch[1]
    else:
        optimizer = optimizer_of(cls, model, lr=0.0)
    closure = closure_of(optimizer, model, batch, backward=cls not in DIFFERENTIATES)
    weights = [param.detach().clone() for param in model.parameters()]
    for _ in range(1000):
        optimizer.step(closure)
    assert same_bits(weights, [param.detach() for param in model.parameters()])


def test_the_perturbation_is_that_of_the_formula():
    model, batch = small_model(dtype=torch.float64), images(4)
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.3)
    start = [param.detach().clone() for param in model.parameters()]
    seen = []

    def closure():
        seen.append([param.detach().clone() for param in model.parameters()])
        loss = cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    optimizer.step(closure)
    loss = cross_entropy(small_model(dtype=torch.float64)(batch[0]), batch[1])
    assert same_bits(seen[0], start)
    distance = sum(((a - b) ** 2).sum() for a, b in zip(seen[1], seen[0])).sqrt()
    assert distance.item() == pytest.approx(0.3, rel=1e-9)
    assert loss.item() == optimizer.telemetry()["loss"]


def test_batch_norm_follows_the_first_pass_alone():
    model, batch = resnet8(), images(4)
    once = copy.deepcopy(model)
    once(batch[0])
    optimizer = CRSAM(model.parameters(), lr=0.01)
    optimizer.step(closure_of(optimizer, model, batch))
    assert same_bits(list(model.buffers()), list(once.buffers()))


def test_a_step_that_is_not_finite_is_skipped():
    model, batch = small_model(), images(4, dtype=torch.float32)
    optimizer = SAM(model.parameters(), lr=0.1, momentum=0.9)
    train(optimizer, model, 1)
    weights = [param.detach().clone() for param in model.parameters()]
    momenta = [optimizer.state[param]["momentum_buffer"].clone() for param in model.parameters()]
    poison = closure_of(optimizer, model, (batch[0] * float("inf"), batch[1]))
    optimizer.step(poison)
    assert optimizer.telemetry()["skipped"] == 1
    assert same_bits(weights, list(model.parameters()))
    assert same_bits(momenta, [optimizer.state[param]["momentum_buffer"] for param in model.parameters()])


def test_an_exception_in_the_closure_leaves_the_weights():
    model = small_model()
    optimizer = SAM(model.parameters(), lr=0.1)
    train(optimizer, model, 1)
    before, calls = [param.detach().clone() for param in model.parameters()], []

    def closure():
        calls.append(1)
        loss = cross_entropy(model(images(4, dtype=torch.float32)[0]), torch.zeros(4, dtype=torch.long))
        loss.backward()
        if len(calls) == 2:
            raise KeyError("second pass")
        return loss

    with pytest.raises(KeyError, match="second pass"):
        optimizer.step(closure)
    assert same_bits(before, list(model.parameters()))
    train(optimizer, model, 1)


# ---- The interface of torch.optim


def bases(cls):
    """The bases that a class can have."""
    own = cls._method["base"] is not None or cls._method["computes_rate"]
    if own:
        return ["sgd"]
    return ["sgd", "adamw"] if cls in NEEDS_OUR_BASE else ["sgd", "adamw", torch.optim.SGD, torch.optim.Adam]


@pytest.mark.parametrize(("cls", "base"), [(cls, base) for cls in CLASSES for base in bases(cls)])
def test_a_loaded_state_goes_on_with_the_same_bits(cls, base):
    options = {} if cls._method["base"] is not None else {"base": base}
    if base in ("sgd", torch.optim.SGD) and cls is not AdamW:
        options["momentum"] = 0.9
    model = small_model()
    optimizer = optimizer_of(cls, model, **options)
    train(optimizer, model, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(optimizer, model, 4, first=3)

    other = small_model(seed=1)
    resumed = optimizer_of(cls, other, **options)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, other, 4, first=3)
    assert same_bits(bits(model), bits(other))


def test_a_state_of_another_method_is_refused():
    model = small_model()
    optimizer = SAM(model.parameters(), lr=0.1)
    train(optimizer, model, 1)
    with pytest.raises(ValueError, match="the state is that of sam, not of looksam"):
        LookSAM(model.parameters(), lr=0.1).load_state_dict(optimizer.state_dict())


def test_a_copy_goes_on_with_the_same_bits():
    model = small_model()
    optimizer = FriendlySAM(model.parameters(), lr=0.1, momentum=0.9)
    train(optimizer, model, 2)
    other, copied = copy.deepcopy((model, optimizer))
    train(optimizer, model, 2, first=2)
    train(copied, other, 2, first=2)
    assert same_bits(bits(model), bits(other))


def test_groups_and_schedulers():
    torch.manual_seed(1)
    model, plain = small_model(dtype=torch.float64), small_model(dtype=torch.float64)

    def groups(of):
        vectors = [param for param in of.parameters() if param.dim() < 2]
        matrices = [param for param in of.parameters() if param.dim() >= 2]
        return [{"params": vectors, "lr": 0.03, "weight_decay": 0.0}, {"params": matrices, "momentum": 0.5}]

    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizer, reference = SGD(groups(model), **options), torch.optim.SGD(groups(plain), **options)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(of, 5) for of in (optimizer, reference)]
    for step in range(5):
        batch = images(4, seed=step)
        optimizer.step(closure_of(optimizer, model, batch))
        reference.step(closure_of(reference, plain, batch))
        for scheduler in schedulers:
            scheduler.step()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_cycled_momentum_and_rho_take_effect():
    model = small_model(dtype=torch.float64)
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.1)
    train(optimizer, model, 1)
    optimizer.param_groups[0].update(rho=0.4, momentum=0.7)
    seen = []
    batch = images(4)

    def closure():
        seen.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
        loss = cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (seen[1] - seen[0]).norm().item() == pytest.approx(0.4, rel=1e-9)


def test_added_parameters_are_trained_and_the_others_keep_their_state():
    model = small_model(dtype=torch.float64)
    head = list(model[4].parameters())
    body = [param for param in model.parameters() if all(param is not other for other in head)]
    plain = copy.deepcopy(model)
    optimizer = SGD(body, lr=0.1, momentum=0.9)
    reference = torch.optim.SGD([p for n, p in plain.named_parameters() if not n.startswith("4")], lr=0.1, momentum=0.9)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": head, "lr": 0.02})
            reference.add_param_group({"params": list(plain[4].parameters()), "lr": 0.02})
        batch = images(4, seed=step)
        optimizer.step(closure_of(optimizer, model, batch))
        reference.step(closure_of(reference, plain, batch))
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    memory = LookSAM(model[1].parameters(), lr=0.1)
    memory.step(closure_of(memory, model, images(4)))
    with pytest.raises(ValueError, match="no parameters can be added"):
        memory.add_param_group({"params": head})


def test_hooks_run():
    model, seen = small_model(), []
    optimizer = SAM(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(optimizer, model, 1)
    assert seen == ["before", "after"]


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_any_base_of_torch_follows_the_direction(base):
    fused = {torch.optim.SGD: "sgd", torch.optim.AdamW: "adamw"}[base]
    options = {"lr": 0.01, "weight_decay": 0.02} | ({"momentum": 0.9} if fused == "sgd" else {})
    model, other = small_model(dtype=torch.float64), small_model(dtype=torch.float64)
    ours, theirs = GSAM(model.parameters(), fused, **options), GSAM(other.parameters(), base, **options)
    for step in range(5):
        batch = images(4, seed=step)
        ours.step(closure_of(ours, model, batch))
        theirs.step(closure_of(theirs, other, batch))
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("base", ["sgd", torch.optim.SGD])
@pytest.mark.parametrize("cls", [SAM, ASAM, GSAM, LookSAM, FriendlySAM])
def test_two_calls_do_what_a_closure_does(cls, base):
    model, other = small_model(), small_model()
    ours, theirs = (optimizer_of(cls, of, base=base, momentum=0.9) for of in (model, other))
    for step in range(7):
        batch = images(4, seed=step, dtype=torch.float32)
        ours.step(closure_of(ours, model, batch))
        cross_entropy(other(batch[0]), batch[1]).backward()
        theirs.first_step(zero_grad=True)
        cross_entropy(other(batch[0]), batch[1]).backward()
        theirs.second_step(zero_grad=True)
    assert same_bits(list(model.parameters()), list(other.parameters()))


def test_two_calls_are_refused_where_they_have_no_meaning():
    model = small_model()
    train(model=model, optimizer=(optimizer := CRSAM(model.parameters(), lr=0.1)), steps=1)
    with pytest.raises(RuntimeError, match="CRSAM takes 3 gradients in a step: use step"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="second_step without first_step"):
        optimizer.second_step()
    randomly = RSAM(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="RSAM takes no gradient at the weights"):
        randomly.first_step()
    with pytest.raises(RuntimeError, match="needs a closure"):
        SAM(model.parameters(), lr=0.1).step()


# ---- Closures and gradients


def test_gradients_may_be_left_to_the_optimizer():
    model, other = small_model(), small_model()
    ours, theirs = SAM(model.parameters(), lr=0.1), SAM(other.parameters(), lr=0.1)
    for step in range(3):
        batch = images(4, seed=step, dtype=torch.float32)
        ours.step(closure_of(ours, model, batch))
        theirs.step(closure_of(theirs, other, batch, backward=False))
    assert same_bits(bits(model), bits(other))


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda loss: loss.item(), RuntimeError, "neither called backward nor returned a loss with a graph"),
        (lambda loss: None, TypeError, "returned a NoneType, expected the loss"),
        (lambda loss: (loss, 1), TypeError, "returned a tuple, expected the loss"),
        (lambda loss: torch.stack([loss, loss]), ValueError, r"shape \(2,\), expected one loss"),
    ],
)
def test_what_is_no_loss_is_refused(answer, error, message):
    model, batch = small_model(), images(4, dtype=torch.float32)
    optimizer = SAM(model.parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        optimizer.step(lambda: answer(cross_entropy(model(batch[0]), batch[1])))


def test_exact_products_say_which_closure_they_need():
    model = small_model()
    optimizer = GNR(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="without calling backward; or pass hvp='difference'"):
        optimizer.step(closure_of(optimizer, model, images(4, dtype=torch.float32)))
    difference = GNR(model.parameters(), lr=0.1, hvp="difference")
    difference.step(closure_of(difference, model, images(4, dtype=torch.float32)))


def test_accumulated_gradients_are_those_of_the_whole_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 10)).double()
    other, batch = copy.deepcopy(model), images(8)
    ours, theirs = SAM(model.parameters(), lr=0.1), SAM(other.parameters(), lr=0.1)

    def accumulated():
        ours.zero_grad()
        total = 0.0
        for part in (slice(0, 4), slice(4, 8)):
            loss = cross_entropy(model(batch[0][part]), batch[1][part]) / 2
            loss.backward()
            total += loss.item()
        return total

    for _ in range(3):
        assert ours.step(accumulated) == pytest.approx(theirs.step(closure_of(theirs, other, batch)).item())
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=1e-12, atol=1e-14)


def test_frozen_shared_and_unused_parameters():
    model = small_model()
    model[1].weight.requires_grad_(False)
    frozen = model[1].weight.clone()
    unused = nn.Parameter(torch.ones(3))
    optimizer = SAM([*model.parameters(), unused], lr=0.1, momentum=0.9)
    train(optimizer, model, 2)
    assert torch.equal(frozen, model[1].weight) and torch.equal(unused, torch.ones(3))
    model[1].weight.requires_grad_(True)
    train(optimizer, model, 2)
    assert not torch.equal(frozen, model[1].weight)

    torch.manual_seed(0)
    tied = nn.Sequential(nn.Flatten(), nn.Linear(432, 432, bias=False), nn.Linear(432, 432, bias=False))
    tied[2].weight = tied[1].weight
    optimizer = SAM(tied.parameters(), lr=0.1)
    train(optimizer, tied, 2)
    assert tied[2].weight is tied[1].weight


def test_other_memory_orders_are_kept():
    model, other = resnet8(dtype=torch.float32), resnet8(dtype=torch.float32).to(memory_format=torch.channels_last)
    ours, theirs = SAM(model.parameters(), lr=0.01), SAM(other.parameters(), lr=0.01)
    train(ours, model, 2)
    train(theirs, other, 2)
    assert other.layer1.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_parameters_that_are_moved_or_loaded_are_taken_over():
    model, start = small_model(), small_model(seed=5)
    optimizer = SAM(model.parameters(), lr=0.1, momentum=0.9)
    train(optimizer, model, 1)
    for param, value in zip(model.parameters(), start.parameters()):
        param.data = value.detach().clone()
    taken = copy.deepcopy(start)
    plain = torch.optim.SGD(taken.parameters(), lr=0.1)
    batch = images(4, dtype=torch.float32)
    optimizer.param_groups[0].update(rho=0.0, momentum=0.0)
    optimizer.step(closure_of(optimizer, model, batch))
    plain.step(closure_of(plain, taken, batch))
    torch.testing.assert_close(list(model.parameters()), list(taken.parameters()), rtol=1e-5, atol=1e-7)
    model.double()
    train(optimizer, model, 1)
    assert all(param.dtype == torch.float64 for param in model.parameters())


def parameter(**of):
    return nn.Parameter(torch.ones(3, **of))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [parameter(), parameter(dtype=torch.float64)], "make an optimizer for each type"),
        (lambda: [parameter(dtype=torch.bfloat16)], "keep the parameters in float32 and use autocast"),
        (lambda: [parameter(device="meta"), parameter()], "make an optimizer for each device"),
        (lambda: [parameter(device="meta")], "device meta: expected cpu or cuda"),
        (lambda: [nn.Parameter(torch.eye(3).to_sparse())], "expected a dense one"),
        (lambda: (lambda flat: [nn.Parameter(flat), nn.Parameter(flat)])(torch.ones(3)), "share memory"),
        (lambda: [nn.Parameter(torch.ones(3), requires_grad=False)], "no parameter has requires_grad"),
    ],
)  # fmt: skip
def test_what_cannot_be_one_vector_is_refused(make, message):
    params = make()
    optimizer = SGD(params, lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: torch.zeros(()))


def test_a_sparse_gradient_is_refused():
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = SGD(embedding.parameters(), lr=0.1)

    def closure():
        loss = embedding(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="sparse"):
        optimizer.step(closure)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: SAM(p, rho=-1.0), ValueError, "rho"),
        (lambda p: SAM(p, lr=0.1, sigma=1.0), TypeError, "SAM has no option 'sigma', expected one of lr, momentum"),
        (lambda p: SAM(p, "adam"), ValueError, "base: 'adam', expected 'sgd', 'adamw', 'muon' or a class"),
        (lambda p: SAM(p, adaptive=True), ValueError, "use ASAM"),
        (lambda p: SAM(p, torch.optim.Adadelta), ValueError, "SAM and Adadelta both have an option rho"),
        (lambda p: SAM(p, torch.optim.LBFGS), ValueError, "LBFGS needs a closure of its own"),
        (lambda p: SAM(p, lr=-0.1), ValueError, "lr: -0.1, expected a finite number"),
        (lambda p: SGD(p, lr=0.1, nesterov=True), ValueError, "nesterov: needs a momentum"),
        (lambda p: SASAM(p, "adamw"), ValueError, "computes the step size itself"),
        (lambda p: SAM(p, p_norm="inf", second_order=True), ValueError, "second-order"),
        (lambda p: CRSAM(p, form="cubic"), ValueError, "form"),
        (lambda p: CRSAM(p, no_sync=nn.Module), ValueError, "no_sync: CRSAM follows more than the gradient"),
        (lambda p: GSAM(p, no_sync=nn.Module), ValueError, "no_sync: GSAM follows more than the gradient"),
        (lambda p: LookSAM(p, no_sync=nn.Module), ValueError, "no_sync: LookSAM follows more than the gradient"),
        (lambda p: SAM([{"params": p[:1]}, {"params": p[1:], "rho": 0.3}]), ValueError, "expected the same in all"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_at_once(make, error, message):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(error, match=message):
        make(params)


def test_wrong_numbers_of_a_schedule_are_refused_in_the_step():
    model = small_model()
    optimizer = SAM(model.parameters(), lr=0.1)
    train(optimizer, model, 1)
    optimizer.param_groups[0]["lr"] = float("nan")
    before = bits(model)
    with pytest.raises(ValueError, match="lr: NaN, expected a finite number"):
        train(optimizer, model, 1)
    optimizer.param_groups[0].update(lr=0.1, rho=-2.0)
    with pytest.raises(ValueError, match="rho"):
        train(optimizer, model, 1)
    assert same_bits(before[:2], bits(model)[:2])


def test_a_step_inside_its_own_closure_is_refused():
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    train(optimizer, model, 1)

    def closure():
        optimizer._engine.telemetry()

    with pytest.raises(RuntimeError, match="in use: by another thread, or by its own closure"):
        optimizer.step(closure)


def test_checkpoints_hold_every_tensor_and_no_more():
    """Programs such as safetensors take tensors of one storage for one tensor."""
    model = small_model()
    optimizer = SAM(model.parameters(), lr=0.1, momentum=0.9)
    train(optimizer, model, 2)
    tensors = [*model.parameters(), *(optimizer.state[param]["momentum_buffer"] for param in model.parameters())]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    file = io.BytesIO()
    torch.save(model[4].state_dict(), file)
    assert file.tell() < 4000


def test_state_that_is_replaced_moved_or_removed_is_taken_over():
    model, plain = small_model(dtype=torch.float64), small_model(dtype=torch.float64)
    ours, theirs = (
        SGD(model.parameters(), lr=0.1, momentum=0.9),
        torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9),
    )
    for step in range(5):
        for optimizer, of in ((ours, model), (theirs, plain)):
            if step == 2:
                for param in of.parameters():
                    optimizer.state[param]["momentum_buffer"].share_memory_()
                    param.share_memory_()
            if step == 3:
                for param in of.parameters():
                    optimizer.state[param]["momentum_buffer"] = torch.full_like(param, 0.01)
            if step == 4:
                optimizer.state.clear()
            optimizer.step(closure_of(optimizer, of, images(4, seed=step)))
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert all("momentum_buffer" in ours.state[param] for param in model.parameters())


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_checkpoints_of_torch_go_on(name):
    options = {"lr": 0.01, "weight_decay": 0.02} | ({"momentum": 0.9} if name == "SGD" else {})
    model, plain = small_model(dtype=torch.float64), small_model(dtype=torch.float64)
    theirs = getattr(torch.optim, name)(plain.parameters(), **options)
    for step in range(6):
        if step == 3:
            model.load_state_dict(plain.state_dict())
            ours = getattr(polder.torch, name)(model.parameters(), **options)
            ours.load_state_dict(theirs.state_dict())
        if step >= 3:
            ours.step(closure_of(ours, model, images(4, seed=step)))
        theirs.step(closure_of(theirs, plain, images(4, seed=step)))
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    perturbed = SAM(model.parameters(), name.lower(), rho=0.2, **options)
    perturbed.load_state_dict(theirs.state_dict())
    assert perturbed.param_groups[0]["rho"] == 0.2


def test_a_second_use_during_a_step_is_refused_before_it_does_harm():
    model, batch = small_model(), images(4, dtype=torch.float32)
    optimizer, other = SAM(model.parameters(), lr=0.0, rho=1.0), small_model()
    train(optimizer, model, 1)
    before = [param.detach().clone() for param in model.parameters()]
    for use in (lambda: optimizer.step(closure_of(optimizer, model, batch)), lambda: optimizer.load_state_dict({}),
                lambda: optimizer.add_param_group({"params": list(other.parameters())}), optimizer.first_step):  # fmt: skip
        refused = []

        def closure():
            with pytest.raises(RuntimeError, match="in use: by another thread, or by its own closure"):
                use()
            refused.append(1)
            return cross_entropy(model(batch[0]), batch[1])

        optimizer.step(closure)
        assert len(refused) == 2
        assert same_bits(before, list(model.parameters()))


def test_a_first_step_may_be_taken_again():
    model, other, batch = small_model(), small_model(), images(4, dtype=torch.float32)
    once, twice = (SAM(of.parameters(), lr=0.1, rho=1.0) for of in (model, other))
    for optimizer, of, times in ((once, model, 1), (twice, other, 2)):
        cross_entropy(of(batch[0]), batch[1]).backward()
        for _ in range(times):
            optimizer.first_step()
        optimizer.zero_grad()
        cross_entropy(of(batch[0]), batch[1]).backward()
        optimizer.second_step()
    assert same_bits(list(model.parameters()), list(other.parameters()))
    twice.first_step()
    twice.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert same_bits(list(model.parameters()), list(other.parameters()))


def test_an_old_graph_is_refused_after_a_step():
    model, batch = small_model(), images(4, dtype=torch.float32)
    optimizer = SGD(model.parameters(), lr=0.1)
    train(optimizer, model, 1)
    loss = cross_entropy(model(batch[0]), batch[1])
    train(optimizer, model, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- Mixed precision, compilation, several processes


def test_a_scaler_is_told_and_changes_nothing_else():
    model, other = small_model(), small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    ours, theirs = SAM(model.parameters(), lr=0.1), SAM(other.parameters(), lr=0.1)
    for step in range(4):
        batch = images(4, seed=step, dtype=torch.float32)

        def closure():
            ours.zero_grad()
            loss = cross_entropy(model(batch[0]), batch[1])
            scaler.scale(loss).backward()
            return loss

        ours.step(closure, scaler=scaler)
        scaler.update()
        theirs.step(closure_of(theirs, other, batch))
    # Scaling by a power of two is exact.
    assert same_bits(list(model.parameters()), list(other.parameters()))
    assert scaler.get_scale() == 2.0**11

    def overflow():
        loss = cross_entropy(model(batch[0]), batch[1])
        scaler.scale(loss * float("inf")).backward()
        return loss

    before = bits(model)[:2]
    assert same_bits(before, bits(model)[:2])
    ours.step(overflow, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**10 and same_bits(before, bits(model)[:2])
    with pytest.raises(RuntimeError, match=r"call step\(closure, scaler=scaler\)"):
        scaler.step(ours, closure)
    # Gradients that are taken here have no scale to be divided by.
    ours.step(lambda: cross_entropy(model(batch[0]), batch[1]), scaler=scaler)
    scaler.update()
    theirs.step(closure_of(theirs, other, batch))
    assert same_bits(list(model.parameters()), list(other.parameters()))


def test_autocast():
    model = small_model()
    optimizer = SAM(model.parameters(), lr=0.1, momentum=0.9)
    batch, losses = images(8, dtype=torch.float32), []

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    for _ in range(10):
        losses.append(optimizer.step(closure).item())
    assert losses[-1] < 0.5 * losses[0]

    # Autocast around the step keeps no cast of the weights from one point to the next.
    optimizer, passes = SAM(model.parameters(), lr=0.0, rho=2.0), []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step(lambda: passes.append(cross_entropy(model(batch[0]), batch[1])) or passes[-1])
    assert passes[1].item() > 1.2 * passes[0].item()


def test_a_compiled_model_stays_compiled():
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        def run(*given):
            compiled.append(1)
            return graph(*given)

        return run

    model, other = small_model(), small_model()
    fast = torch.compile(model, backend=backend)
    ours, theirs = SAM(fast.parameters(), lr=0.1), SAM(other.parameters(), lr=0.1)
    for step in range(3):
        batch = images(4, seed=step, dtype=torch.float32)
        ours.step(closure_of(ours, fast, batch))
        theirs.step(closure_of(theirs, other, batch))
    assert len(compiled) == 6, "each of the passes ran the compiled graph"
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=1e-5, atol=1e-6)


def _replica(rank, world, port, results):
    import torch.distributed as dist

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 10)).double()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.linspace(-0.1, 0.1, param.numel(), dtype=torch.float64).reshape(param.shape))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.5, no_sync=parallel.no_sync)
    for step in range(3):
        inputs, targets = images(8, seed=step)
        part = slice(4 * rank, 4 * rank + 4)
        # With and without a closure that calls backward.
        optimizer.step(closure_of(optimizer, parallel, (inputs[part], targets[part]), backward=step != 1))
    if rank == 0:
        results.put([param.detach().numpy() for param in model.parameters()])
    dist.barrier()
    dist.destroy_process_group()


def test_replicas_perturb_by_their_own_gradient():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_replica, args=(rank, 2, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = [torch.from_numpy(value) for value in results.get(timeout=120)]
    for process in processes:
        process.join(30)
    # The same by hand: each half of the batch has its own perturbation, and the mean of the gradients is followed.
    w = [torch.linspace(-0.1, 0.1, n, dtype=torch.float64).reshape(s) for n, s in ((4320, (10, 432)), (10, (10,)))]
    for step in range(3):
        inputs, targets = images(8, seed=step)
        total = [torch.zeros_like(value) for value in w]
        for part in (slice(0, 4), slice(4, 8)):

            def gradient(at):
                leaves = [value.clone().requires_grad_() for value in at]
                loss = cross_entropy(inputs[part].flatten(1) @ leaves[0].T + leaves[1], targets[part])
                return torch.autograd.grad(loss, leaves)

            g = gradient(w)
            norm = sum((value**2).sum() for value in g).sqrt()
            g = gradient([value + 0.5 * slope / (norm + 1e-12) for value, slope in zip(w, g)])
            total = [value + slope / 2 for value, slope in zip(total, g)]
        w = [value - 0.1 * slope for value, slope in zip(w, total)]
    torch.testing.assert_close(found, w, rtol=1e-12, atol=1e-14)


# ---- Memory


def test_no_memory_is_lost():
    params = [nn.Parameter(torch.randn(1000)), nn.Parameter(torch.randn(20, 50))]
    optimizer = CRSAM(params, lr=1e-4, momentum=0.9)

    def closure():
        optimizer.zero_grad()
        loss = sum((param**2).sum() for param in params)
        loss.backward()
        return loss

    def kilobytes():
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for _ in range(1000):
        optimizer.step(closure)
    before = kilobytes()
    for _ in range(10_000):
        optimizer.step(closure)
    # A leak of ten bytes a step would show.
    assert kilobytes() - before < 100, "kilobytes of growth"


PEAK = """
import resource, sys
import torch
import polder.torch

ELEMENTS = 8_000_000
cls, vectors = getattr(polder.torch, sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)


def train(params, steps):
    optimizer = cls(params, lr=1e-6)

    def closure():
        optimizer.zero_grad()
        loss = sum((param * param).sum() for param in params) / ELEMENTS
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / (4 * ELEMENTS)


# Everything that is loaded late is there before the measurement.
train([torch.nn.Parameter(torch.ones(64))], 2)
before = peak()
train([torch.nn.Parameter(torch.full((ELEMENTS // 8,), 0.5)) for _ in range(8)], 3)
print(peak() - before)
"""


@pytest.mark.parametrize(("cls", "vectors"), [(SGD, 1), (SAM, 3), (CRSAM, 5)])
def test_the_peak_is_that_of_the_vectors(cls, vectors):
    """Weights, momentum and the method's vectors; the gradient that PyTorch has made, and an eighth while it does."""
    command = [sys.executable, "-c", PEAK, cls.__name__, str(vectors)]
    # Freed tensors go back to the system at once, so that the peak is that of what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found = float(run.stdout)
    assert found < 2 + vectors + 1 + 0.5, f"{found:.2f} vectors"


@pytest.mark.parametrize(("cls", "vectors"), [(SGD, 1), (SAM, 3), (CRSAM, 5), (RandomSAM, 2), (FriendlySAM, 4)])
def test_vectors_are_those_that_the_method_needs(cls, vectors):
    """As docs/methods.md counts them, beside the weights and the momentum."""
    params = [nn.Parameter(torch.randn(64, 64))]
    optimizer = cls(params, lr=0.1)
    optimizer.step(lambda: (params[0] ** 2).sum())
    held = sum(block.numel() for block in optimizer._flat.blocks)
    assert held == (2 + vectors) * 64 * 64


# ---- The package itself


def test_kernels_run_on_the_threads_of_pytorch():
    """In a process of its own: the tests have a single thread."""
    program = """
import os, torch, polder.torch
from polder._flat import openmp
torch.set_num_threads(2)
assert openmp() != 0
torch.randn(2000, 2000).sum()
params = [torch.nn.Parameter(torch.randn(1_000_000))]
before = len(os.listdir("/proc/self/task"))
for _ in range(2):
    polder.torch.SAM(params, lr=0.1).step(lambda: (params[0] ** 2).sum())
print(len(os.listdir("/proc/self/task")) - before)
"""
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    # The one more that is allowed is autograd's own.
    assert int(run.stdout) <= 1, "threads were started beside those of PyTorch"


@pytest.mark.parametrize("cls", NEEDS_OUR_BASE)
def test_a_method_that_needs_our_base_refuses_another(cls):
    with pytest.raises(ValueError, match="needs a base optimizer of this library"):
        cls(small_model().parameters(), torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("cls", [RandomSAM, MSAM])
def test_a_pass_elsewhere_needs_a_closure(cls):
    model = small_model()
    optimizer = cls(model.parameters(), lr=0.1, momentum=0.9)
    before = bits(model)
    cross_entropy(model(images(4, dtype=torch.float32)[0]), torch.arange(4)).backward()
    with pytest.raises(RuntimeError, match="takes no gradient at the weights"):
        optimizer.step()
    assert same_bits(before[:2], bits(model)[:2])


def test_sam_on_of_normalisation_alone():
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 10, bias=False), nn.BatchNorm1d(10))
    train(SAM(model.parameters(), lr=0.1, perturb="norm"), model, 2)
    model[1].requires_grad_(False)
    train(SAM(model.parameters(), lr=0.1, perturb="norm"), model, 2)
    whole = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 10, 10]), nn.Flatten(), nn.Linear(400, 10))
    with pytest.raises(ValueError, match="that are vectors"):
        train(SAM(whole.parameters(), lr=0.1, perturb="norm"), whole, 1)


def test_sam_on_perturbs_the_normalisation_of_a_first_group():
    model, batch = small_model(dtype=torch.float64), images(4)
    norm = list(model[2].parameters())
    others = [param for param in model.parameters() if all(param is not other for other in norm)]
    # A bias in front of batch norm, in the order of the model.
    model[1].bias = nn.Parameter(torch.zeros(16, dtype=torch.float64))
    with pytest.raises(ValueError, match="a group of their own"):
        train(SAM(model.parameters(), lr=0.1, perturb="norm"), model, 1)
    optimizer = SAM([{"params": norm}, {"params": [*others, model[1].bias]}], lr=0.1, rho=0.3, perturb="norm")
    start, seen = [param.detach().clone() for param in norm], []

    def closure():
        optimizer.zero_grad()
        seen.append([param.detach().clone() for param in model.parameters()])
        loss = cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        if len(seen) == 1:
            seen.append([param.grad.clone() for param in norm])
        return loss

    optimizer.step(closure)
    first, gradient, second = seen
    length = torch.cat(gradient).norm()
    moved = [param.shape for param, other in zip(first, second) if not torch.equal(param, other)]
    assert moved == [param.shape for param in norm]
    places = [index for index, param in enumerate(model.parameters()) if any(param is other for other in norm)]
    for index, before, direction in zip(places, start, gradient):
        assert torch.allclose(second[index], before + 0.3 * direction / length, rtol=1e-10, atol=0)


def test_every_method_has_a_class_with_its_own_help():
    for cls in CLASSES:
        assert issubclass(cls, torch.optim.Optimizer)
        for option in cls._method["options"]:
            assert f"``{option['name']}``" in inspect.getdoc(cls)
