"""What only a run can tell about a site, and that turns a reuse into a compute."""

from __future__ import annotations

from enum import StrEnum


class Fact(StrEnum):
    """A fact of the run. Its text is the reason of the decision in reports and traces."""

    NO_HISTORY = "nothing is kept yet"
    OVER_LIMIT = "over the memory limit"
    MISFIT = "the history does not fit this call"
    OVERWRITTEN = "the history was overwritten in place"
    UNKNOWN_BRANCH = "nothing tells which branch this is"
    UNKNOWN_FORM = "its inputs and outputs are not known yet"
    """A `skip` before its site has computed in the run, where no forward on the meta device shows its form."""
    INCOMPLETE = "a block of it did not run when it computed"
    LATE = "its first block had run before it was decided"
    OUTER = "the site around it had to compute"
    REPEATED = "one forward calls it more than once"
    """One forward pass calls the site several times, and the site keeps one result."""
    RERUN = "the forward ran again, because a site that had answered was called once more"
    """Another site of a forward pass that was repeated with every site computing."""
    TOO_LARGE = "the weights of its predictor are too large"
    """Its prediction could overflow for any history."""
    SPREAD = "its tokens are spread over processes"
    NOT_FINITE = "its answer would not be finite"
    PEER_REFUSED = "another process could not reuse"
    PEER_COMPUTED = "another process had to compute"
