"""A calibration with one signal and a known threshold, without data."""

from gnuq_serve.calibration.artefact import Calibration, Data, LogisticScore, Seen
from gnuq_serve.calibration.guarantee import BandPoint, Promise


def promise(level, threshold):
    """The promise of one level; threshold None: it can't be kept."""
    return Promise(
        max_error=level,
        confidence=0.95,
        threshold=threshold,
        answered=80 if threshold is not None else 0,
        errors=2,
        share=0.4 if threshold is not None else 0.0,
        upper=level if threshold is not None else None,
        first_count=30,
        sentence="as the guarantee says it",
    )


def made_calibration(**changes):
    """``p_correct`` is 0.5 where the mean token log-probability is -1, and more where it is higher."""
    fields = {
        "name": "faq",
        "model": LogisticScore(("mean_log_probability",), (-1.0,), (0.5,), (1.25,), 0.0),
        "confidence": 0.95,
        "promises": (promise(0.1, 0.7), promise(0.05, None)),
        "band": (BandPoint(threshold=0.5, answered=100, errors=3, share=0.5, risk=0.03, upper=0.18),),
        "seen": Seen(),
        "fingerprint": {"mode": "exact", "span": "answer"},
        "data": Data(
            rows=400,
            fit_rows=200,
            held_out_rows=200,
            held_out_units=200,
            accuracy=0.6,
            auroc=0.7,
            ece=0.04,
            brier_skill=0.1,
        ),
        "reference_scores": (0.1, 0.5, 0.9),
    }
    return Calibration(**{**fields, **changes})


def saved(folder, name="faq", **changes):
    """The path of a saved one."""
    path = folder / f"{name}.json"
    made_calibration(name=name, **changes).save(path)
    return str(path)
