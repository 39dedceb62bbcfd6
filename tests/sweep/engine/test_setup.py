"""What is checked before the first trial."""

import pytest

from stagesweep.base.errors import UserError
from stagesweep.sweep.engine.setup import check_study_name


def test_the_name_of_a_study_is_a_name() -> None:
    for name in ("bayes_0a1b2c3d", "größe-2.1", "grid_1_2"):
        check_study_name(name)
    for name in ("../../x", "a/b", "..", "a..b", "/x", "", "a b", ".x", "a\\b", "a\n"):
        with pytest.raises(UserError, match="must be a name"):
            check_study_name(name)
