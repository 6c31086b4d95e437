"""Pages from what runs left behind: one self-contained file of HTML, its plots as vectors, nothing fetched."""
