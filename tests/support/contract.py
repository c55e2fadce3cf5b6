"""Parts of the adapter contract for the default kind of target of an adapter."""

import contextlib

from grounding.core.errors import TargetError


def structure(adapter):
    """The structure for the default kind of target."""
    return adapter.structure(adapter.target_kinds[0])


def possible_kinds(adapter):
    """The kinds of targets of this model: FLAVA without its heads has not all of its family."""
    kinds = []
    for kind in adapter.target_kinds:
        with contextlib.suppress(TargetError):
            kinds.append(adapter.check_target(kind)[0])
    return kinds


def shortcut(adapter):
    """The shortcut for the default kind of target, or None."""
    return adapter.shortcut(adapter.target_kinds[0])


def default_layer(adapter):
    """Path of the default layer."""
    return structure(adapter).default_layer


def grid(inputs):
    """(rows, columns) of the first image's patches."""
    geometry = inputs.images.geometry(0)
    return geometry.rows, geometry.columns


def all_targets(adapter, inputs, kind=None):
    """Targets for the caption and each token of each text."""
    spans = [[text.caption(), *text.tokens()] for text in inputs.texts]
    return adapter.targets(inputs, spans, kind or adapter.target_kinds[0])


def without_shortcuts(monkeypatch, adapter):
    """Every layer of this class of adapters takes the general path from now on."""
    monkeypatch.setattr(type(adapter), "shortcut", lambda self, kind: None)
