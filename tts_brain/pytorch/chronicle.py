"""What the brain writes and says of a run: journal, log, and the host's dashboard."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tts_brain.journal import FORMAT_VERSION, Journal, NoJournal, to_plain, versions
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.pytorch.ranks import Ranks
from tts_brain.report.terminal import one_decision
from tts_brain.types import Decision, Observation, Verdict

log = logging.getLogger("tts_brain")

Dashboard = Callable[[int, Mapping[str, float]], None]


class Chronicle:
    """One run's. Only the first rank writes a journal.

    Args:
        folder: of the journal.
        dashboard: called once per decision with (step, values).

    Raises:
        OSError: ``folder`` cannot be written.
    """

    def __init__(
        self, folder: Path, manager: ContextAwareTrainingManager, ranks: Ranks, dashboard: Dashboard | None
    ) -> None:
        self.journal = Journal(folder) if ranks.first else NoJournal(folder)
        self._manager = manager
        self._ranks = ranks
        self._dashboard = dashboard
        self._started = False
        self._failing = False

    def _write(self, kind: str, record: Any) -> None:
        """A full disk is no fault of the brain: what cannot be written is left out, and tried again with the next."""
        try:
            self.journal.write(kind, record)
        except OSError as error:
            if not self._failing:
                log.error(
                    "[brain] %s cannot be written (%s): records are missing from here on until it can be; "
                    "nothing else changes",
                    self.journal.path,
                    error,
                )
            self._failing = True
        else:
            self._failing = False

    def start(self, step: int) -> None:
        """The first record: what the run is made with."""
        self._started = True
        record = {
            "step": step,
            "format": FORMAT_VERSION,
            "host": self._manager.capabilities.host,
            "ranks": self._ranks.count,
            "mode": self._manager.config.mode,
            "config": self._manager.config.to_dict(),
            "capabilities": self._manager.capabilities,
            "versions": versions(),
        }
        self._write("start", record)

    def observation(self, observation: Observation) -> None:
        self._write("observation", observation)

    def event(self, step: int, name: str, message: str, **more: Any) -> None:
        self._write("event", {"step": step, "event": name, "message": message, **more})

    def decision(self, decision: Decision) -> None:
        """To the journal, and to people when something moved."""
        self._write("decision", decision)
        if decision.verdict is Verdict.STOP:
            log.error("[brain] %s", decision.reason)
        elif decision.moves:
            log.info("%s", one_decision(to_plain(decision)))

    def dashboard(self, step: int, decision: Decision) -> None:
        """Knobs, phase and attention, as numbers."""
        if self._dashboard is None:
            return
        context = self._manager.decided_on
        values = {f"knob_{name}": value for name, value in decision.after.items()}
        values |= {"phase": float(context.phase.index), "certainty": context.certainty, "stable": float(context.stable)}
        if context.attention is not None:
            values |= {n: getattr(context.attention, n) for n in ("diagonality", "focus", "coverage", "attention_diag")}
        self._dashboard(step, values)

    def end(self, step: int, message: str) -> None:
        """The last record, and the end of the journal; without a start there is none."""
        try:
            if self._started:
                self._write("end", {"step": step, "message": message})
        finally:
            self.journal.close()
