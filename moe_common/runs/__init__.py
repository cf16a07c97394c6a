"""What a command and its run need: options, checkpoints, whole files, downloads."""
