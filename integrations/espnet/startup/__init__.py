"""Not imported: this folder is put on PYTHONPATH by ``tts-brain run`` for its ``sitecustomize.py``."""
