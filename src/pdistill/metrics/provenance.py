"""Which scores may stand side by side: those whose provenances agree in what matters."""

# Parts of a score's provenance that must be equal for two scores to be compared.
MATTERS = ("extractor", "extractor_fingerprint", "reference_fingerprint", "num_samples", "clip", "precision")


def comparable(ours: dict[str, object], theirs: dict[str, object]) -> list[str]:
    """What makes two scores no comparison, by their provenances, as "key theirs, there ours"; empty if nothing."""
    return [f"{k} {theirs.get(k)}, there {ours.get(k)}" for k in MATTERS if ours.get(k) != theirs.get(k)]
