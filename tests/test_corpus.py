"""Folders in LJSpeech layout: what is read, and what is said about each thing that can be wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from tts_brain.corpus import CorpusError, load_ljspeech
from tts_brain_coqui.corpus import ljspeech_any, register

KATHLEEN = Path(__file__).resolve().parents[2] / "shared" / "data" / "kathleen-en-us"


def make_folder(folder: Path, metadata: str | bytes | None, *audio: str) -> Path:
    (folder / "wavs").mkdir(parents=True)
    for name in audio:
        path = folder / "wavs" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    if metadata is not None:
        raw = metadata if isinstance(metadata, bytes) else metadata.encode()
        (folder / "metadata.csv").write_bytes(raw)
    return folder


def test_two_and_three_columns_wav_and_flac(tmp_path: Path) -> None:
    text = "a|Mr. X|mister x\r\n\nb.1|only two\nc.wav|with suffix\nsub/d|below|below\n"
    folder = make_folder(tmp_path / "voice", "\ufeff" + text, "a.wav", "a.flac", "b.1.flac", "c.wav", "sub/d.flac")
    items = load_ljspeech(folder)
    assert [item["text"] for item in items] == ["mister x", "only two", "with suffix", "below"]
    names = [Path(item["audio_file"]).relative_to(folder / "wavs").as_posix() for item in items]
    assert names == ["a.wav", "b.1.flac", "c.wav", "sub/d.flac"]
    assert {(item["speaker_name"], item["root_path"]) for item in items} == {("voice", str(folder))}
    assert load_ljspeech(str(folder)) == items


def test_another_metadata_name(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "voice", None, "a.wav")
    (folder / "eval.txt").write_text("a|yes|yes")
    assert len(load_ljspeech(folder, "eval.txt")) == 1
    assert len(ljspeech_any(str(folder), "eval.txt", ignored_speakers=None)) == 1


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ("", r"metadata\.csv is empty.*id\|text"),
        (" \n\n", r"metadata\.csv is empty"),
        ("a|one\n\nb\n", r"1 line has too few columns \(line 3: 'b'\).*id\|text\|normalised text"),
        ("a|one|one\nb|two|\n", r"1 line has an empty text \(line 2: b\).*delete"),
        ("a| \n", r"an empty text \(line 1: a\)"),
        ("a|one\nb|two\na|three\n", r"an id used before \(line 3: a, first on line 1\).*delete or rename"),
        ("|one\n", r"an id that is no file name \(line 1: ''\)"),
        ("../wavs/a|one\n", r"an id that is no file name .*below wavs/"),
        ("/a|one\n", r"an id that is no file name"),
        (b"a|caf\xe9\n", r"not UTF-8 \(byte 5\).*iconv"),
        ("a|one\nx|two\n", r"1 line has no audio file \(line 2: x\).*\.wav or \.flac.*fix or delete"),
    ],
)
def test_each_bad_metadata_is_explained(tmp_path: Path, metadata: str | bytes, says: str) -> None:
    with pytest.raises(CorpusError, match=f"(?s){says}"):
        load_ljspeech(make_folder(tmp_path / "c", metadata, "a.wav", "b.flac"))


def test_all_missing_audio_is_counted_and_three_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "c", "".join(f"clip{n}|text\n" for n in range(9)), "clip4.flac")
    with pytest.raises(CorpusError, match=r"8 lines have no audio file \(line 1: clip0; .*clip1; .*clip2; \.\.\.\)"):
        load_ljspeech(folder)


def test_missing_folder_file_instead_of_folder_empty_folder_no_metadata(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"nowhere does not exist\. Give the folder that holds metadata\.csv"):
        load_ljspeech(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"has no metadata\.csv\. It is empty"):
        load_ljspeech(tmp_path)
    (tmp_path / "LJSpeech-1.1").mkdir()
    with pytest.raises(CorpusError, match=r"has no metadata\.csv\. It holds LJSpeech-1\.1\. .*metadata="):
        load_ljspeech(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match=r"file is a file\. Give the folder"):
        load_ljspeech(tmp_path / "file")


def test_importing_the_module_does_not_import_coqui() -> None:
    code = "import sys, tts_brain_coqui.corpus; sys.exit('TTS' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_coqui_takes_the_formatter_by_name_and_as_a_function(tmp_path: Path) -> None:
    pytest.importorskip("TTS", reason='needs coqui-tts: pip install "tts-brain[coqui]"')
    from TTS.tts.configs.shared_configs import BaseDatasetConfig, BaseTTSConfig
    from TTS.tts.datasets import load_tts_samples

    names = [f"clip{n}" for n in range(6)]
    folder = make_folder(tmp_path / "c", "".join(f"{n}|text {n}\n" for n in names), *(f"{n}.flac" for n in names))
    register()
    register()
    dataset = BaseDatasetConfig(formatter="ljspeech_any", dataset_name="own", path=str(folder))
    config = BaseTTSConfig(datasets=[dataset])
    for formatter in (None, ljspeech_any):
        train, evaluation = load_tts_samples(config, formatter=formatter, eval_split_size=2)
        assert (len(train), len(evaluation)) == (4, 2)
        assert {item["audio_unique_name"] for item in train + evaluation} == {f"own#wavs/{name}" for name in names}


@pytest.mark.shared_data
def test_a_real_corpus_in_flac() -> None:
    if not KATHLEEN.is_dir():
        pytest.skip(f"no speech corpus at {KATHLEEN}")
    items = load_ljspeech(KATHLEEN)
    assert len(items) == len({item["text"] for item in items}) == 1132
    assert items[0]["text"] == "Author of the danger trail, Philip Steels, etc."
    assert {Path(item["audio_file"]).suffix for item in items} == {".flac"}
    soundfile = pytest.importorskip("soundfile", reason='needs soundfile: pip install "tts-brain[demo]"')
    assert soundfile.info(items[-1]["audio_file"]).samplerate == 22050
