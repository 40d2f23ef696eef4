"""What was learned: spectra of ΔW, closed forms of theory, and the analysis of a trained ΔW."""
