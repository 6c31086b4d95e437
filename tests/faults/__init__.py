"""Faults for real, from a process of its own: ranks killed in mid-backward and mid-save, bytes flipped, full disks."""
