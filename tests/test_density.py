"""The script does not grow dense: the numbers of density.py stay within limits. Only ever lower these."""

import density

LINES = 2598
LONG_LINES = 0.052  # share over 100 characters
NAMES = 4.3
LONGEST_FUNCTION = 40
LOSS_BEGINS = 85
HEART_ENDS = 398


def test_the_script_is_no_denser_than_it_was():
    found = [*density.measure(density.SCRIPT.read_text("utf-8")).items()]
    limits = LINES, LONG_LINES, NAMES, LONGEST_FUNCTION, LOSS_BEGINS, HEART_ENDS
    assert len(found) == len(limits)
    over = [(what, value, limit) for (what, value), limit in zip(found, limits) if value > limit]
    assert not over


def test_what_is_measured_is_what_it_is_called():
    text = '"""Two\nlines."""\nimport os  # names here do not count\n\ndef contrastive_loss(a, b):\n    return a or b\n'
    text += "\n\n# ---- 3. What follows\nx = " + " + ".join(["1"] * 40) + "\n"
    lines, share, names, longest, loss, heart = density.measure(text).values()
    assert (lines, longest, loss, heart) == (10, 2, 5, 8)
    assert share == 1 / 10 and names == (1 + 3 + 2 + 1) / 4
