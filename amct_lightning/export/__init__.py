"""From a trained network to the files that Ascend's compiler takes."""
