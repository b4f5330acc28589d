"""In-step checks, one file per kind of operation, and the hash of state at rest."""
