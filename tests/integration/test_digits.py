"""The main job on real data: less memory, the same accuracy."""

import pytest

from assign.planner import search_table
from assign.tasks import TaskOptions, load_task
from assign.tracing.tracer import trace
from assign.training.loop import train
from assign.training.options import TrainOptions

pytest.importorskip("sklearn")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_plan_at_sixty_per_cent_keeps_the_accuracy(seed):
    task = load_task("digits", TaskOptions(seed=seed))
    table = trace(task.make_model(), task.first_batch(), task.loss, task.optimizer)
    plan = search_table(table, budget="60%")
    baseline = train(task, table=table, options=TrainOptions(seed=seed))
    planned = train(task, plan, table=table, options=TrainOptions(seed=seed))
    assert planned.measured_peak_bytes <= 0.6 * baseline.measured_peak_bytes
    assert planned.metrics["accuracy"] >= baseline.metrics["accuracy"] - 0.01
    for result in (baseline, planned):
        assert result.predicted_peak_bytes == pytest.approx(result.measured_peak_bytes, rel=0.05)
