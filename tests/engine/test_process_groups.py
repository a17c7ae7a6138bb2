"""Real processes over gloo: what one process decides of a sample, several decide of its pieces, and none hangs.

Starting a process costs seconds, so that each scene does many checks; their sentences stand in the files named here.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

from tests.support import ranks  # noqa: E402


def succeed(failed: dict[str, str]) -> None:
    assert not failed, "\n".join(f"{where}: {what}" for where, what in failed.items())


def test_four_processes_decide_as_one():
    """Pieces of a sample, groups, replicas, sessions, FSDP2, DTensors."""
    succeed(
        ranks.play(
            4,
            "tests.support.ranks_toy",
            [
                "replicas_without_a_group_are_left_alone",
                "pieces_decide_as_the_whole",
                "pieces_of_samples_decide_as_the_worst",
                "each_rank_for_itself_would_part",
                "groups_that_do_not_fit_are_refused",
                "two_groups_do_not_couple",
                "a_nan_on_one_rank_makes_all_compute",
                "copies_decide_as_one_of_them",
                "sessions_take_turns",
                "parameters_in_pieces_are_skipped_together",
                "tensors_in_pieces_are_measured_whole",
                "norms_of_tensors_in_pieces_are_right",
            ],
        )
    )


def test_context_parallelism_of_diffusers():
    """Ulysses on Flux and Wan, before the policy and after it."""
    pytest.importorskip("diffusers")
    succeed(
        ranks.play(
            2,
            "tests.support.ranks_diffusers",
            [
                "first_block_cache_decides_as_alone",
                "a_norm_inside_the_first_block_decides_as_alone",
                "static_policies_say_nothing",
                "uneven_tokens_decide_as_alone",
                "compiled_blocks_decide_as_alone",
                "the_group_is_found_where_it_is",
            ],
        )
    )


def test_nobody_waits_for_ever():
    """For a process that raises, is elsewhere, says nothing, or dies."""
    succeed(
        ranks.play(
            2,
            "tests.support.ranks_failing",
            [
                "a_forward_that_raises_is_heard",
                "a_clock_that_raises_is_heard",
                "other_settings_are_noticed",
                "silence_ends_with_the_timeout_of_the_group",
                "a_process_that_dies_is_noticed",
            ],
            timeout=30,
            leaves=[1],
        )
    )
