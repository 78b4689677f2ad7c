"""From a converted model to the files that other tools run, and what proves them equal to it."""
