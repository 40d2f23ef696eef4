"""How runs are trained together: many LoRA runs over one base, each as if it were alone."""
