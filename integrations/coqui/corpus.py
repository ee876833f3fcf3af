"""The core's corpus reader as a Coqui formatter.

Importing this module does not import TTS.
"""

from tts_brain.corpus import DEFAULT_METADATA, load_ljspeech


def ljspeech_any(root_path: str, meta_file: str, **kwargs: object) -> list[dict[str, str]]:
    """`load_ljspeech` as a Coqui formatter: `load_tts_samples(config, formatter=ljspeech_any)`.

    An empty `meta_file` (Coqui's default) means metadata.csv; further arguments of Coqui's, such as
    `ignored_speakers`, have no meaning for one speaker and are ignored.
    """
    return load_ljspeech(root_path, meta_file or DEFAULT_METADATA)


def register() -> None:
    """Make `formatter="ljspeech_any"` known to Coqui's dataset configs; may be called any number of times.

    Raises ValueError if another formatter holds the name.
    """
    from TTS.tts.datasets import formatters

    # Coqui has no public look-up, and register_formatter refuses a name it knows already.
    if formatters._FORMATTER_REGISTRY.get("ljspeech_any") is not ljspeech_any:
        formatters.register_formatter("ljspeech_any", ljspeech_any)
