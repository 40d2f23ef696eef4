"""What was learned: the spectra of ΔW, what theory expects, what is asked of a finished ΔW."""
