"""`align-kit compare`: runs that differ in one factor, and what that factor did, with intervals."""
