"""How one run is trained: from its plan and its base to its finished directory."""
