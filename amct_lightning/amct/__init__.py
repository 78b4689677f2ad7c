"""What concerns AMCT alone: restoring its results, its state_dict layout, its hooks in plain PyTorch."""
