import numpy as np

from stagesweep.stage.linear_baselines import Logistic, Ridge


def test_linear_baselines_learn_linear_relations() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(200, 5))
    shares = np.clip(0.5 + 0.1 * x[:, :1], 0, 1)
    columns = {"x": x, "p": np.hstack([shares, 1 - shares]), "y": (x[:, 1] > 0).astype(int)}
    train, test = (
        {k: v[rows] for k, v in columns.items()} for rows in (slice(150), slice(150, 200))
    )
    np.testing.assert_allclose(Ridge("x", "p")(train, test)["p"], test["p"], atol=0.02)
    predicted = Logistic("x", "y")(train, test)["assignment"]
    assert (predicted.argmax(1) == test["y"]).mean() > 0.9
    np.testing.assert_allclose(predicted.sum(1), 1)
