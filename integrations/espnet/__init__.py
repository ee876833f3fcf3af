"""tts-brain for ESPnet2: ``brain: true`` in the training yaml, and one of two doors.

``python -m tts_brain_espnet.tts_train …`` in place of ``python -m espnet2.bin.tts_train``, or
``tts-brain run -- ./run.sh …`` around a recipe. Importing this package imports nothing of ESPnet.
"""
