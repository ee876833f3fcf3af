"""Speech folders in LJSpeech layout, wav or flac; every problem of a folder is said plainly."""

from pathlib import Path, PurePath

DEFAULT_METADATA = "metadata.csv"
AUDIO_SUFFIXES = (".wav", ".flac")  # the first that exists is taken
_SHAPE = "each line must be id|text or id|text|normalised text"


class CorpusError(ValueError):
    """A folder that cannot be trained on; the message says what is wrong and what to do."""


def load_ljspeech(folder: str | Path, metadata: str = DEFAULT_METADATA) -> list[dict[str, str]]:
    """Read `folder/metadata.csv` (UTF-8, `id|text` or `id|text|normalised text`) and find `wavs/id.wav` or `.flac`.

    Gives one item per line, in order: `text` (third column, or the second of two), `audio_file`, `speaker_name` (the
    folder's name), `root_path` and `id`. Blank lines are skipped; audio is looked for but not opened.

    Raises CorpusError if the folder or the metadata is missing, empty or not UTF-8, and for lines with too few columns,
    an unusable or repeated id, an empty text or no audio file; all lines with one kind of problem are counted at once.
    """
    root = Path(folder).expanduser()
    rows = _read_rows(root, metadata)
    where = root / metadata
    _refuse(where, [f"line {n}: {'|'.join(row)!r}" for n, row in rows if len(row) < 2], "too few columns", _SHAPE)
    _refuse(
        where,
        [f"line {n}: {row[0]!r}" for n, row in rows if not _is_usable(row[0])],
        "an id that is no file name",
        "an id must be a name below wavs/, without '..' and not absolute; rename it there and in the metadata",
    )
    _refuse(
        where,
        [f"line {n}: {row[0]}" for n, row in rows if not _text(row)],
        "an empty text",
        "write the spoken text, or delete these lines",
    )
    _refuse(where, _repeated(rows), "an id used before", "an id may stand once; delete or rename the repeated lines")
    audio = {row[0]: _find_audio(root, row[0]) for _, row in rows}
    _refuse(
        where,
        [f"line {n}: {row[0]}" for n, row in rows if audio[row[0]] is None],
        "no audio file",
        f"put {root / 'wavs' / 'ID'}{' or '.join(AUDIO_SUFFIXES)} there, or fix or delete these lines",
    )
    speaker = root.resolve().name
    return [
        {
            "id": row[0],
            "text": _text(row),
            "audio_file": str(audio[row[0]]),
            "speaker_name": speaker,
            "root_path": str(root),
        }
        for _, row in rows
    ]


def _read_rows(root: Path, metadata: str) -> list[tuple[int, list[str]]]:
    """Line numbers (from 1) and stripped columns of all lines that are not blank."""
    if not root.exists():
        raise CorpusError(f"The folder {root} does not exist. Give the folder that holds {metadata} and wavs/.")
    if not root.is_dir():
        raise CorpusError(f"{root} is a file. Give the folder that holds {metadata} and wavs/.")
    path = root / metadata
    if not path.is_file():
        found = sorted(child.name for child in root.iterdir())
        what = f"It holds {', '.join(found[:3])}{' ...' if len(found) > 3 else ''}" if found else "It is empty"
        raise CorpusError(
            f"The folder {root} has no {metadata}. {what}. Give the folder that holds {metadata} and wavs/, "
            f"or name the file: load_ljspeech(folder, metadata=...); in it, {_SHAPE}."
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 (byte {error.start}). Convert it, for example: iconv -f latin1 -t utf-8 {metadata}"
        ) from error
    rows = [(n, [column.strip() for column in line.split("|")]) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise CorpusError(f"{path} is empty. Write a line for each clip; {_SHAPE}.")
    return rows


def _refuse(where: Path, bad: list[str], problem: str, remedy: str) -> None:
    if bad:
        lines = "1 line has" if len(bad) == 1 else f"{len(bad)} lines have"
        shown = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
        raise CorpusError(f"{where}: {lines} {problem} ({shown}). What to do: {remedy}.")


def _text(row: list[str]) -> str:
    return row[2] if len(row) > 2 else row[1]


def _is_usable(name: str) -> bool:
    path = PurePath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def _repeated(rows: list[tuple[int, list[str]]]) -> list[str]:
    first: dict[str, int] = {}
    # setdefault gives the line where the id stood first
    return [f"line {n}: {row[0]}, first on line {first[row[0]]}" for n, row in rows if first.setdefault(row[0], n) != n]


def _find_audio(root: Path, name: str) -> Path | None:
    # Concatenated, since with_suffix would cut an id such as "talk.1"; some corpora write the suffix into the id.
    names = [name] if name.endswith(AUDIO_SUFFIXES) else []
    names += [name + suffix for suffix in AUDIO_SUFFIXES]
    return next((path for path in (root / "wavs" / n for n in names) if path.is_file()), None)
