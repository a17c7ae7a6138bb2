"""Starts vLLM-Omni once, draws what the tests ask for, and writes down what came of it: `python start_omni.py JOB`.

JOB is a JSON file: `folder` of the model, `engine` arguments, `requests`, and the `output` file. Requests with the same
`group` are under way together. Each has a `seed`, `steps`, further sampling parameters (`more`), further `extra`
arguments, and what it says under `cachepolicy` (`said`).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SIZE = 128
NOTHING = "nothing"
"""What a request says that says nothing."""


def parameters(request: dict[str, Any]) -> Any:
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    said = request.get("said", NOTHING)
    return OmniDiffusionSamplingParams(
        height=SIZE,
        width=SIZE,
        num_inference_steps=request.get("steps", 8),
        seed=request.get("seed", 0),
        guidance_scale=4.0,
        extra_args=request.get("extra", {}) | ({} if said == NOTHING else {"cachepolicy": said}),
        **request.get("more", {}),
    )


async def drawn(omni: Any, name: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return the pixels and the record of a request, or its error."""
    import numpy as np

    prompt = {"prompt": request.get("prompt", "a cat"), "negative_prompt": "ugly"}
    try:
        last = None
        async for output in omni.generate(prompt, request_id=name, sampling_params_list=[parameters(request)]):
            last = output
    except Exception as error:  # noqa: BLE001 (it is what the test asks for)
        return {"error": f"{type(error).__name__}: {error}"}
    pixels = np.asarray(last.images[0])
    pixels = (pixels * 255e3 if pixels.dtype.kind == "f" else pixels).astype(int)  # videos are fractions
    return {"pixels": pixels.ravel().tolist(), "record": (last.custom_output or {}).get("cachepolicy")}


async def main(job: dict[str, Any]) -> dict[str, Any]:
    from vllm_omni.entrypoints.async_omni import AsyncOmni

    written: dict[str, Any] = {"results": []}
    try:
        omni = AsyncOmni(model=job["folder"], dtype="float32", **{"enforce_eager": True, **job["engine"]})
    except BaseException as error:  # noqa: BLE001
        traceback.print_exc()
        written["start"] = f"{type(error).__name__}: {error}"
        return written
    numbered = list(enumerate(job["requests"]))
    for _, together in itertools.groupby(numbered, key=lambda each: each[1].get("group", f"alone {each[0]}")):
        written["results"] += await asyncio.gather(*(drawn(omni, f"request-{n}", each) for n, each in together))
    omni.shutdown()
    return written


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    asked = json.loads(Path(sys.argv[1]).read_text())
    Path(asked["output"]).write_text(json.dumps(asyncio.run(main(asked))))
