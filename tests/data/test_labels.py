from types import SimpleNamespace

from stagesweep.base.spec import Spec
from stagesweep.data.labels import label_names


def test_labels_without_names_are_named_by_their_codes() -> None:
    spec = Spec({}, labels={"site": 3, "kind": 2})
    data = SimpleNamespace(spec=spec, label_names={"kind": ["ill", "well"]})
    assert label_names(data, "kind") == ["ill", "well"]
    assert label_names(data, "site") == ["0", "1", "2"]
    assert label_names(SimpleNamespace(spec=spec), "kind") == ["0", "1"]
