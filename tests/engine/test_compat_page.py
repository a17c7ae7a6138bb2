"""The page of neighbours: every row stands for a test, and no row is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent  # each row is held by a test beside this one
PAGE = Path(__file__).parents[2] / "docs" / "neighbours.md"
ROWS = {
    "accelerate: `cpu_offload`": "test_offloading:test_accelerate_comes_and_goes_in_any_order",
    "diffusers: `enable_model_cpu_offload`": "test_offloading:test_a_pipeline_is_offloaded_as_diffusers_does_it",
    "diffusers: group offloading by leaves": "test_offloading:test_leaves_are_loaded_for_whoever_computes",
    "diffusers: group offloading by blocks": "test_offloading:test_groups_of_blocks_are_loaded_for_whoever_computes",
    "diffusers: group offloading with a stream": "test_offloading:test_a_stream_of_groups_loads_ahead",
    "diffusers: layerwise casting": "test_offloading:test_layerwise_casting_gives_the_same",
    "LoRA by peft": "test_adapters:test_lora_comes_and_goes_in_any_order",
    "LoRA scaled": "test_adapters:test_an_adapter_may_be_scaled_switched_merged_and_swapped",
    "`torch.nn.utils.parametrizations`": "test_adapters:test_parametrisations_come_and_go_in_any_order",
    "torch's dynamic quantisation": "test_adapters:test_quantised_linears_are_modules_like_any_other",
    "torchao": "test_adapters:test_linears_may_be_quantised_while_a_policy_is_on",
    "optimum-quanto": "test_orders:test_two_changes_and_a_policy_in_any_order",
    "a `PeftModel`": "test_orders:test_two_changes_and_a_policy_in_any_order",
    "attention processors": "test_adapters:test_attention_may_be_refitted_while_a_policy_is_on",
    "an IP-Adapter": "test_adapters:test_an_image_prompt_is_part_of_the_model",
    "blocks that change places": "test_adapters:test_blocks_may_change_places",
    "a module that is gone": "test_adapters:test_a_site_that_is_gone_is_named",
    "a module of another model": "test_adapters:test_a_module_of_another_model_with_a_policy_is_not_taken",
    "FSDP2": "test_sharded_models:test_sharded_models_run_under_a_policy",
    "`DistributedDataParallel`": "test_sharded_models:test_sharded_models_run_under_a_policy",
    "diffusers' context parallelism": "test_process_groups:test_context_parallelism_of_diffusers",
    "tensor parallelism": "test_sharded_models:test_sharded_models_run_under_a_policy",
    "`nn.DataParallel`": "test_compat_torch:test_replicas_that_share_the_dict_are_bare",
    "diffusers' caches by `enable_cache`": "test_other_caches:test_a_cache_of_diffusers_is_not_enabled_over_a_policy",
    "diffusers' caches by `apply_*`": "test_other_caches:test_hooks_of_a_cache_are_seen_when_a_trajectory_starts",
    "cache-dit": "test_other_caches:test_a_policy_and_cache_dit_refuse_each_other_on_a_pipeline",
    "diffusers' layer skipping": "test_other_caches:test_blocks_are_known_to_those_who_look_them_up_by_class",
    "forward hooks on sites": "test_compat_torch:test_hooks_of_a_site_run_when_it_computes",
    "`torch.compile`": "test_compat:test_a_compiled_model_has_a_graph_for_each_step_signature",
    "`copy.deepcopy`": "test_compat_torch:test_copies_are_bare_and_have_their_own_weights",
    "`save_pretrained`": "test_compat_torch:test_a_model_of_diffusers_is_saved_and_loaded_under_a_policy",
    "`torch.export`": "test_compat:test_export_sees_the_bare_model",
    "`torch.jit.trace`": "test_compat_torch:test_a_recording_is_of_the_bare_model",
    "`torch.fx.symbolic_trace`": "test_compat_torch:test_a_symbolic_trace_holds_no_policy",
    "`torch.func`:": "test_compat_torch:test_transformed_calls_are_refused_by_name",
    "`torch.func.functional_call`": "test_compat:test_functional_call_uses_the_given_weights",
    "`no_grad`": "test_compat_torch:test_modes_may_change_within_a_trajectory",
    "gradients, training mode": "test_compat_torch:test_training_runs_through_what_was_computed",
    "gradient checkpointing": "test_compat_torch:test_gradient_checkpointing_is_refused_where_it_would_run",
    "`model.to`": "test_compat_torch:test_half_precision_in_the_middle_of_a_trajectory",
    "autocast": "test_compat:test_autocast_is_part_of_the_call",
}
"""How a row begins, and the test that it stands for."""


def rows() -> list[str]:
    found = re.findall(r"^\| (.+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [row for row in found if row != "neighbour" and not row.startswith("---")]


@pytest.mark.parametrize("row", rows())
def test_a_row_stands_for_a_test(row: str) -> None:
    """Every neighbour of the page has a test that is there."""
    begins = max((each for each in ROWS if row.startswith(each)), key=len)
    module, _, name = ROWS[begins].partition(":")
    assert f"def {name}(" in (TESTS / f"{module}.py").read_text(encoding="utf-8")


def test_no_tested_neighbour_is_missing() -> None:
    """Every entry is on the page, once."""
    assert [1] * len(ROWS) == [sum(row.startswith(each) for row in rows()) for each in ROWS]
