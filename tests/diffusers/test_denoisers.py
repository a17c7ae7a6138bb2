"""The names of denoisers are the same for a live pipeline and for a saved one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from click.testing import CliRunner  # noqa: E402

from cachepolicy.cli.commands import main  # noqa: E402
from cachepolicy.diffusers.denoisers import DENOISERS  # noqa: E402
from cachepolicy.engine.introspection import denoisers  # noqa: E402
from cachepolicy.tools.meta_model import read_model  # noqa: E402
from tests.support import zoo  # noqa: E402


@pytest.mark.parametrize("name", DENOISERS)
def test_a_pipeline_folder_with_one_denoiser_is_read(name: str, tmp_path: Path) -> None:
    """A saved pipeline is read from whichever folder holds its denoiser."""
    model: Any = zoo.build("flux")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline"}))
    model.save_config(tmp_path / name)
    blueprint = read_model(tmp_path)
    assert blueprint.class_name == type(model).__name__
    result = CliRunner().invoke(main, ["plan", "pab", "--model", str(tmp_path)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", DENOISERS)
def test_a_pipeline_with_one_denoiser_is_read(name: str) -> None:
    """A live pipeline gives its denoiser under the same names."""
    model = torch.nn.Linear(1, 1)

    class Pipeline(SimpleNamespace):
        def __call__(self) -> None: ...

    assert denoisers(Pipeline(components={name: model})) == {name: model}
