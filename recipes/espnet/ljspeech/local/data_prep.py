"""Stage 1: a folder in LJSpeech layout as Kaldi-style data folders, without Kaldi.

    python local/data_prep.py --data path/to/LJSpeech-1.1 --out data --fs 22050 --dev-utts 50 --eval-utts 50

Writes wav.scp, text, utt2spk, spk2utt and utt2num_samples into OUT/train, OUT/dev and OUT/eval; nothing is written
unless everything fits. Audio is not copied: wav.scp names the wav or flac files where they lie.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

try:
    import soundfile

    from tts_brain.corpus import CorpusError, load_ljspeech
except ImportError as error:
    # Mostly another python than the one the packages were put into.
    sys.exit(f"{sys.executable}: {error}. Install tts-brain and soundfile for this python, or name another: --python.")

Clip = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with metadata.csv and wavs/")
    parser.add_argument("--out", type=Path, required=True, help="where train/, dev/ and eval/ are made")
    parser.add_argument("--fs", type=int, default=22050, help="sampling rate in Hz that every clip must have")
    parser.add_argument("--dev-utts", type=int, default=50, help="clips held out to watch the training")
    parser.add_argument("--eval-utts", type=int, default=50, help="clips held out to be decoded at the end")
    args = parser.parse_args()
    try:
        clips = load_ljspeech(args.data)
    except CorpusError as error:
        sys.exit(f"--data: {error}")
    samples, problems = check(clips, args.fs)
    problems += check_split(len(clips), args.dev_utts, args.eval_utts)
    if problems:
        sys.exit("\n".join(f"--data {args.data}: {problem}" for problem in problems))
    for name, part in split(clips, args.dev_utts, args.eval_utts).items():
        write(args.out / name, part, samples)
        seconds = sum(samples[clip["id"]] for clip in part) / args.fs
        print(f"{args.out / name}: {len(part)} clips, {seconds / 60:.1f} minutes")


def check(clips: list[Clip], fs: int) -> tuple[dict[str, int], list[str]]:
    """Samples by clip id, and every problem of the ids and audio headers."""
    samples: dict[str, int] = {}
    unreadable, empty, wide, rates = [], [], [], {}
    for clip in clips:
        name = Path(clip["audio_file"]).name
        try:
            info = soundfile.info(clip["audio_file"])
        except (RuntimeError, OSError) as error:  # soundfile's own errors are RuntimeErrors
            unreadable.append(f"{name}: {error}")
            continue
        samples[clip["id"]] = info.frames
        if info.frames == 0:
            empty.append(name)
        if info.channels != 1:
            wide.append(f"{name}: {info.channels} channels")
        if info.samplerate != fs:
            rates[name] = info.samplerate
    others = set(rates.values())
    # One other rate throughout is a wrong --fs; several are files to convert.
    remedy = (
        f"run.sh ... --fs {others.pop()}" if len(others) == 1 and len(rates) == len(clips) else _convert(f"-r {fs}")
    )
    found = [
        _problem([clip["id"] for clip in clips if re.search(r"[\s/]", clip["id"])],
                 "an id with a space or slash", "rename the clip and its line in metadata.csv; "
                 "a space ends the id in Kaldi-style files, and ESPnet names its output after the id"),
        _problem(unreadable, "audio that cannot be read", "replace the files or delete their lines in metadata.csv"),
        _problem(empty, "no samples", "replace the files or delete their lines in metadata.csv"),
        _problem(wide, "more than one channel", _convert("-c 1")),
        _problem([f"{name}: {rate} Hz" for name, rate in rates.items()], f"a sampling rate other than {fs} Hz", remedy),
    ]  # fmt: skip
    return samples, [problem for problem in found if problem]


def check_split(clips: int, dev: int, evaluation: int) -> list[str]:
    if clips < 3:
        return [f"{clips} clips are too few; at least 3 are needed, one each to train on, to watch and to decode."]
    if dev >= 1 and evaluation >= 1 and dev + evaluation < clips:
        return []
    share = max(1, clips // 20)
    return [
        f"--dev_utts {dev} and --eval_utts {evaluation} do not fit {clips} clips; each must be at least 1, and "
        f"together at most {clips - 1}, for example: --dev_utts {share} --eval_utts {share}."
    ]


def _problem(bad: list[str], what: str, remedy: str) -> str:
    shown = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
    have = "1 clip has" if len(bad) == 1 else f"{len(bad)} clips have"
    return f"{have} {what} ({shown}). What to do: {remedy}." if bad else ""


def _convert(option: str) -> str:
    return f"convert them, for example: sox IN.wav {option} OUT.wav"


def split(clips: list[Clip], dev: int, evaluation: int) -> dict[str, list[Clip]]:
    """Held out are the clips whose ids have the lowest SHA-256.

    So the order of the lines plays no part, another --dev_utts leaves eval as it is, and a corpus that grows keeps
    nearly all its held-out clips; every k-th clip would not.
    """
    ranked = sorted(clips, key=lambda clip: hashlib.sha256(clip["id"].encode()).digest())
    return {
        "eval": ranked[:evaluation],
        "dev": ranked[evaluation : evaluation + dev],
        "train": ranked[evaluation + dev :],
    }


def write(folder: Path, clips: list[Clip], samples: dict[str, int]) -> None:
    """The five files, sorted by id in byte order as Kaldi-style readers expect."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = sorted(clips, key=lambda clip: clip["id"].encode())
    speaker = re.sub(r"\s+", "_", clips[0]["speaker_name"])
    files = {
        "wav.scp": [f"{clip['id']} {Path(clip['audio_file']).resolve()}" for clip in clips],
        "text": [f"{clip['id']} {' '.join(clip['text'].split())}" for clip in clips],
        "utt2spk": [f"{clip['id']} {speaker}" for clip in clips],
        "spk2utt": [f"{speaker} {' '.join(clip['id'] for clip in clips)}"],
        "utt2num_samples": [f"{clip['id']} {samples[clip['id']]}" for clip in clips],
    }
    for name, lines in files.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
