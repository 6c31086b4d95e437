"""Data from a model itself: its completions, judged, and those worth training on kept (`align-kit sample`)."""
