"""The ESPnet recipe's own parts: yaml pairs, data preparation, option parsing. ESPnet itself is not started."""

import shutil
import subprocess
import sys
import wave
from itertools import chain
from pathlib import Path

import pytest
import yaml

RECIPE = Path(__file__).parents[1] / "recipes" / "espnet" / "ljspeech"
RUN = RECIPE / "run.sh"
BRAIN_KEYS = {"brain", "brain_conf"}

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def clip(path: Path, rate: int = 8000, channels: int = 1, frames: int = 1600) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(b"\0\0" * frames * channels)


def corpus(folder: Path, names: list[str]) -> Path:
    for name in names:
        clip(folder / "wavs" / f"{name}.wav")
    (folder / "metadata.csv").write_text("".join(f"{name}|Text of  {name}.\n" for name in names), encoding="utf-8")
    return folder


def prepare(data: Path, out: Path, dev: int = 2, evaluation: int = 1, fs: int = 8000) -> str:
    """What data_prep.py says; it must be refused if and only if something stands on stderr."""
    pytest.importorskip("soundfile")
    done = subprocess.run(
        [
            *(sys.executable, RECIPE / "local" / "data_prep.py", "--data", data, "--out", out, "--fs", str(fs)),
            *("--dev-utts", str(dev), "--eval-utts", str(evaluation)),
        ],
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (done.stderr == ""), done.stderr
    return done.stdout + done.stderr


def files(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): path.read_text(encoding="utf-8") for path in out.rglob("*") if path.is_file()}


def ids(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines()]


@pytest.mark.parametrize("name", ["train_tacotron2", "train_tacotron2_small"])
def test_the_brain_is_a_key_of_the_yaml_and_nothing_else(name):
    plain, brain = (
        yaml.safe_load((RECIPE / "conf" / f"{stem}.yaml").read_text(encoding="utf-8"))
        for stem in (name, f"{name}_brain")
    )
    assert brain["brain"] is True
    assert not BRAIN_KEYS & plain.keys()
    assert {key: value for key, value in brain.items() if key not in BRAIN_KEYS} == plain
    assert list(plain) == [key for key in brain if key not in BRAIN_KEYS]


def test_data_prep_writes_kaldi_style_folders(tmp_path):
    names = [f"c{i:02}" for i in (3, 1, 2, 10, 4, 7)]
    data = corpus(tmp_path / "my voice", names)
    prepare(data, tmp_path / "out")
    written = files(tmp_path / "out")
    assert set(written) == {
        f"{part}/{name}"
        for part in ("train", "dev", "eval")
        for name in ("wav.scp", "text", "utt2spk", "spk2utt", "utt2num_samples")
    }
    parts = {part: ids(written[f"{part}/text"]) for part in ("train", "dev", "eval")}
    assert {part: len(found) for part, found in parts.items()} == {"train": 3, "dev": 2, "eval": 1}
    assert sorted(chain(*parts.values())) == sorted(names)
    for part, found in parts.items():
        assert found == sorted(found)
        for name in ("wav.scp", "utt2spk", "utt2num_samples"):
            assert ids(written[f"{part}/{name}"]) == found
        assert written[f"{part}/spk2utt"].split() == ["my_voice", *found]
        assert written[f"{part}/text"].splitlines() == [f"{name} Text of {name}." for name in found]
        for line in written[f"{part}/wav.scp"].splitlines():
            name, path = line.split(maxsplit=1)
            assert Path(path).is_absolute()
            assert Path(path) == (data / "wavs" / f"{name}.wav").resolve()
        assert all(line.endswith(" 1600") for line in written[f"{part}/utt2num_samples"].splitlines())


def test_the_split_does_not_depend_on_the_order_of_lines_nor_eval_on_the_size_of_dev(tmp_path):
    names = [f"c{i}" for i in range(12)]
    prepare(corpus(tmp_path / "corpus", names), tmp_path / "a")
    prepare(corpus(tmp_path / "corpus", names[::-1]), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    prepare(tmp_path / "corpus", tmp_path / "c", dev=5)
    assert files(tmp_path / "a")["eval/text"] == files(tmp_path / "c")["eval/text"]


def test_one_run_says_every_problem_and_writes_nothing(tmp_path):
    data = corpus(tmp_path / "corpus", ["a", "b", "two words", "stereo", "empty", "broken"])
    clip(data / "wavs" / "b.wav", rate=16000)
    clip(data / "wavs" / "stereo.wav", channels=2)
    clip(data / "wavs" / "empty.wav", frames=0)
    (data / "wavs" / "broken.wav").write_bytes(b"no audio")
    said = prepare(data, tmp_path / "out", dev=9)
    for part in (
        "(two words)",
        "stereo.wav: 2 channels",
        "empty.wav",
        "broken.wav",
        "b.wav: 16000 Hz",
        "--dev_utts 9",
    ):
        assert part in said
    assert said.count("\n") == 6
    assert not (tmp_path / "out").exists()


def test_a_wrong_rate_gets_the_line_to_write(tmp_path):
    said = prepare(corpus(tmp_path / "corpus", ["a", "b", "c", "d"]), tmp_path / "out", fs=22050)
    assert "4 clips have a sampling rate other than 22050 Hz (a.wav: 8000 Hz; " in said
    assert "--fs 8000" in said


def test_two_clips_are_too_few(tmp_path):
    assert "at least 3 are needed" in prepare(corpus(tmp_path / "corpus", ["a", "b"]), tmp_path / "out", dev=1)


def test_a_folder_without_metadata_is_refused(tmp_path):
    assert "has no metadata.csv" in prepare(tmp_path, tmp_path / "out")


def run(*arguments: str, cwd: Path = RECIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", RUN, *arguments], capture_output=True, text=True, cwd=cwd)


@needs_bash
def test_run_sh_is_valid_bash_and_has_help(tmp_path):
    assert subprocess.run(["bash", "-n", RUN], capture_output=True).stderr == b""
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--train_config" in done.stdout
    assert "set -e" not in done.stdout


@needs_bash
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nothing", "1"], "unknown option --nothing. Known are:\n--cleaner"),
        (["--train_args"], "--train_args needs a value"),
        (["--stage=1"], "write --name value"),
        (["1"], "'1' is no option"),
        (["--stage", "one"], "--stage is 'one', but must be a whole number"),
        (["--skip_train", "yes"], "must be true or false"),
        (["--stop_stage", "1"], "stage 1 needs the corpus: --data DIR"),
        (["--stage", "2", "--datadir", "/no/such"], "/no/such/train/wav.scp is missing or empty: run stage 1 first"),
    ],
)
def test_run_sh_refuses_with_what_to_write(arguments, said):
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr


@needs_bash
def test_the_stages_without_espnet_run_from_any_folder_and_again(tmp_path):
    pytest.importorskip("soundfile")
    data = corpus(tmp_path / "corpus", [f"c{i}" for i in range(9)])
    clip(data / "wavs" / "c0.wav", frames=100)  # shorter than a tenth of a second: stage 4 leaves it out
    clip(data / "wavs" / "c1.wav", frames=8000 * 21)
    for again in range(2):
        done = run(
            *("--data", "corpus", "--fs", "8000", "--dev_utts", "3", "--eval-utts", "1", "--python", sys.executable),
            *("--datadir", f"{tmp_path}/data", "--dumpdir", f"{tmp_path}/dump", "--stop_stage", "4"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, (again, done.stderr)
    assert "Stage 3: passed over" in done.stdout
    raw = tmp_path / "dump" / "raw"
    kept = [ids((raw / part / "wav.scp").read_text()) for part in ("train", "dev", "eval")]
    org = [ids((folder / "wav.scp").read_text()) for folder in (raw / "org/train", raw / "org/dev", raw / "eval")]
    assert sorted(chain(*org)) == [f"c{i}" for i in range(9)]
    assert kept[:2] == [[name for name in part if name not in ("c0", "c1")] for part in org[:2]]
    assert kept[2] == org[2]  # what is decoded is not filtered
    assert (raw / "train" / "feats_type").read_text() == "raw\n"
    assert (raw / "train" / "spk2utt").read_text().split() == ["corpus", *kept[0]]
