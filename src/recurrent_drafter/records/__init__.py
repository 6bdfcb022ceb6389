"""What a result is made of: command, versions, hardware, hashes, trackers."""
