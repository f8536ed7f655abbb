"""The parts of a step, as a profiler shows them; without a profiler a mark costs a microsecond."""

from torch.profiler import record_function

DATA = "data (waiting for the next batches)"
PARTS = {
    DATA: "kto: data",
    "KL forwards": "kto: KL forwards",
    "forwards": "kto: forwards",
    "the head (within the forwards)": "kto: head",
    "backwards": "kto: backwards",
    "optimizer": "kto: optimizer",
}


def part(name: str) -> record_function:
    """A context that marks a part of the step."""
    return record_function(PARTS[name])
