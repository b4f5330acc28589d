"""Guards a step: shows its operators to `checks`, keeps what they read, and hashes the state at rest."""
