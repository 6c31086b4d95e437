"""`align-kit show`: what a run trains on, row by row: decoded, with what is masked and what is trained."""
