"""Corpora in other languages, which chose nothing of the brain: words at random, spoken by espeak-ng.

    python benchmarks/languages.py OUT [--languages de,ru,es,zh] [--clips 600]
    python benchmarks/run.py align --data OUT/de --arms default,brain

One folder per language, LJSpeech layout, one voice, clips of 1 to 4 seconds. Some sentences have a pause inside. Needs
the extra `bench`; the same versions of Faker and espeakng_loader give the same corpus.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tts_brain_coqui.espeak_corpus import write_clips

# espeak-ng's voice and Faker's words.
LANGUAGES = {
    "de": ("de", "de_DE"),
    "ru": ("ru", "ru_RU"),
    "es": ("es", "es_ES"),
    "zh": ("cmn", "zh_CN"),
}
MIN_S, MAX_S = 1.0, 4.0
_PAUSES = 0.3


def texts(locale: str, seed: int = 0) -> Iterator[str]:
    """For ever: sentences of 2 to 9 words, a comma in some."""
    try:
        from faker import Faker
    except ImportError as error:
        raise ImportError('the words need Faker. Run: pip install "tts-brain[bench]"') from error
    words, generator = Faker(locale), np.random.default_rng(seed)
    words.seed_instance(seed)
    while True:
        some = words.words(nb=int(generator.integers(2, 10)))
        if len(some) > 3 and generator.random() < _PAUSES:
            some[len(some) // 2 - 1] += ","
        yield " ".join(some).capitalize() + "."


def make(folder: Path, language: str, clips: int) -> None:
    """Write a corpus; its folder stands under its name only when it is whole.

    Raises:
        FileExistsError: there is something of that name.
        ImportError: Faker or espeakng_loader is not there.
        RuntimeError: espeak-ng fails.
    """
    voice, locale = LANGUAGES[language]
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; delete it, or give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        write_clips(new, texts(locale), clips, name=language, voice=voice, min_s=MIN_S, max_s=MAX_S)
        new.rename(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder per language is made in it")
    parser.add_argument("--languages", default="de,ru,es,zh", help=f"of {', '.join(LANGUAGES)}")
    parser.add_argument("--clips", type=int, default=600)
    args = parser.parse_args()
    wanted = args.languages.split(",")
    unknown = [name for name in wanted if name not in LANGUAGES]
    if unknown or args.clips < 1:
        parser.error(
            f"--languages {args.languages} --clips {args.clips}: of {', '.join(LANGUAGES)}, and 1 clip or more"
        )
    for language in wanted:
        try:
            make(args.out / language, language, args.clips)
        except (FileExistsError, ImportError, RuntimeError) as error:
            print(f"languages.py: {error}", file=sys.stderr)
            return 2
        print(f"{args.out / language}: {args.clips} clips")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
