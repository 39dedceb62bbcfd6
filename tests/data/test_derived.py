import json

import numpy as np
import pytest
import torch

from stagesweep.base.errors import UserError
from stagesweep.base.spec import Features, Spec
from stagesweep.data.derived import DerivedData


@pytest.fixture
def data() -> DerivedData:
    features = Features(("a", "b"), low=0.0, ordered=True, unit="dB", isolated=("b",))
    columns = {
        "train": {"x": np.ones((3, 2)), "kind": np.array([0, 1, 0]), "id": np.array([*"pqr"])},
        "val": {"x": np.zeros((1, 2)), "kind": np.array([1]), "id": np.array(["s"])},
    }
    spec = Spec({"x": features}, {"sex": 3}, {"kind": 2})
    return DerivedData(spec, columns, {"kind": ["ill", "well"]})


def test_arrays_and_json_give_the_same_data(data: DerivedData) -> None:
    metadata = json.loads(json.dumps(data.metadata()))
    again = DerivedData.from_arrays(data.arrays(), metadata)
    assert again.spec == data.spec
    assert again.label_names == data.label_names
    assert again.ids("train").tolist() == ["p", "q", "r"]
    assert torch.equal(again.split("train")["x"], torch.ones(3, 2, dtype=torch.float64))


def test_names_are_not_in_a_view_and_an_unknown_split_is_an_error(data: DerivedData) -> None:
    assert "id" not in data.split("val")
    with pytest.raises(UserError, match="no split 'test'; there are train, val"):
        data.split("test")
