"""The figures in the docs' pages of benchmarks are those of the rows in benchmarks/results, cell by cell."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from bench_corpus import BENCHMARKS

from bench import summary
from bench.figures import rescued
from bench.store import Store

RESULTS = BENCHMARKS / "results"
PAGES = ("benchmarks", "components", "history")
DOCS = "\n".join((BENCHMARKS.parent / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in PAGES)
ABLATIONS = "### The brain with a part switched off"

Row = Mapping[str, Any]
Table = dict[str, dict[str, str]]


def rows_of(name: str) -> list[Row]:
    """All of them; a file that is missing or of several settings is a failure."""
    rows = list(Store(RESULTS / f"{name}.jsonl").rows())
    assert rows, f"no rows of {name}"
    assert summary.of_one_setting(rows)[1] == 0, f"{name} holds rows of several settings"
    return rows


def cells_of(line: str) -> list[str]:
    return [cell.strip().replace("**", "").replace("`", "") for cell in line.strip().strip("|").split("|")]


def blocks(section: str) -> list[str]:
    """The text of each table below a heading, before the next heading."""
    assert DOCS.count(f"\n{section}") == 1, section
    return re.findall(r"(?:^\|.*\n)+", DOCS.split(f"\n{section}")[1].split("\n#")[0], flags=re.M)


def tables(section: str) -> list[Table]:
    """Each of them: first cell of a line, then column, to cell."""
    found = []
    for block in blocks(section):
        head, _, *body = block.splitlines()
        lines = {cells_of(line)[0]: dict(zip(cells_of(head), cells_of(line), strict=True)) for line in body}
        assert len(lines) == len(body), f"a line twice: {head}"
        found.append(lines)
    assert found, f"no table under {section}"
    return found


def ablated(name: str) -> list[str]:
    """Arms that a line of the ablations is of."""
    shorts = re.sub(r" \(.*\)", "", name).split(", ")
    return [short if short == "brain" else f"brain {short}" for short in shorts]


def differences(table: Table, rows: Iterable[Row]) -> list[str]:
    """What a table of medians says otherwise than the rows; an arm without rows is a difference."""
    groups, wrong = summary.by_arm(rows), []
    for name, cells in table.items():
        arm, seeds = re.fullmatch(r"(.+?)(?: \((\d+)\))?", name).groups()
        group = groups.get(arm, [])
        if not group:
            wrong.append(f"{arm}: no rows")
            continue
        if len({row["seed"] for row in group}) != len(group) or (seeds and int(seeds) != len(group)):
            wrong.append(f"{arm}: {len(group)} rows, seeds {sorted(row['seed'] for row in group)}")
        head, line = summary.table(group)
        known = dict(zip(head, line, strict=True)) | {"arm": name, "arm (seeds)": name}
        wrong += [f"{name}, {column}: {cell}, by the rows {known[column]}" for column, cell in cells.items()
                  if cell != known[column]]  # fmt: skip
    return wrong


@pytest.mark.parametrize("corpus", ["kathleen-en-us", "ljspeech-subset"])
def test_every_cell_of_align_is_that_of_the_rows(corpus: str) -> None:
    section = {
        "kathleen-en-us": "### `align` on `kathleen-en-us`: 500 steps, three seeds",
        "ljspeech-subset": "### `align` on long clips: `ljspeech-subset`\n\n`python benchmarks/run.py align --data",
    }[corpus]
    (table,) = tables(section)
    rows = rows_of(f"align-{corpus}")
    assert len(table) >= 11 and len(next(iter(table.values()))) == 6
    assert differences(table, rows) == []
    # And no arm that was run is left out of the docs.
    named = {re.sub(r" \(\d+\)$", "", name) for name in table} | {
        arm for n in tables(ABLATIONS)[0] for arm in ablated(n)
    }
    assert {row["arm"] for row in rows} - named == set()


def test_a_figure_that_is_wrong_and_an_arm_without_rows_are_seen() -> None:
    rows = rows_of("align-kathleen-en-us")
    (table,) = tables("### `align` on `kathleen-en-us`: 500 steps, three seeds")
    column, true = "held-out L1", table["brain"]["held-out L1"]
    assert differences(table | {"brain": table["brain"] | {column: "0.591"}}, rows) == [
        f"brain, {column}: 0.591, by the rows {true}"
    ]
    assert differences({"brainy": table["brain"]}, rows) == ["brainy: no rows"]
    assert differences({"brain (5)": table["brain"] | {"arm": "brain (5)"}}, rows) == ["brain: 3 rows, seeds [0, 1, 2]"]


def test_every_cell_of_the_ablations_is_that_of_the_rows() -> None:
    (table,) = tables(ABLATIONS)
    # The whole brain beside them is the one of then.
    rows = {
        row["arm"]: row
        for name in ("align-kathleen-en-us", "align-kathleen-en-us-sixth")
        for row in rows_of(name)
        if row["seed"] == 0
    }
    columns: dict[str, Callable[[Row], str]] = {
        "steps to aligned": lambda row: "never" if row["aligned_step"] is None else str(row["aligned_step"]),
        "held-out L1": lambda row: f"{row['l1']:.3f}",
        "attention_diag": lambda row: f"{row['attention_diag']:.3f}",
        "speaks": lambda row: f"{row['speaks']:.2f}",
    }
    seen = set()
    for name, cells in table.items():
        for arm in ablated(name):
            assert {column: of(rows[arm]) for column, of in columns.items()} == {c: cells[c] for c in columns}, arm
            seen.add(arm)
    assert seen == {arm for arm in rows if arm.startswith("brain")}


def rescue_lines(rows: Iterable[Row]) -> Table:
    """A line per start of one arm, seeds in order; "clean" is what the errors are compared with."""
    from bench.bad_starts import BAD_STARTS

    rows = sorted(rows, key=lambda row: row["seed"])
    clean = {row["seed"]: row for row in rows if not row["start"]}
    lines = {}
    for start in ("", *BAD_STARTS):
        group = [row for row in rows if row["start"] == start]
        if not group:
            continue
        false = Counter(
            n for row in group for n in row.get("named", ()) if not start or n not in BAD_STARTS[start].causes
        )
        errors = [row[n] / clean[row["seed"]][n] for row in group for n in ("l1", "l1_postnet")]
        saved = sum(rescued(row, clean[row["seed"]]) for row in group)
        lines[start or "clean"] = {
            "start": start or "clean",
            "rescued": f"{saved} of {len(group)}" if start else "–",
            "aligned at": ", ".join(
                "never" if row["aligned_step"] is None else str(row["aligned_step"]) for row in group
            ),
            "larger error, worst": f"{math.nan if any(map(math.isnan, errors)) else max(errors):.2f}" if start else "–",
            "last three, lowest": f"{min(value for row in group for *_, value in row['curve'][-3:]):.2f}",
            "speaks": ", ".join(f"{row['speaks']:.2f}" for row in group),
            "cause told": f"{sum(row.get('told', False) for row in group)} of {len(group)}" if start else "–",
            "false causes": ", ".join(f"{cause} {count}" for cause, count in sorted(false.items())) or "–",
        }
    return lines


RESCUE = "### `rescue`: three seeds, `kathleen-en-us`"
CONSTANTS_RESCUE = "### `rescue`: the best constants under the same starts"


def brains_of_rescue() -> list[Row]:
    # What is wrong with each start stands beside code that needs the host.
    pytest.importorskip("espnet2", reason="ESPnet is not installed: uv pip install 'tts-brain[espnet]'")
    return summary.by_arm(rows_of("rescue-kathleen-en-us"))["brain"]


def test_every_cell_of_rescue_is_that_of_the_rows() -> None:
    (table,) = tables(RESCUE)
    lines = rescue_lines(brains_of_rescue())
    bold = set(re.findall(r"^\| \*\*(.+?)\*\* \|", blocks(RESCUE)[0], flags=re.M))
    assert table == lines and len(table) == 41
    counts = {start: line["rescued"].split(" of ") for start, line in lines.items() if start != "clean"}
    failed = {start for start, (saved, run) in counts.items() if saved != run}
    assert bold == failed


def test_every_cell_of_the_best_constants_under_bad_starts_is_that_of_the_rows() -> None:
    (table,) = tables(CONSTANTS_RESCUE)
    brains = [row for row in brains_of_rescue() if row["seed"] == 0]
    constants = summary.by_arm(rows_of("rescue-kathleen-en-us"))["static g300 lr0.01 fs0.2"]
    arms = {"constants": rescue_lines(constants), "brain": rescue_lines(brains)}
    for start, cells in table.items():
        for arm, lines in arms.items():
            line = lines[start]
            rescue = {"1 of 1": "yes", "0 of 1": "no"}.get(line["rescued"], "–")
            said = f"{rescue}, {line['aligned at']}, {line['larger error, worst']}, {line['last three, lowest']}"
            assert cells[arm] == said, (start, arm)
    assert set(table) == set(arms["constants"])
    text = " ".join(DOCS.split(CONSTANTS_RESCUE)[1].split("\n#")[0].split())
    for arm, lines in arms.items():
        counted = [lines[start]["rescued"] for start in table if start != "clean"]
        assert f"**the {arm} {counted.count('1 of 1')} of {len(counted)}**" in text
        saved = [start for start in table if start != "clean" and lines[start]["rescued"] == "1 of 1"]
        spoken = sum(float(lines[start]["speaks"]) >= 0.5 for start in saved)
        assert f"{spoken} of the {arm}' {len(saved)}" in text or f"{spoken} of the {arm}'s {len(saved)}" in text


def test_the_sums_of_rescue_are_those_of_the_rows() -> None:
    head, clean, *_, every = summary.rescue_table(brains_of_rescue())
    counted = dict(zip(head, every, strict=True))
    text = " ".join(DOCS.split(RESCUE)[1].split("\n#")[0].split())
    share = 100 * int(counted["brain"].split()[0]) / int(counted["brain"].split()[2])
    assert f"**The brain: {counted['brain']}** ({share:.1f} %" in text
    assert f"all causes are told in {counted['cause told']}, a false one in {counted['false causes']}" in text
    assert clean[-1] == "0 of 3" and "nothing in the three clean runs" in text


NOHARM = {
    "### `noharm`: from the best constants": ("kathleen-en-us", "static g300 lr0.01 fs0.2"),
    "### `noharm` on long clips: three seeds": ("ljspeech-subset", "static g100 lr0.002 fs0.03"),
}


def below_the_limit(row: Row) -> str:
    after = [value for step, _, value in row["curve"] if step >= row["aligned_step"]]
    return f"{sum(value < 0.5 for value in after)} of {len(after)}"


@pytest.mark.parametrize("heading", NOHARM)
def test_every_cell_of_noharm_is_that_of_the_rows(heading: str) -> None:
    (table,) = tables(heading)
    corpus, best = NOHARM[heading]
    groups = summary.by_arm(rows_of(f"noharm-{corpus}"))
    assert set(groups) == {best, f"brain at {best}"}
    for column, arm in zip(list(table["0"])[1:], (best, f"brain at {best}"), strict=True):
        figures = {
            str(row["seed"]): f"{row['aligned_step']}, {row['l1']:.3f}, {row['attention_diag']:.2f}"
            for row in groups[arm]
        }
        assert figures == {seed: cells[column] for seed, cells in table.items()}
    ratios = [ours["l1"] / theirs["l1"] for ours, theirs in zip(groups[f"brain at {best}"], groups[best], strict=True)]
    assert all(f"{ratio:.3f}" in DOCS.split(heading)[1].split("\n#")[0] for ratio in ratios)


def test_what_is_said_of_noharm_is_that_of_the_rows() -> None:
    said = {}
    for heading, (corpus, best) in NOHARM.items():
        groups = summary.by_arm(rows_of(f"noharm-{corpus}"))
        for arm in ("brain", "constants"):
            rows = groups[f"brain at {best}" if arm == "brain" else best]
            holds = sum(all(value >= 0.5 for *_, value in row["curve"][-3:]) for row in rows)
            said[corpus, arm] = ([below_the_limit(row) for row in rows], f"{holds} of {len(rows)}", rows)
        text = " ".join(DOCS.split(heading)[1].split("\n#")[0].split())
        if corpus == "kathleen-en-us":
            (with_it, held, _), (without, kept, _) = said[corpus, "brain"], said[corpus, "constants"]
            assert "under 0.5 at {}, {} and {} evaluations with the brain (seeds 0, 1, 2), at".format(*with_it) in text
            assert "at {}, {} and {} with the constants alone".format(*without) in text
            assert f"{held} runs holds with the brain, {kept} without" in text
        else:
            assert all(below.startswith("0 of") for arm in ("brain", "constants") for below in said[corpus, arm][0])
            spoken = [round(24 * row["speaks"]) for row in said[corpus, "brain"][2]]
            assert spoken[0] == 24 and f"{spoken[1]} and {spoken[2]} of 24" in text


def test_every_cell_of_the_other_languages_is_that_of_the_rows() -> None:
    (table,) = tables("### Other languages")
    columns = {"default": "default", "static g300 lr0.01 fs0.2": "constants", "brain": "brain"}
    for language, cells in table.items():
        groups = summary.by_arm(rows_of(f"align-languages-{language}"))
        assert set(groups) == set(columns)
        for arm, column in columns.items():
            (row,) = groups[arm]
            at = "never" if row["aligned_step"] is None else row["aligned_step"]
            assert cells[column] == f"{at}, {row['l1']:.3f}, {row['speaks']:.2f}, {row['mcd']:.1f}", (language, arm)


def test_lowest_attention_after_aligning_is_that_of_the_rows() -> None:
    for corpus, best in (
        ("kathleen-en-us", "static g300 lr0.01 fs0.2"),
        ("ljspeech-subset", "static g100 lr0.002 fs0.03"),
    ):
        groups = summary.by_arm(rows_of(f"align-{corpus}"))
        lowest = []
        for arm in ("brain", best):
            rows = sorted(groups[arm], key=lambda row: row["seed"])
            lowest.append([
                f"{min(value for step, _, value in row['curve'] if step >= row['aligned_step']):.2f}" for row in rows
            ])  # fmt: skip
        text = " ".join(DOCS.split())
        brain, constants = (f"{a}, {b} and {c}" for a, b, c in lowest)
        assert f"is at least {brain} at every evaluation" in text and f"that of the best constants {constants}" in text


def test_how_often_the_alignment_is_under_its_limit_is_that_of_the_rows() -> None:
    groups = summary.by_arm(rows_of("align-kathleen-en-us"))
    counted = []
    for arm in ("brain", "static g300 lr0.01 fs0.2", "static g300 lr0.005 fs0.2", "static g100 lr0.003 fs0.2"):
        after = [v for row in groups[arm] for step, _, v in row["curve"] if step >= row["aligned_step"]]
        counted.append((sum(v < 0.5 for v in after), len(after)))
    assert counted == [(0, 48), (3, 57), (4, 48), (9, 48)]
    text = " ".join(DOCS.split())
    assert all(said in text for said in ("under 0.5 never in 48", "(3 times of 57)", "(4 times of 48)", "(9 of 48)"))


def test_what_was_asked_of_the_components_stands_in_the_docs_met_or_not() -> None:
    verdicts = json.loads((RESULTS / "components.json").read_text(encoding="utf-8"))["verdicts"]
    words = {True: "met", False: "**not met**"}
    lines = [f"| {v['part']} | {v['criterion']} | {v['figure']} | {words[v['met']]} |" for v in verdicts]
    table = DOCS.split("\n## `components`")[1].split("\n#")[0]
    assert re.findall(r"^\| (?!part).*[a-z].*\|$", table, flags=re.M) == lines
    assert sum(not v["met"] for v in verdicts) == table.count("**not met**")


def test_plateau_is_the_default_to_the_last_digit() -> None:
    assert "**`plateau` is `default`**, to the last digit in all seeds" in " ".join(DOCS.split())
    groups = summary.by_arm(rows_of("align-kathleen-en-us"))
    for one, other in zip(groups["default"], groups["plateau"], strict=True):
        differ = {name for name in one if one[name] != other[name]}
        assert differ == {"key", "arm", "seconds"}


def test_the_folder_has_every_file_of_rows_that_the_docs_name() -> None:
    named = set(re.findall(r"[a-z0-9-]+\.jsonl", DOCS))
    missing = {name for name in named if not name.startswith("-") and not (RESULTS / Path(name)).exists()}
    assert missing == set()


def test_every_cell_of_rescue_on_long_clips_is_that_of_the_rows() -> None:
    pytest.importorskip("espnet2", reason="ESPnet is not installed: uv pip install 'tts-brain[espnet]'")
    (heading,) = re.findall(r"^### `rescue` on long clips.*$", DOCS, flags=re.M)
    rows = rows_of("rescue-ljspeech-subset")
    (table,) = tables(heading)
    lines = rescue_lines(rows)
    assert table == lines
    saved, run = (
        sum(int(line["rescued"].split(" of ")[part]) for start, line in lines.items() if start != "clean")
        for part in (0, 1)
    )
    text = " ".join(DOCS.split(heading)[1].split("\n#")[0].split())
    assert f"**The brain: {saved} of {run}** ({100 * saved / run:.1f} %)" in text and f"{run} runs" in heading
    devices = {(row["seed"], row.get("device", "cpu")) for row in rows}
    assert devices == {(0, "cpu"), (1, "cuda")}


def test_every_cell_of_the_third_machine_is_that_of_the_rows() -> None:
    (table,) = tables("### The same on a third machine: five seeds, and methods from the best constants")
    groups = summary.by_arm(rows_of("align-kathleen-en-us-machine3"))
    assert set(table) | {"default"} == set(groups)
    for arm, cells in table.items():
        rows = sorted(groups[arm], key=lambda row: row["seed"])
        errors, spoken = [row["l1"] for row in rows], [row["speaks"] for row in rows]
        later = [row for row in rows if row["aligned_step"]]
        good = [point[2] for row in later for point in row["curve"] if point[0] >= row["aligned_step"]]
        assert cells == {
            "arm": arm,
            "seeds": str(len(rows)),
            "aligned at": ", ".join(str(row["aligned_step"]) for row in rows),
            "held-out L1": f"{median(errors):.3f} ({min(errors):.3f}–{max(errors):.3f})",
            "under 0.5 once aligned": f"{sum(diag < 0.5 for diag in good)} of {len(good)}",
            "speaks": f"{min(spoken):.2f}" + (f"–{max(spoken):.2f}" if min(spoken) < max(spoken) else ""),
        }


def five_seeds(corpus: str, arm: str) -> list[Row]:
    """Rows of the first machine, and of the third where that has the seed."""
    found = {}
    for name in (f"align-{corpus}", f"align-{corpus}-machine3"):
        found |= {row["seed"]: row for row in rows_of(name) if row["arm"] == arm}
    assert sorted(found) == [0, 1, 2, 3, 4]
    return list(found.values())


def test_what_stands_in_short_is_that_of_the_rows() -> None:
    (block,) = blocks("## In short")
    lines = [cells_of(line)[1:] for line in block.splitlines()[2:]]
    expected = []
    for corpus, best in (
        ("kathleen-en-us", "static g300 lr0.01 fs0.2"),
        ("ljspeech-subset", "static g100 lr0.002 fs0.03"),
    ):
        default, *others = ([*five_seeds(corpus, arm)] for arm in ("default", best, "brain"))
        assert not any(row["aligned_step"] for row in default)
        steps, under, errors = ["never"], ["–"], ["1"]
        for rows in others:
            good = [v for row in rows for step, _, v in row["curve"] if step >= row["aligned_step"]]
            steps.append(str(median(row["aligned_step"] for row in rows)))
            under.append(f"{sum(v < 0.5 for v in good)} of {len(good)}")
            ratio = median(row["l1"] for row in rows) / median(row["l1"] for row in default)
            errors.append(f"{ratio:.2f}")
        expected += [steps, under, errors]
    assert [[cell.removesuffix(" evaluations") for cell in line] for line in lines] == expected


def test_every_cell_of_rescue_without_a_part_is_that_of_the_rows() -> None:
    (table,) = tables("### `rescue` without a part: seed 0")
    rows = {(row["arm"], row["start"]): row for row in rows_of("rescue-kathleen-en-us-parts")}
    assert {arm for arm, _ in rows} == set(table)
    for arm, cells in table.items():
        for start, cell in cells.items():
            row = rows.get((arm, "" if start == "clean" else start))
            if row is None:
                assert cell == "–" or start == "arm"
                continue
            lowest = min(point[2] for point in row["curve"][-3:])
            assert cell == f"{row['aligned_step'] or 'never'}, {lowest:.2f}, {row['speaks']:.2f}"
            saved = start == "clean" or rescued(row, rows[arm, ""])
            assert (f"**{cell}**" in DOCS) is not saved


def test_how_many_decisions_each_part_changes_is_that_of_the_rows() -> None:
    (table,) = tables("### How many decisions each part changes")
    for row in json.loads((RESULTS / "components.json").read_text(encoding="utf-8"))["parts"]["eyes"]:
        changed, decisions, runs, large = re.match(
            r"(\d+) of (\d+) decisions of (\d+) runs, (\d+) in", row["note"]
        ).groups()
        column = f"{row['figure'].split('changes, ')[1]} ({runs} runs, {decisions} decisions)"
        assert table[row["against"]][column] == (f"{changed} ({large})" if int(changed) else "0")
