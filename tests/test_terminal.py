"""The run's story in a terminal: narrow or wide, and where only ASCII can be printed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tts_brain.cli import main
from tts_brain.journal import Journal
from tts_brain.report.terminal import LOG_WIDTH, explain, one_decision
from tts_brain.types import Decision, Proposal, TrainingPhase, Verdict

ESCAPE = "\x1b"


def decision(
    step: int, verdict: str, reason: str, after: float = 1.0, before: float = 1.0, **more: Any
) -> dict[str, Any]:
    knobs = {"guided_weight": 4.5, "grad_clip": 100.0}
    return {
        "kind": "decision",
        "step": step,
        "verdict": verdict,
        "phase": "alignment_learning" if step > 100 else "pre_alignment",
        "before": {"learning_rate": before, **knobs},
        "after": {"learning_rate": after, **knobs},
        "reason": reason,
        "proposals": [
            {
                "agent": "learning_rate",
                "moves": {"learning_rate": 1.5},
                "reason": "loss falls",
                "evidence": {"z": -4.2},
            },
            {"agent": "loss_balance", "moves": {}, "reason": "losses are in balance", "evidence": {}},
        ],
        "evidence": {"risk": 0.1, "gain": "nan"},
        "applied": True,
        **more,
    }


def run() -> list[dict[str, Any]]:
    return [
        {"kind": "start", "step": 0, "host": "coqui", "mode": "full", "config": {}, "versions": {}},
        decision(40, "accept", "mel loss falls steadily (z −4.2), gradients calm", after=1.5),
        *[
            record
            for step in range(120, 190, 10)
            for record in (
                {"kind": "observation", "step": step, "losses": {"total": 1.0}},
                decision(step, "hold", f"still judging the last move {step}", 1.5, 1.5),
            )
        ],
        decision(190, "undo", "it did not help", after=1.0, before=1.5),
        {"kind": "event", "step": 200, "event": "skipped_gradient", "message": "norm inf"},
        {"kind": "event", "step": 201, "event": "skipped_gradient", "message": "norm nan"},
        decision(210, "roll_back", "two bad gradients in a row", after=0.5, before=1.0),
        {"kind": "event", "step": 210, "event": "rollback", "message": "restored the snapshot of step 180"},
        {"kind": "end", "step": 240, "message": "all steps done"},
    ]


def told(records: list[dict[str, Any]], width: int = 120, **options: Any) -> str:
    out = io.StringIO()
    explain(records, Console(file=out, width=width), **options)
    assert ESCAPE not in out.getvalue()
    return out.getvalue()


def written(folder: Path) -> Path:
    journal = Journal(folder)
    for record in run():
        journal.write(record["kind"], {name: value for name, value in record.items() if name != "kind"})
    journal.close()
    return journal.path


@pytest.mark.parametrize("width", [60, 120])
def test_the_story(width: int) -> None:
    text = told(run(), width)
    assert all(len(line) <= width and line == line.rstrip() for line in text.splitlines())
    flat = " ".join(text.split())
    for words in (
        "coqui · mode full · steps 0–240",
        "step 40 · pre alignment · moved the knobs: learning_rate 1.00 → 1.50",
        "why: mel loss falls steadily (z −4.2), gradients calm",
        "held from step 120 to 180: still judging the last move 180",
        "took back the last move: learning_rate 1.50 → 1.00",
        "!! steps 200–201 · skipped gradient (2 times): norm nan",
        "!! step 210 · rollback: restored the snapshot of step 180",
        "Ended at step 240: all steps done",
        "1 move: 0 kept, 1 taken back; 1 rollback; 7 holds; 2 skipped gradients.",
        "Phases by step: pre alignment 40–120, alignment learning 120–210.",
        "learning_rate 1.00 → 0.500 (multiplier of the host's rate)",
        "as at the start: guided_weight 4.50, grad_clip 100",
    ):
        assert words in flat


def test_advice_of_each_cause_is_told() -> None:
    advice = [
        {"kind": "event", "step": step, "event": "advice", "cause": cause, "message": f"{cause} at {step}"}
        for step, cause in ((50, "stop_inverted"), (50, "silence"), (90, "silence"), (95, "few_updates"))
    ]
    text = told([*run()[:2], *advice, *run()[2:]])
    assert "!! step 50 · advice: stop_inverted at 50" in text
    assert "!! steps 50–90 · advice (2 times): silence at 90" in text
    assert "!! step 95 · advice: few_updates at 95" in text


def test_a_knob_that_came_back_but_for_a_rounding_is_as_at_the_start() -> None:
    text = told([decision(40, "accept", "x", after=1.5), decision(80, "undo", "y", 1 - 3.39e-14, 1.5)])
    assert "as at the start: learning_rate 1.00" in text and "1.000000" not in text
    assert "learning_rate 1.000000 → 1.000001" in told([decision(40, "accept", "x", after=1.000001)])


def test_holds_one_by_one() -> None:
    text = told(run(), show_holds=True)
    assert text.count("held at step") == 7
    assert "held from" not in text


def test_one_step_in_full() -> None:
    text = told(run(), step=40)
    for words in (
        "learning_rate: learning_rate to 1.50",
        "loss_balance: no move",
        "evidence: z −4.2",
        "gain not finite",
    ):
        assert words in text
    assert "learning_rate 1.00 → 1.50" in text and "grad_clip 100" in text
    assert "step 190" not in text
    assert "restored the snapshot" in told(run(), step=210)


COORDINATION: dict[str, Any] = {
    "criteria": {"convergence": {"score": 0.98, "reason": "the loss falls (z -2.1)"}},
    "equilibrium": {
        "kind": "pure",
        "count": 2,
        "candidates": 5,
        "shares": {"learning_rate": 0.5},
        "gains": {"learning_rate": {"wish": 0.29, "strain": -0.1}},
    },
    "risk": {
        "size": 0.5,
        "budget": 0.25,
        "left_out": {"mel_weight": "mel_weight up: about 5 of 5 such moves hurt"},
        **{"divergence": 0.031, "divergence_held": 0.0, "alignment_loss": 0.0, "alignment_loss_held": 0.0},
        **{"gain": 1.2, "cvar": -3.4, "draws": 256, "probability": {"divergence": 0.011}},
    },
    "vote": {"yes": ["learning_rate", "window"], "no": ["simulation"], "needed": 4, "approved": False},
    "notes": ["learning_rate is heard again"],
}


def test_without_an_alignment_none_is_said_to_be_lost() -> None:
    risk = {**COORDINATION["risk"], "alignment": False}
    text = told([decision(40, "accept", "loss falls", after=1.5, coordination={**COORDINATION, "risk": risk})], step=40)
    assert "plays diverge" in text and "lose the alignment" not in text


def test_one_step_tells_how_the_agents_settled() -> None:
    text = told([decision(40, "accept", "loss falls", after=1.5, coordination=COORDINATION)], step=40)
    for words in (
        "convergence 0.98: the loss falls (z -2.1)",
        "learning_rate plays 50% of its proposal; worth: wish 0.29, strain −0.1",
        "pure equilibrium, 2 pure in all; up to 5 candidates per agent",
        "left out mel_weight: mel_weight up: about 5 of 5 such moves hurt",
        "3.1% of 256 plays diverge, 0.0% if all is held; of runs, some 1.1%",
        "0.0% of 256 plays lose the alignment, 0.0% if all is held the loss falls",
        "cut to 50%: 25.0% of the plays may go wrong by it",
        "no: simulation",
        "no quorum, 4 yes needed",
        "learning_rate is heard again",
    ):
        assert words in " ".join(text.split())


def test_one_step_tells_who_objected_and_why_who_wanted_less_and_what_was_settled_on() -> None:
    vote = {
        "yes": ["learning_rate", "simulation"],
        "no": ["window"],
        "reasons": {"window": "21% of the gradients spike", "forecast": "divergence 30% likely in 100 steps"},
        "wanted": {"window": 0.0, "forecast": 0.5, "new": 0.25},
        "settled": {"guided_weight": 0.75, "mel_weight": 0.75, "grad_clip": 0.5},
        "refused": {"window": "the loss surely rises (z +4.1)", "new": ""},
        **{"needed": 5, "approved": True},
    }
    record = {"equilibrium": {"kind": "mixed", "count": 0}, "vote": vote}
    text = told([decision(40, "accept", "loss falls", after=1.5, coordination=record)], step=40)
    section = text[text.index("Vote") :].split("\n\n")[0]
    assert [line.strip() for line in section.splitlines()] == [
        "Vote",
        "yes: learning_rate, simulation",
        "no: window",
        "window wants 0% of what stirs: 21% of the gradients spike",
        "forecast wants 50% of what stirs: divergence 30% likely in 100 steps",
        "new wants 25% of what stirs",
        "said no to the whole move: window (the loss surely rises (z +4.1)), new",
        "what calms was then voted on alone",
        "settled on 75% of guided_weight, mel_weight",
        "settled on 50% of grad_clip",
        "passed, 5 yes needed",
    ]
    assert "candidates" not in text, "older journals do not say"


@pytest.mark.parametrize(
    "strange",
    [
        None,
        "x",
        [],
        {"criteria": 3, "equilibrium": [], "risk": "x", "vote": None, "notes": 7},
        {"vote": {"reasons": [], "wanted": {"a": None}, "settled": {"b": [], "c": "nan"}, "refused": {"d": None}}},
        {"criteria": {"a": None}, "equilibrium": {"shares": {"b": "x"}}, "risk": {"draws": None, "size": "nan"}},
    ],
)
def test_a_decision_without_coordination_or_with_a_strange_one_is_told_all_the_same(strange: Any) -> None:
    assert "learning_rate 1.00 → 1.50" in told([decision(40, "accept", "x", 1.5, coordination=strange)], step=40)
    assert "Criteria" not in told([decision(40, "accept", "x", 1.5)], step=40)


def test_a_step_without_a_decision_names_the_nearest() -> None:
    assert "No decision was taken at step 183; the nearest are at step 180, 190, 170." in told(run(), step=183)
    assert "none was taken at all" in told(run()[:1], step=5)


def test_unfinished_and_empty_journals() -> None:
    assert "wrote nothing yet" in told([])
    text = told(run()[:1])
    assert "No end record: still running, or stopped from outside, at step 0." in text
    assert "No decision was taken yet." in text


def test_a_resume_is_told() -> None:
    again = {"kind": "start", "step": 50, "host": "coqui", "mode": "observe"}
    assert "resumed at step 50, mode observe" in told([*run()[:2], again, *run()[2:]])


def test_watching_only_says_so() -> None:
    text = told([decision(40, "accept", "loss falls", applied=False)])
    assert "only watched; in full mode: moved the knobs" in text
    assert "wanted by learning_rate: learning_rate to 1.50" in text
    assert "1 move only watched, none made; 0 rollbacks; 0 holds." in text
    later = [decision(step, "accept", "loss falls", after=1.5, applied=step != 50) for step in (40, 50, 60)]
    assert "2 moves: 2 kept, 0 taken back; 1 move only watched; 0 rollbacks" in told(later)


def test_of_several_runs_the_one_that_is_told_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("old", "n e w" * 30)):
        path = written(tmp_path / name)
        os.utime(path, (number, number))
    for options in ([], ["--step", "40"]):
        assert main(["explain", str(tmp_path), *options]) == 0
        assert capsys.readouterr().out.splitlines()[0] == str(path)


def test_a_reader_that_has_read_enough_is_no_failure(tmp_path: Path) -> None:
    """``tts-brain explain RUN | head -2``"""
    written(tmp_path)
    reads, writes = os.pipe()
    os.close(reads)
    code = "import sys; from tts_brain.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "explain", str(tmp_path)]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["explian", "run"],
            "'explian' is no command (did you mean 'explain'?); commands are explain, coqui-train, demo",
        ),
        (["explain", "run", "--step", "abc"], "'abc' is not a whole number of 0 or more; write for example 200"),
        (["explain", "run", "--step", "-5"], "'-5' is not a whole number of 0 or more; write for example 200"),
    ],
)
def test_a_wrong_argument_is_said_with_what_to_write(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_ascii_only_and_hostile_text() -> None:
    raw = io.BytesIO()
    records = [*run(), decision(300, "accept", "Größe \x1b[2J [bold]not markup[/bold] :smile:", after=2.0)]
    out = io.TextIOWrapper(raw, encoding="ascii")
    explain(records, Console(file=out, width=60))
    explain(records, Console(file=out, width=60), step=300)
    out.flush()
    text = raw.getvalue().decode("ascii")
    assert "1.00 -> 1.50" in text
    assert "[bold]not markup[/bold] :smile:" in " ".join(text.split())
    assert ESCAPE not in text


def test_records_with_holes_do_not_crash() -> None:
    holes: list[dict[str, Any]] = [{"kind": "decision"}, {"kind": "event"}, {"kind": "start"}, {"kind": "end"}, {}]
    assert told(holes)
    assert told(holes, step=0)
    assert one_decision({})


def test_the_live_line() -> None:
    text = one_decision(decision(120, "accept", "mel loss falls steadily (z −4.2), gradients calm", after=1.5))
    assert text == (
        "[brain] step 120 · alignment_learning · learning_rate 1.00 → 1.50\n"
        "        why: mel loss falls steadily (z −4.2), gradients calm"
    )
    assert "->" in one_decision(decision(120, "accept", "x", after=1.5), encoding="ascii")
    long = one_decision(decision(120, "hold", "word " * 100))
    assert len(long.splitlines()) == 3 and all(len(line) <= LOG_WIDTH for line in long.splitlines())
    assert "held everything where it was" in long


def test_the_live_line_takes_the_record_itself() -> None:
    taken = Decision(
        step=7,
        verdict=Verdict.ROLL_BACK,
        phase=TrainingPhase.REFINEMENT,
        before={"learning_rate": 1.0},
        after={"learning_rate": 1.001},
        reason="loss is not finite",
        proposals=(Proposal("learning_rate", {"learning_rate": 0.5}, "calm down"),),
    )
    assert one_decision(taken).splitlines()[0] == (
        "[brain] step 7 · refinement · went back to a snapshot: learning_rate 1.000 → 1.001"
    )
