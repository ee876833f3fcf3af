"""The ``brain`` section of Coqui's own ``TacotronConfig`` and ``Tacotron2Config``.

The section is added to Coqui's classes themselves, not to subclasses: ``load_config``, ``setup_model`` and
``continue_path`` find configs by Coqui's class, and the flag must mean the same in a Python recipe, in a
``config.json`` and on the command line (``--coqpit.brain.enabled true``).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from coqpit import Coqpit
from TTS.tts.configs.tacotron2_config import Tacotron2Config
from TTS.tts.configs.tacotron_config import TacotronConfig
from TTS.tts.models.base_tacotron import BaseTacotron

from tts_brain.config import BrainConfig, flag_meant

log = logging.getLogger("tts_brain")

_TYPES = {"str": str, "int": int, "float": float, "bool": bool}
_FLAG = "--coqpit.brain."


class _Section(Coqpit):
    """What the made dataclass below adds to a plain Coqpit: shorthands, and no unknown keys."""

    @classmethod
    def deserialize_immutable(cls, data: Any) -> Any:
        """Read ``true``, ``false`` or a mapping; a mapping that does not say ``enabled`` means it.

        Raises:
            ValueError: an unknown key, a value out of range, or an ``enabled`` that is neither true nor false.
        """
        if isinstance(data, cls):
            _flag(data.enabled)
            return data
        if data is None or isinstance(data, bool):
            return cls(enabled=bool(data))
        if not isinstance(data, Mapping):
            raise ValueError(f"brain={data!r}: write true, false, or a mapping of settings such as {{'mode': 'full'}}")
        settings = {k: v for k, v in data.items() if k != "enabled"}
        return cls(enabled=_flag(data.get("enabled", True)), **BrainConfig.from_dict(settings).to_dict())

    def to_brain(self) -> BrainConfig:
        """The core's settings.

        Raises:
            ValueError: a value out of range, also one set after reading.
        """
        return BrainConfig.from_dict({f.name: getattr(self, f.name) for f in fields(BrainConfig)})


def _flag(value: Any) -> bool:
    """Text is refused, not taken for true: ``"false"`` would switch the brain on."""
    if value is not None and not isinstance(value, bool):
        raise ValueError(f'brain.enabled={value!r} is neither true nor false; write "enabled": {flag_meant(value)}')
    return bool(value)


BrainSection = make_dataclass(
    "BrainSection",
    [("enabled", bool, False), *((f.name, _TYPES[str(f.type)], f.default) for f in fields(BrainConfig))],
    bases=(_Section,),
    namespace={"__doc__": "``enabled`` and every setting of ``tts_brain.BrainConfig``.", "__module__": __name__},
)


def install() -> dict[str, type]:
    """Add the section to Coqui's Tacotron configs and let a run with ``brain.enabled`` attach the brain; idempotent.

    Returns:
        Coqui's classes by name.
    """
    for cls in (TacotronConfig, Tacotron2Config):
        if "brain" not in vars(cls).get("__annotations__", {}):
            _add_section(cls)
    if not getattr(BaseTacotron.on_init_end, "is_brain", False):
        BaseTacotron.on_init_end = _attach_when_enabled(BaseTacotron.on_init_end)
    return {"TacotronConfig": TacotronConfig, "Tacotron2Config": Tacotron2Config}


def _add_section(cls: type) -> None:
    """Run ``@dataclass`` again with one field more.

    Its first run took the default factories off the class, and it does not write over methods that are there: the
    factories are put back and the made methods taken off.
    """
    own = vars(cls).get("__annotations__", {})
    for made in ("__init__", "__repr__", "__eq__", "__match_args__"):
        delattr(cls, made)
    for name in own:
        known = cls.__dataclass_fields__[name]
        if known.default_factory is not MISSING:
            setattr(cls, name, field(default_factory=known.default_factory))
    cls.__annotations__ = {**own, "brain": BrainSection}
    cls.brain = field(default_factory=BrainSection)
    host_post_init = vars(cls).get("__post_init__")

    def __post_init__(self: Any) -> None:
        self.brain = BrainSection.deserialize_immutable(self.brain)
        if host_post_init is not None:
            host_post_init(self)
        else:
            super(cls, self).__post_init__()

    cls.__post_init__ = __post_init__
    dataclass(cls)


def _attach_when_enabled(host: Any) -> Any:
    def on_init_end(self: Any, trainer: Any) -> None:
        host(self, trainer)
        refuse_unknown_flags(sys.argv[1:])
        flags = _brains(sys.argv[1:])
        if flags and hasattr(trainer.config, "brain"):
            # A continued run has read its config.json over them.
            trainer.config.parse_known_args(flags, relaxed_parser=True)
        section = BrainSection.deserialize_immutable(getattr(trainer.config, "brain", None))
        refuse_flags_without_effect(sys.argv[1:], section)
        _say_whose_settings(self, trainer, section, {_name(flag) for flag in flags})
        if section.enabled and section.mode != "off":
            from tts_brain_coqui.adapter import attach

            attach(trainer, section.to_brain())

    on_init_end.is_brain = True  # type: ignore[attr-defined]
    return on_init_end


def refuse_unknown_flags(arguments: list[str]) -> None:
    """Coqui passes over flags it does not know; a misspelt brain flag must not run a night without effect.

    Raises:
        ValueError: names the flag and the nearest known one.
    """
    known = [f.name for f in fields(BrainSection)]
    for argument in arguments:
        if not argument.startswith(_FLAG):
            continue
        name = _name(argument)
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {_FLAG}{near[0]}? " if near else ""
            raise ValueError(f"unknown brain flag {argument!r}; {hint}Known are {_FLAG}{{{', '.join(known)}}}")


def refuse_flags_without_effect(arguments: list[str], section: Any) -> None:
    """A setting of a brain that nobody has switched on; to say that it is off is no mistake.

    Raises:
        ValueError: names the flag, and the one that is missing.
    """
    said = [argument for argument in arguments if argument.startswith(_FLAG)]
    said_off = section.mode == "off" or "enabled" in map(_name, said)
    if section.enabled or not said or said_off:
        return
    raise ValueError(f"{said[0]} sets a brain that is off; write {_FLAG}enabled true, too")


def _say_whose_settings(model: Any, trainer: Any, section: Any, flagged: set[str]) -> None:
    """A continued run reads all of its ``config.json``: what the recipe says by now is lost on it.

    Told where the recipe's is still there: a model that was given a copy of its config has it.
    """
    wanted = getattr(getattr(model, "config", None), "brain", None)
    if not getattr(trainer.args, "continue_path", "") or wanted is None:
        return
    recipes = BrainSection.deserialize_immutable(wanted).to_dict()
    lost = [
        f"{name} {value!r} (the recipe says {recipes[name]!r})"
        for name, value in section.to_dict().items()
        if name not in flagged and recipes[name] != value
    ]
    if lost:
        log.warning(
            "[brain] this run goes on with the brain of its own config.json: %s. Flags such as %smode change it",
            ", ".join(lost),
            _FLAG,
        )


def _brains(arguments: list[str]) -> list[str]:
    """The brain's flags and, where they stand apart, their values."""
    found: list[str] = []
    for argument, after in pairwise([*arguments, "--"]):
        if argument.startswith(_FLAG):
            found += [argument] if "=" in argument or after.startswith("--") else [argument, after]
    return found


def _name(flag: str) -> str:
    return flag.removeprefix(_FLAG).split("=")[0]
