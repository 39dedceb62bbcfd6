"""The fixture `make_run` of tests/stage, for the stages of this system."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

# By path, because pytest's importlib mode puts no folder of tests on sys.path.
_spec = spec_from_file_location("stage_fixtures", Path(__file__).parents[3] / "stage/conftest.py")
assert _spec is not None
assert _spec.loader is not None
_shared = module_from_spec(_spec)
_spec.loader.exec_module(_shared)
make_run = _shared.make_run
