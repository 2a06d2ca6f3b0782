"""PyTorch's own databases of operators and modules, the first three samples of each, under plans.

With torch 2.13 on CPU: 1,793 samples, see ``benchmarks/results/*_opdb_*.json``.
"""

import pytest

from benchmarks.bench_opdb import PARTS, run
from benchmarks.opdb.exceptions import is_exception, is_good


@pytest.mark.slow
@pytest.mark.parametrize(
    ("database", "part"), [(database, part) for database, parts in PARTS.items() for part in range(1, parts + 1)]
)
def test_operators_train_under_plans_as_without(database, part):
    rows = [row for row in run(database, part) if "skipped" not in row]
    assert len(rows) > 50
    bad = [row for row in rows if not is_good(row) and not is_exception(row)]
    assert not bad
