"""A method that joins by an entry point."""

from grounding.methods.base import method


@method("Feature norm", {"activations"}, signed=False)
def feature_norm(trace):
    """Length of the features of each patch. Cost: none beyond the forward pass."""
    return trace.activations().norm(dim=-1)
