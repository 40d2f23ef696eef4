"""What was learned: spectra of ΔW, closed forms of theory, and the analysis of a trained ΔW.

On tensors of one's own, `spectra.spectra_of_sites` gives the `Spectrum` of each site, from factors
(A, B, scale) or from a dense ΔW:

    from lora_lab.analysis.spectra import spectra_of_sites

    spectra_of_sites({"q": (A, B, 2.0), "v": W - W0})["q"].stable_rank
"""
