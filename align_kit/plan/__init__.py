"""What a run will take before it starts: memory, traffic, time and money, on each rank and in all."""
