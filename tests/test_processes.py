"""Real processes over gloo: what one process decides of a sample, several decide of its pieces, and none hangs.

Starting a process costs seconds, so that each scene does many checks; their sentences stand in the files named here.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

from tests import ranks  # noqa: E402


def test_four_processes_decide_as_one():
    """All checks of `ranks_toy`: pieces of a sample, groups, replicas, sessions, FSDP2, DTensors."""
    failed = ranks.play(
        4,
        "tests.ranks_toy",
        [
            "replicas_without_a_group_are_left_alone",
            "pieces_decide_as_the_whole",
            "pieces_of_samples_decide_as_the_worst",
            "each_rank_for_itself_would_part",
            "two_groups_do_not_couple",
            "a_nan_on_one_rank_makes_all_compute",
            "copies_decide_as_one_of_them",
            "sessions_take_turns",
            "parameters_in_pieces_are_skipped_together",
            "tensors_in_pieces_are_measured_whole",
            "norms_of_tensors_in_pieces_are_right",
        ],
    )
    assert not failed, "\n".join(f"{where}: {what}" for where, what in failed.items())
