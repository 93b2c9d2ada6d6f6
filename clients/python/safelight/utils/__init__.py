"""Where scripts written for DiffSynth-Engine import things from; their home is elsewhere in the package."""
