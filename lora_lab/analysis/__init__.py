"""What was learned: spectra of ΔW, closed forms of theory, and the analysis of a trained ΔW.

`spectra.spectra_of_sites` gives the `Spectrum` of any ΔW by site, from factors (A, B, scale) or a
dense tensor:

    from lora_lab.analysis.spectra import (spectra_of_sites)

    spectra_of_sites({"q": (A, B, 2.0), "v": W - W0})["q"].stable_rank
"""
