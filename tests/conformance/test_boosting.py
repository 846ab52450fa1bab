"""The recipes of docs/migrating.md for XGBoost and LightGBM, run as they are written, against the
objectives that are built into the two.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import oracle
import pytest
from sklearn.datasets import load_breast_cancer

import jax_bce

pytestmark = [
    pytest.mark.any_jax,
    # LightGBM has its own to say about what it returns with an objective that it does not know.
    pytest.mark.filterwarnings("ignore::UserWarning:lightgbm"),
]

PAGE = (Path(__file__).parent.parent.parent / "docs/migrating.md").read_text()
ROUNDS = 20


def recipes(library: str) -> list[str]:
    """The code of its section."""
    (section,) = re.findall(rf"^## {library}$(.*?)^## ", PAGE, flags=re.M | re.S)
    return re.findall(r"```python\n(.*?)```", section, flags=re.S)


FEATURES, LABELS = (array[:300] for array in load_breast_cancer(return_X_y=True))
WEIGHTS = np.random.default_rng(0).uniform(0.5, 2, len(LABELS))


NEWTON = re.findall(r"`(gradient, hessian = .*?)`.*?`(1 / .*?)`", PAGE, flags=re.S)[0]


def run(names: dict[str, Any], weighted: bool, positives: float, *codes: str) -> dict[str, Any]:
    """The page's code, with what it says of weights and of the weight of positive labels."""
    for code in codes:
        if weighted:
            code = code.replace("(features, labels", "(features, labels, weight=weights")
            code = code.replace("np.average(labels)", "np.average(labels, weights=weights)")
        if positives != 1:
            code = code.replace("hess_floor", f"pos_weight={positives}, hess_floor")
            code = re.sub("base_score = .*", "{}; base_score = {}".format(*NEWTON), code)
        exec(code, names)
    return names


@pytest.fixture
def names() -> dict[str, Any]:
    common = {"jax": jax, "jax_bce": jax_bce, "np": np}
    return common | {"features": FEATURES, "labels": LABELS, "weights": WEIGHTS}


@pytest.fixture
def xgb(require: Callable[[str], None]) -> ModuleType:
    require("xgboost")
    import xgboost

    xgboost.set_config(nthread=1)  # more would wait for each other where tests run in parallel
    return xgboost


@pytest.fixture
def lgb(require: Callable[[str], None]) -> ModuleType:
    require("lightgbm")
    import lightgbm

    return lightgbm


cases = pytest.mark.parametrize(("weighted", "positives"), [(False, 1.0), (True, 1.0), (True, 9.0)])


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Margins of a few units."""
    np.testing.assert_allclose(actual, expected, rtol=oracle.SURROUNDINGS, atol=oracle.SURROUNDINGS)


@cases
def test_xgboost(
    cpu: str, xgb: ModuleType, names: dict[str, Any], weighted: bool, positives: float
) -> None:
    found = run(names | {"xgb": xgb}, weighted, positives, *recipes("XGBoost"))
    data = xgb.DMatrix(FEATURES, LABELS, weight=WEIGHTS if weighted else None)
    built_in = {"objective": "binary:logistic", "scale_pos_weight": positives}
    expected = xgb.train(built_in, data, ROUNDS)
    for options in ({"output_margin": True}, {}):  # and probabilities
        assert_close(found["booster"].predict(data, **options), expected.predict(data, **options))


@pytest.mark.thorough  # its import alone takes seconds, and XGBoost is asked the same
@cases
def test_lightgbm(
    cpu: str, lgb: ModuleType, names: dict[str, Any], weighted: bool, positives: float
) -> None:
    objective, _ = recipes("XGBoost")
    found = run(names | {"lgb": lgb}, weighted, positives, objective, *recipes("LightGBM"))
    data = lgb.Dataset(FEATURES, LABELS, weight=WEIGHTS if weighted else None)
    built_in = {"objective": "binary", "scale_pos_weight": positives, "verbose": -1}
    expected = lgb.train(built_in, data, ROUNDS)
    assert_close(found["logits"], expected.predict(FEATURES, raw_score=True))


@pytest.mark.thorough
def test_classifiers(cpu: str, xgb: ModuleType, lgb: ModuleType, names: dict[str, Any]) -> None:
    """Whose objectives take the labels first; both start from 0 here."""
    run(names, False, 1.0, recipes("XGBoost")[0])
    objective = eval(re.search(r"`(lambda labels, margin: .*?)`", PAGE)[1], names)
    margins = []
    for built_in in ("binary:logistic", objective):
        model = xgb.XGBClassifier(objective=built_in, n_estimators=ROUNDS, base_score=0.5)
        margins.append(model.fit(FEATURES, LABELS).predict(FEATURES, output_margin=True))
    assert_close(*margins)
    margins = []
    for built_in in ("binary", objective):
        options = {"n_estimators": ROUNDS, "boost_from_average": False, "verbose": -1}
        model = lgb.LGBMClassifier(objective=built_in, **options).fit(FEATURES, LABELS)
        margins.append(model.predict(FEATURES, raw_score=True))
    assert_close(*margins)
