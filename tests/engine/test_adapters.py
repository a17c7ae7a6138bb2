"""Layers that are put in the place of others: LoRA by peft, quantised and reparametrised linears, processors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from cachepolicy.testing.models import Probes, Toy, inputs, sample
from tests.support import zoo

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing", "ignore::FutureWarning")

TIMESTEPS = (950.0, 850.0, 750.0, 650.0, 550.0, 450.0)
TEXTS = {
    "leaf": 'match "to_q$" every 2 -> reuse',
    "attention": "match attention every 2 -> reuse",
    "span": "match blocks[0:] every 3 -> reuse residual",
}


@torch.no_grad()
def run(model: nn.Module) -> list[Tensor]:
    x, y = inputs(Toy())
    return list(sample(model, TIMESTEPS, x, y))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def under(text: str, model: nn.Module) -> list[Tensor]:
    with cachepolicy.apply(model, parse(text)):
        return run(model)


def bare(model: nn.Module) -> bool:
    return all(
        "_cachepolicy" not in each.__dict__ and not hasattr(type(each), "_cachepolicy_class")
        for each in model.modules()
    )


# --- LoRA ------------------------------------------------------------------------------------------------


def lora(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "up"], init_lora_weights=False)
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(config, model, adapter_name=name)
    model.eval()


def layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [each for each in model.modules() if isinstance(each, BaseTunerLayer)]


def take_lora(model: nn.Module) -> None:
    """Give the base layers their places back, as `unload_lora` of diffusers does."""
    pytest.importorskip("diffusers")
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(model)


def adapted() -> nn.Module:
    model = Toy().build()
    lora(model)
    return model


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("put", [False, True])
def test_lora_comes_and_goes_in_any_order(text: str, put: bool) -> None:
    """Before or after the policy, taken out before or after it: each run is that of the policy on what is there."""
    for taken in (False, True):
        model = adapted() if put else Toy().build()
        attached = cachepolicy.apply(model, parse(text))
        if not put:
            assert same(under(text, Toy().build()), run(model))
            lora(model)
        assert same(under(text, adapted()), run(model))
        if taken:
            take_lora(model)
            assert same(under(text, Toy().build()), run(model))
            attached.remove()
        else:
            attached.remove()
            assert same(run(adapted()), run(model))
            take_lora(model)
        assert same(run(Toy().build()), run(model))
        assert bare(model)
        assert [*Toy().build().state_dict()] == [*model.state_dict()]


def test_a_site_follows_its_path_to_the_adapter() -> None:
    """What is answered is the layer with its adapter: neither it nor its base runs at a reuse."""
    model = Toy().build()
    with cachepolicy.apply(model, parse(TEXTS["leaf"])):
        lora(model)
        probes = Probes(model)
        run(model)
        counts = probes.take()
    assert {3} == {counts[f"blocks.{block}.attn.to_q{part}"] for block in range(2) for part in ("", ".base_layer")}


def test_an_adapter_may_be_scaled_switched_merged_and_swapped() -> None:
    """What peft does to an adapter between runs shows in the next run as it does with the policy applied then."""
    model, twin = adapted(), adapted()

    def both(change: Callable[[Any], object]) -> None:
        for each in (model, twin):
            for layer in layers(each):
                change(layer)
        assert same(under(TEXTS["leaf"], twin), run(model))

    def exchange(layer: Any) -> None:
        with torch.no_grad():
            layer.lora_A["default"].weight.neg_()

    with cachepolicy.apply(model, parse(TEXTS["leaf"])):
        both(lambda layer: layer.set_scale("default", 0.25))
        both(lambda layer: layer.enable_adapters(enabled=False))
        both(lambda layer: layer.enable_adapters(enabled=True))
        both(exchange)
        both(lambda layer: layer.merge())
        both(lambda layer: layer.unmerge())
        for each in (model, twin):
            lora(each, "second", seed=2)
        both(lambda layer: layer.set_adapter(["default", "second"]))
        both(lambda layer: layer.delete_adapter("default"))


def test_real_models_take_lora_while_a_policy_is_on() -> None:
    """The calls of diffusers: add, scale, fuse, unfuse, delete and unload on a model with a policy on its leaves."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    text = 'match "attn.to_q$" every 2 -> reuse\nmatch feedforward every 3 -> reuse'
    changes: list[Callable[[Any], object]] = [
        lambda model: (torch.manual_seed(1), model.add_adapter(config, "one"), model.eval()),
        lambda model: model.set_adapters(["one"], [0.5]),
        lambda model: model.fuse_lora(lora_scale=0.5),
        lambda model: model.unfuse_lora(),
        lambda model: model.disable_lora(),
        lambda model: model.enable_lora(),
        lambda model: model.delete_adapters(["one"]),
        lambda model: model.unload_lora(),
    ]
    model, twin = zoo.build("flux"), zoo.build("flux")
    with torch.no_grad(), cachepolicy.apply(model, parse(text)):
        for change in changes:
            change(model)
            change(twin)
            with cachepolicy.apply(twin, parse(text)):
                wanted = list(zoo.trajectory("flux", twin, TIMESTEPS))
            assert same(wanted, list(zoo.trajectory("flux", model, TIMESTEPS)))
    assert bare(model)


def test_a_site_that_is_gone_is_named() -> None:
    """A path that leads nowhere any more is an error at the next trajectory, and nothing is left when it goes off."""
    model = Toy().build()
    attached = cachepolicy.apply(model, parse(TEXTS["attention"]))
    model.blocks = model.blocks[:1]
    with pytest.raises(PolicyError, match=r"no `blocks.1.attn` any more") as caught:
        run(model)
    assert ["E341"] == [each.code for each in caught.value.diagnostics]
    attached.remove()
    assert bare(model)


def test_blocks_may_change_places() -> None:
    """Sites stand at paths: after two blocks were exchanged each has the decisions of its new place."""
    text = 'match "^blocks.0.attn" every 2 -> reuse'
    model, twin = Toy().build(), Toy().build()
    for each in (model, twin):
        if each is model:
            attached = cachepolicy.apply(model, parse(text))
        each.blocks = nn.ModuleList(reversed(each.blocks))
    with attached:
        assert same(under(text, twin), run(model))
    assert bare(model)


def test_a_module_of_another_model_with_a_policy_is_not_taken() -> None:
    """Two runs never hold one module."""
    model, other = Toy().build(), Toy().build()
    with cachepolicy.apply(model, parse(TEXTS["attention"])), cachepolicy.apply(other, parse(TEXTS["attention"])):
        model.blocks[0] = other.blocks[0]
        with pytest.raises(PolicyError, match="has a policy of its own"):
            run(model)
        assert same(under(TEXTS["attention"], Toy().build()), run(other))
    assert bare(model)
    assert bare(other)


# --- reparametrised and quantised ------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.product(["put", "apply"], ["take", "remove"])), ids="-".join)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_parametrisations_come_and_go_in_any_order(text: str, order: tuple[str, str]) -> None:
    """Weight normalisation as torch parametrises it, on sites and inside them, whichever was first and goes first."""
    from torch.nn.utils import parametrizations, parametrize

    def put(model: nn.Module) -> nn.Module:
        for block in model.blocks:
            parametrizations.weight_norm(block.attn.to_q)
        return model

    def take(model: nn.Module) -> nn.Module:
        for block in model.blocks:
            parametrize.remove_parametrizations(block.attn.to_q, "weight")
        return model

    model = put(Toy().build()) if order[0] == "put" else Toy().build()
    attached = cachepolicy.apply(model, parse(text))
    if order[0] == "apply":
        put(model)
    assert same(under(text, put(Toy().build())), run(model))
    if order[1] == "take":
        take(model)
        assert same(under(text, take(put(Toy().build()))), run(model))
        attached.remove()
    else:
        attached.remove()
        take(model)
    assert same(run(take(put(Toy().build()))), run(model))
    assert bare(model)


def test_a_copy_of_a_parametrised_site_is_bare() -> None:
    """A deep copy of a model whose site is parametrised runs with its own weights and no policy."""
    from torch.nn.utils import parametrizations

    model = Toy().build()
    parametrizations.weight_norm(model.blocks[0].attn.to_q)
    wanted = run(model)
    with cachepolicy.apply(model, parse(TEXTS["leaf"])):
        run(model)
        twin = copy.deepcopy(model)
        assert same(wanted, run(twin))
        twin.blocks[0].attn.to_v.weight.data.zero_()
    assert same(wanted, run(model))


def _dynamic(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def _torchao(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    wide = lambda module, _: isinstance(module, nn.Linear) and module.in_features > 1  # noqa: E731
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=wide)
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("name", "computed"), [("leaf", 6), ("attention", 3), ("span", 2)])
@pytest.mark.parametrize("quantise", [_dynamic, _torchao])
def test_quantised_linears_are_modules_like_any_other(
    quantise: Callable[[nn.Module], nn.Module], name: str, computed: int
) -> None:
    """Eight-bit linears, in sites and as sites: what is answered is what was computed, and all comes off."""
    model, twin = quantise(Toy().build()), quantise(Toy().build())
    probes = Probes(model)
    got = under(TEXTS[name], model)
    assert computed == probes.take()["blocks.0.attn"]
    assert same(under(TEXTS[name], twin), got)
    assert not same(run(model), got)
    assert bare(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_linears_may_be_quantised_while_a_policy_is_on() -> None:
    """Weights are changed by torchao in their places: the next run is that of the policy on the quantised model."""
    model = Toy().build()
    with cachepolicy.apply(model, parse(TEXTS["leaf"])):
        run(model)
        _torchao(model)
        assert same(under(TEXTS["leaf"], _torchao(Toy().build())), run(model))


# --- processors ------------------------------------------------------------------------------------------


def test_attention_may_be_refitted_while_a_policy_is_on() -> None:
    """Other processors, another backend, fused and unfused projections: the next run is that of the policy on them."""
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import AttnProcessor

    changes: list[Callable[[Any], object]] = [
        lambda model: model.set_attn_processor(AttnProcessor()),
        lambda model: model.set_default_attn_processor(),
        lambda model: model.fuse_qkv_projections(),
        lambda model: model.unfuse_qkv_projections(),
    ]
    name = "unet2d_condition"
    model, twin = zoo.build(name), zoo.build(name)
    with torch.no_grad(), cachepolicy.apply(model, parse("match attention every 2 -> reuse")):
        for change in changes:
            change(model)
            change(twin)
            with cachepolicy.apply(twin, parse("match attention every 2 -> reuse")):
                wanted = list(zoo.trajectory(name, twin, TIMESTEPS))
            assert same(wanted, list(zoo.trajectory(name, model, TIMESTEPS)))


def test_an_attention_backend_is_part_of_the_model() -> None:
    """`set_attention_backend` while a policy is on."""
    # It also sets the backend of all models of the process. `attention_backend` sets that one back at its end.
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    model, twin = zoo.build("flux"), zoo.build("flux")
    policy = parse("match attention every 2 -> reuse")
    with torch.no_grad(), dispatch.attention_backend("native"), cachepolicy.apply(model, policy):
        for each in (model, twin):
            each.set_attention_backend("_native_math")
        with cachepolicy.apply(twin, policy):
            wanted = list(zoo.trajectory("flux", twin, TIMESTEPS))
        assert same(wanted, list(zoo.trajectory("flux", model, TIMESTEPS)))


def test_an_image_prompt_is_part_of_the_model() -> None:
    """The processors of an IP-Adapter, put in under a policy, and another scale: as with the policy put on last."""
    pytest.importorskip("diffusers")
    text = "match attention every 2 -> reuse"
    model = _image_prompted(text)
    results = list[list[Tensor]]()
    for scale in (0.7, 0.2):
        twin = _image_prompted(None)
        for each in (model, twin):
            for processor in each.attn_processors.values():
                if hasattr(processor, "scale"):
                    processor.scale = [scale]
        with cachepolicy.apply(twin, parse(text)):
            wanted = _prompted(twin)
        results.append(_prompted(model))
        assert same(wanted, results[-1])
    assert not same(*results)


def _image_prompted(text: str | None) -> Any:
    """A U-Net with the layers of an IP-Adapter, which come after the policy where there is one."""
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    model: Any = zoo.build("unet2d_condition")
    if text is not None:
        cachepolicy.apply(model, parse(text))
    torch.manual_seed(0)
    width = model.config.cross_attention_dim
    processors = dict[str, Any]()
    for name in model.attn_processors:
        attention = model.get_submodule(name.removesuffix(".processor"))
        processors[name] = AttnProcessor2_0()
        if attention.is_cross_attention:
            processors[name] = IPAdapterAttnProcessor2_0(attention.query_dim, width, num_tokens=(2,))
    model.set_attn_processor(processors)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(5, width, 2)])
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return model.eval()


@torch.no_grad()
def _prompted(model: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, model.config.in_channels, 16, 16, generator=generator)
    prompt = torch.randn(1, 3, model.config.cross_attention_dim, generator=generator)
    image = {"image_embeds": [torch.randn(1, 1, 5, generator=generator)]}
    return [model(x, t, prompt, added_cond_kwargs=image).sample for t in TIMESTEPS]
