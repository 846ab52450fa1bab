"""The examples and the benchmark run as their docstrings say; the stories are as promised."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracle
import platforms
import pytest
from PIL import Image

pytestmark = pytest.mark.any_jax

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str, folder: Path, platform: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / script), *arguments],
        cwd=folder,
        env=platforms.environment(platform),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown(picture: Path) -> list[dict]:
    """What is written in each of its panels, and the curves, as the script saved them with it."""
    with Image.open(picture) as image:
        assert "Description" in image.info, f"{picture} is not one of make pictures"
        return json.loads(image.info["Description"])["panels"]


def assert_same(drawn: Path, kept: Path) -> None:
    """A picture shows what has just been drawn; of measured times, that there are the same ones."""
    __tracebackhide__ = True
    for now, then in zip(shown(drawn), shown(kept), strict=True):
        assert now["words"] == then["words"], f"{kept.name} is stale: make pictures"
        for kind in ("curves", "measured"):
            assert now[kind].keys() == then[kind].keys(), f"{kept.name} is stale: make pictures"
        assert all(value > 0 for value in then["measured"].values())
        for name, values in now["curves"].items():
            message = f"{name} of {kept.name} is stale: make pictures"
            np.testing.assert_allclose(
                values, then["curves"][name], rtol=oracle.WRONG, err_msg=message
            )


def assert_current(drawn: Path) -> None:
    """The pictures of this name in docs/, the light and the dark one, show it."""
    __tracebackhide__ = True
    for kept in (drawn.name, f"{drawn.stem}-dark.png"):
        assert_same(drawn, ROOT / "docs" / kept)


def test_pictures_have_a_target() -> None:
    drawn = re.findall(r"--(?:plot|dark) (docs/\S+)", (ROOT / "Makefile").read_text())
    assert sorted(drawn) == sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.png"))


def test_a_stale_picture_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A curve that moved makes a picture stale, a time that was measured again does not."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    picture = importlib.import_module("picture")

    def saved(name: str, curve: float, seconds: float) -> Path:
        def draw(colors: dict[str, str]) -> object:
            figure, axis = picture.plt.subplots()
            axis.plot([1.0, curve], label="curve", color=colors["jax_bce"])
            axis.barh(0, seconds, label="time", gid=picture.MEASURED)
            axis.text(0, 0, f"{seconds} s", gid=picture.MEASURED)
            return figure

        light, dark = tmp_path / f"{name}.png", tmp_path / f"{name}-dark.png"
        picture.save(draw, light, dark)
        assert_same(light, dark)
        return light

    kept = saved("kept", 2.0, 3.0)
    assert_same(saved("again", 2.0, 4.0), kept)
    with pytest.raises(AssertionError, match="stale: make pictures"):
        assert_same(saved("moved", 2.5, 3.0), kept)


@pytest.mark.thorough
def test_train_digits(platform: str, tmp_path: Path) -> None:
    """At the default settings: it takes seconds, and it is the first claim of the README."""
    output = run("examples/train_digits.py", folder=tmp_path, platform=platform)
    names = ("naive", "clipped", "Keras 3 on JAX", "jax_bce", "optax")
    final = dict(re.findall(rf"({'|'.join(names)}) (\d\.\d+)", output))
    assert set(final) == set(names)
    assert float(final.pop("jax_bce")) > 0.95
    assert float(final.pop("optax")) > 0.95
    assert all(float(accuracy) < 0.55 for accuracy in final.values())
    if platform == "cpu":
        assert_current(tmp_path / "train_digits.png")


@pytest.mark.thorough
def test_train_digits_reads_an_npz(cpu: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 28, 28), np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=pixels, y_train=np.arange(60) % 10)
    small = ("--samples", "50", "--hidden", "16", "--steps", "2")
    arguments = ("--data", "mnist.npz", *small)
    output = run("examples/train_digits.py", *arguments, folder=tmp_path, platform=cpu)
    assert "50 digits, 2 steps" in output


@pytest.mark.thorough
def test_precision(platform: str, require: Callable[[str], None], tmp_path: Path) -> None:
    output = run("examples/precision.py", folder=tmp_path, platform=platform)
    row = re.findall(r"│ 20 .*", output)[0]
    cells = [cell.strip() for cell in row.split("│")]
    exact, ours = cells[2], cells[3]
    assert exact == ours == "2.061e-09"
    if platform == "cpu":
        require("torch")  # one of the curves
        assert_current(tmp_path / "precision.png")


def test_speed(tmp_path: Path) -> None:
    """The chart, and what pages say of speed, are those of the newest record."""
    pages = "README.md", "docs/benchmarks.md"
    (tmp_path / "docs").mkdir()
    for page in pages:
        (tmp_path / page).write_text((ROOT / page).read_text())
    run("examples/speed.py", "--pages", *pages, folder=tmp_path, platform="cpu")
    for page in pages:
        kept = (ROOT / page).read_text()
        assert "<!-- speed.py: " in kept
        assert (tmp_path / page).read_text() == kept, f"{page} is stale: make pictures"
    assert_current(tmp_path / "speed.png")


@pytest.mark.thorough
def test_train_flax(platform: str, tmp_path: Path) -> None:
    output = run("examples/train_flax.py", "--epochs", "3", folder=tmp_path, platform=platform)
    assert float(re.search(r"unseen digits (\d\.\d+)", output)[1]) > 0.8


@pytest.mark.thorough
def test_benchmark(cpu: str, tmp_path: Path) -> None:
    """Small, for its records: speed is no matter of a test."""
    small = ("--sizes", "10", "--seconds", "0.1", "--output", "records.jsonl")
    small += ("--no-compiled-torch",)
    run("benchmarks/bench.py", *small, folder=tmp_path, platform=cpu)
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert {record["case"] for record in records} == {"value, mean", "value_and_grad, mean"}
    assert {"jax_bce", "optax", "jnp"} <= {record["implementation"] for record in records}
    for record in records:
        assert record["n"] == 1024
        assert record["rounds"] >= 7
        assert record["median_ns_per_element"] > 0
        assert record["share_of_copy_bandwidth"] > 0


@pytest.mark.thorough
def test_benchmark_of_calls(cpu: str, tmp_path: Path) -> None:
    """Small, for its records: speed is no matter of a test."""
    small = ("--n", "8", "--seconds", "0.01", "--repeats", "1", "--output", "records.jsonl")
    run("benchmarks/calls.py", *small, folder=tmp_path, platform=cpu)
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    cases = {(record["call"], record["case"], record["implementation"]) for record in records}
    for name in ("loss", "loss_and_grad", "grad_and_hess", "focal_loss", "asymmetric_loss"):
        assert {(name, case, "jax_bce") for case in ("eager", "jitted")} <= cases
    assert {("import", "import", name) for name in ("jax_bce", "optax")} <= cases
    assert all(record["median_us"] > 0 for record in records)


@pytest.mark.thorough
def test_many_labels(cpu: str, tmp_path: Path) -> None:
    """It learns, and its memory is as the picture says."""
    output = run("examples/many_labels.py", folder=tmp_path, platform=cpu)
    labels, right, frequent = re.search(
        r"(\d+) labels, .* words, (\S+) are right; of the five most frequent, (\S+)\. ", output
    ).groups()
    assert int(labels) > 30_000
    assert float(right) > 3 * float(frequent)
    assert_current(tmp_path / "many_labels.png")


@pytest.mark.thorough
def test_benchmark_of_linear_layers(cpu: str, tmp_path: Path) -> None:
    small = ("--labels", "60", "--rows", "8", "--width", "4", "--seconds", "0")
    options = (*small, "--output", "records.jsonl")
    output = run("benchmarks/linear.py", *options, folder=tmp_path, platform=cpu)
    assert re.search(r"60 labels: \S+ times as long as the dense loss, at most 1.15: ", output)
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    names = {record["implementation"] for record in records}
    assert {"linear_loss", "dense, jax_bce", "dense, optax", "chunks, optax"} <= names
    for record in records:
        assert record["median_seconds"] > 0
        assert record["rounds"] >= 1


@pytest.mark.thorough
def test_a_layer_whose_logits_would_take_four_gib(cpu: str, tmp_path: Path) -> None:
    """4,096 x 262,144 logits, whose memory does not depend on the width, but the time does."""
    sizes = ("--rows", "4096", "--labels", "262144", "--width", "32", "--seconds", "0")
    options = ("--only", "linear_loss", *sizes, "--output", "records.jsonl")
    run("benchmarks/linear.py", *options, folder=tmp_path, platform=cpu)
    (record,) = map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines())
    assert record["mib_of_gradients"] < record["mib_beyond_inputs"] < 512
    assert record["mib_resident"] <= 1536
