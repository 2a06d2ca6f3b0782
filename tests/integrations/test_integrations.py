"""The trainers of transformers and of Lightning, the real ones, under a plan."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import assign
from assign.errors import PlanError
from assign.plan.plan import Entry


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():  # the libraries' own
        warnings.simplefilter("ignore")
        yield


def text(count=32, length=12, symbols=50):
    torch.manual_seed(1)
    rows = torch.randint(0, symbols, (count, length))
    return [{"input_ids": row, "labels": row} for row in rows]


def make_trainer(tmp_path, *callbacks, steps=4, **more):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=12, use_cache=False, resid_pdrop=0, embd_pdrop=0
    )
    config.attn_pdrop = 0
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=1e-3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=2,
        save_strategy="no",
        **more,
    )
    return transformers.Trainer(
        model=transformers.GPT2LMHeadModel(config),
        args=arguments,
        train_dataset=text(),
        eval_dataset=text(8),
        callbacks=list(callbacks),
    )


def losses(trainer):
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


class TestTransformers:
    def test_a_plan_is_searched_and_trained_with(self, tmp_path):
        from assign.integrations import transformers as under

        plain = losses(make_trainer(tmp_path))
        trainer = make_trainer(tmp_path)
        plan = under.search(trainer, low_ratio=0.6)
        assert {"e4m3:pow2", "e5m2:pow2", "bf16"} <= {entry.format for entry in plan.entries.values()}
        trainer.add_callback(under.PlanCallback(plan, backend="eager"))
        model, kind = trainer.model, type(trainer.model)
        planned = losses(trainer)
        assert planned != plain
        assert planned == pytest.approx(plain, rel=0.02)
        assert type(model) is kind
        assert isinstance(trainer.evaluate()["eval_loss"], float)

    def test_micro_batches_are_those_that_the_trainer_accumulates(self, tmp_path):
        from assign.integrations import transformers as under

        plain = losses(make_trainer(tmp_path, gradient_accumulation_steps=4))
        trainer = make_trainer(tmp_path, gradient_accumulation_steps=4)
        plan = under.search(trainer, space=assign.SearchSpace(recipe="bf16"), low_ratio=0.0)
        assert plan.step.micro_batches == 4
        exact = plan.replace(dict.fromkeys(plan.entries, Entry("fp32", low=False)))
        trainer.add_callback(under.PlanCallback(exact, backend="eager"))
        assert losses(trainer) == plain
        other = make_trainer(tmp_path, under.PlanCallback(plan, backend="eager"), gradient_accumulation_steps=2)
        with pytest.raises(PlanError, match=r"4 micro-batches, and the trainer has gradient_accumulation_steps=2"):
            other.train()
        in_three = assign.SearchSpace(step=assign.StepOptions(micro_batches=3))
        with pytest.raises(PlanError, match="3 micro-batches, and the trainer has gradient_accumulation_steps=4"):
            under.search(trainer, space=in_three, low_ratio=0.0)

    def test_all_fp32_changes_nothing(self, tmp_path):
        from assign.integrations import transformers as under

        plain = losses(make_trainer(tmp_path))
        plan = under.search(make_trainer(tmp_path), low_ratio=0.0)
        exact = plan.replace(dict.fromkeys(plan.entries, Entry("fp32", low=False)))
        trainer = make_trainer(tmp_path, under.PlanCallback(exact, backend="eager"))
        assert losses(trainer) == plain

    def test_promotions_are_counted_and_written(self, tmp_path):
        from assign.integrations import transformers as under

        written = []

        class Writer:
            def add_scalar(self, tag, scalar_value, global_step):
                written.append((tag, scalar_value, global_step))

        plan = under.search(make_trainer(tmp_path), recipe="hfp8", low_ratio=1.0)
        callback = under.PlanCallback(plan, writer=Writer(), backend="eager", promote_threshold=1e-9)
        trainer = make_trainer(tmp_path, callback)
        with torch.no_grad():
            trainer.model.transformer.wte.weight.mul_(1e4)
        trainer.train()
        assert callback.promotion.promoted
        assert callback.promotion.plan != plan
        assert [step for tag, _, step in written if tag == "assign/promoted"] == [2, 4, 4]
        last = {tag: value for tag, value, _ in written}
        assert last["assign/promoted"] == len(callback.promotion.promoted)
        assert 0 <= last["assign/overflow_mean"] <= last["assign/overflow_max"] <= 1

    def test_a_second_training_after_one_that_failed(self, tmp_path):
        from assign.integrations import transformers as under

        plan = under.search(make_trainer(tmp_path), low_ratio=0.5)
        trainer = make_trainer(tmp_path, under.PlanCallback(plan, backend="eager"))
        kind, step = type(trainer.model), trainer.training_step
        trainer.training_step = lambda *_, **__: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        trainer.training_step = step
        trainer.train()
        assert type(trainer.model) is kind

    def test_what_outlasts_training_is_refused(self, tmp_path):
        from assign.integrations import transformers as under

        plan = under.search(make_trainer(tmp_path), low_ratio=0.5, gradients="bf16")
        with pytest.raises(PlanError, match=r"assign\.apply"):
            make_trainer(tmp_path, under.PlanCallback(plan, backend="eager")).train()


def make_module():
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
            self.losses = []

        def training_step(self, batch, _):
            loss = cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def data(scale=1.0):
    torch.manual_seed(1)
    return [(scale * torch.randn(16), torch.tensor(each % 4)) for each in range(64)]


def fit(tmp_path, module, *callbacks, scale=1.0, logger=False, accumulate=1):
    import lightning.pytorch as pl

    trainer = pl.Trainer(
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
    )
    trainer.fit(module, DataLoader(data(scale), batch_size=16))
    return module.losses


def make_plan(module, **asked):
    batch = next(iter(DataLoader(data(), batch_size=16)))
    return assign.search(module.model, batch, lambda model, b: cross_entropy(model(b[0]), b[1]), **asked)


class TestLightning:
    def test_a_module_trains_under_a_plan(self, tmp_path):
        from assign.integrations.lightning import PlanCallback

        plain, module = fit(tmp_path, make_module()), make_module()
        plan = make_plan(module, low_ratio=0.5)
        planned = fit(tmp_path, module, PlanCallback(plan, backend="eager"))
        assert planned != plain
        assert planned == pytest.approx(plain, rel=0.05)
        assert type(module.model) is nn.Sequential

    def test_micro_batches_are_those_that_the_trainer_accumulates(self, tmp_path):
        from assign.integrations.lightning import PlanCallback

        plain, module = fit(tmp_path, make_module(), accumulate=2), make_module()
        plan = make_plan(module, low_ratio=0.0).with_step(assign.StepOptions(micro_batches=2))
        exact = plan.replace(dict.fromkeys(plan.entries, Entry("fp32", low=False)))
        assert fit(tmp_path, module, PlanCallback(exact, backend="eager"), accumulate=2) == plain
        with pytest.raises(PlanError, match="2 micro-batches, and the trainer has accumulate_grad_batches=4"):
            fit(tmp_path, make_module(), PlanCallback(plan, backend="eager"), accumulate=4)

    def test_promotions_go_to_tensorboard(self, tmp_path):
        loggers = pytest.importorskip("lightning.pytorch.loggers")
        events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        from assign.integrations.lightning import PlanCallback

        module = make_module()
        callback = PlanCallback(make_plan(module, space="hfp8", low_ratio=1.0), backend="eager")
        logger = loggers.TensorBoardLogger(str(tmp_path))
        fit(tmp_path, module, callback, scale=100.0, logger=logger)
        assert callback.promotion.promoted
        found = events.EventAccumulator(logger.log_dir)
        found.Reload()
        points = [point.value for point in found.Scalars("assign/promoted")]
        assert points[-1] == len(callback.promotion.promoted)
        assert points == sorted(points)
        assert max(point.value for point in found.Scalars("assign/overflow_max")) >= 0.01

    def test_the_module_is_itself_again_after_an_error(self, tmp_path):
        from assign.integrations.lightning import PlanCallback

        module = make_module()
        plan = make_plan(module, low_ratio=0.5)
        module.training_step = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path, module, PlanCallback(plan, backend="eager"))
        assert type(module.model) is nn.Sequential

    def test_a_module_that_is_not_there(self, tmp_path):
        from assign.integrations.lightning import PlanCallback

        module = make_module()
        plan = make_plan(module, low_ratio=0.5)
        for name in ("net", ""):
            with pytest.raises(PlanError, match="'model'"):
                fit(tmp_path, module, PlanCallback(plan, module=name, backend="eager"))
