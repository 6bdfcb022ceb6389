"""What a result was made by: command, versions, hardware and hashes, for files and experiment trackers."""
