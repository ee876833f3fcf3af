"""Tacotron2 on any corpus in LJSpeech layout, with the brain on by default.

    python recipes/coqui/ljspeech/train_tacotron2.py --data path/to/LJSpeech-1.1 --out runs
    python recipes/coqui/ljspeech/train_tacotron2.py --data ... --no-brain          # plain Coqui
    python recipes/coqui/ljspeech/train_tacotron2.py --data ... --coqpit.batch_size 64 --coqpit.brain.mode observe

Audio may be wav or flac. Every other Coqui setting can be given as ``--coqpit.NAME VALUE``.
"""

import argparse
import sys
from pathlib import Path

from trainer import Trainer, TrainerArgs
from TTS.config.shared_configs import BaseAudioConfig, BaseDatasetConfig
from TTS.tts.datasets import load_tts_samples
from TTS.tts.models.tacotron2 import Tacotron2

from tts_brain.corpus import CorpusError, load_ljspeech
from tts_brain_coqui import Tacotron2Config
from tts_brain_coqui.corpus import register


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with metadata.csv and wavs/")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where run folders are made")
    parser.add_argument("--no-brain", action="store_true", help="plain Coqui, nothing steered")
    parser.add_argument("--continue_path", type=Path, help="folder of a run to go on with")
    args, host_arguments = parser.parse_known_args()
    try:
        clips = load_ljspeech(args.data)  # all faults of the corpus at once, before anything is trained
    except CorpusError as error:
        sys.exit(f"--data: {error}")
    if args.continue_path:
        host_arguments += ["--continue_path", str(args.continue_path)]
    if args.no_brain:  # over the saved config of a run that is continued, too
        host_arguments += ["--coqpit.brain.enabled", "false"]
    sys.argv[1:] = host_arguments  # the Trainer reads --coqpit.* and --continue_path from here
    register()

    config = Tacotron2Config(
        run_name="tacotron2",
        output_path=str(args.out),
        datasets=[BaseDatasetConfig(formatter="ljspeech_any", meta_file_train="metadata.csv", path=str(args.data))],
        audio=BaseAudioConfig(sample_rate=22050, do_trim_silence=True, trim_db=60.0, mel_fmin=0.0, mel_fmax=8000),
        text_cleaner="english_cleaners",
        batch_size=32,
        shuffle=True,  # else the clips come in the order of their length, and the losses follow it
        eval_batch_size=16,
        r=2,
        lr=1e-3,
        lr_scheduler=None,
        epochs=1000,
        print_step=25,
        save_step=1000,
        test_delay_epochs=100,  # before an alignment each test sentence runs to the decoder's limit: minutes
        eval_split_size=max(2, min(64, len(clips) // 10)),
        min_audio_len=4410,
        brain=not args.no_brain,  # <- the flag
    )
    if args.continue_path:
        config.load_json(str(args.continue_path / "config.json"))
    config.parse_known_args(host_arguments, relaxed_parser=True)  # before the model: r and the like shape it
    train_samples, eval_samples = load_tts_samples(config, eval_split_size=config.eval_split_size)
    model = Tacotron2(config)
    trainer = Trainer(
        TrainerArgs(), config, str(args.out), model=model, train_samples=train_samples, eval_samples=eval_samples
    )
    trainer.fit()


if __name__ == "__main__":
    main()
