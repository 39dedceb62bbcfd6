"""Names that occur more than once."""

import pandas as pd
import pytest

from stagesweep.base.errors import UserError
from stagesweep.data.duplicates import check_duplicates, unique_names


def test_the_first_three_are_named() -> None:
    names = pd.Series(["a", "b", "c", "d", "e", None, None, "d", "c", "b", "a", "a"])
    with pytest.raises(UserError, match=r"^'d', 'c', 'b' and 1 more: more than once in x; .*k=u$"):
        check_duplicates(names, "refuse", "x", "k", ("u",))
    check_duplicates(names, "u", "x", "k", ("u",))
    check_duplicates(names[:7], "refuse", "x", "k", ("u",))
    with pytest.raises(UserError, match=r"k='v' must be refuse or u"):
        check_duplicates(names, "v", "x", "k", ("u",))


def test_repetitions_are_numbered_past_names_that_exist() -> None:
    assert unique_names(["a", "a", "a-1", "b", "a"]) == ["a", "a-2", "a-1", "b", "a-3"]
