"""What a command and its run need: options, training, checkpoints, whole files, downloads."""
