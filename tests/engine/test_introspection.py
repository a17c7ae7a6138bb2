"""Kinds of modules by structure, for models that use none of diffusers' classes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

import cachepolicy  # noqa: E402
from cachepolicy.engine.introspection import describe  # noqa: E402
from cachepolicy.errors import PolicyError  # noqa: E402
from cachepolicy.language.parser import parse  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")


class Attention(nn.Module):
    """The core of an attention: it has no weights, and a helper inside."""

    def __init__(self) -> None:
        super().__init__()
        self.impl = nn.Identity()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.impl(torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v)


class SelfAttention(nn.Module):
    def __init__(self, linear: Any = nn.Linear) -> None:
        super().__init__()
        self.to_qkv, self.to_out, self.attn = linear(4, 12), linear(4, 4), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(self.attn(*self.to_qkv(x).chunk(3, dim=-1)))


class TextCrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_kv, self.to_out, self.attn = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(4, 4), Attention()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.to_out(self.attn(self.to_q(x), *self.to_kv(y).chunk(2, dim=-1)))


class SD3CrossAttention(nn.Module):
    """Joint attention, whatever it is called: two streams in, two out."""

    def __init__(self, names: tuple[str, str, str, str]) -> None:
        super().__init__()
        self.names = names
        for name, width in zip(names, (12, 12, 4, 4), strict=True):
            self.add_module(name, nn.Linear(4, width))
        self.core = Attention()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        first, second, out, other = (getattr(self, name) for name in self.names)
        parts = [torch.cat(pair, dim=1) for pair in zip(first(x).chunk(3, -1), second(y).chunk(3, -1), strict=True)]
        both = self.core(*parts)
        return out(both[:, : x.shape[1]]), other(both[:, x.shape[1] :])


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn, self.cross, self.ff = attention, TextCrossAttention(), nn.Sequential(nn.Linear(4, 4), nn.GELU())

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.attn, SD3CrossAttention):
            more, other = self.attn(x, y)
            x, y = x + more, y + other
        else:
            x = x + self.attn(x)
        x = x + self.cross(x, y)
        return x + self.ff(x), y


class Net(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(make()) for _ in range(2))

    def forward(self, x: Tensor, timestep: Any, y: Tensor) -> Tensor:
        for block in self.blocks:
            x, y = block(x, y)
        return x


JOINT = {
    "added": ("to_qkv", "add_kv_proj", "to_out", "to_add_out"),
    "two of each": ("img_qkv", "txt_qkv", "img_proj", "txt_proj"),
    "two outputs": ("first", "second", "out_x", "out_y"),
    "queries": ("to_q", "add_q_proj", "to_out", "other"),
}
MAKERS: dict[str, Any] = {"self": SelfAttention} | {
    name: (lambda names=names: SD3CrossAttention(names)) for name, names in JOINT.items()
}


@pytest.mark.parametrize("name", MAKERS)
def test_attention_with_a_core_without_weights_is_attention(name: str) -> None:
    """The module with the projections is selected, not its core, and joint attention is no cross-attention."""
    kinds = {each.name: each.kinds for each in describe(Net(MAKERS[name])).modules}
    for index in range(2):
        assert kinds[f"blocks.{index}.attn"] == {"attention", "self_attention"}
        assert kinds[f"blocks.{index}.cross"] == {"attention", "cross_attention"}
    assert not any(found for path, found in kinds.items() if path.count(".") > 2)


@pytest.mark.parametrize("name", MAKERS)
def test_pab_reuses_attention_of_models_that_are_not_of_diffusers(name: str) -> None:
    """The shipped policy selects self- and cross-attention, each by its interval."""
    x, y = torch.randn(1, 3, 4), torch.randn(1, 2, 4)
    with cachepolicy.apply(Net(MAKERS[name]), "pab", spatial_every=2, cross_every=3) as run, torch.no_grad():
        for t in (700.0, 600.0, 500.0, 400.0, 300.0, 200.0):
            run.target(x, t, y)
        rows = run.trace.rows()
    assert {"CRCRCR"} == {row for site, row in rows.items() if site.endswith(".attn")}
    assert {"CRRCRR"} == {row for site, row in rows.items() if site.endswith(".cross")}


def test_a_second_sequence_that_a_forward_needs_makes_it_cross_attention() -> None:
    """Where no name says so, the signature does; an optional sequence and joint attention are no sign."""

    class PlainAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_kv = nn.Linear(4, 4), nn.Linear(4, 8)

    class NeedsContext(PlainAttention):
        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return x + context.mean()

    class TakesContext(PlainAttention):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return x if context is None else x + context.mean()

    class JointAttention(NeedsContext):
        pass

    kinds = dict[str, str]()
    for each in (NeedsContext, TakesContext, JointAttention):
        each.__name__ = each.__name__.replace("Context", "ContextAttention")
        net = nn.Module()
        net.blocks = nn.ModuleList([nn.Sequential(each())])
        kinds[each.__name__] = next(kind for each in describe(net).modules for kind in each.kinds if "_" in kind)
    assert kinds == {
        "NeedsContextAttention": "cross_attention",
        "TakesContextAttention": "self_attention",
        "JointAttention": "self_attention",
    }


@pytest.mark.parametrize(
    "names", [("wq", "wk", "wv", "wo"), ("q", "k", "v", "o"), ("qkv", "proj"), ("to_q", "to_kv"), ("q_proj", "k_proj")]
)
def test_projections_make_an_attention_whatever_it_is_called(names: tuple[str, ...]) -> None:
    """A class without the word is found by its queries and keys; a block around it is none."""

    class Self2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x

    net = nn.Module()
    net.blocks = nn.ModuleList([nn.ModuleDict({"mixer": Self2(), "lin": nn.Linear(4, 4)})])
    kinds = {each.name: each.kinds for each in describe(net).modules}
    assert {"attention", "self_attention"} == kinds["blocks.0.mixer"]
    assert [] == [name for name, each in kinds.items() if "attention" in each and name != "blocks.0.mixer"]


def test_a_list_that_holds_one_module_twice_keeps_the_numbers_of_its_blocks() -> None:
    """The module has the name of its first place, and the others keep theirs."""
    first, second = (nn.Sequential(SelfAttention()) for _ in range(2))
    net = nn.Module()
    net.blocks = nn.ModuleList([first, first, second])
    assert ["blocks.0", "blocks.2"] == [each.name for each in describe(net).modules if "block" in each.kinds]


def test_quantised_projections_are_weights() -> None:
    """Layers that keep their weights outside the parameters make an attention all the same."""
    model = torch.ao.quantization.quantize_dynamic(Net(SelfAttention).eval(), {nn.Linear})
    kinds = {each.name: each.kinds for each in describe(model).modules}
    assert kinds["blocks.0.attn"] == {"attention", "self_attention"}


class BareAttention(nn.Module):
    """The core of an attention, without anything inside."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v


class ProjectingBlock(nn.Module):
    """A block that projects for the attention core inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.attn1 = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), BareAttention()
        self.ff_a, self.ff_b = (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2))


class FusedBlock(nn.Module):
    """A block that is its own attention and its own feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv_mlp, self.proj_out, self.norm = nn.Linear(4, 28), nn.Linear(20, 4), nn.Sequential(nn.LayerNorm(4))


class Engine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(4, 4), nn.SiLU())
        self.blocks = nn.ModuleList(ProjectingBlock() for _ in range(2))
        self.single_blocks = nn.ModuleList(FusedBlock() for _ in range(2))
        self.norms = nn.ModuleList(nn.Sequential(nn.LayerNorm(4)) for _ in range(2))


def test_a_core_is_the_attention_of_a_block_that_projects_for_it() -> None:
    """It has no weights, and there is no other module around its projections and itself."""
    kinds = {each.name: each.kinds for each in describe(Engine()).modules}
    assert {"blocks.0.attn1", "blocks.1.attn1"} == {name for name, found in kinds.items() if "attention" in found}
    assert {"attention", "self_attention"} == kinds["blocks.0.attn1"]


def test_both_streams_have_a_feed_forward_and_embedders_have_none() -> None:
    """`ff_a` and `ff_b` are feed-forward; the network of a timestep's embedding is part of no block."""
    found = [each.name for each in describe(Engine()).modules if "feedforward" in each.kinds]
    assert [f"blocks.{block}.{name}" for block in range(2) for name in ("ff_a", "ff_b")] == found


def test_blocks_that_are_their_own_attention_are_blocks() -> None:
    """A layer for queries, keys, values and more shows them; a list of norms is none of blocks."""
    assert ("blocks", "single_blocks") == describe(Engine()).block_lists


def test_a_block_called_after_its_attention_is_no_attention() -> None:
    """It holds one, with weights or as a core."""

    class AttentionBlock(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.ff = inner, nn.Linear(4, 4)

    for inner in (Attention(), SelfAttention()):
        net = nn.Module()
        net.blocks = nn.ModuleList([AttentionBlock(inner)])
        kinds = {each.name: each.kinds for each in describe(net).modules}
        assert "attention" not in kinds["blocks.0"]


# --- the unit of a timestep ------------------------------------------------------------------------------

READS_T = "match attention when t in (100, 800) every 2 -> reuse"


@pytest.mark.parametrize("t", [0.98, torch.tensor([0.5]), torch.tensor(0.25, dtype=torch.bfloat16)])
def test_a_first_timestep_that_may_be_a_fraction_is_no_training_timestep(t: Any) -> None:
    """A class that is not known, called with a number between 0 and 1, is refused with the two ways out."""
    x, y = torch.randn(1, 3, 4), torch.randn(1, 2, 4)
    with (
        cachepolicy.apply(Net(SelfAttention), parse(READS_T)) as run,
        pytest.raises(PolicyError, match="E321") as caught,
    ):
        run.target(x, t, y)
    assert "scheduler=" in (caught.value.diagnostics[0].help or "")


@pytest.mark.parametrize("t", [0, 0.0, 1.0, 14.6146, torch.tensor(80.0)])
def test_a_low_first_timestep_is_an_assumption_that_is_stated(t: Any) -> None:
    """Rising timesteps start at 0, fractions at 1, noise levels at 14.6 or 80; in training units that is the end."""
    x, y = torch.randn(1, 3, 4), torch.randn(1, 2, 4)
    with cachepolicy.apply(Net(SelfAttention), parse(READS_T)) as run:
        with pytest.warns(UserWarning, match="taken for one of 0..1000"):
            run.target(x, t, y)
        run.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run.target(x, torch.tensor([1]), y)


def test_a_policy_without_t_takes_any_unit() -> None:
    """Where the policy does not read `t`, its unit does not matter."""
    x, y = torch.randn(1, 3, 4), torch.randn(1, 2, 4)
    with cachepolicy.apply(Net(SelfAttention), parse("match attention every 2 -> reuse")) as run, torch.no_grad():
        for t in (0.9, 0.6, 0.3, 0.1):
            run.target(x, t, y)
        assert {"CRCR"} == set(run.trace.rows().values())


class Adding(nn.Module):
    """A block with a child, so that a list of them is a block list."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.lin(hidden_states)


class Sharing(nn.Module):
    """A model whose list holds blocks by the letters of a text, and whose `first` may be one of them."""

    def __init__(self, letters: str, *, alias: bool = False) -> None:
        super().__init__()
        blocks = {letter: Adding() for letter in letters}
        if alias:
            self.first = blocks[letters[0]]
        self.blocks = nn.ModuleList(blocks[letter] for letter in letters)

    def forward(self, hidden_states: Tensor, timestep: Any) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@pytest.mark.parametrize(
    "selector", ["blocks[1:]", "blocks[0]", "blocks[-1]", "each blocks[::2]", 'blocks[:2] of "^blocks$"']
)
@pytest.mark.parametrize(("letters", "alias"), [("ABA", False), ("AAB", False), ("ABCAD", False), ("ABC", True)])
def test_positions_in_a_list_that_shares_a_module_are_refused(letters: str, alias: bool, selector: str) -> None:
    """A module at two places has one name, so an index or a slice would take other elements than it says."""
    model = Sharing(letters, alias=alias)
    with pytest.raises(PolicyError, match="E206"):
        cachepolicy.apply(model, parse(f"match {selector} every 2 -> reuse"))


@pytest.mark.parametrize("selector", ["blocks", "each blocks"])
def test_all_blocks_of_a_list_that_shares_a_module_are_the_model(selector: str) -> None:
    """Without a position, what one forward calls twice computes, and says so."""
    torch.manual_seed(0)
    model, plain = Sharing("ABA"), Sharing("ABA")
    plain.load_state_dict(model.state_dict())
    inputs = torch.randn(3, 1, 2, 4)
    with torch.no_grad(), pytest.warns(UserWarning, match="W604"):
        with cachepolicy.apply(model, parse(f"match {selector} every 2 -> reuse")) as run:
            outputs = [model(x, 900.0 - step) for step, x in enumerate(inputs)]
        assert torch.equal(torch.stack(outputs), torch.stack([plain(x, 0.0) for x in inputs]))
        assert all(decision.computes for call in run.trace.last.calls for decision in call.decisions)
