"""The tables of facts about diffusers, compared with the installed diffusers."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.models import transformers, unets  # noqa: E402
from diffusers.models.modeling_utils import ModelMixin  # noqa: E402

from cachepolicy.diffusers import argument_names, call_forms, guidance, hook_names, module_names  # noqa: E402
from cachepolicy.diffusers.denoisers import DENOISER_PACKAGES, DENOISERS  # noqa: E402
from cachepolicy.diffusers.timestep_scaling import SCALES  # noqa: E402

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "Flux3Transformer2DModel"), reason="the tables are those of diffusers 0.42"
)

SOURCE = Path(diffusers.__file__).parent
OF_OTHERS = {"transformer_3", "dit"}
NOT_CALLED_WITH_A_TIMESTEP = {
    "T5FilmDecoder",
    "MotionAdapter",
    "MiniMaxMusic3RVQDepthDecoder",
    "RFD4ProteinaTransformer",
    "UVit2DModel",
}


def _resolved(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _denoisers() -> Iterator[type]:
    for module in (transformers, unets):
        for each in vars(module).values():
            if isinstance(each, type) and issubclass(each, ModelMixin):
                yield each


def _forward_parameters(kind: Any) -> set[str]:
    return set(inspect.signature(kind.forward).parameters)


ALL_PARAMETERS = {name: _forward_parameters(kind) for kind in _denoisers() for name in [kind.__name__]}


@pytest.mark.parametrize("path", sorted(path for path in SCALES if path.startswith("diffusers.")))
def test_a_class_with_a_scale_is_where_the_table_says(path: str) -> None:
    """Every key of the scales is the module path and name of a denoiser."""
    assert path == f"{_resolved(path).__module__}.{_resolved(path).__qualname__}"
    assert path.startswith(DENOISER_PACKAGES)


def test_attention_and_feedforward_are_the_classes_of_diffusers_own_caches() -> None:
    """The paths name exactly the classes by which diffusers' hooks find attention and feed-forward."""
    common = importlib.import_module("diffusers.hooks._common")
    assert set(common._ATTENTION_CLASSES) == {_resolved(path) for path in module_names.ATTENTION_CLASSES}
    assert set(common._FEEDFORWARD_CLASSES) == {_resolved(path) for path in module_names.FEEDFORWARD_CLASSES}


def test_every_denoiser_has_a_timestep_of_a_known_name() -> None:
    """The names of timesteps are complete for the classes that are called with one, and each is used."""
    without = {
        name for name, parameters in ALL_PARAMETERS.items() if not parameters & set(argument_names.TIMESTEP_NAMES)
    }
    assert without <= NOT_CALLED_WITH_A_TIMESTEP
    for name in argument_names.TIMESTEP_NAMES:
        assert any(name in parameters for parameters in ALL_PARAMETERS.values()), name


@pytest.mark.parametrize(
    "names",
    [
        {*argument_names.GRID_SIZES},
        {argument_names.GRID_IDS},
        {argument_names.GRID_SHAPES},
        {argument_names.HIDDEN_STATES},
        {"audio_hidden_states", "sigma"},
        {"down_block_additional_residuals"},
        {"controlnet_block_samples"},
    ],
)
def test_an_argument_name_is_that_of_a_denoiser(names: set[str]) -> None:
    """Some denoiser takes all of these arguments together."""
    assert any(names <= parameters for parameters in ALL_PARAMETERS.values())


@pytest.mark.parametrize("name", ["audio_hidden_states", "sigma", "down_block_additional_residuals"])
def test_what_is_new_at_each_step_is_recognised(name: str) -> None:
    """Arguments that pipelines create anew at each step match, text embeddings do not."""
    assert argument_names.NEW_AT_EACH_STEP.search(name)
    assert not argument_names.NEW_AT_EACH_STEP.search("encoder_hidden_states")


@pytest.mark.parametrize("name", [name for name in DENOISERS if name not in OF_OTHERS])
def test_a_pipeline_holds_a_denoiser_under_each_name(name: str) -> None:
    """Every attribute of the table is a component of a pipeline."""
    pattern = re.compile(rf"^        {name}: ", re.MULTILINE)
    assert any(pattern.search(text) for text in _sources("pipelines").values())


def _sources(folder: str) -> dict[str, str]:
    files = (SOURCE / folder).rglob("*.py")
    return {str(file.relative_to(SOURCE)): file.read_text(encoding="utf-8") for file in files}


def test_the_names_of_branches_are_those_that_pipelines_enter() -> None:
    """Every name that a pipeline enters `cache_context` with is in the table or belongs to a third branch."""
    entered = {
        name
        for folder in ("pipelines", "modular_pipelines")
        for text in _sources(folder).values()
        for name in re.findall(r'cache_context\(\s*"(\w+)"', text)
    }
    known = guidance.COND_BRANCHES | guidance.UNCOND_BRANCHES | {guidance.BATCH_CONTEXT}
    assert {"cond", "uncond", guidance.BATCH_CONTEXT} <= entered
    assert {name for name in entered - known if not name.startswith("uncond_")} == set()


def test_the_guiders_call_their_branches_as_the_table_says() -> None:
    """The predictions of guiders carry the names that modular pipelines enter `cache_context` with."""
    from diffusers.guiders import ClassifierFreeGuidance

    assert set(ClassifierFreeGuidance._input_predictions) <= guidance.COND_BRANCHES | guidance.UNCOND_BRANCHES


def test_the_property_of_guidance_is_that_of_pipelines() -> None:
    """Pipelines say by this property that guidance is on."""
    assert isinstance(getattr(diffusers.StableDiffusionPipeline, guidance.GUIDANCE_PROPERTY), property)


@pytest.mark.parametrize("name", sorted(call_forms.FORMS))
def test_a_call_form_names_arguments_of_its_class(name: str) -> None:
    """Latents, timestep and text are parameters of the class's forward, and the config has the width of the text."""
    form, kind = call_forms.FORMS[name], getattr(diffusers, name)
    text = {"encoder_hidden_states"} if form.text else set()
    assert {form.timestep, *({form.latents} if form.latents else ()), *text} <= _forward_parameters(kind)
    assert form.text is None or form.text in inspect.signature(kind.__init__).parameters


def test_the_hooks_of_caches_are_registered_under_these_names() -> None:
    """Every name of the table is a constant of `diffusers.hooks`, and no hook of a cache is missing."""
    constants = dict[str, str]()
    for module in pkgutil.iter_modules(importlib.import_module(hook_names.HOOKS_MODULE).__path__):
        loaded = importlib.import_module(f"{hook_names.HOOKS_MODULE}.{module.name}")
        for key, value in vars(loaded).items():
            if isinstance(value, str) and key.isupper() and "." not in value:
                constants[value] = module.name
    assert set(hook_names.CACHES) <= constants.keys()
    assert hook_names.GROUP_OFFLOADING in constants
    caching = {constants[name] for name in hook_names.CACHES}
    missing = {name for name, module in constants.items() if module in caching and re.search(r"cache|block", name)}
    assert missing - hook_names.CACHES.keys() <= {"sea_cache_post_norm"}  # only records a signal


def test_hooks_are_kept_where_the_table_says() -> None:
    """A module with a hook of diffusers or accelerate has the attribute of the table."""
    from diffusers.hooks import HookRegistry

    module = torch.nn.Linear(1, 1)
    HookRegistry.check_if_exists_or_initialize(module)
    assert hook_names.REGISTRY in vars(module)
    accelerate = pytest.importorskip("accelerate.hooks")
    accelerate.add_hook_to_module(module, accelerate.ModelHook())
    assert hook_names.ACCELERATE_HOOK in vars(module)


def test_what_is_looked_up_in_modules_of_hooks_is_there() -> None:
    """The classes that the engine looks up by module name exist."""
    assert hasattr(importlib.import_module(hook_names.BLOCK_REGISTRY_MODULE), "TransformerBlockRegistry")
    assert hasattr(importlib.import_module(hook_names.CONTEXT_PARALLEL_MODULE), "ContextParallelSplitHook")


def test_lists_beside_the_main_stream_are_known_by_name() -> None:
    """The words of side lists occur in denoisers, and the lists of main blocks have none of them."""
    text = "\n".join(text for folder in ("models", "pipelines/ltx2") for text in _sources(folder).values())
    attributes = set(re.findall(r"self\.(\w+) = ", text))
    for word in module_names.SIDE_LIST.pattern.split("|"):
        assert any(word in name for name in attributes), word
    main = {"transformer_blocks", "single_transformer_blocks", "blocks", "layers", "double_blocks", "down_blocks"}
    assert not [name for name in main if module_names.SIDE_LIST.search(name)]


# --- guidance batches ------------------------------------------------------------------------------------


def _classes() -> dict[str, ast.ClassDef]:
    """The classes of all pipelines by name, from their source: importing them all takes minutes."""
    return {
        node.name: node
        for text in _sources("pipelines").values()
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef) and re.search(r"Pipeline(?!Output)|PAGMixin", node.name)
    }


PIPELINES = _classes()
assert len(PIPELINES) > 200


def _orders(name: str) -> tuple[guidance.Order, ...]:
    orders = guidance.orders_of(type(name, (), {"__module__": "diffusers.pipelines.any"}))
    assert orders is not None
    return orders


def _part(name: str) -> str:
    """The part of a guidance batch that a variable in the source of a pipeline stands for."""
    if "..." in name:
        return "..."
    for part, words in {
        "uncond": "uncond|neg|null",
        "cond": "text|pos",
        "image": "img|image",
        "perturbed": "perturb",
    }.items():
        if re.search(words, name):
            return part
    return "cond"


def _splits(pipeline: ast.ClassDef) -> set[tuple[str, ...]]:
    """The orders of parts into which a pipeline splits its predictions."""
    found = set[tuple[str, ...]]()
    for node in ast.walk(pipeline):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        if getattr(node.value.func, "attr", "") not in {"chunk", "split"}:
            continue
        target, value = node.targets[0], ast.unparse(node.value)
        if not re.search(r"\.chunk\(|torch\.split\(", value) or re.search(r"dim=1|dim=-1|, 1\)|embeds", value):
            continue
        if isinstance(target, ast.Tuple):
            names = [ast.unparse(each) for each in target.elts]
            if "_" not in names and any(_part(name) == "uncond" for name in names):
                found.add(tuple(map(_part, names)))
        elif re.search(r"chunk\((?!\d+[,)])", value):
            found.add(("...", "...", "..."))  # as many parts as there are edits
    for node in ast.walk(pipeline):  # Z-Image: a list of predictions, of which the first half is taken
        if isinstance(node, ast.Assign) and getattr(getattr(node.value, "value", None), "id", "") == "model_out_list":
            first = re.fullmatch(r"(\w+)_out = model_out_list\[:\w+\]", ast.unparse(node))
            if first:
                found.add(("cond", "uncond") if _part(first[1]) == "cond" else ("uncond", "cond"))
    return found


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_the_orders_of_guidance_batches_are_those_of_the_source(name: str) -> None:
    """How a pipeline splits a prediction is what the table says of it; pipelines that call twice split nothing."""
    orders, splits = _orders(name), _splits(PIPELINES[name])
    pairs, more = ({each for each in splits if (len(each) > 2) is many} for many in (False, True))
    if name == "PAGMixin":
        assert more == {("uncond", "cond", "perturbed")}
        return
    known = {tuple("cond" if part == "edit" else part for part in order) for order in orders}
    assert pairs <= known
    assert any(len(order) > 2 for order in orders) == bool(more) or name == "StableDiffusionPanoramaPipeline"
    assert not pairs or any(len(order) == 2 for order in orders)


def test_pipelines_with_perturbed_attention_have_the_property() -> None:
    """All of them share the class with the property that says whether it is on."""
    methods = {node.name for node in PIPELINES["PAGMixin"].body if isinstance(node, ast.FunctionDef)}
    assert guidance.PERTURBED_PROPERTY in methods
    with_pag = [node for name, node in PIPELINES.items() if "PAG" in name and name != "PAGMixin"]
    assert len(with_pag) > 10
    assert all("PAGMixin" in map(ast.unparse, node.bases) for node in with_pag)


def test_the_table_of_guidance_batches_has_names_of_pipelines_only() -> None:
    """Every entry is a pipeline of the installed diffusers, current or deprecated."""
    assert guidance.ORDERS.keys() <= PIPELINES.keys()


def test_the_models_of_conditional_first_pipelines_are_listed() -> None:
    """A denoiser is in the table if all pipelines that split its predictions put the conditional half first."""
    listed = {path.rpartition(".")[2] for path in guidance.COND_FIRST_MODELS}
    assert listed == {_resolved(path).__name__ for path in guidance.COND_FIRST_MODELS}
    holding = dict[str, set[bool]]()
    for name, node in PIPELINES.items():
        init = next((each for each in node.body if getattr(each, "name", "") == "__init__"), None)
        if init is None or not _splits(node):
            continue
        for argument in init.args.args:
            if argument.arg in DENOISERS and argument.annotation is not None:
                first = _orders(name)[0]
                holding.setdefault(ast.unparse(argument.annotation), set()).add(first == ("cond", "uncond"))
    assert listed == {model for model, sides in holding.items() if sides == {True} and hasattr(diffusers, model)}
