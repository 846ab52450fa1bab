"""jax_bce.torch_like against PyTorch: the same where it is right, and a list of where it is not."""

import inspect
from collections.abc import Callable
from functools import partial
from operator import attrgetter

import jax
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import FLOAT64, FLOATS

from jax_bce import torch_like

pytestmark = pytest.mark.any_jax


@pytest.fixture(autouse=True)
def _torch(require: Callable[[str], None]) -> None:
    require("torch")


INF, NAN = np.inf, np.nan
SHAPES = [(), (1,), (5,), (2, 3), (3, 1), (2, 1, 4)]


def f(name: str) -> Callable:
    import torch

    return getattr(torch.nn.functional, name)


def bce(*arguments, **options):
    return f("binary_cross_entropy_with_logits")(*arguments, **options)


def focal(inputs, targets, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"):
    """What torchvision.ops.sigmoid_focal_loss says: that package is not installed."""
    import torch

    p = torch.sigmoid(inputs)
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = bce(inputs, targets, reduction="none") * (1 - p_t) ** gamma
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return {"none": lambda v: v, "mean": torch.mean, "sum": torch.sum}[reduction](loss)


def of_torch(peers, function: Callable, operands: dict[str, np.ndarray]) -> tuple[np.ndarray, dict]:
    """A loss, and the gradients of its sum, of which PyTorch has none in the weights."""
    import torch

    tensors = {k: torch.tensor(v) for k, v in operands.items()}
    differentiable = {k: v.requires_grad_() for k, v in tensors.items() if "weight" not in k}
    loss = function(**tensors)
    loss.sum().backward()
    return loss.detach().numpy(), {k: v.grad.numpy() for k, v in differentiable.items()}


def of_jax(peers, function: Callable, operands: dict[str, np.ndarray]) -> tuple[jax.Array, dict]:
    return peers.both(lambda operands: function(**operands), operands)


@pytest.mark.parametrize(
    "name",
    [
        "functional.binary_cross_entropy_with_logits",
        "functional.binary_cross_entropy",
        "BCEWithLogitsLoss",
        "BCELoss",
    ],
)
def test_signature(name: str) -> None:
    """PyTorch's, but for two arguments that it deprecated."""
    import torch

    theirs = inspect.signature(attrgetter(name)(torch.nn)).parameters
    ours = inspect.signature(attrgetter(name.split(".")[-1])(torch_like)).parameters
    assert {k: v.default for k, v in ours.items()} == {
        k: v.default for k, v in theirs.items() if k not in ("size_average", "reduce")
    }


def test_binary_cross_entropy(cpu: str, peers) -> None:
    @peers.examples
    @given(st.data())
    def agree(data: st.DataObject) -> None:
        shape, dtype = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(FLOATS))
        operands = {
            "input": peers.logits(data.draw, shape),
            "target": peers.labels(data.draw, shape),
        }
        # One for all, one for each class, one for each sample, one for each element.
        aligned = st.sampled_from([(), shape[-1:], shape[:-1] + (1,) * bool(shape), shape])
        for name in ("weight", "pos_weight"):
            if data.draw(st.booleans()):
                operands[name] = peers.weights(data.draw, data.draw(aligned))
        options = {"reduction": data.draw(st.sampled_from(["none", "mean", "sum"]))}

        expected, expected_gradients = of_torch(peers, partial(bce, **options), operands)
        with jax.enable_x64(dtype == FLOAT64):
            ours = partial(torch_like.binary_cross_entropy_with_logits, **options)
            actual, gradients = of_jax(
                peers, ours, {k: v.astype(dtype) for k, v in operands.items()}
            )
        assert actual.dtype == dtype
        peers.agree(actual, expected)
        for name, expected_gradient in expected_gradients.items():
            assert gradients[name].dtype == dtype
            peers.agree(gradients[name], expected_gradient)

    agree()


@pytest.mark.parametrize("create", ["BCEWithLogitsLoss", "BCELoss"])
def test_objects(cpu: str, peers, create: str) -> None:
    """Made and called with the same arguments, among them probabilities of 0 and 1."""
    import torch

    @peers.examples
    @given(st.data())
    def agree(data: st.DataObject) -> None:
        shape, dtype = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(FLOATS))
        values = peers.logits(data.draw, shape)  # multiples of 1/8 up to 16
        operands = {
            "input": values if create == "BCEWithLogitsLoss" else (values + 16) / 32,
            "target": peers.labels(data.draw, shape),
        }
        reduction = data.draw(st.sampled_from(["none", "mean", "sum"]))
        weights = {"weight": peers.weights(data.draw, shape)} if data.draw(st.booleans()) else {}

        criterion = getattr(torch.nn, create)(
            **{k: torch.tensor(v) for k, v in weights.items()}, reduction=reduction
        )
        expected, expected_gradients = of_torch(peers, criterion, operands)
        with jax.enable_x64(dtype == FLOAT64):
            weights = {k: v.astype(dtype) for k, v in weights.items()}
            ours = getattr(torch_like, create)(**weights, reduction=reduction)
            actual, gradients = of_jax(
                peers, ours, {k: v.astype(dtype) for k, v in operands.items()}
            )
        assert actual.dtype == dtype
        peers.agree(actual, expected)
        compared = np.ones(shape, bool)
        if create == "BCELoss":  # next to 0 terms of soft labels cancel; at 0 and 1 see below
            p = operands["input"]
            compared = (p > 0) & (p < 1) & (oracle.kind_of(operands["target"]) == "hard")
        for name, gradient in expected_gradients.items():
            peers.agree(np.where(compared, gradients[name], 0), np.where(compared, gradient, 0))

    agree()


@pytest.mark.parametrize(("p", "y"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.25)])
def test_gradients_of_clamped_logarithms(cpu: str, peers, p: float, y: float) -> None:
    """PyTorch divides p - y by 1e-12; that of the clamped formula is 0. The losses are the same."""
    operands = {"input": np.float32([p]), "target": np.float32([y])}
    expected, theirs = of_torch(peers, f("binary_cross_entropy"), operands)
    loss, ours = of_jax(peers, torch_like.binary_cross_entropy, operands)
    peers.agree(loss, expected)
    peers.still_wrong(theirs["input"][0], (p - y) * 1e12, 0.0)
    assert ours["input"] == 0


def test_focal_loss(cpu: str, peers) -> None:
    @peers.examples
    @given(st.data())
    def agree(data: st.DataObject) -> None:
        shape, dtype = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(FLOATS))
        logits, labels = peers.logits(data.draw, shape), peers.labels(data.draw, shape)
        operands = {"inputs": logits, "targets": labels}
        options = {
            "alpha": data.draw(st.sampled_from([-1, 0.0, 0.25, 0.75])),
            "gamma": data.draw(st.sampled_from([0, 0.5, 1, 2, 3.5])),
            "reduction": data.draw(st.sampled_from(["none", "mean", "sum"])),
        }

        expected, expected_gradients = of_torch(peers, partial(focal, **options), operands)
        with jax.enable_x64(dtype == FLOAT64):
            ours = partial(torch_like.sigmoid_focal_loss, **options)
            actual, gradients = of_jax(
                peers, ours, {k: v.astype(dtype) for k, v in operands.items()}
            )
        assert actual.dtype == dtype
        peers.agree(actual, expected)
        if oracle.kind_of(labels) == "hard":  # the terms of others cancel
            peers.agree(gradients["inputs"], expected_gradients["inputs"])

    agree()


def element(
    peers, of: Callable, function: Callable, what: str, operands: dict, **options
) -> np.ndarray:
    """Its loss, or its gradient."""
    loss, gradients = of(peers, partial(function, reduction="none", **options), operands)
    return np.asarray(loss if what == "loss" else next(iter(gradients.values())))


# logit, label, what, PyTorch's value, in float32.
WRONG = [
    (-20.0, 0.0, "loss", 0.0),
    (-15.0, 0.0, "loss", 0.0),
    (17.0, 1.0, "gradient", 0.0),
    (20.0, 1.0, "gradient", 0.0),
    (-90.0, 0.0, "gradient", 0.0),
    (INF, 1.0, "loss", NAN),
    (-INF, 0.0, "loss", NAN),
    (-INF, 1.0, "loss", NAN),
]


@pytest.mark.parametrize(("logit", "label", "what", "listed"), WRONG)
def test_where_pytorch_is_wrong(
    check, cpu: str, peers, logit: float, label: float, what: str, listed: float
) -> None:
    operands = {"input": np.float32([logit]), "target": np.float32([label])}
    elements = partial(element, peers, what=what, operands=operands)
    exact = getattr(oracle.exact(*operands.values()), what)
    peers.still_wrong(elements(of_torch, bce)[0], listed, exact[0])
    ours = elements(of_jax, torch_like.binary_cross_entropy_with_logits)
    check.elements(cpu, *operands.values(), **{what: ours})


# The same for torchvision's focal loss without alpha; gamma, and the exact value.
WRONG_FOCAL = [
    (2.0, -20.0, 0.0, "loss", 0.0, 8.7565108e-27),
    (2.0, -20.0, 0.0, "gradient", 0.0, 2.6269532e-26),
    (2.0, 20.0, 1.0, "loss", 0.0, 8.7565108e-27),
    (0.5, 20.0, 1.0, "gradient", NAN, -1.4036435e-13),
    (2.0, INF, 1.0, "loss", NAN, 0.0),
    (2.0, INF, 1.0, "gradient", NAN, 0.0),
    (2.0, INF, 0.0, "gradient", NAN, 1.0),
]


@pytest.mark.parametrize(("gamma", "logit", "label", "what", "listed", "exact"), WRONG_FOCAL)
def test_where_torchvision_is_wrong(
    cpu: str,
    peers,
    gamma: float,
    logit: float,
    label: float,
    what: str,
    listed: float,
    exact: float,
) -> None:
    operands = {"inputs": np.float32([logit]), "targets": np.float32([label])}
    elements = partial(element, peers, what=what, operands=operands, gamma=gamma, alpha=-1)
    peers.still_wrong(elements(of_torch, focal)[0], listed, exact)
    peers.agree(elements(of_jax, torch_like.sigmoid_focal_loss), [exact])


def test_pytorch_divides_nothing_by_nothing(cpu: str, peers) -> None:
    nothing = {"input": np.zeros(0, np.float32), "target": np.zeros(0, np.float32)}
    peers.still_wrong(of_torch(peers, bce, nothing)[0], NAN, 0.0)
    assert of_jax(peers, torch_like.binary_cross_entropy_with_logits, nothing)[0] == 0


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 1), (6,)], ids=str)
def test_both_refuse_a_target_of_another_size(peers, shape: tuple[int, ...]) -> None:
    operands = {"input": np.zeros((2, 3), np.float32), "target": np.zeros(shape, np.float32)}
    for of, function in (of_torch, bce), (of_jax, torch_like.binary_cross_entropy_with_logits):
        with pytest.raises(ValueError, match=r"[Tt]arget"):
            of(peers, function, operands)
