"""The tables of facts about diffusers, compared with the installed diffusers."""

from __future__ import annotations

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


@pytest.mark.parametrize("path", sorted(SCALES))
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
