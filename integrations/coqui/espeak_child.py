"""Run as a script by `espeak_corpus`: reads one sentence per line, answers each with its speech.

Answer: the number of bytes (4 bytes, little-endian), then 22050 Hz 16-bit mono PCM. Arguments: library, data folder,
name of the voice.

A process of its own, because espeak-ng keeps state between sentences that even `espeak_Terminate` leaves behind: the
same sentence gives other samples the second time. A new process always starts from the same state. It also keeps
the GPL library and any crash of it out of the training process. Only the standard library is imported here.
"""

import ctypes
import struct
import sys
from collections.abc import Callable

SAMPLE_RATE_HZ = 22050
WORDS_PER_MINUTE = 165

# Values from espeak-ng's speak_lib.h.
AUDIO_OUTPUT_SYNCHRONOUS = 2
INITIALIZE_DONT_EXIT = 0x8000  # without it, missing data ends the process with no message of ours
PARAMETER_RATE = 1
POSITION_CHARACTER = 1
CHARS_UTF8 = 1


def open_voice(library: str, data: str, voice: str) -> Callable[[str], bytes]:
    """Load espeak-ng and give a function from one sentence to its PCM bytes.

    Raises RuntimeError if espeak-ng refuses the data, the voice or (in the function) the sentence.
    """
    espeak = ctypes.CDLL(library)
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    pcm = bytearray()

    def receive(samples: object, count: int, events: object) -> int:
        if samples and count > 0:  # a null pointer marks the end of the sentence
            pcm.extend(ctypes.string_at(samples, 2 * count))  # type: ignore[arg-type]
        return 0

    callback = prototype(receive)
    rate_hz = espeak.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data.encode(), INITIALIZE_DONT_EXIT)
    if rate_hz != SAMPLE_RATE_HZ:
        raise RuntimeError(f"espeak_Initialize gave {rate_hz}, expected {SAMPLE_RATE_HZ} Hz, with the data in {data}")
    espeak.espeak_SetSynthCallback(callback)
    if espeak.espeak_SetVoiceByName(voice.encode()) != 0:
        raise RuntimeError(f"espeak-ng has no voice {voice!r} in {data}")
    espeak.espeak_SetParameter(PARAMETER_RATE, WORDS_PER_MINUTE, 0)

    # The default keeps the callback alive as long as the function: espeak-ng holds a bare pointer to it.
    def speak(sentence: str, _keep_alive: object = callback) -> bytes:
        pcm.clear()
        text = sentence.encode() + b"\0"
        status = espeak.espeak_Synth(text, len(text), 0, POSITION_CHARACTER, 0, CHARS_UTF8, None, None)
        if status != 0:
            raise RuntimeError(f"espeak_Synth failed with {status} on {sentence!r}")
        return bytes(pcm)

    return speak


def main(library: str, data: str, voice: str) -> None:
    speak = open_voice(library, data, voice)
    for line in sys.stdin.buffer:
        pcm = speak(line.decode().strip())
        sys.stdout.buffer.write(struct.pack("<I", len(pcm)) + pcm)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
