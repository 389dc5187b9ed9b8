"""Made-up questions, and scored answers whose chance of being right is known; files of them."""

import json
import math
import random

from gnuq_serve import Uncertainty


def scored_rows(count, *, seed=0, base=0.5, slope=2.0, groups=None):
    """``count`` rows as a log has them: P(right) is a logistic function of the mean token log-probability.

    ``base`` moves it up or down (in logits), ``slope`` says how much the signal tells; the gradient norm tells
    nothing.
    """
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        quality = rng.gauss(0, 1)
        tokens = rng.randint(3, 12)
        mean = -0.6 * math.exp(-0.5 * quality)
        score = Uncertainty.scored(
            token_log_probabilities=[mean] * tokens,
            token_entropies=[abs(rng.gauss(1, 0.3)) for _ in range(tokens)],
            grad_norm_sq=math.exp(rng.gauss(10, 1)),
            fingerprint="f1f1",
        )
        chance = 1 / (1 + math.exp(-(base + slope * quality)))
        rows.append(
            {
                "question": f"Question {index}?",
                "answer": f"Answer {index}",
                "answers": [f"Reference {index}"],
                "correct": rng.random() < chance,
                "prompt_tokens": 20 + index % 7,
                "finish_reason": "stop",
                "uncertainty": score.to_dict(),
            }
            | ({} if groups is None else {"conversation": f"c{index % groups}"})
        )
    return rows


def questions(count):
    """Questions with their answers, as a file of them has them."""
    return [{"question": f"What is {n} + 1?", "answers": [str(n + 1)]} for n in range(count)]


def write(path, rows):
    """The rows as JSON Lines; the path as a text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
