"""The state-space recurrence of Mamba-2, bare (ssd_scan) and with all that surrounds it (mamba2_mixer)."""
