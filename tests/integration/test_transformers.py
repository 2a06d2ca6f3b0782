"""Models from transformers' configurations trace, plan and train."""

import pytest
import torch

from assign.executor.apply import planned_step
from assign.planner import search_table
from assign.tracing.tracer import trace

transformers = pytest.importorskip("transformers")


def language(config, model):
    ids = torch.randint(0, 100, (4, 16))
    return model(config), {"input_ids": ids, "labels": ids}


def vision(config, model):
    return model(config), {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.randint(0, 5, (4,))}


def bert():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=100, num_labels=5, **sizes)
    batch = {"input_ids": torch.randint(0, 100, (4, 16)), "labels": torch.randint(0, 5, (4,))}
    return transformers.BertForSequenceClassification(config), batch


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=100, num_key_value_heads=2, **sizes)
    return language(config, transformers.LlamaForCausalLM)


def vit():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **sizes)
    return vision(config, transformers.ViTForImageClassification)


def resnet():
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 32, 64], depths=[1] * 4, num_labels=5)
    return vision(config, transformers.ResNetForImageClassification)


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[16, 32, 32, 64], depths=[1] * 4, num_labels=5, patch_size=2)
    return vision(config, transformers.ConvNextForImageClassification)


def mobilenet():
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, num_labels=5)
    return vision(config, transformers.MobileNetV2ForImageClassification)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return language(config, transformers.GPT2LMHeadModel)


@pytest.mark.slow
@pytest.mark.parametrize("make", [resnet, vit, bert, llama, convnext, mobilenet, gpt2], ids=lambda make: make.__name__)
def test_traces_plans_and_trains_two_steps(make):
    model, batch = make()
    model.train()

    def loss(network, inputs):
        return network(**inputs).loss

    def adam(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3)

    table = trace(model, batch, loss, adam)
    plan = search_table(table, low_ratio=0.5)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer, step = adam(model.parameters()), planned_step(model, loss, plan, backend="eager")
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        value = step(batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert all(torch.isfinite(torch.tensor(losses)))
    assert plan.provenance.estimate["low_ratio"] >= 0.5
    changed = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert changed > 0.9 * len(before)
