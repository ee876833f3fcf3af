"""An attribute of a host's object with ours in its place, until it is given back."""

from __future__ import annotations

from typing import Any


class Replaced:
    """Sets ``owner.name`` to ``ours`` on the instance.

    Args:
        owner: any object with a ``__dict__``.
        name: of its attribute.
        ours: usually a bound method of ours that calls ``host``.

    Attributes:
        host: what stood there, the instance's own or its class's.
    """

    def __init__(self, owner: Any, name: str, ours: Any) -> None:
        self.host = getattr(owner, name)
        self._owner, self._name, self._ours = owner, name, ours
        self._own_before = {name: owner.__dict__[name]} if name in owner.__dict__ else {}
        setattr(owner, name, ours)

    def give_back(self) -> None:
        """What stood there before stands there again; what somebody has put around ours since stays."""
        attributes = self._owner.__dict__
        if attributes.get(self._name) == self._ours:
            del attributes[self._name]
            attributes |= self._own_before
